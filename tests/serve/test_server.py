"""Requests beside each other: places, the queue, cancelling, the end of the server; and what it tells of itself."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from m2lite import Model
from m2lite.engine.thread import compute_thread
from m2lite.serve import answering, replies
from tests.serve.conftest import Serve, Served, serving
from tests.serve.sse import events
from tests.serve.test_chat_completions import QUESTION, WEATHER
from tests.tinymodel import ENDLESS, write_model

CHAT = "/v1/chat/completions"
ASKS = ["Hello", "Who are you?", "What is 2 + 3?", "Tell me a story.", "What is the capital of France?"]


def body(text: str = "Hello", **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def wait_until_idle(found: Served) -> None:
    """Nothing is asked or computed; the test's time limit ends what never comes."""
    driver = found.server._driver
    assert driver is not None
    while found.server.n_open or not driver.is_idle:
        pass


def test_many_at_once_are_what_each_is_alone(tiny: Model) -> None:
    tiny.loop.forget()
    asked = [(ASKS[n % len(ASKS)], n) for n in range(20)]
    with serving(tiny, parallel=4) as found, ThreadPoolExecutor(20) as threads:

        def ask(each: tuple[str, int]) -> Any:
            text, seed = each
            answer = found.http.post(CHAT, json=body(text, seed=seed, max_tokens=60, return_token_ids=True))
            return answer.json()["choices"][0]["token_ids"]

        told = list(threads.map(ask, asked))
        assert tiny.loop.counts.n_most_running <= 4
        wait_until_idle(found)
    for (text, seed), ids in zip(asked, told, strict=True):
        expected = tiny.chat([{"role": "user", "content": text}], seed=seed, max_tokens=60)
        assert ids == expected.completion.tokens


def test_the_queue_is_bounded(serve: Serve) -> None:
    """One is answered, one waits, the third is told when to come again; then there is room again."""
    found = serve("endless", parallel=1, queue=1)
    client = found.openai
    running = client.chat.completions.create(**body(stream=True))  # type: ignore[call-overload]
    next(iter(running))
    waiting = client.chat.completions.create(**body(stream=True))  # type: ignore[call-overload]
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(**body())
    assert caught.value.code == "queue_full"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert found.http.post("/v1/completions", json={}).status_code != 429
    running.close()
    assert next(iter(waiting)).choices
    waiting.close()
    wait_until_idle(found)
    assert client.chat.completions.create(**body(max_tokens=1)).choices


@pytest.mark.parametrize("more", [b"", b"\r\n", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_who_leaves_is_not_answered_any_more(serve: Serve, more: bytes) -> None:
    """Also one who does not stream: nothing was sent to it that could fail. And one who asked for more already."""
    found = serve("endless")
    data = json.dumps(body()).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(found.url.rpartition(":")[2]))) as stream:
        stream.sendall(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        while not found.server.under_way:
            pass
        stream.sendall(more)
    wait_until_idle(found)
    compute_thread().run(lambda: None)
    assert not found.server.model.loop.scheduler.running
    assert found.server.metrics.n_requests == {"cancelled": 1}


def test_one_that_fails_touches_no_other(serve: Serve) -> None:
    """Bad bodies, closed sockets and cancelled streams between answers that stay what they are."""
    found, luck = serve("random", parallel=3, queue=200), random.Random(1)
    bad: list[Any] = [{}, {"messages": 3}, body(temperature=9e9), body(tools=[{"type": "function"}]), body("x" * 9000)]
    plan = [(luck.choice(("good", "bad", "leave")), luck.choice(bad), luck.randrange(9)) for _ in range(60)]

    def run(each: tuple[str, Any, int]) -> Any:
        what, wrong, seed = each
        if what == "bad":
            answer = found.http.post(CHAT, json=wrong)
            assert answer.status_code == 400 and answer.json()["error"]["message"]
            return None
        asked = body(seed=seed, max_tokens=40, return_token_ids=True)
        if what == "leave":
            with found.http.stream("POST", CHAT, json={**asked, "stream": True}) as stream:
                next(stream.iter_lines())
            return None
        return found.http.post(CHAT, json=asked).json()["choices"][0]["token_ids"]

    with ThreadPoolExecutor(8) as threads:
        told = list(threads.map(run, plan))
    wait_until_idle(found)
    model = found.server.model
    for (what, _, seed), ids in zip(plan, told, strict=True):
        if what == "good":
            expected = model.chat([{"role": "user", "content": "Hello"}], seed=seed, max_tokens=40)
            assert ids == expected.completion.tokens


def test_an_error_while_computing_is_told(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its status, or as an event where the answer has begun."""
    found = serve("random")
    runner = found.server.model.runner

    def fail(*_: Any) -> Any:
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "evaluate_rows", fail)
        told = found.http.post(CHAT, json=body())
        assert told.status_code == 500 and "RuntimeError: boom" in told.json()["error"]["message"]
        with pytest.raises(openai.APIError, match="boom"):
            list(found.openai.chat.completions.create(**body(stream=True)))  # type: ignore[call-overload]
    assert found.http.post(CHAT, json=body(max_tokens=2)).status_code == 200


def test_draining(serve: Serve) -> None:
    """Running answers go on, new ones are refused, and those that still run are told when the time is over."""
    found = serve("endless")
    stream = found.openai.chat.completions.create(**body(stream=True))  # type: ignore[call-overload]
    chunks = iter(stream)
    next(chunks)
    loop = found.server._loop
    assert loop is not None
    loop.call_soon_threadsafe(found.server.drain)
    while not found.server.is_draining:
        pass
    assert found.http.get("/health").json() == {"status": "draining"}
    with pytest.raises(openai.InternalServerError) as caught:
        found.openai.chat.completions.create(**body())
    assert caught.value.status_code == 503 and caught.value.code == "draining"
    assert next(chunks).choices
    loop.call_soon_threadsafe(found.server.end_all)
    with pytest.raises(openai.APIError, match="ending"):
        list(chunks)


def test_a_prompt_that_is_read_is_told(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """By comments, so that no one gives up, and as events where they are asked for."""
    tiny.loop.forget()
    monkeypatch.setattr(replies, "BEAT_S", 1e-9)
    asked = body("word " * 300, stream=True, max_tokens=2)
    with serving(tiny) as found:
        for return_progress in (False, True):
            tiny.loop.forget()
            with found.http.stream("POST", CHAT, json=asked | {"return_progress": return_progress}) as stream:
                lines = list(stream.iter_lines())
            told = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            progress = [each["prompt_progress"] for each in told if "prompt_progress" in each]
            assert bool(progress) == return_progress
            assert return_progress or ": ping" in lines
    assert progress[-1]["processed"] == progress[-1]["total"] > 300
    assert progress[-1]["seconds_left"] == progress[-1]["cache"] == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/messages"])
def test_progress_in_every_dialect(tiny: Model, path: str) -> None:
    tiny.loop.forget()
    text = {"/v1/completions": "prompt", "/v1/responses": "input"}.get(path)
    asked = body("word " * 300, max_tokens=16) if text is None else {text: "word " * 300}
    with serving(tiny) as found:
        told = [data for _, data in events(found.http, path, asked | {"return_progress": True})]
    progress = [each["prompt_progress"] for each in told if "prompt_progress" in each]
    assert progress and progress[-1]["processed"] == progress[-1]["total"] > 300


def test_a_long_wait_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Once, as soon as it is known how long it will be."""
    monkeypatch.setattr(answering, "LONG_S", 0.0)
    with Model.open(write_model(tmp_path / "m.gguf", ENDLESS), ctx=4096) as model, serving(model) as found:
        n = found.http.post(CHAT, json=body("word " * 780, max_tokens=2)).json()["usage"]["prompt_tokens"]
    line = r"^req_\w+ · ([\d,]+) of ([\d,]+) tokens read \(0 cached\) · about \d+ s to go$"
    [(n_done, n_total)] = re.findall(line, capfd.readouterr().err, re.MULTILINE)
    assert n_done != n_total == f"{n:,}"


def test_ids_of_tokens(tiny: Model) -> None:
    """Streamed and whole, the prompt's too."""
    with serving(tiny) as found:
        asked = body(seed=5, max_tokens=20, return_token_ids=True)
        whole = found.http.post(CHAT, json=asked).json()
        ids, prompt = list[int](), list[int]()
        with found.http.stream("POST", CHAT, json={**asked, "stream": True}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    ids += chunk["choices"][0]["token_ids"]
                    prompt += chunk.get("prompt_token_ids", [])
    assert len(ids) == 20 and ids == whole["choices"][0]["token_ids"]
    assert prompt == whole["prompt_token_ids"] and len(prompt) == whole["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    "more",
    [
        {"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}, {"reasoning": {"effort": "none"}},
        {"chat_template_kwargs": {"enable_thinking": False}}, {"thinking": {"type": "enabled", "budget_tokens": 0}},
    ],
    ids=str,
)  # fmt: skip
def test_without_thinking(served: Served, more: dict[str, Any]) -> None:
    message = served.http.post(CHAT, json=body(max_tokens=30, **more)).json()["choices"][0]["message"]
    assert "reasoning_content" not in message and message["content"]


def test_efforts_that_the_model_does_not_know(served: Served) -> None:
    asked = body(max_tokens=30, reasoning_effort="high", thinking={"type": "adaptive"}, seed=1)
    found = served.http.post(CHAT, json=asked).json()
    assert found["choices"][0]["message"]["reasoning"] and "m2lite_warnings" not in found


def test_what_is_ignored_is_told(served: Served) -> None:
    asked = body(max_tokens=2, store=False, user="me", top_a=0.1, tools=[{"type": "web_search"}])
    assert served.http.post(CHAT, json=asked).json()["m2lite_warnings"] == [
        "Tools of type 'web_search' cannot be called here and were left out.",
        "The field 'top_a' is not known and was ignored.",
    ]
    refused = served.http.post(CHAT, json=body(logit_bias={"5": 1}))
    assert refused.status_code == 400 and "logit_bias" in refused.json()["error"]["message"]


def test_a_context_that_is_full(serve: Serve) -> None:
    found = serve("endless").http.post(CHAT, json=body(max_tokens=100_000)).json()
    assert found["choices"][0]["finish_reason"] == "length"
    n = found["usage"]["completion_tokens"]
    [warning] = found["m2lite_warnings"]
    assert warning == f"The answer was cut off after {n:,} tokens of 100,000 that were asked for: the context is full."


def test_names_of_models(serve: Serve) -> None:
    found = serve("reply", name="m2", is_strict=True)
    assert found.openai.models.list().data[0].id == "m2"
    assert found.openai.models.retrieve("m2").id == "m2"
    assert found.http.get("/v1/models").json()["models"] == []
    for name, status in (("m2", 200), ("gpt-4", 404)):
        answer = found.http.post(CHAT, json=body(max_tokens=1) | {"model": name})
        assert answer.status_code == status
    assert answer.json()["error"]["code"] == "model_not_found"
    del answer
    plain = serve("endless").http.post(CHAT, json=body(max_tokens=1) | {"model": "gpt-4"})
    assert plain.json()["model"] == "endless"


def test_the_tokenizer(served: Served, tiny: Model) -> None:
    http, ids = served.http, tiny.tokenizer.encode("Hello, world")
    assert http.post("/tokenize", json={"content": "Hello, world"}).json()["tokens"] == ids
    assert http.post("/tokenize", json={"prompt": "Hello, world"}).json()["count"] == len(ids)
    pieces = http.post("/tokenize", json={"content": "Hello, world", "with_pieces": True}).json()["tokens"]
    assert "".join(each["piece"] for each in pieces) == "Hello, world"
    assert http.post("/detokenize", json={"tokens": ids}).json()["content"] == "Hello, world"
    row = served.server.encode(served.server.defaults().__class__(QUESTION, served.server.options.sampling))
    assert http.post("/tokenize", json={"messages": QUESTION}).json()["tokens"] == row
    text = http.post("/apply-template", json={"messages": QUESTION, "tools": [WEATHER]}).json()["prompt"]
    assert text == tiny.template.render(QUESTION, [WEATHER])
    assert http.get("/tokenizer_info").json()["eos_token"] == "[e~["
    assert http.get("/props").json()["default_generation_settings"]["n_ctx"] == tiny.ctx
    for path, wrong in (("/tokenize", {}), ("/detokenize", {"tokens": "x"}), ("/detokenize", {"tokens": [1 << 40]})):
        assert http.post(path, json=wrong).status_code == 400


def test_metrics(served: Served) -> None:
    """In Prometheus' form: a type for each name, and counts that add up."""
    for _ in range(2):
        found = served.http.post(CHAT, json=body(max_tokens=5, seed=1)).json()
    text = served.http.get("/metrics").text
    values = dict[str, float]()
    for line in text.splitlines():
        if line.startswith("# "):
            assert re.fullmatch(r"# (HELP m2lite_\w+ .+|TYPE m2lite_\w+ (counter|gauge|histogram))", line)
        else:
            name, _, value = line.rpartition(" ")
            assert re.fullmatch(r'm2lite_\w+(\{\w+="[^"]*"\})?', name), line
            values[name] = float(value)
    n_prompt = found["usage"]["prompt_tokens"]
    n_cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert values["m2lite_prompt_tokens_total"] == 2 * n_prompt - n_cached
    assert values["m2lite_prefix_tokens_reused_total"] == n_cached > 0
    assert values["m2lite_tokens_predicted_total"] == 10
    assert values['m2lite_requests_total{end="length"}'] == 2
    assert values["m2lite_time_to_first_token_seconds_count"] == 2
    assert values['m2lite_time_to_first_token_seconds_bucket{le="+Inf"}'] == 2
    assert values["m2lite_requests_processing"] == values["m2lite_requests_deferred"] == 0


def test_nothing_to_do_is_nothing_done(served: Served) -> None:
    """The driver's thread waits for a condition, and the loop makes no step."""
    served.http.post(CHAT, json=body(max_tokens=2))
    wait_until_idle(served)
    n_steps = served.server.model.loop.counts.n_steps
    served.http.get("/health")
    assert served.server.model.loop.counts.n_steps == n_steps
    assert any(thread.name == "m2lite-driver" for thread in threading.enumerate())


def test_two_answers_have_two_ids(served: Served) -> None:
    found = [served.http.post(CHAT, json=body(max_tokens=1, seed=1)) for _ in range(2)]
    assert len({answer.json()["id"] for answer in found} | {a.headers["x-request-id"] for a in found}) == 4
    assert isinstance(found[0], httpx.Response)
