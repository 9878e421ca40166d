"""Anthropic's messages, as Anthropic's own client reads them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from m2lite import Model
from m2lite.errors import UsageError
from m2lite.serve.chat_completions import parse_chat
from m2lite.serve.messages import chat_body
from tests.serve.conftest import Serve, Served, serving
from tests.serve.sse import events
from tests.serve.test_chat_completions import CALL
from tests.tinymodel import ENDLESS, write_model

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"name": "get_weather", "description": "Current weather in a city", "input_schema": SCHEMA}
ASKED: Any = {"model": "m", "max_tokens": 200, "messages": QUESTION}


def test_an_answer_is_what_python_gives(served: Served, tiny: Model) -> None:
    found = served.anthropic.messages.create(**ASKED, extra_body={"seed": 7})
    expected = tiny.chat(QUESTION, seed=7, max_tokens=200)
    assert [block.type for block in found.content] == ["thinking", "text"]
    thinking, text = found.content
    assert isinstance(thinking, anthropic.types.ThinkingBlock)
    assert thinking.signature, "clients send a thought back as one only where it is signed"
    assert isinstance(text, anthropic.types.TextBlock)
    assert (thinking.thinking, text.text) == (expected["reasoning_content"], expected["content"])
    assert found.stop_reason == "end_turn"
    assert found.usage.output_tokens == len(expected.completion.tokens)
    Message.model_validate(found.to_dict())


@pytest.mark.parametrize(
    "more", [{}, {"tools": [WEATHER]}, {"stop_sequences": ["a"]}, {"max_tokens": 3}, {"thinking": {"type": "disabled"}}]
)
def test_streaming_gives_the_same(tiny: Model, more: dict[str, Any]) -> None:
    script = tiny.tokenizer.encode(CALL, control=True) if "tools" in more else None  # m2-tiny calls no tools
    asked = {**ASKED, **more, "seed": 3}
    with serving(tiny, script=lambda _: script) as served:
        whole = Message.model_validate(served.http.post("/v1/messages", json=asked).json())
        told = events(served.http, "/v1/messages", asked)
        own = served.anthropic.messages.stream(**{**ASKED, **more}, extra_body={"seed": 3})
        with own as stream:
            final = stream.get_final_message()
    for name, data in told:
        assert name == data["type"]
        if name != "ping":
            TypeAdapter(RawMessageStreamEvent).validate_python(data)
    assert told[0][0] == "message_start"
    assert told[-1][0] == "message_stop"
    said, expected_blocks = ([block.to_dict() | {"id": ""} for block in each.content] for each in (final, whole))
    assert said == expected_blocks
    assert (final.stop_reason, final.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert final.usage.output_tokens == whole.usage.output_tokens
    expected = {"tools": "tool_use", "stop_sequences": "stop_sequence", "max_tokens": "max_tokens"}
    assert whole.stop_reason == expected.get(next(iter(more), ""), "end_turn")
    kinds = [block.type for block in whole.content]
    if "tools" in more:
        assert kinds == ["thinking", "text", "tool_use", "tool_use"]
        calls = [block for block in whole.content if isinstance(block, anthropic.types.ToolUseBlock)]
        assert [(call.name, call.input) for call in calls] == [
            ("get_weather", {"city": "Paris"}),
            ("get_weather", {"city": "Rome"}),
        ]
        assert len({call.id for call in calls}) == 2
    if "stop_sequences" in more:
        assert whole.stop_sequence == "a"
    if "thinking" in more:
        assert kinds == ["text"]


def test_what_was_computed_before_is_told(served: Served) -> None:
    long = [{"role": "user", "content": "Tell me of the sea. " * 20}]
    asked = {"model": "m", "max_tokens": 4, "messages": long}
    first, second = (served.anthropic.messages.create(**asked).usage for _ in range(2))
    assert (first.cache_read_input_tokens, first.cache_creation_input_tokens) == (0, 0)
    assert (second.input_tokens, second.cache_read_input_tokens) == (1, first.input_tokens - 1)
    count = served.anthropic.messages.count_tokens(model="m", messages=long)
    assert count.input_tokens == first.input_tokens


def test_a_call_is_carried_out_and_goes_on(tiny: Model) -> None:
    """The next turn begins with all that was computed for the call."""
    tiny.loop.forget()
    script = tiny.tokenizer.encode(CALL, control=True)
    with serving(tiny, script=lambda prompt: script if len(prompt) < 600 else None) as served:
        first = served.anthropic.messages.create(**ASKED, tools=[WEATHER])
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "sunny"}]}
            for block in first.content
            if block.type == "tool_use"
        ]
        said = [{k: v for k, v in block.to_dict().items() if v is not None} for block in first.content]
        later: Any = [*QUESTION, {"role": "assistant", "content": said}, {"role": "user", "content": results}]
        second = served.anthropic.messages.create(model="m", max_tokens=4, tools=[WEATHER], messages=later)
        usage = first.usage
        assert second.usage.cache_read_input_tokens is not None
        n_hit, n_before = second.usage.cache_read_input_tokens, usage.input_tokens + usage.output_tokens
        assert n_hit >= n_before - 17


def test_many_at_once(served: Served) -> None:
    def ask(seed: int) -> Any:
        return served.anthropic.messages.create(**(ASKED | {"max_tokens": 20}), extra_body={"seed": seed})

    with ThreadPoolExecutor(20) as threads:
        found = list(threads.map(ask, range(20)))
    assert len({each.id for each in found}) == 20
    for seed in (0, 19):
        assert ask(seed).content == found[seed].content


def test_a_long_prompt_is_waited_for(tmp_path: Path) -> None:
    """More comes than pings, which clients do not count: nothing, again and again, of what is to come."""
    asked = ASKED | {"messages": [{"role": "user", "content": "word " * 780}], "max_tokens": 20}
    with Model.open(write_model(tmp_path / "m.gguf", ENDLESS), ctx=4096) as model, serving(model) as served:
        told = [data for _, data in events(served.http, "/v1/messages", asked)]
        whole = served.http.post("/v1/messages", json=asked).json()
        model.loop.forget()
        without = events(served.http, "/v1/messages", asked | {"thinking": {"type": "disabled"}})
        model.loop.forget()
        with_progress = events(served.http, "/v1/messages", asked | {"return_progress": True})
    n_pings = [data["type"] for data in told].count("ping")
    assert n_pings > 1
    nothing = {"type": "thinking_delta", "thinking": ""}
    assert [data.get("delta") for data in told].count(nothing) == n_pings - 1
    thinking = [data["delta"]["thinking"] for data in told if "thinking" in data.get("delta", {})]
    assert "".join(thinking) == whole["content"][0]["thinking"]
    assert all(data.get("content_block", {}).get("type") != "thinking" for _, data in without)
    n_pings = [name for name, _ in without].count("ping")
    assert [data.get("delta") for _, data in without].count({"type": "text_delta", "text": ""}) == n_pings - 1 > 0
    progress = [data["prompt_progress"]["processed"] for name, data in with_progress if name == "ping"]
    assert len(set(progress)) > 1 and progress == sorted(progress)


def test_errors_are_anthropics(serve: Serve) -> None:
    served = serve("reply")
    with pytest.raises(anthropic.BadRequestError) as caught:
        served.anthropic.messages.create(**ASKED | {"messages": [{"role": "user", "content": "word " * 4000}]})
    error: Any = caught.value.body
    assert error["error"]["type"] == "invalid_request_error"
    words = error["error"]["message"].split()
    assert words[:4] == ["prompt", "is", "too", "long:"]
    assert words[5:7] == ["tokens", ">"]
    assert int(words[4]) > int(words[7])
    assert words[8] == "maximum"
    with pytest.raises(anthropic.BadRequestError, match="temperature is -1"):
        served.anthropic.messages.create(**ASKED, extra_body={"temperature": -1})
    assert served.http.head("/").status_code == 200


def read(body: dict[str, Any], defaults: Any) -> tuple[Any, list[str]]:
    asked, told = chat_body(body)
    chat, more = parse_chat(asked, defaults)
    return chat, [*told, *more]


def test_a_body_as_an_agent_sends_it(served: Served) -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    body = {
        "model": "x", "max_tokens": 32000, "stream": True, "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"}, "metadata": {"user_id": "u"}, "context_management": {"edits": []},
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: a=1; b=2;"},
            {"type": "text", "text": "You help."},
            {"type": "text", "text": "In few words.", **cached},
        ],
        "tools": [WEATHER | cached, {"type": "web_search_20250305", "name": "web_search"}],
        "tool_choice": {"type": "auto"},
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi", **cached}, {"type": "text", "text": "there"}]},
            {"role": "system", "content": "Today is Monday."},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": ""},
                    {"type": "redacted_thinking", "data": "abc"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"city": "Rome"}},
                    {"type": "tool_use", "id": "c2", "name": "get_weather", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "And?"},
                    {"type": "tool_result", "tool_use_id": "c1", "content": "sunny", **cached},
                    {"type": "tool_result", "tool_use_id": "c2", "is_error": True, "content": [
                        {"type": "text", "text": "no city"}, {"type": "image", "source": {"data": "x"}}]},
                ],
            },
        ],
        "novelty": 1,
    }  # fmt: skip
    chat, told = read(body, served.server.defaults())
    assert chat.think_tokens is None
    assert chat.max_tokens == 32000
    assert chat.tools == [
        {"type": "function", "function": {"name": "get_weather", "description": WEATHER["description"],
                                          "parameters": SCHEMA}}
    ]  # fmt: skip
    system, user, answer, first, second, question = chat.messages
    assert system == {"role": "system", "content": "You help.\n\nIn few words.\n\nToday is Monday."}
    assert user == {"role": "user", "content": "Hi\nthere"}
    assert (answer["content"], answer["reasoning_content"]) == ("I look.", "Hm.")
    assert [call["function"]["arguments"] for call in answer["tool_calls"]] == [{"city": "Rome"}, {}]
    assert (first["tool_call_id"], first["content"]) == ("c1", "sunny")
    assert second["content"] == "Error: no city\n[image, which this model cannot read]"
    assert question == {"role": "user", "content": "And?"}
    for words in ("redacted_thinking", "image", "web_search_20250305", "novelty"):
        assert sum(words in each for each in told) == 1, (words, told)
    assert len(told) == 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"messages": []}, "messages is no list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "Message 0 has a block of type",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "Message 0: content is a int"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "The"}]}, "nothing is asked"),
        ({"messages": [3]}, "Message 0 is a int"),
        ({"system": 3}, "system: content is a int"),
        ({"thinking": {"type": "much"}}, "thinking is of type 'much'"),
        ({"thinking": 3}, "thinking is a int"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "think_budget is -1"),
        ({"tool_choice": {"type": "some"}}, "tool_choice is of type 'some'"),
        ({"tool_choice": {"type": ["auto"]}}, "tool_choice is of type"),
        ({"tools": 3}, "tools is no list"),
        ({"tools": [{"description": "x"}]}, "Tool 0 has no name"),
        ({"stop_sequences": 3}, "stop is neither"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "has no schema"),
        ({"max_tokens": "many"}, "max_tokens is 'many'"),
    ],
)
def test_what_cannot_be_meant(served: Served, more: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read({**ASKED, **more}, served.server.defaults())


def test_thinking_and_schema(served: Served) -> None:
    def chat(**more: Any) -> Any:
        return read({**ASKED, **more}, served.server.defaults())[0]

    assert chat(thinking={"type": "disabled"}).think_tokens == 0
    assert chat(thinking={"type": "enabled", "budget_tokens": 1024}).think_tokens == 1024
    assert chat(output_config={"format": {"type": "json_schema", "schema": SCHEMA}}).schema == SCHEMA
    assert chat(output_format={"type": "json_schema", "schema": SCHEMA}).schema == SCHEMA
    assert chat(top_k=5).sampling.top_k == 5
