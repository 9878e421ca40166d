"""Which experts a page's tokens chose is kept with it, and those of a beginning that comes from disk are hot."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from m2lite import Model
from m2lite.engine.prefix_cache import page_keys
from m2lite.engine.request import Request
from m2lite.engine.thread import compute_thread
from m2lite.model import residency
from m2lite.model.cache import PAGE
from m2lite.model.observer import Observer
from m2lite.model.routing import N_RECALLED, Routing
from m2lite.model.stream import Stream
from m2lite.storage import syscalls
from m2lite.storage.ledger import HALF_LIFE
from tests.budgets import budget_beyond
from tests.engine.asked import GREEDY

pytestmark = [
    pytest.mark.skipif(not syscalls.AVAILABLE, reason="residency is controlled on Linux only"),
    pytest.mark.usefixtures("cache_home"),
]
Ids = npt.NDArray[np.int32]
TEXT = "Once upon a time there was a small fox who lived near the river. One day it met a bear who had lost a ring. "


class Recorder(Observer):
    """The experts of one call's rows, by layer."""

    def __init__(self) -> None:
        self.found = list[Ids]()

    def chosen(self, layer: int, start: int, ids: Ids) -> None:
        self.found.append(ids.copy())


@pytest.fixture(autouse=True)
def always_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a model that would fit."""
    monkeypatch.setattr(residency, "choose_budget", lambda *_: budget_beyond(2 << 30))


@pytest.fixture
def model(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model, ctx=1024, load="direct") as opened:
        yield opened


def stream_of(model: Model, n_units: int) -> Stream:
    """The model's stream, with room for so many experts and nothing in it."""
    stream = model.runner.stream
    assert stream is not None and model.runner.residency is not None and model._warmer is not None
    model._warmer.wait()
    model.runner.residency.fit = lambda: None  # type: ignore[method-assign]  # it would give it more
    compute_thread().run(stream.drop)
    compute_thread().run(partial(stream.resize, n_units * int(stream.ledger.sizes[0])))
    stream.ledger.warm(np.zeros(len(stream.ledger.sizes)))
    return stream


def routing_of(model: Model) -> Routing:
    routing = model.runner.pool.routing
    assert routing is not None
    return routing


def ask(model: Model, ids: list[int], n: int = 4, draft: str | None = None) -> list[int]:
    return (
        model.submit(Request(prompt=ids, max_tokens=n, sampling=GREEDY, ignore_stop=True, draft=draft)).result().tokens
    )


def text_ids(model: Model, n: int) -> list[int]:
    return model.encode_prompt(TEXT * 40)[:n]


def begin(model: Model, ids: list[int], n_most: int) -> None:
    """As a sequence does, and nothing is computed."""

    def fork() -> None:
        model.loop.prefix_cache.fork(ids, n_most)[0].release()

    compute_thread().run(fork)


def saved(model: Model, ids: list[int]) -> list[int]:
    """The ids' pages are on disk, and nothing of them is in memory; what is said behind them."""
    model.use_disk()
    answer = ask(model, ids)
    assert model.loop.save(ids[:-1]) == (len(ids) - 1) // PAGE
    model.loop.forget()
    return answer


def observed(model: Model, ids: list[int]) -> Ids:
    """int32 [n_layers, n_tokens, n_used]: the experts of each token."""

    def look() -> Ids:
        timeline, recorder = model.runner.pool.timeline(), Recorder()
        model.runner.evaluate(timeline, 0, ids, observers=[recorder])
        timeline.release()
        return np.stack(recorder.found)

    return compute_thread().run(look)


def kept(model: Model, ids: list[int]) -> Ids:
    """The same, as the pages of the prefix cache have it."""

    def look() -> Ids:
        timeline = model.loop.prefix_cache.fork(ids, len(ids))[0]
        found = np.concatenate([routing_of(model).ids[page] for page in timeline.pages], axis=1)[:, : timeline.length]
        timeline.release()
        return found.astype(np.int32)

    return compute_thread().run(look)


@pytest.mark.parametrize("draft", ["off", "ngram"])
def test_pages_have_what_an_observer_sees(model: Model, draft: str) -> None:
    """Of prompts, of answers, behind a copy of half a page, and where drafts were thrown away."""
    prompt = text_ids(model, 150)
    ids = [*prompt, *ask(model, prompt, 60, draft)][:-1]
    assert len(ids) == 209 and np.array_equal(kept(model, ids), observed(model, ids))
    other = [*ids[:170], *model.encode_prompt(TEXT)]
    assert kept(model, other).shape[1] == 170
    ask(model, other, 1)
    found = kept(model, other)
    assert found.shape[1] == len(other) and np.array_equal(found, observed(model, other))
    assert np.array_equal(kept(model, ids), observed(model, ids))
    assert model.loop.counts.n_drafts > model.loop.counts.n_accepted or draft == "off"


def test_they_go_to_disk_and_come_back(model: Model, bundled_model: Path) -> None:
    ids = text_ids(model, 4 * PAGE + 9)
    model.use_disk()
    ask(model, ids, 1)
    expected = kept(model, ids[: 4 * PAGE])
    assert model.loop.save(ids) == 4
    disk = model.loop.prefix_cache.disk
    assert disk is not None and disk.n_written == 4 * (disk.trunk_bytes + routing_of(model).ids[0].nbytes)
    with Model.open(bundled_model, ctx=1024, load="direct") as other:
        other.use_disk()
        assert np.array_equal(kept(other, ids[: 4 * PAGE]), expected)
        other_disk = other.loop.prefix_cache.disk
        assert other_disk is not None and other_disk.n_read == disk.n_written
    with pytest.MonkeyPatch.context() as patch, Model.open(bundled_model, ctx=1024, load="direct", heat=False) as plain:
        assert plain.runner.pool.routing is None
        plain.use_disk()
        assert ask(plain, ids) == ask(model, ids)  # it reads the pages, and leaves the rest
        patch.setattr(residency, "choose_budget", lambda *_: None)
        with Model.open(bundled_model, ctx=1024) as resident:
            assert resident.runner.pool.routing is None
            resident.use_disk()
            assert ask(resident, ids) == ask(model, ids)


def test_pages_without_them_are_read(model: Model, bundled_model: Path) -> None:
    """And count for nothing, as those that hold what no router says."""
    ids = text_ids(model, 4 * PAGE + 9)
    with Model.open(bundled_model, ctx=1024, load="direct", heat=False) as plain:
        plain.use_disk()
        ask(plain, ids, 1)
        assert plain.loop.save(ids) == 4
    model.use_disk()
    routing, stream = routing_of(model), stream_of(model, 200)
    routing.ids[:] = np.arange(8)  # of what was there before
    heat = stream.ledger.heat
    assert not kept(model, ids[: 4 * PAGE]).any() and np.array_equal(stream.ledger.heat, heat)
    for content in (b"", b"x", bytes(range(8)) * (4 * PAGE - 1), bytes([0] * 7 + [255]) * (4 * PAGE)):
        routing.load(0, content)
        timeline = model.runner.pool.timeline()
        timeline.pages, timeline.length = [0], PAGE
        counted, n_known = routing.recall(timeline)
        assert n_known == 0 and not counted.any()


@pytest.mark.parametrize("at", [0, 41, 44, -1])
def test_a_damaged_note_costs_the_page(model: Model, at: int) -> None:
    """Its magic, its note's length, the page, the note."""
    ids = text_ids(model, 2 * PAGE + 9)
    expected = saved(model, ids)
    disk = model.loop.prefix_cache.disk
    assert disk is not None
    path = disk.store.path(disk.name(page_keys(ids)[1]))
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    stream = stream_of(model, 200)
    handle = model.submit(Request(prompt=ids, max_tokens=4, sampling=GREEDY, ignore_stop=True, draft="off"))
    assert handle.result().tokens == expected and handle.completion.stats.n_reused == PAGE
    assert np.isfinite(stream.ledger.heat).all()


def test_a_beginning_from_disk_leaves_the_heat_that_computing_leaves(model: Model) -> None:
    """But for what lies further back than is looked at; and one that is in memory changes nothing."""
    ids = text_ids(model, N_RECALLED + 3 * PAGE)
    chosen = observed(model, ids)
    saved(model, [*ids, 5])
    stream = stream_of(model, 100)
    stream.ledger.warm(np.full(256, 7.0))
    begin(model, ids, len(ids))
    found, ages = stream.ledger.heat.reshape(4, 64), np.arange(N_RECALLED)
    assert np.allclose(found.sum(axis=1), 8 * (0.5 ** (ages / HALF_LIFE)).sum() + 64 * 7 / 16)
    expected = heat_of(chosen[:, -N_RECALLED:]) + 7 / 16
    assert np.allclose(found.ravel(), expected)
    begin(model, ids, len(ids))
    assert np.array_equal(stream.ledger.heat, found.ravel())


def test_it_asks_for_the_right_experts(model: Model) -> None:
    """Those that its last tokens chose most come while nothing is computed, into what memory is free."""
    ids = text_ids(model, 3 * PAGE + 1)
    expected = saved(model, ids)
    stream, warmer = stream_of(model, 90), model._warmer
    assert warmer is not None
    begin(model, ids, len(ids) - 1)
    warmer.wait()
    there = np.array([stream.ledger.has(unit) for unit in range(256)])
    heat = heat_of(observed(model, ids[:-1]))
    assert there.sum() == 90 and heat[there].min() >= heat[~there].max()
    assert stream.ledger.resident_bytes <= stream.ledger.capacity
    n_read = []
    for _ in range(2):  # warm, then cold
        before = stream.traffic.read_bytes
        assert ask(model, ids) == expected
        n_read.append(stream.traffic.read_bytes - before)
        stream_of(model, 90)
    assert 0 < n_read[0] < n_read[1]


def heat_of(chosen: Ids) -> npt.NDArray[np.float64]:
    """float64 [n_layers x n_experts], a token at a time."""
    found = np.zeros((4, 64))
    for layer in range(4):
        for age, experts in enumerate(chosen[layer][::-1]):
            found[layer, experts] += 0.5 ** (age / HALF_LIFE)
    return found.ravel()


def test_full_memory_is_read_into_by_nobody(model: Model) -> None:
    """What leaves first changes; nothing is read before it is wanted."""
    ids = text_ids(model, 3 * PAGE + 1)
    saved(model, ids)
    stream, warmer = stream_of(model, 40), model._warmer
    assert warmer is not None
    other = model.encode_prompt("What is seven times six? " * 20)[:100]
    ask(model, other)
    assert stream.ledger.resident_bytes == stream.ledger.capacity
    there, heat = [stream.ledger.has(unit) for unit in range(256)], stream.ledger.heat
    begin(model, ids, len(ids) - 1)
    warmer.wait()
    assert not np.array_equal(stream.ledger.heat, heat)
    assert [stream.ledger.has(unit) for unit in range(256)] == there
