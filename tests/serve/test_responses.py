"""OpenAI's responses, as OpenAI's own client reads them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from m2lite import Model
from m2lite.errors import UsageError
from m2lite.serve.chat_completions import parse_chat
from m2lite.serve.responses_body import Names, chat_body
from tests.serve.conftest import Served, serving
from tests.serve.sse import events
from tests.serve.test_chat_completions import CALL

QUESTION = "What is the capital of France?"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "name": "get_weather", "description": "Weather in a city", "parameters": SCHEMA}
ASKED: dict[str, Any] = {"model": "m", "input": QUESTION, "max_output_tokens": 200}
_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def output(found: Any) -> list[Any]:
    """What was said, without what differs each time."""
    ids = {"id": "", "call_id": ""}
    return [item | {name: ids[name] for name in ids if name in item} for item in found["output"]]


def test_an_answer_is_what_python_gives(served: Served, tiny: Model) -> None:
    found = served.openai.responses.create(**ASKED, extra_body={"seed": 7})
    expected = tiny.chat([{"role": "user", "content": QUESTION}], seed=7, max_tokens=200)
    assert found.output_text == expected["content"]
    reasoning, message = found.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert reasoning.content[0].text == expected["reasoning_content"]
    assert message.type == "message"
    assert found.status == "completed"
    assert found.usage is not None
    assert found.usage.output_tokens == len(expected.completion.tokens)
    assert found.usage.output_tokens_details.reasoning_tokens > 0
    Response.model_validate(found.to_dict())


@pytest.mark.parametrize(
    "more",
    [{}, {"tools": [WEATHER]}, {"max_output_tokens": 1}, {"reasoning": {"effort": "none"}},
     {"include": ["message.output_text.logprobs"], "top_logprobs": 2}],
)  # fmt: skip
def test_streaming_gives_the_same(tiny: Model, more: dict[str, Any]) -> None:
    script = tiny.tokenizer.encode(CALL, control=True) if "tools" in more else None  # m2-tiny calls no tools
    asked = {**ASKED, **more, "seed": 3}
    with serving(tiny, script=lambda _: script) as served:
        whole = served.http.post("/v1/responses", json=asked).json()
        told = events(served.http, "/v1/responses", asked)
        own = served.openai.responses.stream(**{**ASKED, **more}, extra_body={"seed": 3})
        with own as stream:
            final = stream.get_final_response().to_dict() if "max_output_tokens" not in more else None
    Response.model_validate(whole)
    for number, (name, data) in enumerate(told):
        assert (name, number) == (data["type"], data["sequence_number"])
        parsed = _EVENT.validate_python(data)
        assert parsed.type == name
    names = [name for name, _ in told]
    assert names[:2] == ["response.created", "response.in_progress"]
    is_cut = more.get("max_output_tokens") == 1
    assert names[-1] == f"response.{whole['status']}" == ("response.incomplete" if is_cut else "response.completed")
    last = told[-1][1]["response"]
    assert output(last) == output(whole)
    assert [data["item"] for name, data in told if name == "response.output_item.done"] == last["output"]
    for item in output(last):
        place = last["output"].index(next(each for each in last["output"] if output({"output": [each]}) == [item]))
        deltas = [d["delta"] for n, d in told if str(n).endswith(".delta") and d["output_index"] == place]
        text = item["arguments"] if "arguments" in item else item["content"][0]["text"]
        assert "".join(deltas) == text
    if final is not None:
        assert [item["type"] for item in final["output"]] == [item["type"] for item in whole["output"]]  # type: ignore[attr-defined]
    kinds = [item["type"] for item in whole["output"]]
    if "tools" in more:
        assert kinds == ["reasoning", "message", "function_call", "function_call"]
        assert [(c["name"], c["arguments"]) for c in whole["output"][2:]] == [
            ("get_weather", '{"city": "Paris"}'),
            ("get_weather", '{"city": "Rome"}'),
        ]
    if "reasoning" in more:
        assert kinds == ["message"]
    if "include" in more:
        noted = whole["output"][1]["content"][0]["logprobs"]
        assert len(noted) > 2
        assert all(len(each["top_logprobs"]) == 2 for each in noted)
    if is_cut:
        assert whole["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_call_is_carried_out_and_goes_on(tiny: Model) -> None:
    """The next turn begins with all that was computed for the call; its function is called by the name it came with."""
    tiny.loop.forget()
    script = tiny.tokenizer.encode(CALL, control=True)
    tools = [{"type": "namespace", "name": "mcp__sky", "description": "The sky", "tools": [WEATHER]}]
    with serving(tiny, script=lambda prompt: script if len(prompt) < 600 else None) as served:
        asked = {**ASKED, "tools": tools, "instructions": "Be brief."}
        first = served.http.post("/v1/responses", json=asked).json()
        calls = [item for item in first["output"] if item["type"] == "function_call"]
        assert [(call["namespace"], call["name"]) for call in calls] == [("mcp__sky", "get_weather")] * 2
        results = [{"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"} for call in calls]
        items = [{"role": "user", "content": QUESTION}, *first["output"], *results]
        second = served.http.post("/v1/responses", json=asked | {"input": items, "max_output_tokens": 4}).json()
    usage = first["usage"]
    assert second["usage"]["input_tokens_details"]["cached_tokens"] >= usage["total_tokens"] - 17


def test_many_at_once(served: Served) -> None:
    def ask(seed: int) -> Any:
        asked = ASKED | {"max_output_tokens": 20, "seed": seed}
        return served.http.post("/v1/responses", json=asked).json()

    served.http  # noqa: B018 - made before the threads ask for it
    with ThreadPoolExecutor(20) as threads:
        found = list(threads.map(ask, range(20)))
    assert len({each["id"] for each in found}) == 20
    for seed in (0, 19):
        assert output(ask(seed)) == output(found[seed])


@pytest.mark.parametrize("nothing", ["", []])
def test_an_empty_input_is_answered(served: Served, nothing: Any) -> None:
    """Some clients try whether anybody is there."""
    found = served.openai.responses.create(model="m", input=nothing, instructions="Be brief.", max_output_tokens=1)
    assert found.status == "incomplete"
    assert found.usage is not None
    assert found.usage.output_tokens == 1


def test_errors(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="previous_response_id was given"):
        served.openai.responses.create(**ASKED, previous_response_id="resp_1")
    long = ASKED | {"input": "word " * 40_000}
    with pytest.raises(openai.BadRequestError) as caught:
        served.openai.responses.create(**long)
    assert caught.value.code == "context_length_exceeded"
    told = events(served.http, "/v1/responses", long)
    assert [name for name, _ in told] == ["response.created", "response.in_progress", "response.failed"]
    failed = told[-1][1]["response"]
    assert failed["error"]["code"] == "context_length_exceeded"
    assert failed["status"] == "failed"
    assert [data["sequence_number"] for _, data in told] == [0, 1, 2]


def test_an_error_in_mid_answer_is_an_event(tiny: Model) -> None:
    with serving(tiny) as served:
        found = list[Any]()
        endless = ASKED | {"max_output_tokens": 1000}
        with served.openai.responses.create(**endless, stream=True, extra_body={"seed": 1}) as stream:
            for event in stream:
                found.append(event)
                if event.type == "response.created":
                    served.server._loop.call_soon_threadsafe(served.server.end_all)  # type: ignore[union-attr]
    assert found[-1].type == "response.failed"
    assert found[-1].response.error.code == "draining"


def read(body: dict[str, Any], defaults: Any) -> tuple[Any, list[str], Names]:
    asked, told, names = chat_body(body)
    chat, more = parse_chat(asked, defaults)
    return chat, [*told, *more], names


def test_a_body_as_an_agent_sends_it(served: Served) -> None:
    inner = [WEATHER | {"strict": False}, {"type": "function", "name": "stop", "parameters": SCHEMA}]
    other = {"type": "namespace", "name": "b", "tools": [{"type": "function", "name": "stop"}]}
    body = {
        "model": "x", "stream": True, "store": False, "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k", "client_metadata": {"a": "b"}, "reasoning": {"effort": "high", "summary": "auto"},
        "parallel_tool_calls": True, "tool_choice": "auto", "truncation": "disabled", "instructions": "You help.",
        "text": {"verbosity": "low"},
        "tools": [{"type": "namespace", "name": "a", "tools": inner}, other, {"type": "web_search"}],
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "In few words."}]},
            {"role": "user", "content": [{"type": "input_text", "text": each} for each in ("Hi", "there")]},
            {"type": "reasoning", "summary": [], "encrypted_content": None,
             "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
            {"type": "function_call", "call_id": "c1", "name": "get_weather", "namespace": "a",
             "arguments": '{"city": "Rome"}'},
            {"type": "function_call", "call_id": "c2", "name": "stop", "namespace": "b", "arguments": ""},
            {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
            {"type": "function_call_output", "call_id": "c2",
             "output": [{"type": "input_text", "text": "done"}, {"type": "input_image", "image_url": "x"}]},
            {"type": "web_search_call", "id": "w", "status": "completed"},
            {"type": "reasoning", "summary": [], "encrypted_content": "abc"},
            {"role": "user", "content": "And?"},
        ],
        "novelty": 1,
    }  # fmt: skip
    chat, told, names = read(body, served.server.defaults())
    functions = [tool["function"] for tool in chat.tools]
    assert [function["name"] for function in functions] == ["get_weather", "a__stop", "b__stop"]
    assert functions[0] == {
        "name": "get_weather",
        "description": WEATHER["description"],
        "parameters": SCHEMA,
    }
    assert names.theirs("b__stop") == {"name": "stop", "namespace": "b"}
    assert names.theirs("other") == {"name": "other"}
    system, user, answer, first, second, question = chat.messages
    assert system == {"role": "system", "content": "You help.\n\nIn few words."}
    assert user == {"role": "user", "content": "Hi\nthere"}
    assert (answer["content"], answer["reasoning_content"]) == ("I look.", "Hm.")
    called = [(call["function"]["name"], call["function"]["arguments"]) for call in answer["tool_calls"]]
    assert called == [("get_weather", {"city": "Rome"}), ("b__stop", {})]
    assert (first["tool_call_id"], first["content"]) == ("c1", "sunny")
    assert second["content"] == "done\n[input_image, which this model cannot read]"
    assert question == {"role": "user", "content": "And?"}
    for words in ("'web_search'", "input_image", "web_search_call", "novelty"):
        assert sum(words in each for each in told) == 1, (words, told)
    assert len(told) == 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"conversation": "c"}, "conversation was given"),
        ({"background": True}, "background is true"),
        ({"input": 3}, "input is a int"),
        ({"input": [3]}, "Item 0 is a int"),
        ({"input": [{"role": "judge", "content": "x"}]}, "Item 0 has role 'judge'"),
        ({"input": [{"role": "user", "content": 3}]}, "Item 0: content is a int"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "a part of type 'input_image'"),
        ({"input": [{"type": "reasoning", "content": [{}]}]}, "content has a part without a text"),
        ({"input": [{"type": "reasoning", "summary": "x"}]}, "summary is a str"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "no assistant message"),
        ({"input": [{"type": "function_call", "call_id": "c"}, {"role": "user", "content": "x"}]}, "has no name"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{]"}, {"role": "user", "content": "x"}]},
         "its arguments are no JSON"),
        ({"instructions": []}, "instructions is a list"),
        ({"include": "x"}, "include is no list"),
        ({"text": {"format": {"type": "json_schema"}}}, "has no schema"),
        ({"text": {"format": 3}}, "text.format is a int"),
        ({"tools": [{"type": "function"}]}, "Tool 0 has no name"),
        ({"tools": 3}, "tools is no list"),
        ({"max_output_tokens": 0}, "max_completion_tokens is 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(served: Served, more: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read({**ASKED, **more}, served.server.defaults())


def test_a_schema(served: Served) -> None:
    text = {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}}
    assert read(ASKED | {"text": text}, served.server.defaults())[0].schema == SCHEMA
    assert read(ASKED | {"text": {"format": {"type": "text"}}}, served.server.defaults())[0].schema is None
