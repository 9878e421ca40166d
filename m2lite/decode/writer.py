"""An answer as it is written: token by token from whoever has the logits. Knows no cache and no other answer.

What `Conversation` does with a session of its own, in steps that a batch can take for many answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from m2lite.decode.conversation import Answer, Options
from m2lite.decode.rows import close_thinking
from m2lite.decode.rules import Logprobs, Penalties, Rule
from m2lite.decode.sampling import Logits, Sampling, draw
from m2lite.text.reply import ReplyStream, opens_thinking

if TYPE_CHECKING:
    from m2lite.decode.constrain import Masks
    from m2lite.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Wish:
    """An answer that is asked for: `row` are the prompt's ids, `stream` separates its random numbers from others'."""

    key: str
    row: Sequence[int]
    stream: int
    options: Options
    tools: Sequence[Mapping[str, Any]] | None = None
    ends: bool = True  # False, for measurements: only its options and the context end the answer
    script: Sequence[int] | None = None  # of a measurement: the row's ids, which are said whatever is drawn


class Writer:
    """One answer: draws from logits, closes the thinking when it is time, and knows when it has ended."""

    def __init__(self, wish: Wish, tokenizer: Tokenizer, masks: Masks, n_most: int) -> None:
        """`n_most`: tokens that the row may have, the last of which needs no position of its own."""
        options = wish.options
        self.wish, self.answer, self.n_most = wish, Answer(), n_most
        self._tokenizer = tokenizer
        self._stop_ids = tokenizer.stop_ids if wish.ends else frozenset[int]()
        self._sampling = options.get("sampling") or Sampling()
        in_thinking = opens_thinking(tokenizer, wish.row)
        self._reply = ReplyStream(tokenizer, in_thinking, options.get("stop_texts", ()), wish.tools)
        self._n_left, self._n_think = options.get("max_tokens"), options.get("think_tokens")
        self._rules: list[Rule] = []
        n_likeliest, schema = options.get("logprobs"), options.get("schema")
        self._noted = None if n_likeliest is None else Logprobs(n_likeliest)
        if self._noted is not None:
            self._rules.append(self._noted)
        if schema is not None:
            self._rules.append(masks.constraint(schema, in_thinking, options.get("max_tokens")))
        if self._sampling.presence_penalty or self._sampling.frequency_penalty:
            self._rules.append(Penalties(self._sampling))
        self.row = list(wish.row)
        if self._n_think is not None and self._n_think <= 0:
            self._close()

    @property
    def draws(self) -> tuple[Sampling, int]:
        """With which tokens are drawn, and the stream of random numbers."""
        return self._sampling, self.wish.stream

    @property
    def n_left(self) -> int:
        """Tokens that may come at most."""
        n_room = self.n_most - len(self.row)
        return n_room if self._n_left is None else min(n_room, self._n_left)

    @property
    def is_done(self) -> bool:
        return self.answer.finish_reason != "interrupted"

    def write(self, logits: Logits) -> None:
        """The row goes on with a token drawn from `logits` [V], and with those that close the thinking behind it."""
        for rule in self._rules:
            logits = rule.apply(logits)
        token = draw(logits, self._sampling, self.wish.stream, len(self.row))
        if self.wish.script is not None:
            token = self.wish.script[len(self.row)]
        for rule in self._rules:
            rule.settle(token)
        if token in self._stop_ids:
            self._end("stop")
            return
        self._push(token)
        self._n_left = None if self._n_left is None else self._n_left - 1
        if self._reply.is_stopped:
            self._end("stop")
        elif self._n_left == 0 or len(self.row) >= self.n_most:
            self._end("length")
        elif self._n_think is not None and self._reply.kind == "thinking":
            self._n_think -= 1
            if self._n_think <= 0:
                self._close()

    def _close(self) -> None:
        """The thinking has been as long as it may be."""
        if self._reply.kind == "thinking":
            for token in close_thinking(self._tokenizer):
                for rule in self._rules:
                    rule.settle(token)
                self._push(token)
            if len(self.row) >= self.n_most:
                self._end("length")
        self._n_think = None

    def _push(self, token: int) -> None:
        self.row.append(token)
        self.answer.tokens.append(token)
        self._reply.push(token)

    def _end(self, reason: str) -> None:
        answer = self.answer
        answer.finish_reason = reason
        self._reply.finish()
        answer.reply = self._reply.reply()
        answer.stats.n_prompt, answer.stats.n_generated = len(self.wish.row), len(answer.tokens)
        if self._noted is not None:
            answer.logprobs = self._noted.found[: len(answer.tokens)]
