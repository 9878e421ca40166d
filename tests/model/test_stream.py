"""A model larger than its memory: the same bits whatever comes when, within the capacity, and errors leave it whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from m2lite import Model
from m2lite.drafting.drafted import Drafted
from m2lite.engine.thread import compute_thread
from m2lite.errors import BadModelError, M2liteError, ResourceError, UsageError
from m2lite.model import residency as residency_module
from m2lite.model.cache import Timeline
from m2lite.model.observer import Observer
from m2lite.model.stream import Stream, Stretch, runs
from m2lite.sampling.draw import Sampling
from m2lite.storage import syscalls
from m2lite.storage.reads import DirectReads
from tests.budgets import budget_beyond

F32 = npt.NDArray[np.float32]

pytestmark = [
    pytest.mark.skipif(not syscalls.AVAILABLE, reason="residency is controlled on Linux only"),
    pytest.mark.slow,
]


@pytest.fixture(autouse=True)
def always_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a model that would fit."""
    monkeypatch.setattr(residency_module, "choose_budget", lambda *_: budget_beyond(2 << 30))


@pytest.fixture(scope="module")
def own_copy(bundled_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody else's, and read by the page cache a page at a time: what was written lies in large folios there."""
    path = tmp_path_factory.mktemp("stream") / "m2-tiny.gguf"
    shutil.copy(bundled_model, path)
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    return path


@pytest.fixture(scope="module")
def tokens(own_copy: Path) -> list[int]:
    with Model.open(own_copy, ctx=512) as model:
        return model.encode_prompt("Once upon a time there was a small fox who lived near the river. " * 12)[:150]


@pytest.fixture(scope="module")
def expected(own_copy: Path, tokens: list[int]) -> F32:
    """From the whole model in memory: opened before `always_stream` acts."""
    with Model.open(own_copy, ctx=512) as model:
        assert model.runner.stream is None
        return model.logits(tokens)


@pytest.fixture(params=["mmap", "direct", "owned copy"])
def model(
    request: pytest.FixtureRequest, own_copy: Path, expected: object, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Model]:
    if request.param == "owned copy":
        monkeypatch.setattr(syscalls, "lock_on_fault", lambda *_: False)
    with Model.open(own_copy, ctx=512, heat=False, load="auto" if request.param == "direct" else "mmap") as opened:
        yield opened


def stream_of(model: Model, n_units: int | None = None) -> Stream:
    """The model's stream, with room for so many experts."""
    stream = model.runner.stream
    assert stream is not None
    if n_units is not None:
        stream.resize(n_units * int(stream.ledger.sizes[0]))
        assert model.runner.residency is not None
        model.runner.residency.fit = lambda: None  # type: ignore[method-assign]  # it would give it more
    return stream


@contextmanager
def opened_timeline(model: Model) -> Iterator[Timeline]:
    timeline = compute_thread().run(model.runner.pool.timeline)
    yield timeline
    compute_thread().run(timeline.release)


def extend(model: Model, timeline: Timeline, tokens: Sequence[int], *observers: Observer) -> F32:
    """Logits of all tokens, in one call behind what the timeline holds."""
    evaluate, at = model.runner.evaluate, timeline.length
    return compute_thread().run(lambda: evaluate(timeline, at, tokens, "all", observers=observers).copy())


def n_pins(stream: Stream) -> int:
    """Pinned is what is under way, and nothing else, between two calls."""
    return int(stream.ledger._pins.sum())


@pytest.mark.parametrize("n_units", [2, 9, 40, 1000])
def test_same_bits(model: Model, tokens: list[int], expected: F32, n_units: int) -> None:
    """In one prompt, in pieces, token by token; with room for nearly nothing and for all."""
    stream = stream_of(model, n_units)
    assert np.array_equal(model.logits(tokens), expected)
    with opened_timeline(model) as timeline:
        for first, end in ((0, 40), (40, 41), (41, 49), (49, 80), *((i, i + 1) for i in range(80, 100))):
            assert np.array_equal(extend(model, timeline, tokens[first:end]), expected[first:end])
            assert stream.ledger.resident_bytes <= stream.ledger.capacity
    assert n_pins(stream) == len(stream._flights)
    assert stream.traffic.hit_rate is not None and 0 <= stream.traffic.hit_rate < 1


def test_generates_the_same_and_tells_the_traffic(model: Model, tokens: list[int], own_copy: Path) -> None:
    stream_of(model, 20)

    def answer(of: Model) -> list[int]:
        with of.session() as session:
            ids = list(session.generate(tokens[:30], max_tokens=40, sampling=Sampling(seed=7), ignore_stop=True))
            traffic = session.stats.traffic
            if of is model:
                assert traffic is not None and traffic.wanted_bytes > traffic.read_bytes > 0
            return ids

    streamed = answer(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residency_module, "choose_budget", lambda *_: None)
        with Model.open(own_copy, ctx=512) as whole:
            assert answer(whole) == streamed


def test_an_error_leaves_everything_as_it_was(
    model: Model, tokens: list[int], expected: F32, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = stream_of(model, 30)
    reads = stream._experts._reads  # type: ignore[attr-defined]
    name, n_left = "read_into" if isinstance(reads, DirectReads) else "read", 25
    real = getattr(reads, name)

    def read(*args: Any) -> int:
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise BadModelError("the disk is gone")
        return int(real(*args))

    with opened_timeline(model) as timeline:
        extend(model, timeline, tokens[:20])
        monkeypatch.setattr(reads, name, read)
        for n in (1, 60, 120):
            n_left = n
            with pytest.raises(M2liteError, match="the disk is gone"):
                extend(model, timeline, tokens[20:])
            assert timeline.length == 20
        monkeypatch.undo()
        assert np.array_equal(extend(model, timeline, tokens[20:]), expected[20:])
    assert n_pins(stream) == len(stream._flights)


def test_stopped_anywhere(model: Model, tokens: list[int], expected: F32) -> None:
    stream = stream_of(model, 30)
    reasons = set()
    for n in range(1, 40, 3):
        asked = iter(range(1000))
        with model.session() as session:
            list(session.generate(tokens, max_tokens=1, stop=lambda a=asked, n=n: next(a) >= n, keep=False))
            reasons.add(session.finish_reason)
    assert "interrupted" in reasons
    assert np.array_equal(model.logits(tokens), expected)
    assert n_pins(stream) == len(stream._flights)


def test_pages_that_left_are_read_again(own_copy: Path, tokens: list[int], expected: F32) -> None:
    """The system may take pages of the cache behind our back; the ledger finds out, and says what was read."""
    with Model.open(own_copy, ctx=512, heat=False, load="mmap") as model:
        stream = stream_of(model, 1000)
        assert np.array_equal(model.logits(tokens), expected)
        before = stream.traffic.read_bytes
        model.logits(tokens)
        assert stream.traffic.read_bytes == before  # all is there
        for unit in range(0, len(stream.ledger.sizes), 2):
            stream._experts.drop(unit)
        assert np.array_equal(model.logits(tokens), expected)
        assert stream.traffic.read_bytes > before


def test_budget_that_cannot_do(own_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency_module, "choose_budget", lambda *_: residency_module.Budget(3_000_000))
    with pytest.raises(ResourceError, match=r"needs at least [\d.]+ [MG]iB of memory.*the budget is 2.86 MiB") as told:
        Model.open(own_copy, ctx=512)
    assert "--ram" in told.value.todo
    with pytest.raises(UsageError, match="Load mode 'tape' does not exist"):
        Model.open(own_copy, load="tape")


def test_runs() -> None:
    assert list(runs([])) == []
    assert list(runs([0, 1, 2, 5, 7, 8])) == [Stretch(0, 3), Stretch(5, 6), Stretch(7, 9)]


def test_reads_ahead_are_dropped_when_not_wanted(model: Model, tokens: list[int]) -> None:
    """A sweep reads the next layer ahead; a stop then leaves reads under way that a decode does not want."""
    stream = stream_of(model, 100)
    many = (tokens * 2)[:200]
    asked = iter(range(1000))
    with model.session() as session:
        list(session.generate(many, max_tokens=1, stop=lambda: next(asked) >= 4))
        flights: list[list[Future[int]]] = list(stream._flights.values())
        assert flights
        list(session.generate(tokens[:5], max_tokens=3, ignore_stop=True))
    assert all(f.done() for flight in flights for f in flight)
    assert n_pins(stream) == len(stream._flights)


def test_a_budget_that_is_not_given_does_not_creep(monkeypatch: pytest.MonkeyPatch) -> None:
    """What experts took is counted as ours, not as free again; what others take is theirs."""
    ours, free = 1 << 30, 10 << 30
    monkeypatch.setattr(residency_module.machine, "anonymous_bytes", lambda: ours)
    monkeypatch.setattr(residency_module.machine, "free_memory_bytes", lambda: free)
    budget = residency_module.Budget(None, free // 10)
    first = budget.total
    assert first == 10 << 30
    ours, free = ours + (8 << 30), free - (8 << 30)
    assert budget.total == first
    free -= 1 << 30
    assert budget.total == first - (1 << 30)
    assert residency_module.Budget(5).total == 5


def test_modules_beside_a_streamed_model(bundled_model: Path) -> None:
    """Left alone unless they are asked for: the memory they take is missed more. The ids are the same."""
    sampling, found = Sampling(seed=2), []
    for draft in ("off", "auto", "mtp"):
        with Model.open(bundled_model, ctx=256, load="direct", heat=False, draft=draft) as model:
            drafting = model.runner.drafting
            assert drafting.n_modules == (3 if draft == "mtp" else 0)
            assert ("does not fit" in (drafting.warning or "")) == (draft == "auto")
            assert model.kv_bytes == model.runner.pool.n_bytes
            with model.session() as session:
                found.append(list(session.generate([5, 6, 7] * 9, max_tokens=30, sampling=sampling)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("setting", [("off", None), ("ngram", 7), ("mtp", 3), ("auto", None)])
def test_drafts_of_a_streamed_model(bundled_model: Path, tokens: list[int], setting: tuple[str, int | None]) -> None:
    """The same ids, and as many right drafts, as of the model in memory."""
    prompt, sampling = tokens[:60], Sampling(temperature=0, seed=1)

    def answer(model: Model) -> tuple[list[int], Drafted | None]:
        with model.session(*setting) as session:
            ids = list(session.generate(prompt, max_tokens=80, sampling=sampling, ignore_stop=True))
            return ids, session.stats.drafted

    with Model.open(bundled_model, ctx=256, load="direct", heat=False, draft=setting[0]) as streamed:
        assert streamed.runner.stream is not None
        found, drafted = answer(streamed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residency_module, "choose_budget", lambda *_: None)
        with Model.open(bundled_model, ctx=256, draft=setting[0]) as whole:
            expected, drafted_whole = answer(whole)
    assert found == expected
    if setting[1] is not None:  # what auto does depends on what it costs
        assert drafted is not None and drafted_whole is not None
        assert drafted.as_dict() == drafted_whole.as_dict() and drafted.n_accepted > 5


@pytest.mark.parametrize("at", range(4))
def test_rows_may_be_left_out_at_any_layer(model: Model, tokens: list[int], expected: F32, at: int) -> None:
    """Those before them are computed as ever, and the timeline ends before them."""
    stream, n_experts = stream_of(model, 1000), model.config.n_experts_used
    seen = list[tuple[int, int]]()

    class Leave(Observer):
        def chosen(self, layer: int, start: int, ids: npt.NDArray[np.int32]) -> int | None:
            seen.append((layer, len(ids)))
            assert ids.shape[1] == n_experts and start == 20
            return 3 if layer == at else None

    with opened_timeline(model) as timeline:
        extend(model, timeline, tokens[:20])
        assert np.array_equal(extend(model, timeline, tokens[20:28], Leave()), expected[20:23])
        assert timeline.length == 23
        assert np.array_equal(extend(model, timeline, tokens[23:30]), expected[23:30])
    assert seen == [(layer, 8 if layer <= at else 3) for layer in range(model.config.n_layers)]
    assert n_pins(stream) == len(stream._flights)
