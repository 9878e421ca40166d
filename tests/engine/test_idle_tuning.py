"""Experiments of the first idle moment: kept where they say something, and nobody waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from m2lite import Model
from m2lite.engine import idle_tuning, model, tuned
from m2lite.engine.idle_tuning import IdleTuning
from m2lite.engine.tuned import Tuning, load_tuning, save_tuning, this_machine, tuning_path
from m2lite.simd import tuning
from m2lite.simd.crowd import Used

READ_BYTES = 1 << 20


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuned, "machine_cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(idle_tuning, "_REST_S", 0.0)
    monkeypatch.setattr(idle_tuning, "_PAUSE_S", 0.001)
    monkeypatch.setattr(idle_tuning, "processor_seconds", lambda: Used(0.0, 64, 0.0))
    yield
    tuning.use({})


class Weights:
    """Reads that take as long as `speed` of the values in force says, on a clock of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, speed: Callable[[], float]) -> None:
        self.n_reads, self._speed, self._now = 0, speed, 0.0
        self._rng = np.random.default_rng(1)
        clock = SimpleNamespace(perf_counter=lambda: self._now, monotonic=time.monotonic)
        monkeypatch.setattr(idle_tuning, "time", clock)

    def read(self) -> None:
        self.n_reads += 1
        self._now += float(self._rng.normal(1, 0.002)) / self._speed()


def is_fast() -> float:
    return 100 + 20 * (tuning.VALUES["tiles_ahead"] == 4)


def test_what_is_faster_is_used_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    IdleTuning(Weights(monkeypatch, is_fast).read, READ_BYTES, lambda: True)._thread.join()
    found = load_tuning()
    assert found.values == {"tiles_ahead": 4} and dict(tuning.VALUES) == tuning.DEFAULTS | found.values
    assert found.read_bytes_per_s == pytest.approx(120 * READ_BYTES, rel=0.05) and found.date


def test_where_nothing_is_faster_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Weights(monkeypatch, lambda: 100)
    IdleTuning(weights.read, READ_BYTES, lambda: True)._thread.join()
    found = load_tuning()
    assert found.values == {} and found.date and dict(tuning.VALUES) == tuning.DEFAULTS
    assert weights.n_reads < 150, "some seconds at most, of reads of some milliseconds"


def test_it_gives_way_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits finds the values of before."""
    weights, seen, is_over = Weights(monkeypatch, is_fast), list[dict[str, int]](), threading.Event()

    def is_idle() -> bool:
        if weights.n_reads == 60 and not is_over.is_set():
            seen.append(dict(tuning.VALUES))
            return len(seen) > 3 and (is_over.set() or True)
        return True

    IdleTuning(weights.read, READ_BYTES, is_idle)._thread.join()
    assert seen[1:] == [tuning.DEFAULTS] * 3 and load_tuning().values == {"tiles_ahead": 4}


def test_what_others_disturbed_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs are busy whenever we are: after some attempts that is that."""
    weights = Weights(monkeypatch, is_fast)
    monkeypatch.setattr(idle_tuning, "processor_seconds", lambda: Used(100.0 * weights.n_reads, 2, 0.0))
    IdleTuning(weights.read, READ_BYTES, lambda: True)._thread.join()
    assert weights.n_reads > 100 and not load_tuning().date and dict(tuning.VALUES) == tuning.DEFAULTS


def test_nothing_is_read_once_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Weights(monkeypatch, is_fast)

    def is_idle() -> bool:
        if weights.n_reads >= 40:
            running._stopped.set()
        return True

    running = IdleTuning(weights.read, READ_BYTES, is_idle)
    running._thread.join()
    n = weights.n_reads
    with pytest.raises(idle_tuning.Disturbed):
        running._pair((tuning.DEFAULTS, tuning.DEFAULTS))
    assert weights.n_reads == n and not load_tuning().date


def test_a_model_does_so_once_and_only_where_nothing_is_known(
    bundled_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(**options: bool) -> bool:
        with Model.open(bundled_model, draft="off", **options) as opened:  # type: ignore[arg-type]
            opened.tune_when_idle()
            running = opened._idle_tuning
            if running is not None:
                running._thread.join()
            ids = opened.generate([1, 2, 3], max_tokens=8, temperature=0).tokens
        said.append(ids)
        return running is not None

    said = list[list[int]]()
    assert not runs(), "weights that caches hold tell nothing"
    monkeypatch.setattr(model, "_TUNED_BYTES", 1 << 16)
    assert not runs(tuning=False) and not load_tuning().date
    assert runs() and load_tuning().date
    assert not runs() and said == [said[0]] * 4
    path = tuning_path(this_machine())
    save_tuning(path, Tuning())
    path.write_text("{")
    assert not runs(), "a file that is not used is the user's to remove"
