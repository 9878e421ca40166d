"""Memory stays as it is over a long chat and a long answer; benchmarks/long_run.py shows it for any model."""

from __future__ import annotations

from pathlib import Path

import pytest

import long_run
import tinymodel
from m2lite import Model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("run", "n"), [(long_run.chat, 200), (long_run.answer, 5000)])
def test_memory_is_flat(tmp_path: Path, run: object, n: int) -> None:
    """After a tenth of it; 200 questions and answers are text that is kept, and less than 500 bytes each."""
    shape = tinymodel.Shape(n_ctx=8192)
    path = tinymodel.write_model(tmp_path / "m.gguf", tinymodel.REPLY, shape=shape)
    with Model.open(path, ctx=2048) as model:
        points = long_run.measure(run, model, n)  # type: ignore[arg-type]
    resident, objects = long_run.grown(points)
    assert [p.n for p in points] == [n // 10 * i for i in range(1, 11)]
    assert resident < 1e6, points
    assert objects < 300e3, points


def test_growth_is_seen() -> None:
    points = [long_run.Point(n, 100 + 5 * n, 10 * n) for n in range(10)]
    assert long_run.grown(points) == (35, 70)
