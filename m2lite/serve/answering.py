"""One answer under way, for whoever waits for it on the event loop. Knows no dialect and no HTTP."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from m2lite.dialogue.chat_request import ChatRequest
from m2lite.engine.answer import Token
from m2lite.engine.driver import News
from m2lite.engine.handle import Handle
from m2lite.engine.sequence import Prompt
from m2lite.serve import log
from m2lite.serve.errors import Refused
from m2lite.serve.events import AnswerEnd, AnswerEvent, Beat, Narration, WholeAnswer, WholeCall
from m2lite.serve.metrics import Metrics
from m2lite.serve.progress import LONG_S, ReadProgress
from m2lite.system.streams import note
from m2lite.text.tokenizer import Tokenizer
from m2lite.text.values import closed

How = Literal["stop", "tool_calls", "length", "cancelled", "failed"]


@dataclass(frozen=True, kw_only=True)
class AnswerRequest:
    """What is to be answered: messages, or the ids of `prompt`."""

    chat: ChatRequest
    prompt: Sequence[int] | None = None
    prompt_logprobs: int | None = None  # as in the engine's requests
    has_experts: bool = False  # which ones each token was drawn with
    rng_stream: int | None = None  # by default as in `Model.chat`


class Answering:
    """One answer under way. Read `events`, or wait for `whole`; leaving either early cancels it."""

    def __init__(
        self, asked: AnswerRequest, prompt: Sequence[int], tokenizer: Tokenizer, metrics: Metrics,
        conclude: Callable[[Answering, How], None],
    ) -> None:  # fmt: skip
        """`conclude` is called once, when nothing more is computed."""
        self.asked, self.prompt = asked, prompt
        self.id = secrets.token_hex(12)  # of the answer; each dialect puts its own prefix before it
        self.created = int(time.time())  # seconds since 1970
        self.log = log.current.get()
        self.tokenizer, self._metrics, self._conclude = tokenizer, metrics, conclude
        self._news, self._came = deque[News](), asyncio.Event()
        self._handle: Handle | None = None
        self._is_over = False
        self._ended_by: Exception | None = None
        self._calls: Sequence[WholeCall] = ()
        self._began, self._last = time.monotonic(), 0.0  # of its last tokens; 0: none came
        self._first_s: float | None = None  # until its first token
        self.progress, self._is_wait_told = ReadProgress(len(prompt), metrics.reading), False

    @property
    def seed(self) -> int:
        return self.asked.chat.sampling.seed

    @property
    def handle(self) -> Handle:
        assert self._handle is not None
        return self._handle

    def begin(self, handle: Handle) -> None:
        """On any thread."""
        self._handle = handle
        if self._is_over:
            handle.cancel()

    def give_up(self) -> None:
        """Nobody waits for it any more; it may be about to begin."""
        if self._handle is None:
            self._is_over = True
            self.progress.end()
            if self._handle is not None:  # it began just now, on another thread
                self._handle.cancel()
        self.cancel()

    def hear(self, news: News) -> None:
        """On the event loop: something happened."""
        self._news.append(news)
        self._came.set()
        self._follow_prompt(news)
        n_tokens = sum(isinstance(event, Token) for event in news.events)
        if n_tokens:
            now = time.monotonic()
            if self._last:
                self._metrics.between_tokens.add((now - self._last) / n_tokens, n_tokens)
            else:
                self._first_s = now - self._began
                self._metrics.first_token.add(self._first_s)
            self._last = now

    def _follow_prompt(self, news: News) -> None:
        """How far it is read; that it will take long is told once."""
        progress = self.progress
        for event in news.events:
            if isinstance(event, Token):
                progress.end()
            elif isinstance(event, Prompt) and not progress.is_over:
                computed_s = math.inf if self._handle is None else self._handle.completion.stats.prompt_s
                progress.saw(event.n_done, event.n_cached, computed_s)
        left = None if progress.is_over or self._is_wait_told else progress.seconds_left
        if left is not None and left >= LONG_S and self.log is not None:
            self._is_wait_told = True
            done = f"{progress.n_done:,} of {progress.n_total:,} tokens read ({progress.n_cached:,} cached)"
            note(f"{self.log.id} · {done} · about {left:.0f} s to go")

    def end(self, error: Exception) -> None:
        """It ends now, with this error for whoever waits."""
        if not self._is_over:
            self._ended_by = error
            self._came.set()

    async def events(self, beat_s: float | None = None) -> AsyncIterator[AnswerEvent]:
        """What happens, in order, up to AnswerEnd; Beat where nothing does for `beat_s`.

        Raises the request's own error, or what the server ended it with.
        """
        narration = Narration(self.tokenizer, self.handle)
        self._calls = narration.calls
        how: How = "cancelled"
        try:
            while True:
                taken = list(self._news)
                self._news.clear()
                for event in narration.tell([event for news in taken for event in news.events]):
                    if isinstance(event, AnswerEnd):
                        how = event.reason
                        self._finish(how)
                    yield event
                if how != "cancelled":
                    return
                if self._ended_by is not None or (taken and taken[-1].is_over):
                    how = "failed"
                    raise self._ended_by or taken[-1].error or Refused(503, "ended", "The answer was ended.")
                if not self._news:
                    self._came.clear()
                    try:
                        await asyncio.wait_for(self._came.wait(), beat_s)
                    except TimeoutError:
                        yield Beat()
        finally:
            self._finish(how)

    def message(self) -> dict[str, Any]:
        """What was said, as it comes back: with the ids of its calls."""
        message = self.handle.completion.reply.message()
        calls = [
            {"id": call.id, "function": {"name": call.name, "arguments": json.loads(closed(call.arguments))}}
            for call in self._calls
        ]
        return message | ({"tool_calls": calls} if calls else {})

    def cut_short(self, end: AnswerEnd) -> list[str]:
        """What is to be told of an answer that the context ended before `max_tokens` did."""
        most, n_tokens = self.asked.chat.max_tokens, len(end.completion.tokens)
        if end.reason != "length" or (most is not None and n_tokens >= most):
            return []
        asked_for = "" if most is None else f" of {most:,} that were asked for"
        return [f"The answer was cut off after {n_tokens:,} tokens{asked_for}: the context is full."]

    async def whole(self) -> WholeAnswer:
        found = WholeAnswer()
        async for event in self.events():
            found.add(event)
        return found

    def cancel(self) -> None:
        """Nobody waits any more, or it is whole. Done again, nothing happens."""
        self._finish("cancelled")

    def _finish(self, how: How) -> None:
        if not self._is_over:
            self._is_over = True
            self.progress.end()
            if self._handle is not None:
                self._handle.cancel()
                if self._first_s is not None:  # what was not computing was waiting
                    self._metrics.queue.add(max(0.0, self._first_s - self._handle.completion.stats.prompt_s))
            self._conclude(self, how)
