"""Replies taken apart, and put together again by the template."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m2lite.text import m2_template
from m2lite.text.calls import parse_tool_calls
from m2lite.text.reply import Reply, ReplyStream, opens_thinking
from m2lite.text.template import Template, encode_chat
from m2lite.text.tokenizer import Tokenizer, load_tokenizer

M2 = Template(m2_template.SOURCE, "builtin")
USER = {"role": "user", "content": "a"}
ONE_CALL = '\n<invoke name="f">\n<parameter name="x">1</parameter>\n</invoke>\n'


def read(tokenizer: Tokenizer, text: str, in_thinking: bool = True) -> ReplyStream:
    stream = ReplyStream(tokenizer, in_thinking)
    pieces = [piece for index in tokenizer.encode(text, control=True) for piece in stream.push(index)]
    pieces += stream.finish()
    assert all(piece.text for piece in pieces)
    for kind, whole in stream._texts.items():
        assert [piece.text for piece in pieces if piece.kind == kind] == whole
    return stream


def parts(tokenizer: Tokenizer, text: str, in_thinking: bool = True) -> tuple[str, str, str]:
    texts = read(tokenizer, text, in_thinking)._texts
    return "".join(texts["thinking"]), "".join(texts["content"]), "".join(texts["tool_call"])


CASES = {
    "thinking and content": ("why\n</think>\n\nHello.[e~[", ("why", "Hello.", "")),
    "line breaks of their own": ("\n a \n\n</think>\n\n\n\nb\n\n[e~[", ("\n a \n", "\n\nb\n\n", "")),
    "no line breaks": ("a</think>b[e~[", ("a", "b", "")),
    "empty thinking": ("\n</think>\n\nb[e~[", ("", "b", "")),
    "call after content": (
        f"a\n</think>\n\nb\n<minimax:tool_call>{ONE_CALL}</minimax:tool_call>[e~[",
        ("a", "b", ONE_CALL),
    ),
    "call alone": (f"a\n</think>\n\n\n<minimax:tool_call>{ONE_CALL}</minimax:tool_call>[e~[", ("a", "", ONE_CALL)),
    "call closer": (f"a\n</think>\n\n<minimax:tool_call>{ONE_CALL}</minimax:tool_call>[e~[", ("a", "", ONE_CALL)),
    "two blocks": (
        f"a</think><minimax:tool_call>{ONE_CALL}</minimax:tool_call>\n<minimax:tool_call>{ONE_CALL}</minimax:tool_call>[e~[",
        ("a", "", ONE_CALL + ONE_CALL),
    ),
    "opened again": ("<think>\na\n</think>\n\nb[e~[", ("a", "b", "")),
    "opened again after a line break": ("\n<think>\na\n</think>\n\nb[e~[", ("a", "b", "")),
    "named inside the thinking": ("the <think> tag\n</think>\n\nb[e~[", ("the <think> tag", "b", "")),
    "call named inside the thinking": (
        "use <minimax:tool_call>\n</think>\n\nb[e~[",
        ("use <minimax:tool_call>", "b", ""),
    ),
    "closed twice": ("a\n</think>\n\nb</think>c[e~[", ("a", "b</think>c", "")),
    "thinks again": ("a\n</think>\n\nb\n<think>\nc\n</think>\n\nd[e~[", ("a", "b\n<think>\nc\n</think>\n\nd", "")),
    "thinks again at once": ("a\n</think>\n\n<think>b</think>c[e~[", ("a", "<think>b</think>c", "")),
    "cut in the thinking": ("a\nb\n", ("a\nb\n", "", "")),
    "cut in the content": ("a\n</think>\n\nb\n", ("a", "b\n", "")),
    "cut in the call": ('a\n</think>\n\n\n<minimax:tool_call>\n<invoke name="f">', ("a", "", '\n<invoke name="f">')),
    "nothing": ("[e~[", ("", "", "")),
    "other control tokens are shown": ("a\n</think>\n\nb]~b]c[e~[", ("a", "b]~b]c", "")),
}


@pytest.mark.parametrize("case", CASES)
def test_parts(tokenizer: Tokenizer, case: str) -> None:
    text, expected = CASES[case]
    assert parts(tokenizer, text) == expected


def test_parts_of_sentencepiece(spm_tokenizer: Tokenizer) -> None:
    """The space in front of every stretch of text is no part of it, but for the first, which continues the prompt."""
    assert parts(spm_tokenizer, f"a</think>\n\nb\n<minimax:tool_call>{ONE_CALL}[e~[") == (" a", "b", ONE_CALL)


def test_without_thinking(tokenizer: Tokenizer) -> None:
    assert parts(tokenizer, "a\n\nb[e~[", in_thinking=False) == ("", "a\n\nb", "")
    assert parts(tokenizer, "<think>\na\n</think>\n\nb[e~[", in_thinking=False) == ("a", "b", "")


def test_vocabulary_without_think_tokens(open_keys: Any, bpe_keys: dict[str, Any]) -> None:
    tokens = [token.replace("think>", "reflect>") for token in bpe_keys["ggml.tokens"]]
    tokenizer = load_tokenizer(open_keys(bpe_keys | {"ggml.tokens": tokens}))
    assert tokenizer.think_open_id is tokenizer.think_close_id is None
    assert parts(tokenizer, "<think>\na\n</think>\n\nb[e~[") == ("", "<think>\na\n</think>\n\nb", "")


def test_quoted_tags_are_not_tags(tokenizer: Tokenizer) -> None:
    """The tag as ordinary tokens, which is how a user's text spells it."""
    stream = ReplyStream(tokenizer, True)
    pieces = [piece for index in tokenizer.encode("a</think>b") for piece in stream.push(index)] + stream.finish()
    assert "".join(piece.text for piece in pieces) == "a</think>b"
    assert {piece.kind for piece in pieces} == {"thinking"}


def test_unfinished_character_before_a_tag(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("鱼")[:1]
    assert tokenizer.decode(half) == "\ufffd"
    stream = ReplyStream(tokenizer, True)
    assert stream.push(half[0]) == []
    (piece,) = stream.push(tokenizer.think_close_id or 0)
    assert (piece.kind, piece.text, stream.kind) == ("thinking", "\ufffd", "content")


lines = st.lists(st.sampled_from(["a", "\n", " ", "é", "你", "<", "think>", "."]), max_size=6).map("".join)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    thinking=lines.filter(bool),
    content=lines,
    arguments=st.lists(
        st.dictionaries(st.sampled_from(["x", "y"]), st.integers() | st.booleans() | st.none()), max_size=2
    ),
)
def test_render_and_read_again(
    tokenizer: Tokenizer, thinking: str, content: str, arguments: list[dict[str, Any]]
) -> None:
    """The template's text of a reply is read as that reply, and renders to the same ids again."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": value}} for value in arguments]
    message = {"role": "assistant", "content": content, "reasoning_content": thinking, "tool_calls": calls}
    prompt = encode_chat(tokenizer, M2, [USER])
    whole = encode_chat(tokenizer, M2, [USER, message], add_generation_prompt=False)
    shared = next((n for n, pair in enumerate(zip(prompt, whole, strict=False)) if len(set(pair)) > 1), len(prompt))
    if tokenizer.decode(whole[:shared]) != tokenizer.decode(prompt):
        return  # the reply's first line break joined the prompt's last one in one token
    assert opens_thinking(tokenizer, prompt)
    numbers = {"type": ["integer", "boolean", "null"]}
    tools = [{"name": "f", "parameters": {"properties": {"x": numbers, "y": numbers}}}]
    stream = ReplyStream(tokenizer, opens_thinking(tokenizer, prompt), tools=tools)
    for index in whole[shared:-1]:  # the line break after the stop token belongs to the next turn
        stream.push(index)
    stream.finish()
    reply = stream.reply()
    assert reply == Reply(thinking, content, calls)
    assert encode_chat(tokenizer, M2, [USER, reply.message()], add_generation_prompt=False) == whole


def test_opens_thinking(tokenizer: Tokenizer) -> None:
    answered = [USER, {"role": "assistant", "content": "b", "reasoning_content": "c"}]
    assert opens_thinking(tokenizer, encode_chat(tokenizer, M2, [USER]))
    assert not opens_thinking(tokenizer, encode_chat(tokenizer, M2, answered, add_generation_prompt=False))
    assert not opens_thinking(tokenizer, tokenizer.encode("plain <think> text"))


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}}]
WHOLE = f"<minimax:tool_call>{ONE_CALL}</minimax:tool_call>"
ENDED = ["The model called a tool inside its thinking, which was taken to end there."]
MISFIT = "The call of 'f': 'x' is 'one', expected integer."
CALLS_IN_THINKING: dict[str, tuple[str, Reply]] = {
    "whole": (f"why\n{WHOLE}[e~[", Reply("why", "", [{"x": 1}], ENDED)),
    "text behind it": (f"why\n{WHOLE}\nb[e~[", Reply("why", "\nb", [{"x": 1}], ENDED)),
    "closed behind it": (f"why\n{WHOLE}\n</think>\n\nb[e~[", Reply("why", "b", [{"x": 1}], ENDED)),
    "second marker": (
        f"use <minimax:tool_call> now\n{WHOLE}",
        Reply("use <minimax:tool_call> now", "", [{"x": 1}], ENDED),
    ),
    "never closed": (f"why\n<minimax:tool_call>{ONE_CALL}[e~[", Reply("why", "", [{"x": 1}], ENDED)),
    "closed by the answer": (
        f"why\n<minimax:tool_call>{ONE_CALL}</think>\n\nb[e~[",
        Reply(f"why\n<minimax:tool_call>{ONE_CALL[:-1]}", "b"),
    ),
    "cut": (
        'why\n<minimax:tool_call>\n<invoke name="f">\n',
        Reply('why\n<minimax:tool_call>\n<invoke name="f">\n', ""),
    ),
    "no tool of ours": (f"why\n{WHOLE.replace('f', 'g', 1)}", Reply(f"why\n{WHOLE.replace('f', 'g', 1)}", "")),
    "an example": (
        "<minimax:tool_call> and so on </minimax:tool_call>\n</think>\n\nb",
        Reply("<minimax:tool_call> and so on </minimax:tool_call>", "b"),
    ),
    "two": (f"a{WHOLE}{WHOLE}", Reply("a", "", [{"x": 1}, {"x": 1}], ENDED)),
    "a value that does not fit": (f"a{WHOLE.replace('1', 'one')}", Reply("a", "", [{"x": "one"}], [*ENDED, MISFIT])),
}


@pytest.mark.parametrize("case", CALLS_IN_THINKING)
def test_a_call_inside_the_thinking(tokenizer: Tokenizer, case: str) -> None:
    """It ends the thinking where it came as a token, and is whole; else it is a thought."""
    text, expected = CALLS_IN_THINKING[case]
    for tools in (TOOLS, None):
        stream = ReplyStream(tokenizer, True, tools=tools)
        pieces = [piece for index in tokenizer.encode(text, control=True) for piece in stream.push(index)]
        pieces += stream.finish()
        found = stream.reply()
        if tools is None and expected.tool_calls:
            assert found.tool_calls == [] and "<invoke" in found.thinking
        else:
            calls = [call("f", **arguments) for arguments in expected.tool_calls]
            assert found == Reply(expected.thinking, expected.content, calls, expected.errors)
        assert "".join(p.text for p in pieces if p.kind == "thinking") == found.thinking
    spelled = ReplyStream(tokenizer, True, tools=TOOLS)  # the same text in ordinary tokens
    for index in tokenizer.encode(text.replace("[e~[", "")):
        spelled.push(index)
    spelled.finish()
    assert spelled.reply().tool_calls == [] and "<minimax:tool_call>" in spelled.reply().thinking


# --- tool calls


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def invoke(*values: tuple[str, str], name: str = "f") -> str:
    body = "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in values)
    return f'\n<invoke name="{name}">\n{body}</invoke>\n'


def tool(**properties: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}]


ANY_OF = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
VALUES: dict[str, tuple[str, Any, Any]] = {  # name: text, schema, value
    "string": ("5", {"type": "string"}, "5"),
    "string null": ("null", {"type": "string"}, "null"),
    "string or null": ("null", {"type": ["string", "null"]}, None),
    "string with line breaks": ("\n\na\n\n", {"type": "string"}, "\n\na\n\n"),
    "string with spaces": (" a ", {"type": "string"}, " a "),
    "string with markup": ('<b a="c">&amp;</b>', {"type": "string"}, '<b a="c">&amp;</b>'),
    "string with its closing tag": ("a</parameter>b", {"type": "string"}, "a</parameter>b"),
    "string with a call": (
        "<invoke name='x'></invoke> </minimax:tool_call>",
        {},
        "<invoke name='x'></invoke> </minimax:tool_call>",
    ),
    "no schema": ("5", None, "5"),
    "no schema null": ("null", None, None),
    "empty": ("", {"type": "string"}, ""),
    "integer": ("\n5\n", {"type": "integer"}, 5),
    "integer as float": ("5.0", {"type": "integer"}, 5),
    "big integer": ("123456789012345678901234567890", {"type": "integer"}, 123456789012345678901234567890),
    "number": ("1.5e3", {"type": "number"}, 1500.0),
    "number as integer": ("2", {"type": "number"}, 2),
    "boolean": ("true", {"type": "boolean"}, True),
    "boolean in Python": ("False", {"type": "boolean"}, False),
    "null": ("null", {"type": "integer"}, None),
    "array": ('[1, "a", null]', {"type": "array"}, [1, "a", None]),
    "object": ('\n{"a": {"b": []}}\n', {"type": "object"}, {"a": {"b": []}}),
    "any of": ("7", ANY_OF, 7),
    "integer or string, integer": ("7", {"type": ["integer", "string"]}, 7),
    "integer or string, string": ("7x", {"type": ["integer", "string"]}, "7x"),
    "enum of strings": ("1", {"enum": ["1", "2"]}, "1"),
    "enum of numbers": ("1", {"enum": [1, 2]}, 1),
    "schema is true": ("x", True, "x"),
}


@pytest.mark.parametrize("case", VALUES)
def test_values(case: str) -> None:
    text, schema, value = VALUES[case]
    tools = None if schema is None else tool(v=schema)
    calls, errors = parse_tool_calls(invoke(("v", text), ("w", "x")), tools)
    assert calls == [call("f", v=value, w="x")]
    assert type(calls[0]["function"]["arguments"]["v"]) is type(value)
    assert errors == []


MISFITS = {
    "integer": ("five", {"type": "integer"}, "'v' is 'five', expected integer"),
    "half": ("1.5", {"type": "integer"}, "expected integer"),
    "truth is no number": ("true", {"type": "number"}, "expected number"),
    "object": ("{a: 1}", {"type": "object"}, "expected object"),
    "list for an object": ("[1]", {"type": "object"}, "expected object"),
    "not a number": ("NaN", {"type": "number"}, "expected number"),
    "neither": ("x", ANY_OF, "expected integer or null"),
    "deep": ("[" * 100_000, {"type": "array"}, "expected array"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_values_that_do_not_fit(case: str) -> None:
    text, schema, match = MISFITS[case]
    calls, (error,) = parse_tool_calls(invoke(("v", text)), tool(v=schema))
    assert calls == [call("f", v=text)]
    assert match in error


def test_calls() -> None:
    text = invoke(("a", "1"), name="f") + invoke(name="g")
    assert parse_tool_calls(text) == ([call("f", a="1"), call("g")], [])
    assert parse_tool_calls("") == ([], [])
    assert parse_tool_calls(" \n ") == ([], [])
    assert parse_tool_calls("<invoke name='f'></invoke>") == ([call("f")], [])
    assert parse_tool_calls("<invoke name=f><parameter name=a>1</parameter></invoke>") == ([call("f", a="1")], [])


def test_call_errors() -> None:
    assert parse_tool_calls("f(1)")[1] == ["The tool call holds no <invoke>: 'f(1)'."]
    calls, errors = parse_tool_calls(invoke(name="h"), tool())
    assert (calls, errors) == ([call("h")], ["The call of 'h' names no tool; there are 'f'."])
    calls, errors = parse_tool_calls(invoke(("a", "1"), ("a", "2")))
    assert (calls, errors) == ([call("f", a="1")], ["The call of 'f' gives 'a' twice; the first one counts."])


def test_every_cut_is_noticed() -> None:
    """Whatever part of two calls arrived: only whole calls are given, and a part of one is an error."""
    first, second = invoke(("a", "1"), ("b", "x\ny"), name="f"), invoke(("c", "2"), name="g")
    text = first + second
    for end in range(len(text)):
        calls, errors = parse_tool_calls(text[:end])
        whole = [call("f", a="1", b="x\ny")] * (end >= len(first) - 1) + [call("g", c="2")] * (end >= len(text) - 1)
        assert calls == whole, end
        rest = text[:end].replace(first.strip(), "").replace(second.strip(), "")
        assert bool(errors) == bool(rest.strip()), end


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(
            [
                "<invoke name=",
                '"f"',
                ">",
                '<parameter name="a">',
                "</parameter>",
                "</invoke>",
                "\n",
                "1",
                "null",
                "<",
                "é",
            ]
        ),
        max_size=14,
    ).map("".join)
)
def test_any_text_is_survived(text: str) -> None:
    calls, _ = parse_tool_calls(text, tool(a={"type": "integer"}))
    assert all(set(item["function"]) == {"name", "arguments"} for item in calls)
