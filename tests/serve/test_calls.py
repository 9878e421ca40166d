"""Calls of tools in streams: arguments come as they are written, and are those of the whole answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import anthropic
import pytest

from m2lite import Model
from tests.serve.conftest import Served, serving
from tests.serve.sse import events

QUESTION = "Write a file, please."
SCHEMA = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "text": {"type": "string"}, "mode": {"type": "integer"}},
}
TEXT = 'He said: "ünï\\çødé 你好 \U0001f600"\n\t<b>' * 10
ARGUMENTS = {"path": "a.txt", "text": TEXT, "mode": 420}
WRITTEN = (
    '<minimax:tool_call>\n<invoke name="write">\n<parameter name="path">a.txt</parameter>\n'
    f'<parameter name="text">{TEXT}</parameter>\n<parameter name="mode">420</parameter>\n</invoke>\n'
    '<invoke name="list">\n</invoke>\n</minimax:tool_call>'
)
SAID = f"I write.\n</think>\n\n{WRITTEN}[e~["


class Call(NamedTuple):
    id: str
    name: str
    pieces: list[str]  # of its arguments


def _chat(served: Served, **more: Any) -> tuple[list[Call], list[Call]]:
    functions = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("write", "list")]
    asked = {"messages": [{"role": "user", "content": QUESTION}], "tools": functions, "seed": 1, **more}
    found = list[Call]()
    for _, data in events(served.http, "/v1/chat/completions", asked):
        for choice in data["choices"]:
            for call in choice["delta"].get("tool_calls", []):
                if call["index"] == len(found):
                    found.append(Call(call["id"], call["function"]["name"], []))
                else:
                    assert set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
                found[call["index"]].pieces.append(call["function"]["arguments"])
    message = served.http.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]
    whole = [Call("", c["function"]["name"], [c["function"]["arguments"]]) for c in message["tool_calls"]]
    return found, whole


def _responses(served: Served, **more: Any) -> tuple[list[Call], list[Call]]:
    functions = [{"type": "function", "name": name, "parameters": SCHEMA} for name in ("write", "list")]
    asked = {"input": QUESTION, "tools": functions, "seed": 1, **more}
    found, done = dict[int, Call](), list[str]()
    for name, data in events(served.http, "/v1/responses", asked):
        if name == "response.output_item.added" and data["item"]["type"] == "function_call":
            assert data["item"]["arguments"] == ""
            found[data["output_index"]] = Call(data["item"]["call_id"], data["item"]["name"], [])
        elif name == "response.function_call_arguments.delta":
            found[data["output_index"]].pieces.append(data["delta"])
        elif name == "response.function_call_arguments.done":
            assert data["arguments"] == "".join(found[data["output_index"]].pieces)
        elif name == "response.output_item.done":
            done.append(data["item"]["status"])
    output = served.http.post("/v1/responses", json=asked).json()["output"]
    assert done == [item["status"] for item in output]
    whole = [Call("", item["name"], [item["arguments"]]) for item in output if item["type"] == "function_call"]
    return list(found.values()), whole


def _messages(served: Served, **more: Any) -> tuple[list[Call], list[Call]]:
    asked: Any = {
        "model": "m", "max_tokens": 4000, "messages": [{"role": "user", "content": QUESTION}],
        "tools": [{"name": name, "input_schema": SCHEMA} for name in ("write", "list")], **more,
    }  # fmt: skip
    found = dict[int, Call]()
    for name, data in events(served.http, "/v1/messages", asked | {"seed": 1}):
        if name == "content_block_start" and data["content_block"]["type"] == "tool_use":
            found[data["index"]] = Call(data["content_block"]["id"], data["content_block"]["name"], [])
        elif name == "content_block_delta" and data["delta"]["type"] == "input_json_delta":
            found[data["index"]].pieces.append(data["delta"]["partial_json"])
    with served.anthropic.messages.stream(**asked, extra_body={"seed": 1}) as stream:
        own = stream.get_final_message().content
    content = served.http.post("/v1/messages", json=asked | {"seed": 1}).json()["content"]
    whole = [Call("", block["name"], [json.dumps(block["input"])]) for block in content if block["type"] == "tool_use"]
    if "max_tokens" not in more:  # where it is cut, the package leaves out the value that is
        used = [block.input for block in own if isinstance(block, anthropic.types.ToolUseBlock)]
        assert used == [json.loads(call.pieces[0]) for call in whole]
    return list(found.values()), whole


Ask = Callable[..., tuple[list[Call], list[Call]]]
DIALECTS = pytest.mark.parametrize("ask", [_chat, _responses, _messages])


@DIALECTS
def test_arguments_grow(tiny: Model, ask: Ask) -> None:
    script = tiny.tokenizer.encode(SAID, control=True)
    with serving(tiny, script=lambda _: script) as served:
        told, whole = ask(served)
    assert len({call.id for call in told}) == 2
    assert [call.name for call in told] == [call.name for call in whole] == ["write", "list"]
    found = [json.loads("".join(call.pieces)) for call in told]
    assert found == [json.loads(call.pieces[0]) for call in whole] == [ARGUMENTS, {}]
    assert "".join(told[0].pieces) == json.dumps(ARGUMENTS, ensure_ascii=False)
    assert len(told[0].pieces) > 5


@DIALECTS
def test_a_call_that_is_cut_off(tiny: Model, ask: Ask) -> None:
    """It is no JSON, so that nobody carries it out, and the same streamed and whole."""
    script = tiny.tokenizer.encode(SAID, control=True)
    n_tokens = len(tiny.tokenizer.encode(SAID[: SAID.index("你好")], control=True))
    limit = {_chat: "max_completion_tokens", _responses: "max_output_tokens", _messages: "max_tokens"}[ask]
    with serving(tiny, script=lambda _: script) as served:
        [told], [whole] = ask(served, **{limit: n_tokens})
    arguments = "".join(told.pieces)
    assert arguments.startswith('{"path": "a.txt", "text": "He said: \\"ünï\\\\çødé ')
    with pytest.raises(ValueError):
        json.loads(arguments)
    expected = json.dumps(json.loads(arguments + '"}')) if ask is _messages else arguments
    assert whole.pieces == [expected]


def test_a_call_that_was_cut_off_comes_back(tiny: Model) -> None:
    """With an error of its client: the conversation goes on, behind the very ids that were said."""
    tiny.loop.forget()
    script = tiny.tokenizer.encode(SAID, control=True)
    tools: Any = [{"type": "function", "function": {"name": "write", "parameters": SCHEMA}}]
    asked: list[Any] = [{"role": "user", "content": QUESTION}]
    with serving(tiny, script=lambda _: script) as served:
        create = served.openai.chat.completions.create
        first = create(model="m", messages=asked, tools=tools, max_tokens=60)
        assert first.choices[0].finish_reason == "length"
        message = first.choices[0].message.model_dump()
        for name in ("reasoning", "reasoning_content", None):
            message.pop(name, None)
            [call] = message["tool_calls"]
            more = [*asked, message, {"role": "tool", "tool_call_id": call["id"], "content": "The call is no JSON."}]
            second = create(model="m", messages=more, tools=tools, max_tokens=2)
            assert first.usage is not None and second.usage is not None
            assert second.usage.prompt_tokens_details is not None
            known = first.usage.prompt_tokens + first.usage.completion_tokens
            assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= known - 17
