"""Chat completions, as OpenAI's own client reads them."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from m2lite import Model
from tests.serve.conftest import Serve, Served, serving

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_an_answer_is_what_python_gives(served: Served, tiny: Model) -> None:
    found = served.openai.chat.completions.create(model="any", messages=QUESTION, seed=7, max_tokens=200)
    expected = tiny.chat(QUESTION, seed=7, max_tokens=200)
    message = found.choices[0].message
    assert message.content == expected["content"]
    assert message.reasoning_content == message.reasoning == expected["reasoning_content"]  # type: ignore[attr-defined]
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None
    assert found.usage.completion_tokens == len(expected.completion.tokens)
    assert found.model_extra is not None
    assert found.model_extra["m2lite"]["seed"] == 7


CALL = (
    'I look.\n</think>\n\nWait.\n<minimax:tool_call>\n<invoke name="get_weather">\n'
    '<parameter name="city">Paris</parameter>\n</invoke>\n<invoke name="get_weather">\n'
    '<parameter name="city">Rome</parameter>\n</invoke>\n</minimax:tool_call>[e~['
)


@pytest.mark.parametrize("more", [{}, {"tools": [WEATHER]}, {"logprobs": True, "top_logprobs": 2}, {"stop": ["a"]}])
def test_streaming_gives_the_same(tiny: Model, more: dict[str, Any]) -> None:
    script = tiny.tokenizer.encode(CALL, control=True) if "tools" in more else None  # m2-tiny calls no tools
    with serving(tiny, script=lambda _: script) as served:
        _check_streaming(served.openai, more)


def _check_streaming(client: openai.OpenAI, more: dict[str, Any]) -> None:
    asked: Any = {"model": "m", "messages": QUESTION, "seed": 3, "max_tokens": 300, **more}
    whole = client.chat.completions.create(**asked).choices[0]
    thinking, content, calls, reasons, logprobs = "", "", dict[int, list[str]](), list[str](), list[Any]()
    usage = None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            thinking += getattr(choice.delta, "reasoning_content", None) or ""
            content += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                assert call.function is not None
                begun = calls.setdefault(call.index, ["", ""])
                begun[0] += call.function.name or ""
                begun[1] += call.function.arguments or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
            logprobs += choice.logprobs.content or [] if choice.logprobs else []
    assert usage is not None
    assert (thinking, content) == (whole.message.reasoning_content, whole.message.content)  # type: ignore[attr-defined]
    assert reasons == [whole.finish_reason]
    expected = [[c.function.name, c.function.arguments] for c in whole.message.tool_calls or []]  # type: ignore[union-attr]
    assert list(calls.values()) == expected
    if "tools" in more:
        assert expected == [["get_weather", '{"city": "Paris"}'], ["get_weather", '{"city": "Rome"}']]
        assert whole.finish_reason == "tool_calls"
    if "logprobs" in more:
        assert whole.logprobs is not None
        assert logprobs == whole.logprobs.content
        assert len(logprobs) == usage.completion_tokens


def test_a_client_that_goes_away_stops_its_answer(serve: Serve) -> None:
    found = serve("endless")
    stream = found.openai.chat.completions.create(model="m", messages=QUESTION, stream=True)
    next(iter(stream))
    stream.close()
    driver = found.server._driver
    assert driver is not None
    while not driver.is_idle:  # ends, or the test's time limit does it
        pass
    assert not found.server.under_way


def test_errors_are_openais(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.openai.chat.completions.create(model="m", messages=QUESTION, temperature=-1)
    assert caught.value.type == "invalid_request_error"
    assert "temperature is -1" in caught.value.message
    long: Any = [{"role": "user", "content": "word " * 40_000}]
    with pytest.raises(openai.BadRequestError) as caught:
        served.openai.chat.completions.create(model="m", messages=long)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        served.openai.models.retrieve("x/y")
    assert served.http.post("/v1/nothing", json={}).json()["error"]["code"] == "not_found"
    assert served.http.get("/v1/chat/completions").status_code == 405
