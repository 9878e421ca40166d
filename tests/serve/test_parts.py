"""Parts of an answer, and the ids that are told with its texts, however its tokens come together."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2lite import Model
from m2lite.engine.answer import Token
from m2lite.engine.request import Request
from m2lite.engine.sequence import Event, Finished
from m2lite.serve.events import AnswerEvent, Beat, CallArguments, CallBegin, CallEnd, Drawn, Narration, Reading, Text
from m2lite.serve.parts import PartBegin, PartEnd, PartMore, Parts

SAID = (
    "I look.\n</think>\n\nWait.\n<minimax:tool_call>\n<invoke name=\"f\">\n<parameter name=\"a\">b</parameter>\n"
    "</invoke>\n</minimax:tool_call>\n<minimax:tool_call>\n<invoke name=\"g\">\n</invoke>\n</minimax:tool_call>So.[e~["
)  # fmt: skip


@pytest.fixture(scope="module")
def answered(tiny: Model) -> tuple[Any, list[Event]]:
    prompt, script = tiny.tokenizer.encode("<think>\n", control=True), tiny.tokenizer.encode(SAID, control=True)
    handle = tiny.submit(Request(prompt=prompt, script=script, logprobs=0, draft="off"))
    return handle, [event for event in handle if isinstance(event, Token | Finished)]


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(1, 200)))
def test_however_tokens_come_together(tiny: Model, answered: Any, cuts: set[int]) -> None:
    handle, events = answered
    narration, ends = Narration(tiny.tokenizer, handle), [0, *sorted(c for c in cuts if c < len(events)), len(events)]
    told = list[AnswerEvent]()
    for start, end in pairwise(ends):
        told += narration.tell(events[start:end])
    parts, open_part = Parts(), None
    for event in told:
        for each in parts.tell(event):
            match each:
                case PartBegin():
                    assert open_part is None
                    open_part = each.part
                case PartMore():
                    assert each.part is open_part
                    assert each.text
                case PartEnd():
                    assert each.part is open_part
                    open_part = None
    assert open_part is None
    found = [(part.kind, part.name, part.text) for part in parts.found]
    assert found == [
        ("thinking", "", "I look."), ("content", "", "Wait."), ("call", "f", '{"a": "b"}'), ("call", "g", "{}"),
        ("content", "", "So."),
    ]  # fmt: skip
    decode = tiny.tokenizer.decode
    by_part = [decode([each.token for each in part.logprobs if each]) for part in parts.found if part.kind != "call"]
    assert by_part == ["I look.\n", "</think>\n\nWait.\n", "So."]  # as tokens come
    drawn = [i for event in told if not isinstance(event, Reading | Beat) for i in event.drawn.ids]
    assert drawn == handle.completion.tokens


def test_blanks_are_no_part(tiny: Model) -> None:
    script = tiny.tokenizer.encode(" \n</think>\n\n \n <minimax:tool_call>\n<invoke name=\"f\">\n</invoke>\n"
                                   "</minimax:tool_call>\n\n x", control=True)  # fmt: skip
    prompt = tiny.tokenizer.encode("<think>\n", control=True)
    handle = tiny.submit(Request(prompt=prompt, script=script, draft="off"))
    narration, parts = Narration(tiny.tokenizer, handle), Parts()
    for event in handle.events():
        for each in narration.tell([event]):
            parts.tell(each)
    found = [(part.kind, part.text) for part in parts.found]
    assert [kind for kind, _ in found] == ["call", "content"]
    assert found[1][1].strip() == "x"
    assert found[1][1].startswith("\n")


def test_waiting_adds_nothing() -> None:
    """Whatever is open goes on with nothing; before there is anything the thinking begins, which then goes on."""
    parts, nothing = Parts(), Drawn([], [], [])
    begun, more = parts.wait()
    assert isinstance(begun, PartBegin)
    assert isinstance(more, PartMore)
    assert (begun.part.kind, more.text) == ("thinking", "")
    for event in (Text("thinking", "Hm.", nothing), Text("content", "Yes.", nothing)):
        parts.tell(event)
        [more] = parts.wait()
        assert isinstance(more, PartMore)
        assert (more.part.kind, more.text) == (event.kind, "")
    parts.tell(CallBegin(0, "id", "f", nothing))
    parts.tell(CallArguments(0, "{}", nothing))
    parts.tell(CallEnd(0, nothing))
    assert parts.wait() == []
    assert [(part.kind, part.text) for part in parts.found] == [
        ("thinking", "Hm."),
        ("content", "Yes."),
        ("call", "{}"),
    ]
