"""One answer as a fold over its tokens: what may come next, what it says, and when it ends. The only such place.

A token is pushed whether it was drawn, forced (the closing of the thinking) or replayed (of an answer that goes on), so
an answer that is continued is rebuilt by pushing its ids again. Knows no cache, no other answer and no thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from m2lite.engine.request import Request
from m2lite.engine.stats import Stats
from m2lite.sampling.draw import Logits, Sampling, draw
from m2lite.sampling.rules import LogitsProcessor, Logprob, Logprobs, Penalties
from m2lite.sampling.tool_choice import content_rules
from m2lite.text.reply import Piece, Reply, ReplyStream, close_thinking, opens_thinking

if TYPE_CHECKING:
    from m2lite.sampling.json_schema import Masks
    from m2lite.text.tokenizer import Tokenizer


@dataclass
class Completion:
    """What an answer is: its ids without the one that ended it, what they say, and what they cost."""

    tokens: list[int] = field(default_factory=list)
    reply: Reply = field(default_factory=lambda: Reply("", ""))
    finish_reason: str = "interrupted"  # or "stop", "length"
    stats: Stats = field(default_factory=Stats)
    logprobs: list[Logprob | None] = field(default_factory=list)  # by token, where they were asked for
    prompt_logprobs: list[Logprob] = field(default_factory=list)  # by token from the prompt's second on, likewise
    # By token, where they were asked for: what the call that drew it chose, [n_layers, n_used] of Config.expert_dtype;
    # None of those that nobody drew.
    experts: list[bytes | None] = field(default_factory=list)
    stop_id: int | None = None  # that ended it
    stop_logprob: Logprob | None = None  # of that

    @property
    def text(self) -> str:
        """Its content; `reply` has its thinking and its tool calls, too."""
        return self.reply.content


class Token(NamedTuple):
    """One more id of an answer, and the text that it completes."""

    id: int
    pieces: list[Piece]


class Answer:
    """An answer to a request. `ids` are the prompt and the answer so far."""

    def __init__(self, request: Request, tokenizer: Tokenizer, masks: Masks, n_positions: int) -> None:
        """`n_positions`: of the context; the last token that is drawn needs none."""
        self.request, self.completion = request, Completion()
        self.ids = list(request.prompt)
        self.new = list[Token]()  # what came since somebody took it
        self.last_pieces = list[Piece]()  # text that the end completes
        in_thinking = opens_thinking(tokenizer, request.prompt)
        self._new_reply = partial(ReplyStream, tokenizer, in_thinking, request.stop_texts, request.tools)
        self._reply = self._new_reply()
        self._stop_ids = frozenset[int]() if request.ignore_stop else tokenizer.stop_ids
        self._most_ids = n_positions + 1
        self._most = request.max_tokens
        if request.script is not None:
            self._most = min(self._most or len(request.script), len(request.script))
        self._noted = None if request.logprobs is None else Logprobs(request.logprobs)
        self._rules = self._make_rules(masks, in_thinking)
        self._n_think = request.think_tokens
        self._close_ids = [] if self._n_think is None else close_thinking(tokenizer)
        self._closing = list[int]()  # ids that close the thinking and have not come yet
        self._replay()
        self.completion.stats.n_prompt = len(request.prompt) + len(request.given)

    def _make_rules(self, masks: Masks, in_thinking: bool) -> list[LogitsProcessor]:
        request, sampling = self.request, self.request.sampling
        rules: list[LogitsProcessor] = [] if self._noted is None else [self._noted]
        rules += content_rules(masks, request.calls, request.schema, in_thinking, request.max_tokens)
        if sampling.presence_penalty or sampling.frequency_penalty:
            rules.append(Penalties(sampling))
        return rules

    def _replay(self) -> None:
        """The ids that the answer begins with; those of the closing among them are not forced again."""
        self._check_thinking()
        for token in self.request.given:
            for rule in self._rules:
                rule.push(token)
            is_closing = self._closing[:1] == [token]
            del self._closing[: len(self._closing) if not is_closing else 1]
            self._append(token)
            if not self._closing and not is_closing:
                self._check_thinking()
        self.new.clear()
        self.completion.stats.n_generated = 0
        if self.request.given and not self._closing and self._is_over_budget:
            self._closing = list(self._close_ids)
        if self._reply.is_stopped:
            self.end("stop")
        self._force()

    @property
    def sampling(self) -> Sampling:
        return self.request.sampling

    @property
    def n_left(self) -> int:
        """Tokens that may come at most."""
        n = self._most_ids - len(self.ids)
        return max(0, n if self._most is None else min(n, self._most - len(self.completion.tokens)))

    @property
    def logprobs(self) -> list[Logprob | None]:
        """By token so far; None of those that nobody drew."""
        return [] if self._noted is None else self._noted.found[: len(self.completion.tokens)]

    @property
    def is_cut(self) -> bool:
        """Whether a stop text ended it: its ids say more than its text."""
        return self._reply.is_stopped

    @property
    def stop_text(self) -> str | None:
        """The stop text that ended it, if one did."""
        return self._reply.stop_text

    @property
    def is_finished(self) -> bool:
        return self.completion.finish_reason != "interrupted"

    def draw(self, logits: Logits, experts: bytes | None = None) -> None:
        """The answer goes on with a token drawn from `logits` [V], and with those that close the thinking behind it.

        Raises M2liteError where the schema cannot be followed or the logits are not finite.
        """
        for rule in self._rules:
            logits = rule.apply(logits)
        token = draw(logits, self.sampling, self.request.rng_stream, len(self.ids))
        if self.request.script is not None:
            token = self.request.script[len(self.completion.tokens)]
        for rule in self._rules:
            rule.push(token)
        if token in self._stop_ids:
            self.completion.stop_id = token
            self.completion.stop_logprob = None if self._noted is None else self._noted.found[-1]
            self.end("stop")
            return
        self._append(token, experts)
        if self._reply.is_stopped:
            self.end("stop")
        elif not self.n_left:
            self.end("length")
        else:
            self._check_thinking()
            self._force()

    def end(self, reason: str) -> None:
        """Nothing more comes."""
        done = self.completion
        done.finish_reason = reason
        self.last_pieces = self._reply.finish()
        done.reply = self._reply.reply()
        done.logprobs = self.logprobs

    def reply_of(self, tokens: Sequence[int]) -> Reply:
        """What the first `tokens` of it say."""
        stream = self._new_reply()
        for token in tokens:
            stream.push(token)
        stream.finish()
        return stream.reply()

    @property
    def _is_over_budget(self) -> bool:
        return self._n_think is not None and self._n_think <= 0 and self._reply.kind == "thinking"

    def _check_thinking(self) -> None:
        """The thinking is closed where it is as long as it may be."""
        if self._is_over_budget and not self._closing:
            self._closing = list(self._close_ids)

    def _force(self) -> None:
        """What closes the thinking, as far as there is room."""
        while self._closing and self.n_left:
            token = self._closing.pop(0)
            for rule in self._rules:
                rule.push(token)
            self._append(token)
        if not self.n_left and not self.is_finished:
            self.end("length")

    def _append(self, token: int, experts: bytes | None = None) -> None:
        self.ids.append(token)
        self.completion.tokens.append(token)
        if self.request.experts:
            self.completion.experts.append(experts)
        self.completion.stats.n_generated += 1
        self.new.append(Token(token, self._reply.push(token)))
        if self._n_think is not None and self._reply.kind == "thinking":
            self._n_think -= 1
