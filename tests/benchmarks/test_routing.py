"""The routing trace is what the model chose, and nobody beats who knows the future."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from m2lite import Model
from routing import HALF_LIVES, best_hit_rate, compare, hit_rate, record, table

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long


@pytest.fixture(scope="module")
def trace(bundled_model: Path) -> np.ndarray:
    text = "Once upon a time there was a small fox who lived near the river. "
    with Model.open(bundled_model, ctx=256) as model:
        return record(model, model.encode_prompt(text * 20)[:200])


def test_every_token_chooses_its_experts(trace: np.ndarray) -> None:
    assert trace.shape == (200, 4, 8)
    assert trace.min() >= 0 and trace.max() < 64
    assert all(len(set(experts)) == 8 for layers in trace.tolist() for experts in layers)


def test_it_does_not_depend_on_how_the_text_is_cut(
    trace: np.ndarray, bundled_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("routing.CHUNK", 37)
    text = "Once upon a time there was a small fox who lived near the river. "
    with Model.open(bundled_model, ctx=256) as model:
        again = record(model, model.encode_prompt(text * 20)[:200])
    assert np.array_equal(np.sort(again), np.sort(trace))


def test_policies(trace: np.ndarray) -> None:
    for size in (0.1, 0.3, 0.6):
        best = best_hit_rate(trace, 64, size)
        rates = [hit_rate(trace, 64, size, half_life) for half_life in HALF_LIVES.values()]
        assert 0 < max(rates) <= best < 1
    found = compare(trace, 64)
    assert "Belady" in table(found) and 0 < found["shared_with_last_token"] < 1


def test_a_cycle_larger_than_the_cache() -> None:
    """LRU never hits; Belady keeps a part."""
    cycle = np.array([[[t % 6]] for t in range(240)], np.int32)
    assert hit_rate(cycle, 6, 0.5, 0.1) == 0
    assert best_hit_rate(cycle, 6, 0.5) == pytest.approx(0.4, abs=0.05)
