"""A long prompt lets others go on between its layers: nobody waits for it, and every id stays what it is alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2lite import Model, Request, Sampling
from m2lite.engine.driver import Driver, News
from m2lite.engine.handle import Handle
from m2lite.engine.pace import MOST_ROWS, STEP_S, Pace
from m2lite.engine.sequence import Event, Prompt, Token

N_LONG = 700


@pytest.fixture(scope="module")
def model(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model, ctx=1024, sequences=4, heat=False) as opened:
        opened.loop.share_time()
        yield opened


@pytest.fixture(autouse=True)
def always_others(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Others have their turn at every look, whatever the clock says; and nothing is left of an earlier test."""
    real = type(model.loop)._let_others_go_on

    def let(loop: Any, stop: Any) -> None:
        loop._others_from = 0.0
        real(loop, stop)

    monkeypatch.setattr(type(model.loop), "_let_others_go_on", let)
    model.loop.forget()
    yield
    assert not model.loop.scheduler.running
    assert not model.loop.scheduler.in_flight


def request(n: int, seed: int, **more: Any) -> Request:
    ids = np.random.default_rng(seed).integers(300, 2000, n).tolist()
    return Request(prompt=ids, sampling=Sampling(seed=seed), ignore_stop=True, keep="nothing", **more)


def alone(bundled: Path, requests: Sequence[Request]) -> list[list[int]]:
    with Model.open(bundled, ctx=1024, draft="off", heat=False) as model:
        return [model.submit(each).result().tokens for each in requests]


def drain(handles: Sequence[Handle]) -> list[tuple[int, Event]]:
    """(which, event) in the order in which they came, on one thread."""
    found = list[tuple[int, Event]]()
    while not all(each.is_over for each in handles):
        handles[0]._loop.drive()
        for i, each in enumerate(handles):
            while each._sequence.events:
                found.append((i, each._sequence.events.popleft()))
    return found


@pytest.mark.parametrize("draft", ["off", "mtp", "auto"])
def test_an_answer_goes_on_while_a_long_prompt_is_read(model: Model, bundled_model: Path, draft: str) -> None:
    requests = [request(20, 1, max_tokens=60, draft=draft), request(N_LONG, 2, max_tokens=20, draft=draft)]
    expected = alone(bundled_model, [request(20, 1, max_tokens=60), request(N_LONG, 2, max_tokens=20)])
    first = model.submit(requests[0])
    while not first.completion.tokens:
        model.loop.drive()
    n_before, news = len(first.completion.tokens), list[int]()
    model.loop.on_news = lambda: news.append(len(first.completion.tokens))
    try:
        long = model.submit(requests[1])
        drain([first, long])
    finally:
        model.loop.on_news = lambda: None
    assert [first.completion.tokens, long.completion.tokens] == expected
    assert news
    assert news[0] > n_before  # tokens came in the middle of the prompt


def test_tokens_are_told_while_a_long_prompt_is_read(model: Model) -> None:
    """To those who do not drive the loop, such as a server."""
    told, over = list[tuple[str, bool]](), threading.Event()
    handles = dict[str, Handle]()

    def deliver(news: list[News]) -> None:
        for each in news:
            is_reading = "long" in handles and not handles["long"].completion.tokens
            told.append((each.listener, is_reading and any(isinstance(event, Token) for event in each.events)))
        if len(handles) == 2 and all(each.is_over for each in handles.values()):
            over.set()

    driver = Driver(model, deliver)
    try:
        handles["long"] = driver.submit(request(N_LONG, 60, max_tokens=2), "long")
        handles["short"] = driver.submit(request(20, 61, max_tokens=30), "short")
        assert over.wait(60)
    finally:
        driver.close()
        model.loop.on_news = lambda: None
    assert ("short", True) in told


def test_a_short_request_passes_a_long_prompt(model: Model, bundled_model: Path) -> None:
    requests = [request(N_LONG, 3, max_tokens=5), request(30, 4, max_tokens=5)]
    expected = alone(bundled_model, requests)
    handles = [model.submit(each) for each in requests]
    passed = list[bool]()
    model.loop.on_news = lambda: passed.append(len(handles[1].completion.tokens) > len(handles[0].completion.tokens))
    try:
        drain(handles)
    finally:
        model.loop.on_news = lambda: None
    assert [each.completion.tokens for each in handles] == expected
    assert any(passed)


def test_a_long_prompt_that_is_cancelled_ends_and_the_others_go_on(model: Model, bundled_model: Path) -> None:
    requests = [request(20, 5, max_tokens=40), request(N_LONG, 6, max_tokens=20)]
    expected = alone(bundled_model, requests[:1])
    first, long = [model.submit(each) for each in requests]
    model.loop.on_news = long.cancel
    try:
        drain([first, long])
    finally:
        model.loop.on_news = lambda: None
    assert first.completion.tokens == expected[0]
    assert long.completion.finish_reason == "interrupted"
    assert not long.completion.tokens


def test_one_that_fails_meanwhile_harms_nobody(
    model: Model, bundled_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        request(20, 7, max_tokens=40, key="bad"),
        request(N_LONG, 8, max_tokens=8),
        request(25, 9, max_tokens=8),
    ]
    expected = alone(bundled_model, requests)
    handles = [model.submit(each) for each in requests]
    draw, bad = handles[0].answer.draw, list[int]()

    def fail(*arguments: Any) -> None:
        bad.append(1)
        if len(bad) == 5:
            raise RuntimeError("a bug")
        draw(*arguments)

    monkeypatch.setattr(handles[0].answer, "draw", fail)
    drain(handles)
    assert isinstance(handles[0].error, RuntimeError)
    assert [each.completion.tokens for each in handles[1:]] == expected[1:]


def test_pages_run_out_while_a_long_prompt_is_read(bundled_model: Path) -> None:
    requests = [request(100, 20 + i, max_tokens=150) for i in range(3)] + [request(N_LONG, 30, max_tokens=30)]
    expected = alone(bundled_model, requests)
    with Model.open(bundled_model, ctx=1024, pool=1024, sequences=4, heat=False) as model:
        model.loop.share_time()
        handles = [model.submit(each) for each in requests]
        drain(handles)
        assert [each.completion.tokens for each in handles] == expected


def test_what_is_cached_stays_while_a_long_prompt_is_read(model: Model) -> None:
    ids = request(200, 40).prompt
    model.submit(Request(prompt=ids, sampling=Sampling(seed=1), max_tokens=1)).result()
    long = model.submit(request(N_LONG, 41, max_tokens=1))
    drain([long])
    assert model.loop.n_cached(ids) == len(ids)


def test_long_prompts_that_wait_are_not_preempted(model: Model, bundled_model: Path) -> None:
    requests = [request(N_LONG, 50 + i, max_tokens=4) for i in range(3)]
    expected, n_before = alone(bundled_model, requests), model.loop.counts.n_preempted
    handles = [model.submit(each) for each in requests]
    drain(handles)
    assert [each.completion.tokens for each in handles] == expected
    assert model.loop.counts.n_preempted == n_before


def test_progress_of_the_long_prompt_is_told(model: Model) -> None:
    model.n_rows, n_rows = 256, model.n_rows
    try:
        handles = [model.submit(request(N_LONG, 11, max_tokens=2)), model.submit(request(20, 12, max_tokens=30))]
        done = [event.n_done for i, event in drain(handles) if i == 0 and isinstance(event, Prompt)]
    finally:
        model.n_rows = n_rows
    assert len(done) >= 3
    assert done == sorted(set(done))
    assert done[-1] == N_LONG


def test_pace_bounds_the_rows_of_a_step() -> None:
    pace = Pace()
    assert 1 <= pace.rows(3) <= MOST_ROWS
    for _ in range(20):
        pace.saw(2, 0, 0.1)
        pace.saw(2, 4, 0.1 + 4 * 0.05)
    n = pace.rows(2)
    assert 0.1 + n * 0.05 <= STEP_S < 0.1 + (n + 1) * 0.05 + 1e-6
    for _ in range(40):
        pace.saw(1, 0, 2.0)
    assert pace.rows(1) >= 30  # twice a token's time
    for _ in range(40):
        pace.saw(0, 1, 10.0)
    assert pace.rows(1) == 1
