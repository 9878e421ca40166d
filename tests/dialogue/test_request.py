"""OpenAI's fields: each is supported, or an error that names it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m2lite import M2liteError, Model, Sampling, UsageError
from m2lite.chat.tools import Limits, load_tools
from m2lite.commands.generate import _as_object, _read_request
from m2lite.dialogue.chat_request import FIELDS, ChatRequest, check_whole, parse_request, response_body
from m2lite.dialogue.conversation import Conversation
from m2lite.engine.answer import Completion
from m2lite.engine.stats import Stats
from m2lite.sampling.json_schema import load_schema
from m2lite.sampling.tool_choice import NamedTool
from m2lite.text.reply import Reply

HELLO = [{"role": "user", "content": "Hello"}]
DEFAULTS = ChatRequest([], Sampling(0.5, 10, 0.9, 0.1, seed=7), max_tokens=99, think_tokens=5, stop_texts=("x",))
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}

STRICT = {"type": "function", "function": TOOL["function"] | {"strict": True, "parameters": {  # type: ignore[operator]
    "type": "object", "additionalProperties": True,
}}}  # fmt: skip

# Field, a value that is taken, and what it becomes.
TAKEN: list[tuple[str, Any, Any]] = [
    ("messages", HELLO, HELLO),
    ("messages", [{"role": "developer", "content": "Be brief."}, *HELLO][::1], None),
    ("model", "MiniMax-M2", "MiniMax-M2"),
    ("tools", [TOOL], [TOOL]),
    ("tools", [], None),
    ("tool_choice", "auto", "auto"),
    ("tool_choice", "none", "none"),
    ("parallel_tool_calls", True, True),
    ("parallel_tool_calls", False, False),
    ("max_tokens", 5, 5),
    ("max_completion_tokens", 5, 5),
    ("temperature", 0, 0.0),
    ("top_p", 0.25, 0.25),
    ("top_k", 3, 3),
    ("min_p", 0.5, 0.5),
    ("seed", 2**64 - 1, 2**64 - 1),
    ("presence_penalty", -2, -2.0),
    ("frequency_penalty", 1.5, 1.5),
    ("stop", "END", ("END",)),
    ("stop", ["a", "b"], ("a", "b")),
    ("response_format", {"type": "text"}, None),
    ("response_format", {"type": "json_object"}, {"type": "object"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}},
     {"type": "null"}),
    ("logprobs", True, 0),
    ("logprobs", False, None),
    ("think_budget", 0, 0),
    ("n", 1, None),
    ("stream", False, None),
]  # fmt: skip
PLACES = {
    "max_completion_tokens": "max_tokens", "stop": "stop_texts", "response_format": "schema",
    "think_budget": "think_tokens",
}  # fmt: skip


@pytest.mark.parametrize(("name", "value", "expected"), TAKEN)
def test_taken(name: str, value: Any, expected: Any) -> None:
    request = parse_request({"messages": HELLO, name: value}, DEFAULTS)
    place = PLACES.get(name, name)
    if hasattr(request.sampling, place):
        assert getattr(request.sampling, place) == expected
    elif hasattr(request, place) and expected is not None:
        assert getattr(request, place) == expected


def test_every_field_of_the_table_is_tried() -> None:
    assert {name for name, _, _ in TAKEN} | {"top_logprobs"} == set(FIELDS)


@pytest.mark.parametrize("name", sorted(set(FIELDS) - {"messages"}))
def test_null_is_the_default(name: str) -> None:
    assert parse_request({"messages": HELLO, name: None}, DEFAULTS) == parse_request({"messages": HELLO}, DEFAULTS)


WRONG: list[tuple[str, Any]] = [
    ("messages", []), ("messages", "Hello"), ("messages", [{"role": "robot", "content": "x"}]), ("messages", [3]),
    ("messages", [*HELLO, {"role": "assistant", "content": "Hi"}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("model", 3), ("tools", "f"), ("tools", [{}]), ("tool_choice", "required"), ("tool_choice", "any"),
    ("tool_choice", {"type": "function"}), ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("parallel_tool_calls", 1), ("max_tokens", 0), ("max_tokens", 2.0), ("max_tokens", True),
    ("max_completion_tokens", -1), ("temperature", "1"), ("temperature", -0.1), ("temperature", float("nan")),
    ("top_p", 1.01), ("top_k", -1), ("min_p", 2), ("seed", -1), ("seed", 2**64), ("presence_penalty", 3),
    ("frequency_penalty", None.__class__), ("stop", 3), ("stop", [""]), ("response_format", "json"),
    ("response_format", {"type": "xml"}), ("response_format", {"type": "json_schema"}),
    ("logprobs", 3), ("top_logprobs", 5), ("n", 2), ("n", True), ("stream", True), ("think_budget", -1),
    ("logit_bias", {}), ("user", "me"), ("stream_options", {}), ("metadata", {}), ("functions", []), ("audio", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_ones_are_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"(?i)" + name.rstrip("s")):
        parse_request({"messages": HELLO, name: value}, DEFAULTS)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([], "list"),
        ({}, "no messages"),
        ({"messages": None}, "no messages"),
        ({"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        ({"messages": HELLO, "top_logprobs": 3, "logprobs": False}, "without logprobs"),
        ({"messages": HELLO, "tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "There are 'f'"),
        ({"messages": HELLO, "tools": [STRICT]}, "The schema of the tool 'f' allows parameters"),
        (
            {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "not",
        ),
    ],
)
def test_wrong_bodies(body: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_request(body, DEFAULTS)


@pytest.mark.parametrize("choice", [{"function": {"name": "f"}}, {"name": "f"}], ids=["chat", "responses"])
def test_a_tool_that_is_named(choice: Any) -> None:
    """With an answer of a schema beside it, which then cannot come."""
    body = {"messages": HELLO, "tools": [TOOL], "tool_choice": {"type": "function"} | choice}
    request = parse_request(body | {"response_format": {"type": "json_object"}}, DEFAULTS)
    assert request.tool_choice == NamedTool("f") and request.schema == {"type": "object"}
    asked = request.to_engine([1], 0)
    assert (asked.tool_choice, asked.parallel_tool_calls, asked.tools) == (NamedTool("f"), True, request.tools)


def test_what_is_left_out_is_the_default() -> None:
    request = parse_request({"messages": HELLO, "top_p": 1}, DEFAULTS)
    assert request.sampling == Sampling(0.5, 10, 1.0, 0.1, seed=7)
    assert (request.max_tokens, request.think_tokens, request.stop_texts) == (99, 5, ("x",))


def test_json_that_was_cut_off_is_an_error() -> None:
    cut = Completion([1, 2], Reply("", "{"), "length")
    check_whole(None, cut)
    check_whole({}, Completion([1], Reply("", "{}"), "stop"))
    with pytest.raises(M2liteError, match="cut off after 2 tokens"):
        check_whole({}, cut)


@pytest.fixture(scope="module")
def tiny(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model) as model:
        yield model


def test_response(tiny: Model) -> None:
    body = {"messages": HELLO, "seed": 3, "logprobs": True, "top_logprobs": 2, "max_tokens": 200}
    request = parse_request(body, ChatRequest([], Sampling(seed=0)))
    with tiny.session() as session:
        conversation = Conversation(session)
        list(conversation.reply_to(request.messages, **request.options()))
        found = response_body(conversation.answer, tiny.tokenizer, "chatcmpl-1", "m2-tiny", 1)
        plain = Conversation(session)
        list(plain.ask("Hello", sampling=Sampling(seed=3), max_tokens=200))
    assert conversation.answer.tokens == plain.answer.tokens
    assert json.loads(json.dumps(found)) == found
    choice, answer = found["choices"][0], conversation.answer
    assert choice["message"]["content"] == answer.reply.content
    assert choice["message"]["reasoning_content"] == answer.reply.thinking
    assert choice["finish_reason"] == answer.finish_reason
    assert found["usage"]["completion_tokens"] == len(answer.tokens)
    entries = choice["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * len(answer.tokens)
    assert b"".join(bytes(e["bytes"]) for e in entries).decode() == tiny.tokenizer.decode(answer.tokens)


def test_calls_in_a_response(tiny: Model) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
    answer = Completion([1], Reply("hm", "", [call]), "stop")
    choice = response_body(answer, tiny.tokenizer, "x", "m", 1)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (told,) = choice["message"]["tool_calls"]
    assert told["function"] == {"name": "f", "arguments": '{"a": "é"}'} and told["id"]
    again = [*HELLO, choice["message"], {"role": "tool", "tool_call_id": told["id"], "content": "1"}]
    assert parse_request({"messages": again}, DEFAULTS).messages[1]["tool_calls"][0]["function"] == call["function"]


def test_ids_of_calls(tiny: Model) -> None:
    """The same on every run, so that results are the same bytes; and of no other answer, also with the same seed."""
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    answer = Completion([1], Reply("hm", "", [call, call]), "stop")

    def ids(answer: Completion, name: str = "x") -> list[str]:
        [choice] = response_body(answer, tiny.tokenizer, name, "m", 1)["choices"]
        return [call["id"] for call in choice["message"]["tool_calls"]]

    later = replace(answer, stats=Stats(n_prompt=9))
    assert ids(answer) == ids(answer)
    others = [*ids(answer), *ids(answer, "y"), *ids(later), *ids(replace(answer, tokens=[2]))]
    assert len(set(others)) == 8


def test_warnings_in_a_response(tiny: Model) -> None:
    """What is in doubt about the calls is told to programs, too."""
    answer = Completion([1], Reply("hm", "", [], ["The call of 'f' is cut off."]), "stop")
    found = response_body(answer, tiny.tokenizer, "x", "m", 1)
    assert found["m2lite_warnings"] == ["The call of 'f' is cut off."]
    assert _as_object(tiny, answer, 1)["m2lite_warnings"] == found["m2lite_warnings"]
    calm = Completion([1], Reply("hm", "b"), "stop")
    assert "m2lite_warnings" not in response_body(calm, tiny.tokenizer, "x", "m", 1)
    assert "m2lite_warnings" not in _as_object(tiny, calm, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "'content' is given twice"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "holds U\\+D800"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}], "x\\udfff": 1}', "holds U\\+D[8F]"),
        (b'{"temperature": NaN}', "NaN is no JSON"),
        (b"\xff", "no UTF-8"),
        (b"[" * 100_000, "levels deep"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, text: bytes, said: str) -> None:
    """Requests, schemas and tools alike."""
    path = tmp_path / "x.json"
    path.write_bytes(text)
    for read in (
        lambda: _read_request(str(path), DEFAULTS),
        lambda: load_schema(text, "x.json"),
        lambda: load_tools([str(path)], Limits(tmp_path)),
    ):
        with pytest.raises(UsageError, match=f"x.json: no JSON .*{said}"):
            read()
