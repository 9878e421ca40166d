"""A second start reads first what the first run used most, and only into memory that is free."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from m2lite import Model
from m2lite.engine import model as session_module
from m2lite.model import residency
from m2lite.sampling.draw import Sampling
from m2lite.storage import syscalls
from m2lite.storage.heat import load_heat
from tests.budgets import budget_beyond

pytestmark = pytest.mark.skipif(not syscalls.AVAILABLE, reason="residency is controlled on Linux only")


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where heat is kept in this test; every model is streamed."""
    path = tmp_path / "heat.npy"
    monkeypatch.setattr(session_module, "heat_path", lambda _: path)
    monkeypatch.setattr(residency, "choose_budget", lambda *_: budget_beyond(2 << 30))
    return path


def answer(model: Model) -> list[int]:
    with model.session() as session:
        return list(session.generate("Once upon a time", max_tokens=30, sampling=Sampling(seed=3), ignore_stop=True))


def test_the_next_start_is_warm(bundled_model: Path, record: Path) -> None:
    with Model.open(bundled_model, ctx=256, load="direct") as model:
        cold = answer(model)
    with Model.open(bundled_model, ctx=256, load="direct") as model:
        assert model._warmer is not None
        model._warmer.wait()
        stream = model.runner.stream
        assert stream is not None and not stream._flights
        heat = load_heat(record, model.config.n_layers, model.config.n_experts)
        assert heat is not None
        there = np.array([stream.ledger.has(unit) for unit in range(heat.size)])
        assert there[np.flatnonzero(heat.reshape(-1))].all()
        before = stream.traffic.read_bytes
        assert answer(model) == cold
        assert stream.traffic.read_bytes == before  # every expert was there


def test_no_more_than_fits(bundled_model: Path, record: Path) -> None:
    with Model.open(bundled_model, ctx=256, load="direct") as model:
        cold = answer(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "load_heat", lambda *_: None)
        model = Model.open(bundled_model, ctx=256, load="direct")
    with model:
        stream = model.runner.stream
        assert stream is not None and model.runner.residency is not None
        stream.resize(20 * int(stream.ledger.sizes[0]))
        model.runner.residency.fit = lambda: None  # type: ignore[method-assign]
        heat = load_heat(record, model.config.n_layers, model.config.n_experts)
        assert heat is not None
        stream.ledger.warm(heat.reshape(-1))
        assert model._warmer is not None
        model._warmer.wake()
        assert answer(model) == cold  # while it is warmed
        model._warmer.wait()
        assert 0 < stream.ledger.resident_bytes <= stream.ledger.capacity
        assert not stream.ledger._pins.any()


def test_opted_out(bundled_model: Path, record: Path) -> None:
    with Model.open(bundled_model, ctx=256, load="direct", heat=False) as model:
        answer(model)
    assert not record.exists()


def test_disk_fails_while_warming(bundled_model: Path, record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Model.open(bundled_model, ctx=256, load="direct") as model:
        cold = answer(model)
    from m2lite.errors import BadModelError
    from m2lite.model.stream import Stream

    def fail(*_: object) -> int:
        raise BadModelError("the disk is gone")

    monkeypatch.setattr(Stream, "fill", fail)
    with Model.open(bundled_model, ctx=256, load="direct") as model:
        assert model._warmer is not None
        model._warmer.wait()
        assert answer(model) == cold
