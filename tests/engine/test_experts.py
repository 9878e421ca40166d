"""Which experts tokens were drawn with is noted where it is asked for, the same in every way of computing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from m2lite import Model, Request, Sampling
from m2lite.engine.answer import Completion
from m2lite.engine.thread import compute_thread
from m2lite.model import residency
from m2lite.model.observer import Observer
from m2lite.storage import syscalls
from m2lite.text.template import encode_chat
from tests.budgets import budget_beyond

Ids = npt.NDArray[Any]


class Chosen(Observer):
    """The experts of one call's rows, by layer."""

    def __init__(self) -> None:
        self.found = list[Ids]()

    def chosen(self, layer: int, start: int, ids: npt.NDArray[np.int32]) -> None:
        self.found.append(ids.copy())


@pytest.fixture(scope="module")
def model(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model, ctx=1024, sequences=4, heat=False) as opened:
        yield opened


@pytest.fixture(autouse=True)
def nothing_cached(model: Model) -> None:
    model.loop.forget()


def request(n: int, seed: int, **more: Any) -> Request:
    ids = np.random.default_rng(seed).integers(300, 2000, n).tolist()
    asked: dict[str, Any] = {"prompt": ids, "sampling": Sampling(seed=seed), "max_tokens": 40, "ignore_stop": True}
    return Request(**asked | more)


def expected(model: Model, asked: Request, done: Completion) -> Ids:
    """[n_tokens, n_layers, n_used]: the prompt with its answer in one call, as an observer sees it."""

    def look() -> Ids:
        timeline, seen = model.runner.pool.timeline(), Chosen()
        model.runner.evaluate(timeline, 0, [*asked.prompt, *done.tokens[:-1]], observers=[seen])
        timeline.release()
        return np.stack(seen.found, axis=1)[len(asked.prompt) - 1 :]

    return compute_thread().run(look)


def noted(model: Model, done: Completion) -> Ids:
    c = model.config
    assert None not in done.experts and len(done.experts) == len(done.tokens)
    return np.frombuffer(b"".join(filter(None, done.experts)), np.uint8).reshape(-1, c.n_layers, c.n_experts_used)


@pytest.mark.parametrize("draft", ["off", "ngram", "mtp"])
def test_each_token_has_those_that_it_was_drawn_with(model: Model, draft: str) -> None:
    """Beside an answer that does not ask, whose tokens are the same as those of one that does."""
    asked, plain = request(100, 1, experts=True, draft=draft), request(100, 1, draft=draft)
    done, other = (each.result() for each in [model.submit(asked), model.submit(plain)])
    assert np.array_equal(noted(model, done), expected(model, asked, done))
    assert other.tokens == done.tokens and other.experts == []
    if draft != "off":
        assert done.stats.drafted is not None


def test_a_prompt_that_is_cached(model: Model) -> None:
    asked = request(200, 2, experts=True)
    first, second = (model.submit(asked).result() for _ in range(2))
    assert second.stats.n_reused == 199
    assert second.experts == first.experts and np.array_equal(noted(model, first), expected(model, asked, first))


def test_while_a_long_prompt_is_read(bundled_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls are under way then, and each has its own."""
    with Model.open(bundled_model, ctx=1024, sequences=4, heat=False) as model:
        model.loop.share_time()
        real = type(model.loop)._let_others_go_on

        def let(loop: Any, stop: Any) -> None:
            loop._others_from = 0.0
            real(loop, stop)

        monkeypatch.setattr(type(model.loop), "_let_others_go_on", let)
        asked = [request(20, 3, experts=True, max_tokens=60), request(700, 4, experts=True, max_tokens=8)]
        short = model.submit(asked[0])
        while not short.completion.tokens:
            model.loop.drive()
        n_before, long = len(short.completion.tokens), model.submit(asked[1])
        while not long.completion.tokens:
            model.loop.drive()
        assert len(short.completion.tokens) > n_before + 1
        for each, handle in zip(asked, (short, long), strict=True):
            done = handle.result()
            assert np.array_equal(noted(model, done), expected(model, each, done))


def test_ids_that_nobody_drew_have_none(model: Model) -> None:
    """Those that the answer began with, and those that close its thinking."""
    given = model.submit(request(50, 5)).result().tokens[:10]
    done = model.submit(request(50, 5, given=given, experts=True)).result()
    assert [each is None for each in done.experts] == [True] * 10 + [False] * 30
    ids = encode_chat(model.tokenizer, model.template, [{"role": "user", "content": "Hello"}], None)
    asked = Request(prompt=ids, sampling=Sampling(seed=1), max_tokens=40, think_tokens=5, experts=True)
    done = model.submit(asked).result()
    close = model.tokenizer.think_close_id
    assert done.tokens.index(close) >= 5
    assert done.experts[done.tokens.index(close)] is None and done.experts[4] is not None
    assert len(done.experts) == len(done.tokens)


@pytest.mark.skipif(not syscalls.AVAILABLE, reason="residency is controlled on Linux only")
@pytest.mark.usefixtures("cache_home")
def test_of_a_model_that_is_streamed(model: Model, bundled_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(100, 6, experts=True)
    done = model.submit(asked).result()
    monkeypatch.setattr(residency, "choose_budget", lambda *_: budget_beyond(2 << 30))
    with Model.open(bundled_model, ctx=1024, load="direct", draft="off") as streamed:
        again = streamed.submit(asked).result()
        assert again.stats.traffic is not None
    assert (again.tokens, again.experts) == (done.tokens, done.experts)
