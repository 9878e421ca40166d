"""What happens to an answer, in terms that every dialect translates. Knows no HTTP."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from m2lite.engine.answer import Completion, Token
from m2lite.engine.handle import Handle
from m2lite.engine.sequence import Event, Finished, Prompt
from m2lite.sampling.rules import Logprob
from m2lite.text.calls import CallPiece, CallReader
from m2lite.text.tokenizer import Tokenizer

TextKind = Literal["thinking", "content"]


class Drawn(NamedTuple):
    """Ids of the answer that came with an event, tags included; what stands beside them where it was asked for."""

    ids: list[int]
    logprobs: list[Logprob | None]
    experts: list[bytes | None]  # as in `Completion`

    def joined(self, more: Drawn) -> Drawn:
        return Drawn(self.ids + more.ids, self.logprobs + more.logprobs, self.experts + more.experts)


class Reading(NamedTuple):
    """The prompt is computed up to `n_done` of `n_total` tokens, of which `n_cached` need not be."""

    n_done: int
    n_total: int
    n_cached: int


class Text(NamedTuple):
    kind: TextKind
    text: str
    drawn: Drawn


class CallBegin(NamedTuple):
    number: int
    id: str
    name: str
    drawn: Drawn


class CallArguments(NamedTuple):
    """More of the JSON of the call's arguments."""

    number: int
    text: str
    drawn: Drawn


class CallEnd(NamedTuple):
    """Its arguments are JSON. Where the answer ends in the middle of a call, there is none."""

    number: int
    drawn: Drawn


class Beat(NamedTuple):
    """Nothing happened for a while: the connection is to be kept alive."""


class AnswerEnd(NamedTuple):
    """The answer is whole."""

    completion: Completion
    reason: Literal["stop", "tool_calls", "length"]
    stop_text: str | None  # the one that ended it
    n_thinking: int  # of its tokens
    drawn: Drawn


AnswerEvent = Reading | Text | CallBegin | CallArguments | CallEnd | Beat | AnswerEnd


def call_id() -> str:
    """Unique everywhere: clients merge what has the same id."""
    return f"call_{secrets.token_hex(12)}"


@dataclass
class WholeCall:
    id: str
    name: str
    arguments: str = ""  # JSON, of which the end is missing where the call was cut off


class Narration:
    """Turns the engine's events of one answer into those of this file."""

    def __init__(self, tokenizer: Tokenizer, handle: Handle) -> None:
        self._tokenizer, self._handle = tokenizer, handle
        self._tools: Sequence[Mapping[str, Any]] | None = handle.request.tools
        self._block: CallReader | None = None  # of calls, as far as it has come
        self.calls, self._is_calling = list[WholeCall](), False  # whether the last one has not ended
        self._ids, self._n_told = list[int](), 0  # ids that no event has told yet, and how many were told

    def tell(self, events: Sequence[Event]) -> list[AnswerEvent]:
        """Texts of one kind that came together are one event. Ids without a text of their own go with what follows."""
        found, text, kind, n_own = list[AnswerEvent](), "", "", 0

        def flush() -> None:
            nonlocal text
            if text:
                found.append(Text("thinking" if kind == "thinking" else "content", text, self._drawn(n_own)))
                text = ""

        for event in events:
            if isinstance(event, Prompt):
                found.append(Reading(*event))
                continue
            if isinstance(event, Token):
                self._ids.append(event.id)
            for piece in event.pieces:
                if piece.kind == "tool_call":
                    flush()
                    self._block = self._block or CallReader(self._tools)
                    self._add_calls(found, self._block.push(piece.text))
                    continue
                if piece.kind != kind:
                    flush()
                kind, text, n_own = piece.kind, text + piece.text, len(self._ids)
            is_end = isinstance(event, Finished) or event.id == self._tokenizer.tool_close_id
            if is_end and self._block is not None:
                self._add_calls(found, self._block.finish())
                self._block = None
                if isinstance(event, Token):  # what the answer's own end cuts off ends with it
                    self._end_call(found)
            if isinstance(event, Finished):
                flush()
                found.append(self._end(event.completion))
        flush()
        return found

    def _drawn(self, n: int | None = None) -> Drawn:
        """The first n of them, or all."""
        n = len(self._ids) if n is None else n
        ids, self._ids = self._ids[:n], self._ids[n:]
        start, self._n_told = self._n_told, self._n_told + len(ids)
        noted = self._handle.answer.logprobs[start : self._n_told]
        return Drawn(ids, noted, self._handle.completion.experts[start : self._n_told])

    def _add_calls(self, found: list[AnswerEvent], pieces: Sequence[CallPiece]) -> None:
        """What is new of calls; arguments that came together are one event."""
        for kind, text in pieces:
            if kind == "begin":
                self._end_call(found)
                self.calls.append(WholeCall(call_id(), text))
                self._is_calling = True
                found.append(CallBegin(len(self.calls) - 1, self.calls[-1].id, text, self._drawn()))
                continue
            self.calls[-1].arguments += text
            drawn, last = self._drawn(), found[-1] if found else None
            if isinstance(last, CallArguments):
                text, drawn = last.text + text, last.drawn.joined(drawn)
                found.pop()
            found.append(CallArguments(len(self.calls) - 1, text, drawn))

    def _end_call(self, found: list[AnswerEvent]) -> None:
        if self._is_calling:
            self._is_calling = False
            found.append(CallEnd(len(self.calls) - 1, self._drawn()))

    def _end(self, completion: Completion) -> AnswerEnd:
        reason = completion.finish_reason
        is_called = self.calls and reason == "stop"
        close, tokens = self._tokenizer.think_close_id, completion.tokens
        n_thinking = 0
        if completion.reply.thinking:
            n_thinking = tokens.index(close) if close in tokens else len(tokens)
        return AnswerEnd(
            completion,
            "tool_calls" if is_called else "length" if reason == "length" else "stop",
            self._handle.answer.stop_text,
            n_thinking,
            self._drawn(),
        )


@dataclass
class WholeAnswer:
    """What the events of an answer add up to."""

    thinking: str = ""
    content: str = ""
    calls: list[WholeCall] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob | None] = field(default_factory=list)
    experts: list[bytes | None] = field(default_factory=list)
    end: AnswerEnd | None = None
    events: list[AnswerEvent] = field(default_factory=list)  # all of it, for dialects that keep its order

    def add(self, event: AnswerEvent) -> None:
        self.events.append(event)
        if isinstance(event, Text) and event.kind == "thinking":
            self.thinking += event.text
        elif isinstance(event, Text):
            self.content += event.text
        elif isinstance(event, CallBegin):
            self.calls.append(WholeCall(event.id, event.name))
        elif isinstance(event, CallArguments):
            self.calls[event.number].arguments += event.text
        elif isinstance(event, AnswerEnd):
            self.end = event
        if not isinstance(event, Reading | Beat):
            self.ids += event.drawn.ids
            self.logprobs += event.drawn.logprobs
            self.experts += event.drawn.experts
