"""An answer as its parts, one after the other: thinking, text, calls. For dialects that number them.

A stretch of text that is nothing but white space is no part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from m2lite.sampling.rules import Logprob
from m2lite.serve.events import AnswerEnd, AnswerEvent, CallArguments, CallBegin, CallEnd, Text, TextKind


@dataclass
class AnswerPart:
    kind: Literal["thinking", "content", "call"]
    number: int  # its place in the answer
    text: str = ""  # of a call the JSON of its arguments
    id: str = ""  # of a call
    name: str = ""
    logprobs: list[Logprob | None] = field(default_factory=list)


class PartBegin(NamedTuple):
    part: AnswerPart


class PartMore(NamedTuple):
    """`text` more of it; the part has it already."""

    part: AnswerPart
    text: str
    logprobs: list[Logprob | None]


class PartEnd(NamedTuple):
    part: AnswerPart


PartEvent = PartBegin | PartMore | PartEnd
_NOTHING = AnswerPart("call", 0)


class Parts:
    """Turns the events of an answer into those of its parts."""

    def __init__(self) -> None:
        self.found = list[AnswerPart]()
        self._open: AnswerPart | None = None
        self._blank = _NOTHING  # what a stretch of text begins with, until something follows

    def tell(self, event: AnswerEvent) -> list[PartEvent]:
        match event:
            case Text():
                return self._text(event)
            case CallBegin():
                return [*self._close(), self._begin(AnswerPart("call", len(self.found), id=event.id, name=event.name))]
            case CallArguments():
                return [self._more(event.text, [])]
            case CallEnd() | AnswerEnd():
                return self._close()
        return []

    def wait(self, first: TextKind = "thinking") -> list[PartEvent]:
        """Nothing was said: nothing more of the part that is open. Before there is any that is the `first`."""
        begun = [] if self.found else [self._begin(AnswerPart(first, 0))]
        return [*begun, *([] if self._open is None else [self._more("", [])])]

    def tell_all(self, events: Iterable[AnswerEvent]) -> list[AnswerPart]:
        """The parts of a whole answer."""
        for event in events:
            self.tell(event)
        return self.found

    def _text(self, event: Text) -> list[PartEvent]:
        if self._open is not None and self._open.kind == event.kind:
            return [self._more(event.text, event.drawn.logprobs)]
        found = list[PartEvent]() if self._open is None else self._close()
        if event.kind != self._blank.kind:
            self._blank = AnswerPart(event.kind, 0)
        blank = self._blank
        blank.text += event.text
        blank.logprobs += event.drawn.logprobs
        if not blank.text.isspace():
            self._blank = _NOTHING
            found += [self._begin(AnswerPart(event.kind, len(self.found))), self._more(blank.text, blank.logprobs)]
        return found

    def _begin(self, part: AnswerPart) -> PartBegin:
        self._open = part
        self.found.append(part)
        return PartBegin(part)

    def _more(self, text: str, logprobs: list[Logprob | None]) -> PartMore:
        part = self._open
        assert part is not None
        part.text += text
        part.logprobs += logprobs
        return PartMore(part, text, logprobs)

    def _close(self) -> list[PartEvent]:
        part, self._open, self._blank = self._open, None, _NOTHING
        return [] if part is None else [PartEnd(part)]
