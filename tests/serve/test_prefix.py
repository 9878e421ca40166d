"""The header that names what a prompt begins with: by it a proxy finds the server that has it computed."""

from __future__ import annotations

from typing import Any

import pytest

from m2lite.model.cache import PAGE
from tests.serve.conftest import Served
from tests.serve.test_chat_completions import WEATHER

QUESTION: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
CALLED = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
TURNS = [CALLED, RESULT, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "And now?"}]


def name(served: Served, path: str, **body: Any) -> str:
    answer = served.http.post(path, json={"model": "m", "max_tokens": 2, **body})
    assert answer.status_code == 200, answer.text
    return answer.headers.get("x-m2lite-prefix", "")


def chat(served: Served, messages: list[Any], tools: Any = (WEATHER,), **more: Any) -> str:
    return name(served, "/v1/chat/completions", messages=messages, tools=list(tools), **more)


@pytest.mark.parametrize("is_stream", [False, True])
def test_all_turns_of_a_conversation_have_the_same(served: Served, is_stream: bool) -> None:
    first = chat(served, QUESTION, stream=is_stream)
    assert len(first) == 16 and int(first, 16)
    for n in (2, 4):
        assert chat(served, QUESTION + TURNS[:n], stream=is_stream) == first
    others = [
        chat(served, QUESTION, tools=[]),
        chat(served, [QUESTION[0], {"role": "user", "content": "A title for: Hello"}]),
        chat(served, [{"role": "system", "content": "Be long."}, QUESTION[1]]),
    ]
    assert len({first, *others}) == 4


def test_other_dialects(served: Served) -> None:
    """What differs between the requests of a conversation and is not said to the model does not count."""

    def message(text: str, *more: Any, system: str = "Be brief.", mark: Any = None) -> str:
        block = {"type": "text", "text": text} | ({} if mark is None else {"cache_control": mark})
        billing = {"type": "text", "text": f"x-anthropic-billing-header: cch={len(more)};"}
        return name(
            served, "/v1/messages", messages=[{"role": "user", "content": [block]}, *more],
            system=[billing, {"type": "text", "text": system}],
        )  # fmt: skip

    first = message("Hello", mark={"type": "ephemeral"})
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]}
    assert first and message("Hello", answer, {"role": "user", "content": "And?"}) == first
    assert message("Hallo") != first

    items: list[Any] = [{"role": "user", "content": "Hello"}]
    first = name(served, "/v1/responses", input=items, max_output_tokens=2)
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hi"}]}
    items += [said, {"role": "user", "content": "And?"}]
    assert first and name(served, "/v1/responses", input=items, max_output_tokens=2) == first


def test_raw_prompts_have_that_of_their_first_page(served: Served) -> None:
    ids = list(range(300, 300 + 2 * PAGE))
    first = name(served, "/v1/completions", prompt=ids)
    assert first and name(served, "/v1/completions", prompt=ids[: PAGE + 1]) == first
    assert name(served, "/v1/completions", prompt=[7, *ids]) not in ("", first)
    assert name(served, "/v1/completions", prompt=ids[: PAGE - 1]) == ""


def test_what_is_no_answer_has_none(served: Served) -> None:
    assert "x-m2lite-prefix" not in served.http.get("/v1/models").headers
    refused = served.http.post("/v1/chat/completions", json={"messages": []})
    assert refused.status_code == 400 and "x-m2lite-prefix" not in refused.headers
