"""Requests at which servers elsewhere fell over, and what goes wrong beside an answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m2lite import Model
from m2lite.dialogue.chat_request import ChatRequest
from m2lite.engine.thread import compute_thread
from m2lite.errors import BadModelError
from m2lite.sampling.draw import Sampling
from m2lite.serve.answering import AnswerRequest
from m2lite.serve.server import Server
from tests.bounded import bounded_work
from tests.serve.conftest import Serve, Served, serving
from tests.serve.test_server import CHAT, body, wait_until_idle

MANY = 10**9


def test_a_body_of_a_hundred_megabytes(served: Served) -> None:
    """Its sender gets an answer, and no more of it is held than a body may have."""

    def chunks() -> Iterator[bytes]:
        yield b'{"x": "'
        yield from [b"y" * 1_000_000] * 100

    with bounded_work(MANY, 40e6):
        answer = served.http.post(CHAT, content=chunks(), headers={"content-type": "application/json"})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (CHAT, body()),
        ("/v1/completions", {"prompt": "Hello"}),
        ("/v1/responses", {"input": "Hello"}),
        ("/v1/messages", body(max_tokens=2)),
    ],
)
def test_negative_numbers(served: Served, path: str, asked: dict[str, Any]) -> None:
    names = ["max_tokens", "seed", "top_k", "top_p", "min_p", "temperature", "n"]
    names[0] = "max_output_tokens" if path == "/v1/responses" else names[0]
    for name in names:
        for value in (-1, -(2**63)):
            answer = served.http.post(path, json=asked | {name: value})
            assert answer.status_code == 400 and str(value) in answer.json()["error"]["message"], (name, answer.text)


def test_a_template_in_a_request(served: Served) -> None:
    """It is code: nobody's is run but the file's."""
    template = "{{ cycler.__init__.__globals__ }}"
    answer = served.http.post(CHAT, json=body(chat_template=template))
    assert answer.status_code == 400 and "chat_template" in answer.json()["error"]["message"]
    plain, told = (
        served.http.post(CHAT, json=body(max_tokens=2, seed=1, return_token_ids=True, chat_template_kwargs=values))
        for values in ({}, {"chat_template": template})
    )
    assert told.json()["prompt_token_ids"] == plain.json()["prompt_token_ids"]
    assert told.json()["m2lite_warnings"] == [
        "The field 'chat_template' of chat_template_kwargs is not known and was ignored."
    ]


def test_nothing_is_computed_for_who_has_left(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the step that was under way."""
    found, late, has_left = serve("endless"), list[bool](), False
    runner = found.server.model.runner
    evaluate = runner.evaluate_rows

    def counted(*parts: Any, **more: Any) -> Any:
        late.append(has_left and not found.server.under_way)
        return evaluate(*parts, **more)

    monkeypatch.setattr(runner, "evaluate_rows", counted)
    with found.http.stream("POST", CHAT, json=body(stream=True)) as stream:
        next(line for line in stream.iter_lines() if "reasoning_content" in line)
        has_left = True
    wait_until_idle(found)
    compute_thread().run(lambda: None)
    assert late and sum(late) <= 1


def test_who_leaves_while_it_is_asked(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine has the request, and nobody has its answer yet."""
    found, goes_on = serve("endless"), threading.Event()
    assert found.http.get("/health").status_code == 200  # it has started
    server, submit = found.server, found.server._submit

    def slowly(answering: Any) -> None:
        goes_on.wait()
        submit(answering)

    monkeypatch.setattr(server, "_submit", slowly)
    prompt, n_before = server.model.encode_prompt("Hello"), server.model.loop.counts.n_drawn
    asked = AnswerRequest(chat=ChatRequest([], Sampling(seed=0)), prompt=prompt)
    assert server._loop is not None
    begun = asyncio.run_coroutine_threadsafe(server.begin(asked), server._loop)
    while not server.n_open:
        pass
    begun.cancel()
    while server.n_open:
        pass
    goes_on.set()
    monkeypatch.undo()
    assert found.http.post(CHAT, json=body(max_tokens=1)).status_code == 200  # behind it
    wait_until_idle(found)
    assert server.model.loop.counts.n_drawn - n_before < server.model.ctx // 2


def test_a_disk_that_fails_ends_no_thread(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiny.loop.forget()
    tiny.use_disk()
    try:
        with serving(tiny) as found:
            with monkeypatch.context() as patch:
                patch.setattr(tiny.loop, "save", _fail)
                assert found.http.post(CHAT, json=body(max_tokens=2)).status_code == 200
                wait_until_idle(found)
                _wait_for_driver(found.server)
            assert found.http.post(CHAT, json=body(max_tokens=2)).status_code == 200
    finally:
        tiny.loop.prefix_cache.disk = None
    assert "warning: prompts and answers are not kept on disk: The file has changed." in capfd.readouterr().err


def _fail(*_: Any) -> Any:
    raise BadModelError("The file has changed.")


def _wait_for_driver(server: Server) -> None:
    """Until the job that it does is done."""
    done = threading.Event()
    assert server._driver is not None
    server._driver.later(lambda stop: done.set())
    done.wait()
