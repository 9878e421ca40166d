"""Messages as clients send them back: thinking wherever they put it, fields that change nothing, and others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from m2lite.errors import UsageError
from m2lite.text import m2_template
from m2lite.text.messages import check_messages, check_tools, to_json
from m2lite.text.reply import Said
from m2lite.text.template import Template
from tests.text.rendered import rendered

M2 = Template(m2_template.SOURCE, "builtin")
USER = {"role": "user", "content": "Hi"}


def assistant(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "b"} | fields


def checked(message: dict[str, Any]) -> dict[str, Any]:
    return check_messages([USER, message])[1]


TEXT = {"type": "reasoning.text", "text": "why", "signature": None, "format": "unknown", "id": "r1", "index": 0}
SEALED = {"type": "reasoning.encrypted", "data": "xyz", "index": 0}
THINKING: dict[str, dict[str, Any]] = {
    "reasoning_content": {"reasoning_content": "why"},
    "reasoning": {"reasoning": "why"},
    "thinking": {"thinking": "why"},
    "two names": {"reasoning": "why", "reasoning_content": "why"},
    "empty beside full": {"reasoning": "why", "reasoning_content": "", "thinking": None, "reasoning_details": []},
    "reasoning_details": {"reasoning_details": [TEXT]},
    "as pieces": {"reasoning_details": [TEXT | {"text": "w"}, TEXT | {"text": "hy"}]},
    "as a summary": {"reasoning_details": [{"type": "reasoning.summary", "summary": "why"}]},
    "sealed beside readable": {"reasoning_details": [TEXT, SEALED]},
    "reasoning and its details": {"reasoning": "why", "reasoning_details": [TEXT, SEALED]},
    "thinking_blocks": {"thinking_blocks": [{"type": "thinking", "thinking": "why", "signature": "s"}]},
    "in content": {"content": "<think>\nwhy\n</think>\n\nb"},
    "in content, closer": {"content": "<think>why</think>b"},
    "in content, behind line breaks": {"content": "\n<think>\nwhy\n</think>\n\nb", "reasoning_content": None},
    "in content, behind an empty one": {"content": "<think></think><think>why</think>b"},
    "as a part": {
        "content": [{"type": "thinking", "thinking": "why", "signature": "s"}, {"type": "text", "text": "b"}]
    },
    "as a part of parts": {
        "content": [{"type": "thinking", "thinking": [{"type": "text", "text": "why"}]}, {"type": "text", "text": "b"}]
    },
}


@pytest.mark.parametrize("case", THINKING)
def test_thinking_is_thinking_wherever_it_stands(case: str) -> None:
    message = assistant(**THINKING[case])
    found = checked(message)
    assert found == {"role": "assistant", "content": "b", "reasoning_content": "why"}
    assert checked(found) == found
    text = rendered(M2, [USER, message], add_generation_prompt=False)
    assert text.endswith("]~b]ai\n<think>\nwhy\n</think>\n\nb[e~[\n")


def test_what_only_looks_like_thinking_is_content() -> None:
    for content in (
        "With <think>, then </think> and the answer.",
        "<think>never closed",
        "why</think>b",
        "`<think>x</think>`",
    ):
        assert checked(assistant(content=content))["content"] == content
    found = checked(assistant(content="<think>x</think>y", reasoning="why"))
    assert (found["reasoning_content"], found["content"]) == ("why", "<think>x</think>y")
    own = Said.of(assistant(content="<think>x</think>y"), [1])  # the model's own, whose thinking is known
    assert check_messages([USER, own])[1]["content"] == "<think>x</think>y"


# What the SDKs of OpenAI and Anthropic, OpenRouter, LiteLLM and Vercel's have on an assistant's message besides.
HARMLESS = {
    "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None, "images": [],
    "prefix": False, "parsed": None, "name": "m", "id": "msg_1", "index": 0, "type": "message", "model": "m",
    "stop_reason": "end_turn", "stop_sequence": None, "usage": {"input_tokens": 3}, "status": "completed",
    "provider_specific_fields": {"x": 1}, "cache_control": {"type": "ephemeral"}, "finish_reason": "stop",
    "logprobs": {"content": [1]}, "metadata": {"a": 1}, "citations": [{"a": 1}],
}  # fmt: skip


def test_fields_that_change_nothing() -> None:
    plain = rendered(M2, [USER, assistant()], add_generation_prompt=False)
    assert rendered(M2, [USER, assistant(**HARMLESS)], add_generation_prompt=False) == plain
    for name, value in (HARMLESS | {"refusal": "no", "annotations": [{"type": "url_citation"}]}).items():
        assert rendered(M2, [USER, assistant(**{name: value})], add_generation_prompt=False) == plain
    parts = [
        {"type": "text", "text": "b", "annotations": [], "citations": None, "cache_control": {"type": "ephemeral"}}
    ]
    assert rendered(M2, [USER, assistant(content=parts)], add_generation_prompt=False) == plain
    for kind in ("input_text", "output_text"):
        assert checked(assistant(content=[{"type": kind, "text": "b"}]))["content"] == "b"
    assert checked(assistant(content=[{"type": "refusal", "refusal": "no"}]))["content"] == "no"


LOST: dict[str, tuple[dict[str, Any], str]] = {
    "audio": (assistant(audio={"id": "a"}), "'audio'"),
    "images": (assistant(images=[{"type": "image_url"}]), "'images'"),
    "prefix": (assistant(prefix=True), "'prefix'"),
    "unknown": (assistant(mood="good"), "'mood'"),
    "thinking of a user": ({"role": "user", "content": "a", "reasoning_content": "b"}, "'reasoning_content'"),
    "calls of a user": ({"role": "user", "content": "a", "tool_calls": [{}]}, "'tool_calls'"),
    "image": ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "'image_url'"),
    "sound": ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "'input_audio'"),
    "file": ({"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}, "'input_file'"),
    "a thought of a user": ({"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}, "'thinking'"),
    "tool use": (assistant(content=[{"type": "tool_use", "name": "f", "input": {}}]), "'tool_use'"),
    "more in a part": ({"role": "user", "content": [{"type": "text", "text": "a", "image_url": "x"}]}, "'image_url'"),
    "a custom call": (assistant(tool_calls=[{"type": "custom", "custom": {"name": "f", "input": "x"}}]), "'custom'"),
    "more in a call": (assistant(tool_calls=[{"function": {"name": "f", "input": "x"}}]), "'input'"),
    "two thoughts": (
        assistant(reasoning="a", reasoning_content="b"),
        "reasoning_content and reasoning are two different",
    ),
    "sealed": (assistant(reasoning_details=[SEALED]), "reasoning_details is encrypted"),
    "sealed part": (assistant(content=[{"type": "redacted_thinking", "data": "x"}]), "content is encrypted"),
    "an unknown thought": (assistant(reasoning_details=[{"type": "reasoning.server_tool_call"}]), "server_tool_call"),
    "no string": (assistant(reasoning={"effort": "high"}), "reasoning is a dict"),
    "no list": (assistant(reasoning_details="why"), "reasoning_details is a str"),
    "a key twice": (assistant(tool_calls=[{"name": "f", "arguments": '{"a": 1, "a": 2}'}]), "'a' is given twice"),
    "half a character": (assistant(tool_calls=[{"name": "f", "arguments": '{"a": "\\ud800"}'}]), "U\\+D800"),
    "both kinds of call": (
        assistant(tool_calls=[{"name": "f"}], function_call={"name": "f"}),
        "both tool_calls and function_call",
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_what_would_be_lost_is_named(case: str) -> None:
    message, match = LOST[case]
    with pytest.raises(UsageError, match=f"Message 1.*{match}"):
        checked(message)


def test_the_deprecated_function_call() -> None:
    call = {"name": "f", "arguments": '{"a": 1}'}
    old = [USER, assistant(content=None, function_call=call), {"role": "function", "name": "f", "content": "2"}]
    new = [USER, assistant(content=None, tool_calls=[{"function": call}]), {"role": "tool", "content": "2"}]
    assert rendered(M2, old) == rendered(M2, new)


def test_half_a_character_is_told_by_field_and_place() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"role": "user", "content": "ab\ud800d"}, r"messages\[1\].content holds U\+D800, .* at position 2\."),
        (assistant(reasoning="a\udfff"), r"messages\[1\].reasoning_content holds U\+DFFF, .* at position 1\."),
        (
            assistant(tool_calls=[{"name": "f", "arguments": {"k\ud801": 1}}]),
            r"A name in messages\[1\].tool_calls\[0\].function.arguments holds U\+D801, .* at position 1\.",
        ),
    ]
    for message, match in cases:
        with pytest.raises(UsageError, match=match):
            rendered(M2, [USER, message])
    with pytest.raises(UsageError, match=r"values.x\[1\] holds U\+DC00"):
        to_json({"values": {"x": ["a", "\udc00"]}})
    assert json.loads(to_json({"a": "é"})) == {"a": "é"}
    assert check_tools([]) is None
