"""Messages to tokens and back: render, reuse the common prefix, parse the reply. Knows no terminal and no file."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from m2lite.decode.drafts import n_common
from m2lite.decode.engine import Stop
from m2lite.decode.sampling import Sampling
from m2lite.decode.session import Progress, Session, Stats
from m2lite.errors import ContextError
from m2lite.text.reply import Piece, Reply, ReplyStream, opens_thinking
from m2lite.text.template import encode_chat

Message = dict[str, Any]
Pieces = Generator[Piece, None, None]


@dataclass
class Answer:
    """One answer: its parts, and the ids as they were generated, without the one that ended it."""

    tokens: list[int] = field(default_factory=list)
    reply: Reply = field(default_factory=lambda: Reply("", ""))
    finish_reason: str = "interrupted"
    stats: Stats = field(default_factory=Stats)


class Conversation:
    """A list of messages and the session whose row follows it.

    Only what changed since the last turn is evaluated: the row is rewound to the longest common prefix, which ends
    where the last answer began if the template drops the thinking of earlier turns.
    """

    def __init__(self, session: Session, system: str | None = None) -> None:
        self.session = session
        self.messages: list[Message] = []
        self.answer = Answer()
        self.set_system(system)

    @property
    def n_turns(self) -> int:
        return sum(message["role"] == "user" for message in self.messages)

    def set_system(self, text: str | None) -> None:
        """Replace the system message; None leaves it to the template."""
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = ([] if text is None else [{"role": "system", "content": text}]) + rest

    def clear(self) -> None:
        """Forget every turn; the system message stays."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def ask(
        self,
        text: str,
        *,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop: Stop | None = None,
        progress: Progress | None = None,
    ) -> Pieces:
        """Append the question and yield the pieces of the answer as they come; `answer` and `messages` then hold it.

        A question that does not fit raises ContextError before anything is computed and is forgotten, and so is one
        that was stopped before its answer began.
        """
        session, turn = self.session, self.n_turns
        messages = [*self.messages, {"role": "user", "content": text}]
        row = encode_chat(session.model.tokenizer, session.model.template, messages)
        try:
            session.set_tokens(row)
        except ContextError as error:
            raise self._too_long(error, row) from None
        ids = session.generate(
            (), max_tokens=max_tokens, sampling=sampling, stream=turn << 32, stop=stop, progress=progress
        )
        return self._collect(ids, opens_thinking(session.model.tokenizer, row), messages)

    def complete(
        self,
        text: str,
        *,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop: Stop | None = None,
        progress: Progress | None = None,
    ) -> Pieces:
        """Continue raw text, without a template; `messages` stay as they are."""
        session = self.session
        row = session.model.encode_prompt(text)
        session.set_tokens(row)
        ids = session.generate((), max_tokens=max_tokens, sampling=sampling, stop=stop, progress=progress)
        return self._collect(ids, opens_thinking(session.model.tokenizer, row), None)

    def _collect(self, ids: Iterator[int], in_thinking: bool, messages: list[Message] | None) -> Pieces:
        """Pieces of `ids`; whatever came, however it ends, goes to `answer` and behind `messages`."""
        stream = ReplyStream(self.session.model.tokenizer, in_thinking)
        answer = self.answer = Answer(stats=self.session.stats)
        try:
            for token in ids:
                answer.tokens.append(token)
                yield from stream.push(token)
            yield from stream.finish()
        finally:
            answer.finish_reason = self.session.finish_reason or "interrupted"
            stream.finish()
            answer.reply = stream.reply()
            if messages is not None and (answer.tokens or answer.finish_reason != "interrupted"):
                self.messages = [*messages, answer.reply.message()]

    def _too_long(self, error: ContextError, row: Sequence[int]) -> ContextError:
        """Counted behind the turns that are kept, which is what the user can act on."""
        if not self.n_turns:
            return error
        n_kept = n_common(self.session.tokens, row)
        needed, free = len(row) - n_kept, max(0, error.limit - n_kept)
        return ContextError(
            f"This message needs {needed:,} tokens; {free:,} are free of {error.limit:,}.",
            "Shorten it, /clear the turns so far, or start again with a larger --ctx.",
            needed=needed,
            free=free,
            limit=error.limit,
        )
