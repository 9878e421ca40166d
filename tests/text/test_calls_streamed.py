"""Calls that are read as they come: what was told of their arguments is never wrong, however the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m2lite.text.calls import CallReader, parse_tool_calls
from m2lite.text.values import closed
from tests.text.test_calls import ANY, FRAGMENTS, TOLD, call, invoke, nasty, tool, tools_and_calls, written

Told = list[list[str]]  # of each call its name and the JSON of its arguments


def streamed(text: str, tools: Any, cuts: set[int] | None = None) -> tuple[Told, CallReader]:
    """The calls of a text that comes in pieces; without `cuts`, character by character."""
    ends = sorted(range(len(text)) if cuts is None else {cut % (len(text) + 1) for cut in cuts})
    reader, told, start = CallReader(tools), Told(), 0
    for end in [*ends, len(text)]:
        add(told, reader.push(text[start:end]))
        start = end
    add(told, reader.finish())
    return told, reader


def add(told: Told, pieces: list[Any]) -> None:
    for kind, text in pieces:
        if kind == "begin":
            told.append([text, ""])
        else:
            assert text
            told[-1][1] += text


def check(text: str, tools: Any, cuts: set[int]) -> None:
    calls, errors = parse_tool_calls(text, tools)
    told, reader = streamed(text, tools, cuts)
    assert (reader.calls, reader.errors[:20]) == (calls, errors[:20])
    expected = [each["function"] for each in calls]
    assert told[: len(calls)] == [[f["name"], json.dumps(f["arguments"], ensure_ascii=False)] for f in expected]
    for _, arguments in told[len(calls) :]:  # was cut off: what came is the beginning of an object
        assert len(told) == len(calls) + 1
        with pytest.raises(ValueError):
            json.loads(arguments)
        assert isinstance(json.loads(closed(arguments)), dict)
        assert told == streamed(text, tools)[0]


slow = [HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=slow)
@given(tools_and_calls(), st.sets(st.integers(0, 10_000), max_size=8), st.integers(0, 200))
def test_pieces_are_the_whole(drawn: tuple[Any, Any], cuts: set[int], n_missing: int) -> None:
    """Of calls as the template writes them, whole ones and those of an answer that ended early."""
    tools, calls = drawn
    text = written(calls)
    check(text, tools, cuts)
    check(text[: max(0, len(text) - n_missing)], tools, cuts)


SCHEMAS: list[Any] = [
    {"type": "string"}, {"type": "integer"}, {"type": ["string", "null"]}, {"type": ["string", "number"]}, {},
    {"type": "object"}, {"enum": ["a", "5", 5]}, {"anyOf": [{"type": "array"}, {"type": "string"}]},
    {"const": True}, {"type": "boolean"},
]  # fmt: skip
values = nasty | st.one_of(*ANY.values()).map(json.dumps)
parameters = st.tuples(st.sampled_from(["x", "y", "z"]), values).map(
    lambda pair: f'<parameter name="{pair[0]}">{pair[1]}</parameter>'
)
texts = st.lists(
    st.sampled_from([*FRAGMENTS, '<invoke name="g">', "<parameter name='z'>", "</"]) | parameters, max_size=16
)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(texts.map("".join), st.tuples(*[st.sampled_from(SCHEMAS)] * 4), st.booleans(), st.sets(st.integers(0, 10_000)))
def test_whatever_the_model_writes(text: str, schemas: tuple[Any, ...], is_either: bool, cuts: set[int]) -> None:
    """With tags that have no place, values that do not fit, and schemas of which one or the other holds."""
    one = {"properties": dict(zip("xy", schemas[:2], strict=True)), "required": ["y"]}
    other = {"properties": dict(zip("xz", schemas[2:], strict=True)), "required": ["z"]}
    tools = [tool({"anyOf": [one, other]} if is_either else one)]
    check(text, tools, cuts)
    check(text, None, cuts)


@pytest.mark.parametrize("case", TOLD)
def test_what_is_in_doubt_waits(case: str) -> None:
    one, text, _, _ = TOLD[case]
    check(text, [one], set(range(len(text))))


def after(text: str, tools: Any) -> str:
    """What is told of the arguments when no more than this has come."""
    told = Told()
    add(told, CallReader(tools).push(text))
    return told[-1][1] if told else "-"


BEGUN: dict[str, tuple[Any, str, str]] = {  # the schema of x, what has come behind its tag, what is told by then
    "a string": ({"type": "string"}, 'a\n"b\\', '{"x": "a\\n\\"b\\\\'),
    "what may be the end of a string": ({"type": "string"}, "a</param", '{"x": "a'),
    "what is no end of a string": ({"type": "string"}, "a</paragraph>", '{"x": "a</paragraph>'),
    "an end, unless text follows": ({"type": "string"}, "a</parameter>\n</invoke>\n", '{"x": "a'),
    "an end, since another follows": ({"type": "string"}, 'a</parameter>\n<parameter name="y">', '{"x": "a", "y": "'),
    "an end, since a call follows": ({"type": "string"}, 'a</parameter>\n</invoke>\n<invoke name="f">', "{"),
    "no number yet": ({"type": "integer"}, "12", "{"),
    "a number": ({"type": "integer"}, "12</parameter>", '{"x": 12'),
    "a string that may be a number": ({"type": ["string", "integer"]}, "12", "{"),
    "a string that is none": ({"type": ["string", "integer"]}, "12 a", '{"x": "12 a'),
    "anything": ({}, "nul", "{"),
    "anything but null": ({}, "nut", '{"x": "nut'),
    "an object, perhaps": ({}, '{"a', "{"),
    "code": ({}, "{ a", '{"x": "{ a'),
    "one of some strings": ({"enum": ["ab", "ac"]}, "a", "{"),
}


@pytest.mark.parametrize("case", BEGUN)
def test_what_is_told_in_the_middle(case: str) -> None:
    schema, text, told = BEGUN[case]
    tools = [tool({"properties": {"x": schema, "y": {"type": "string"}}})]
    assert after(f'\n<invoke name="f">\n<parameter name="x">{text}', tools) == told


def test_names_that_may_go_on() -> None:
    tools = [tool({"properties": {"a": {"type": "string"}, 'a">b': {"type": "string"}}})]
    assert after('<invoke name="f"><parameter name="a">', tools) == "{"
    assert after('<invoke name="f"><parameter name="a">b', tools) == "{"
    assert after('<invoke name="f"><parameter name="a">c', tools) == '{"a": "c'
    assert after('<invoke name="f"><parameter name="a">b">c', tools) == '{"a\\">b": "c'
    assert after('<invoke name="f', tools) == "-"


def test_an_argument_that_comes_twice() -> None:
    """The first one counts: it may have been told already."""
    tools = [tool({"properties": {"x": {"type": "string"}, "y": {"type": "string"}}})]
    text = invoke(("x", "a"), ("x", "b"), ("y", "c"))
    assert parse_tool_calls(text, tools)[0] == [call("f", x="a", y="c")]
    check(text, tools, set(range(len(text))))


@pytest.mark.slow
def test_long_values_come_in_time() -> None:
    """Work grows with the text, whatever it looks like."""
    tools = [tool({"properties": {"x": {"type": "string"}, "y": {"type": "object"}}})]
    for value in ("a" * 200_000, "a < b " * 30_000, "</parameter>b" * 2_000, '{"a": 1}' * 2_000):
        for name in "xy":
            text = f'<invoke name="f">\n<parameter name="{name}">{value}</parameter>\n</invoke>\n'
            streamed(text, tools, set(range(0, len(text), 5 if len(value) > 100_000 else 50)))
