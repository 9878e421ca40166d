"""What all dialects share: the model, the requests under way and their bounds. Knows no dialect and no HTTP."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from m2lite.dialogue.chat_request import ChatRequest
from m2lite.dialogue.conversation import turn_stream
from m2lite.dialogue.encode import encode_kept
from m2lite.engine.driver import Driver, News
from m2lite.engine.handle import Handle
from m2lite.engine.request import Request
from m2lite.sampling.draw import Sampling, new_seed
from m2lite.serve.errors import Refused
from m2lite.serve.events import AnswerEnd, AnswerEvent, Beat, Narration, WholeAnswer

if TYPE_CHECKING:
    from m2lite.api import Model

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a server is run."""

    name: str = ""  # of the model, for clients; by default the file's
    parallel: int = 4  # answers at once
    queue: int = 64  # requests that wait beyond those
    is_strict: bool = False  # another model's name is refused
    api_keys: tuple[str, ...] = ()  # any of which a request must show; none: no key is asked for
    allowed_hosts: tuple[str, ...] = ()  # beside loopback
    allowed_origins: tuple[str, ...] = ()  # of pages in browsers that may ask
    logs_prompts: bool = False
    most_body_bytes: int = 64 << 20
    sampling: Sampling = field(default_factory=Sampling)  # of requests that say nothing
    max_tokens: int | None = None
    think_tokens: int | None = None
    script: Callable[[Sequence[int]], Sequence[int] | None] | None = None  # for tests: what is said to a prompt's ids


@dataclass(frozen=True, kw_only=True)
class AnswerRequest:
    """What is to be answered: messages, or the ids of `prompt`."""

    chat: ChatRequest
    prompt: Sequence[int] | None = None
    rng_stream: int | None = None  # by default as in `Model.chat`


class Answering:
    """One answer under way. Read `events`, or wait for `whole`; leaving either early cancels it."""

    def __init__(self, server: Server, asked: AnswerRequest, prompt: Sequence[int]) -> None:
        self.server, self.asked, self.prompt = server, asked, prompt
        self.id = secrets.token_hex(12)  # of the answer; each dialect puts its own prefix before it
        self.created = int(time.time())  # seconds since 1970
        self._news, self._came = deque[News](), asyncio.Event()
        self._handle: Handle | None = None
        self._is_over = False

    @property
    def seed(self) -> int:
        return self.asked.chat.sampling.seed

    @property
    def handle(self) -> Handle:
        assert self._handle is not None
        return self._handle

    def begin(self, handle: Handle) -> None:
        self._handle = handle

    def hear(self, news: News) -> None:
        """On the event loop: something happened."""
        self._news.append(news)
        self._came.set()

    async def events(self, beat_s: float | None = None) -> AsyncIterator[AnswerEvent]:
        """What happens, in order, up to AnswerEnd; Beat where nothing does for `beat_s`.

        Raises the request's own error; asyncio.CancelledError where the server ends.
        """
        narration = Narration(self.server.model.tokenizer, self.handle)
        try:
            while True:
                taken = list(self._news)
                self._news.clear()
                for event in narration.tell([event for news in taken for event in news.events]):
                    yield event
                    if isinstance(event, AnswerEnd):
                        return
                if taken and taken[-1].is_over:
                    raise taken[-1].error or asyncio.CancelledError
                if not self._news:
                    self._came.clear()
                    try:
                        await asyncio.wait_for(self._came.wait(), beat_s)
                    except TimeoutError:
                        yield Beat()
        finally:
            self.cancel()

    async def whole(self) -> WholeAnswer:
        found = WholeAnswer()
        async for event in self.events():
            found.add(event)
        return found

    def cancel(self) -> None:
        """Nobody waits any more, or it is whole. Done again, nothing happens."""
        if not self._is_over:
            self._is_over = True
            if self._handle is not None:
                self._handle.cancel()
            self.server.ended(self)


class Server:
    """An opened model and the requests that it answers. Belongs to one event loop."""

    def __init__(self, model: Model, options: ServeOptions) -> None:
        self.model, self.options = model, options
        self.name = options.name or model.path.stem
        self.created = int(time.time())  # seconds since 1970
        self.under_way = set[Answering]()
        self.is_draining = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._driver: Driver | None = None
        # One thread renders and tokenizes: a long prompt there stops neither the event loop nor the compute thread.
        self._texts = ThreadPoolExecutor(1, "m2lite-texts")
        self._n_begun = 0  # requests that are being rendered

    async def start(self) -> None:
        """Inside the event loop that it will serve."""
        self._loop = asyncio.get_running_loop()
        self.model.loop.scheduler.n_most = min(self.options.parallel, self.model.n_rows)
        self._driver = Driver(self.model, self._deliver)

    async def stop(self) -> None:
        """Cancel what is under way; the model stays open."""
        for answering in list(self.under_way):
            answering.cancel()
        if self._driver is not None:
            await asyncio.to_thread(self._driver.close)
        self._texts.shutdown(wait=False, cancel_futures=True)

    async def off_loop(self, call: Callable[[], T]) -> T:
        """Run what takes a while, such as to parse, render and tokenize, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, call)

    def defaults(self) -> ChatRequest:
        """A request that says nothing. Its seed is its own."""
        options = self.options
        sampling = Sampling(**{**vars(options.sampling), "seed": new_seed()})
        return ChatRequest([], sampling, max_tokens=options.max_tokens, think_tokens=options.think_tokens)

    async def begin(self, asked: AnswerRequest) -> Answering:
        """Ask the model. Refused where too many wait; UsageError or ContextError for what can never be answered."""
        self._check_model(asked.chat.model)
        if self.is_draining:
            raise Refused(503, "draining", "The server is ending.", "Ask again soon.", headers={"Retry-After": "5"})
        n_most = self.options.parallel + self.options.queue
        if self._n_begun + len(self.under_way) >= n_most:
            raise Refused(
                429, "queue_full", f"{n_most} requests are under way or wait, which is the limit.",
                "Ask again later.", headers={"Retry-After": "5"},
            )  # fmt: skip
        self._n_begun += 1
        try:
            prompt = asked.prompt
            if prompt is None:
                prompt = await self.off_loop(lambda: self.encode(asked.chat))
            answering = Answering(self, asked, prompt)
            answering.begin(await self.off_loop(lambda: self._submit(answering)))
        finally:
            self._n_begun -= 1
        self.under_way.add(answering)
        return answering

    def encode(self, chat: ChatRequest) -> list[int]:
        """The ids of a request's messages, with the thinking of earlier turns that they have."""
        model = self.model
        return encode_kept(model.tokenizer, model.template, chat.messages, chat.tools, is_to_answer=True)

    def ended(self, answering: Answering) -> None:
        self.under_way.discard(answering)

    def _submit(self, answering: Answering) -> Handle:
        assert self._driver is not None
        return self._driver.submit(self._request(answering), answering)

    def _request(self, answering: Answering) -> Request:
        asked = answering.asked
        stream = asked.rng_stream
        if stream is None:
            stream = turn_stream(asked.chat.messages) if asked.prompt is None else 0
        request = asked.chat.to_engine(answering.prompt, stream, answering.id)
        script = self.options.script
        return request if script is None else replace(request, script=script(answering.prompt))

    def _check_model(self, name: str | None) -> None:
        if self.options.is_strict and name not in (None, self.name):
            raise Refused(404, "model_not_found", f"There is no model {name!r} here.", f"Ask for {self.name!r}.")

    def _deliver(self, news: list[News]) -> None:
        """On the driver's thread: one call into the event loop for a whole burst."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_hand_out, news)
        except RuntimeError:  # the event loop has ended: nobody waits
            return


def _hand_out(news: list[News]) -> None:
    for each in news:
        each.listener.hear(each)
