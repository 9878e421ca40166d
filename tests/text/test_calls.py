"""Tool calls: what the template writes is read as what it was, whatever the schema; what is in doubt is told."""

from __future__ import annotations

import re
import socket
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from m2lite.errors import UsageError
from m2lite.text import m2_template
from m2lite.text.calls import parse_tool_calls
from m2lite.text.messages import check_tools
from m2lite.text.reply import ReplyStream
from m2lite.text.schema import Schema
from m2lite.text.template import Template, encode_chat
from m2lite.text.tokenizer import Tokenizer
from tests.text.rendered import rendered

M2 = Template(m2_template.SOURCE, "builtin")
USER = {"role": "user", "content": "a"}
DOUBT = re.compile(r"</parameter>(?=\s*<(?:parameter\s+name=|/invoke>))|</parameter>.*<parameter\s+name=", re.DOTALL)


def call(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(parameters: Any, name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def invoke(*values: tuple[str, str], name: str = "f") -> str:
    body = "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in values)
    return f'\n<invoke name="{name}">\n{body}</invoke>\n'


def written(calls: list[dict[str, Any]]) -> str:
    """What stands between the tags of the block where the template writes these calls."""
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    text = rendered(M2, [USER, message], add_generation_prompt=False)
    whole = rendered(M2, [USER], add_generation_prompt=False) + "]~b]ai\n\n<minimax:tool_call>"
    assert text.startswith(whole)
    return text.removeprefix(whole).removesuffix("</minimax:tool_call>[e~[\n")


def normal(value: Any) -> Any:
    """Equal for what JSON holds for equal: 1 and 1.0, not 1 and true."""
    if isinstance(value, dict):
        return {key: normal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [normal(item) for item in value]
    return (isinstance(value, bool), value)


NASTY = [
    "", "\n", " ", "\t", "a", "é", "你好", "\U0001f600", '"', "'", ">", "<", "&lt;", "\\", "\\n", "{", "}", "[1, 2]",
    "</parameter>", '<parameter name="x">', '<parameter name="', "</invoke>", '<invoke name="f">',
    "<think>", "</think>",
    "<minimax:tool_call>", "</minimax:tool_call>", "5", "-0", "1.10", "1e5", "null", "true", "True", "None", "NaN",
    '{"a": 1}', '"5"', "[e~[", "]~b]", "\r\n", "\u2028", "\0",
]  # fmt: skip
nasty = st.lists(st.sampled_from(NASTY), max_size=5).map("".join)
strings = nasty | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
keys = st.sampled_from(["x", "y", "a>b", 'a"b', 'a">b', "items", "name", "get", "", "$ref", "é ü", "a\nb"]) | strings
plain_keys = keys.filter(lambda key: not re.search(r'\n|"\s*>', key))
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers()
ANY: dict[str, Any] = {
    "string": strings, "integer": st.integers(), "number": numbers, "boolean": st.booleans(), "null": st.none(),
}  # fmt: skip
anything = st.recursive(
    st.one_of(*ANY.values()), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@st.composite
def typed(draw: st.DrawFn, definitions: dict[str, Any], depth: int = 0) -> tuple[Any, Any]:
    """A schema and a value that it allows; what is referred to goes to `definitions`."""
    inner = typed(definitions, depth + 1)
    deep = ["any", "array", "object", "anyOf", "oneOf", "allOf", "ref", "enum", "const", "nullable", "types"]
    kind = draw(st.sampled_from([*ANY] * 2 + (deep if depth < 3 else ["any"])))
    if kind in ANY:
        return {"type": kind}, draw(ANY[kind])
    if kind == "any":
        return draw(st.sampled_from([{}, True, {"description": "whatever"}])), draw(anything)
    if kind == "array":
        schema, value = draw(inner)
        return {"type": "array", "items": schema}, [value] * draw(st.integers(0, 2))
    if kind == "object":
        name = draw(keys)
        schema, value = draw(inner)
        more = draw(st.dictionaries(keys.filter(lambda key: key != name), st.integers(), max_size=1))
        added = {"additionalProperties": {"type": "integer"}} if more else {"additionalProperties": False}
        return {"type": "object", "properties": {name: schema}, **added}, {name: value} | more
    if kind in ("anyOf", "oneOf"):
        pairs = draw(st.lists(inner, min_size=1, max_size=3))
        return {kind: [schema for schema, _ in pairs]}, draw(st.sampled_from(pairs))[1]
    if kind == "types":
        names = draw(st.lists(st.sampled_from([*ANY]), min_size=1, unique=True))
        return {"type": names}, draw(ANY[draw(st.sampled_from(names))])
    schema, value = draw(inner)
    if kind == "nullable":
        return {"anyOf": [schema, {"type": "null"}]}, draw(st.sampled_from([value, None]))
    if kind == "allOf":
        return {"allOf": [schema, draw(st.sampled_from([{}, {"description": "x"}]))]}, value
    if kind == "ref":
        name = f"d{len(definitions)}/~"
        definitions[name] = schema
        return {"$ref": f"#/$defs/d{len(definitions) - 1}~1~0"}, value
    others = draw(st.lists(anything, max_size=2))
    return ({"const": value}, value) if kind == "const" else ({"enum": [*others, value]}, value)


@st.composite
def tools_and_calls(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    tools, calls = [], []
    for name in draw(st.lists(st.sampled_from(["f", "g.h", 'a>"b']), min_size=1, max_size=2, unique=True)):
        definitions: dict[str, Any] = {}
        given_ = draw(st.dictionaries(keys, typed(definitions), max_size=3))
        properties = {key: schema for key, (schema, _) in given_.items()}
        body: dict[str, Any] = {"type": "object", "properties": properties}
        body["required"] = draw(st.lists(st.sampled_from([*properties]), unique=True)) if properties else []
        form = draw(st.sampled_from(["plain", "closed", "anyOf", "allOf", "ref"]))
        if form == "closed":
            body["additionalProperties"] = False
        elif form == "ref":
            body, definitions["args"] = {"$ref": "#/$defs/args"}, body
        elif form != "plain":
            body = {form: [body, {"type": "object"}]} if form == "allOf" else {form: [body]}
        tools.append(tool(body | {"$defs": definitions}, name))
        value = {key: value for key, (_, value) in given_.items()}
        if form in ("plain", "ref", "anyOf"):
            more = draw(st.dictionaries(plain_keys, anything, max_size=1))  # of which the schema says nothing
            value |= {key: item for key, item in more.items() if key not in value}
        assume(jsonschema.Draft202012Validator(body | {"$defs": definitions}).is_valid(value))
        calls.append(call(name, **value))
    return tools, calls


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(tools_and_calls())
def test_reading_is_the_inverse_of_writing(drawn: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    """Where the format cannot tell two values apart, what was read is written as the same text, or it is told."""
    tools, calls = drawn
    text = written(calls)
    found, errors = parse_tool_calls(text, tools)
    if errors:
        assert DOUBT.search(text), errors
    elif normal(found) != normal(calls):
        assert written(found) == text


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(keys, strings, max_size=3))
def test_strings_are_read_as_they_were_written(arguments: dict[str, str]) -> None:
    """Every byte of every string, but where it holds the tags that end it: then it is told."""
    tools = [tool({"properties": {key: {"type": "string"} for key in arguments}})]
    found, errors = parse_tool_calls(written([call("f", **arguments)]), tools)
    if errors or any(DOUBT.search(value) for value in arguments.values()):
        assert DOUBT.search(written([call("f", **arguments)]))
    else:
        assert found == [call("f", **arguments)]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["x", "y"]), strings, max_size=2))
def test_strings_come_through_as_tokens(tokenizer: Tokenizer, arguments: dict[str, str]) -> None:
    """From a message to ids and back: the markers inside a string are text there, and end nothing."""
    message = {"role": "assistant", "content": "", "tool_calls": [call("f", **arguments)], "reasoning_content": "b"}
    tools = [tool({"properties": {"x": {"type": "string"}, "y": {"type": "string"}}})]
    prompt = encode_chat(tokenizer, M2, [USER], tools)
    row = encode_chat(tokenizer, M2, [USER, message], tools, add_generation_prompt=False)
    assert row[: len(prompt)] == prompt
    stream = ReplyStream(tokenizer, True, tools=tools)
    for index in row[len(prompt) :]:
        stream.push(index)
    stream.finish()
    reply = stream.reply()
    if not reply.errors:
        assert reply.tool_calls == [call("f", **arguments)] or written(reply.tool_calls) == written(
            [call("f", **arguments)]
        )
    assert (reply.thinking, reply.content.strip("\n")) == ("b", "")


# --- what a value is, by its schema

DEFS = {
    "$defs": {
        "n": {"type": "integer"},
        "s": {"type": "string"},
        "tree": {"type": "object", "properties": {"child": {"$ref": "#/$defs/tree"}}},
        "a": {"$ref": "#/$defs/b"},
        "b": {"$ref": "#/$defs/a"},
        "anchored": {"$anchor": "here", "type": "boolean"},
    }
}
BY_SCHEMA: dict[str, tuple[Any, str, Any]] = {  # the schema of all arguments, or of `v`; the text of `v`; its value
    "$ref": ({"v": {"$ref": "#/$defs/n"}}, "5", 5),
    "$ref to a string": ({"v": {"$ref": "#/$defs/s"}}, "5", "5"),
    "anchor": ({"v": {"$ref": "#here"}}, "true", True),
    "a tree": ({"v": {"$ref": "#/$defs/tree"}}, '{"child": {}}', {"child": {}}),
    "a circle says nothing": ({"v": {"$ref": "#/$defs/a"}}, "x", "x"),
    "allOf": ({"v": {"allOf": [{"$ref": "#/$defs/n"}], "description": "d"}}, "5", 5),
    "allOf narrows": ({"v": {"allOf": [{"type": ["integer", "string"]}, {"type": ["string", "null"]}]}}, "5", "5"),
    "anyOf of references": ({"v": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}, "5", 5),
    "nullable": ({"v": {"type": "string", "nullable": True}}, "null", None),
    "number in a string or number": ({"v": {"type": ["string", "number"]}}, "1.5", 1.5),
    "version in a string or number": ({"v": {"type": ["string", "number"]}}, "1.10", "1.10"),
    "blanks in a string or number": ({"v": {"type": ["string", "number"]}}, " 5", " 5"),
    "a word in a string or boolean": ({"v": {"type": ["string", "boolean"]}}, "True", "True"),
    "enum of both": ({"v": {"enum": ["auto", 5]}}, "5", 5),
    "enum of strings": ({"v": {"enum": ["5", "auto"]}}, "5", "5"),
    "const": ({"v": {"const": 5}}, "5", 5),
    "anything": ({"v": {}}, '{"a": 1}', {"a": 1}),
    "top-level $ref": ({"$ref": "#/$defs/top", "$defs": {"top": {"properties": {"v": {"type": "integer"}}}}}, "5", 5),
    "top-level anyOf": ({"anyOf": [{"properties": {"v": {"type": "integer"}}}, {"properties": {}}]}, "5", 5),
    "top-level allOf": ({"allOf": [{"properties": {"v": {"type": "integer"}}}, {"properties": {}}]}, "5", 5),
    "then": ({"properties": {}, "if": {}, "then": {"properties": {"v": {"type": "integer"}}}}, "5", 5),
    "patternProperties": ({"patternProperties": {"^v$": {"type": "integer"}}}, "5", 5),
    "additionalProperties": ({"additionalProperties": {"type": "integer"}}, "5", 5),
    "draft 7": (
        {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"n": {"type": "integer"}},
         "properties": {"v": {"$ref": "#/definitions/n"}}}, "5", 5,
    ),
    "its own name": (
        {"$id": "https://example.com/f", "$defs": {"n": {"type": "integer"}},
         "properties": {"v": {"$ref": "https://example.com/f#/$defs/n"}}}, "5", 5,
    ),
    "not declared": ({"properties": {}}, "[5]", [5]),
    "no schema at all": ([], "5", "5"),
    "types that are none": ({"properties": {"v": {"type": 5, "enum": 3, "anyOf": 1, "allOf": {}}}}, "a", "a"),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_SCHEMA)
def test_values_by_schema(case: str) -> None:
    schema, text, value = BY_SCHEMA[case]
    if isinstance(schema, dict) and "v" in schema:
        schema = DEFS | {"type": "object", "properties": schema}
    tools = check_tools([tool(schema)])
    assert parse_tool_calls(invoke(("v", text)), tools) == ([call("f", v=value)], [])
    (found,), _ = parse_tool_calls(invoke(("v", text)), tools)
    assert type(found["function"]["arguments"]["v"]) is type(value)


def test_the_alternative_that_fits_decides() -> None:
    kinds = [("n", {"type": "integer"}), ("s", {"type": "string"})]
    items = [{"properties": {"kind": {"const": kind}, "v": schema}, "required": ["kind"]} for kind, schema in kinds]
    for key in ("oneOf", "anyOf"):
        for kind, value in (("n", 5), ("s", "5")):
            calls, errors = parse_tool_calls(invoke(("kind", kind), ("v", "5")), [tool({key: items})])
            assert (calls, errors) == ([call("f", kind=kind, v=value)], [])


@pytest.mark.parametrize(
    "reference", ["https://example.com/a.json", "a.json#/b", "#/$defs/none", "#none", "file:///etc/passwd"]
)
def test_references_that_lead_out_are_refused_and_never_fetched(
    monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    tools = [tool({"properties": {"a": {"items": {"anyOf": [{"$ref": reference}]}}}})]
    with pytest.raises(
        UsageError, match=re.escape(f"Tool 0 ('f'): its schema refers to '{reference}', which is not in it")
    ):
        check_tools(tools)
    assert check_tools([tool({"properties": {"a": {"default": {"$ref": reference}}, "$ref": {"type": "string"}}})])


def test_schemas_that_refer_to_themselves_many_times_end() -> None:
    twice = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
    schema = {"$defs": twice | {"d40": {"properties": {"v": {"type": "integer"}}}}, "$ref": "#/$defs/d0"}
    assert parse_tool_calls(invoke(("v", "5")), [tool(schema)]) == ([call("f", v=5)], [])
    wide = {
        "allOf": [{"oneOf": [{"properties": {f"p{i}": {"type": t}}} for t in ("integer", "null")]} for i in range(30)]
    }
    assert len(Schema(wide).arguments()) <= 64
    calls, _ = parse_tool_calls(invoke(("p29", "5"), ("p0", "null")), [tool(wide)])
    assert calls == [call("f", p29=5, p0=None)]
    chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)} | {"d5000": {}}
    assert parse_tool_calls(invoke(("v", "x")), [tool({"$defs": chain, "$ref": "#/$defs/d0"})])[1] == []


# --- what may have been meant otherwise is told

S = {"type": "string"}
X = tool({"properties": {"x": S}, "required": ["x"]})
XY = tool({"properties": {"x": S, "y": S}})
XY_REQUIRED = tool({"properties": {"x": S, "y": S}, "required": ["x", "y"]})
BETWEEN = '<parameter name="x">a</parameter>\nand\n<parameter name="y">b</parameter>\n</invoke>'
TOLD: dict[str, tuple[Any, str, list[dict[str, Any]], str]] = {
    "the end of a call inside a value": (
        X, invoke(("x", "a</parameter>\n</invoke>\nb")), [call("f", x="a</parameter>\n</invoke>\nb")],
        "read as its text",
    ),
    "text between parameters": (
        XY, f'<invoke name="f">{BETWEEN}', [call("f", x='a</parameter>\nand\n<parameter name="y">b')],
        "read as its text",
    ),
    "text between parameters that must come": (
        XY_REQUIRED, f'<invoke name="f">{BETWEEN}', [call("f", x="a", y="b")], "left out: 'and'",
    ),
    "text behind the last value": (
        X, '<invoke name="f"><parameter name="x">a</parameter> and </invoke>', [call("f", x="a")], "left out: 'and'",
    ),
    "text before the first value": (
        X, '<invoke name="f">and <parameter name="x">a</parameter></invoke>', [call("f", x="a")], "left out: 'and'",
    ),
    "text between calls": (
        X, invoke(("x", "a")) + "and" + invoke(("x", "b")), [call("f", x="a"), call("f", x="b")], "left out: 'and'",
    ),
    "text around calls": (X, "so" + invoke(("x", "a")), [call("f", x="a")], "left out: 'so'"),
    "text behind calls": (X, invoke(("x", "a")) + "so", [call("f", x="a")], "left out: 'so'"),
    "a call that begins in another": (
        tool({"properties": {"x": {"type": "integer"}}}),
        '<invoke name="f">\n<parameter name="x">1</parameter>\n' + invoke(("x", "2")),
        [call("f", x=1), call("f", x=2)], "has no end",
    ),
    "a call that begins in another's string": (
        X, '<invoke name="f">\n<parameter name="x">a</parameter>' + invoke(("x", "b")),
        [call("f", x='a</parameter>\n<invoke name="f">\n<parameter name="x">b')], "read as its text",
    ),
    "a key twice in an object": (
        tool({"properties": {"x": {"type": "object"}}}), invoke(("x", '{"a": 1, "a": 2}')),
        [call("f", x='{"a": 1, "a": 2}')], "expected object",
    ),
    "half a character in an object": (
        tool({"properties": {"x": {"type": "object"}}}), invoke(("x", '{"a": "\\ud800"}')),
        [call("f", x='{"a": "\\ud800"}')], "expected object",
    ),
    "not of an enum": (
        tool({"properties": {"x": {"enum": ["a", 1]}}}), invoke(("x", "b")), [call("f", x="b")], '"a" or 1',
    ),
    "not known": (
        tool({"properties": {"x": S}, "additionalProperties": False}), invoke(("x", "a"), ("z", "b")),
        [call("f", x="a", z="b")], "gives 'z', which its schema does not know",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_what_is_in_doubt_is_told(case: str) -> None:
    one, text, calls, told = TOLD[case]
    found, errors = parse_tool_calls(text, [one])
    assert found == calls
    assert any(told in error for error in errors), errors


FRAGMENTS = [
    '<invoke name="f">',
    '<parameter name="x">',
    '<parameter name="y">',
    "</parameter>",
    "</invoke>",
    "\n",
    "a",
    "<",
]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=16).map("".join))
def test_nothing_is_lost_in_silence(text: str) -> None:
    """Whatever the model writes: without a word, every byte but blanks between tags is in the calls."""
    calls, errors = parse_tool_calls(text, [XY])
    if not errors:
        again = written(calls) if calls else ""
        assert "".join(text.split()) == "".join(again.split())


def test_names_with_any_character() -> None:
    for name in ("a>b", 'a"b', "a<b", "it's", 'a">b', "a\nb", "<parameter name="):
        tools = [tool({"properties": {name: {"type": "integer"}}}, name)]
        assert parse_tool_calls(invoke((name, "1"), name=name), tools) == ([call(name, **{name: 1})], []), name
    for name in ("a>b", 'a"b', "a<b", "it's"):  # and where nobody knows them
        assert parse_tool_calls(invoke((name, "1"), name=name)) == ([call(name, **{name: "1"})], []), name


def test_long_texts_are_read_in_time() -> None:
    """Work grows with the text: each of these was made to be tried again and again."""
    many = 20_000
    for text in (
        '<invoke name="f">' + '<parameter name="x">a</parameter>b' * many,
        '<invoke name="f"><parameter name="x">' + "</parameter>\n</invoke>b" * many,
        '<invoke name="f"><parameter name="x">' + "</parameter>" * many,
        '<invoke name="f">' * many,
        '<invoke name="' * many,
        '<invoke name="f"><parameter name="' * many,
        '<invoke name="f"><parameter name="n">' + "1</parameter>" * many,
    ):
        parse_tool_calls(text, [tool({"properties": {"x": S, "n": {"type": "integer"}}, "required": ["x", "y"]})])
