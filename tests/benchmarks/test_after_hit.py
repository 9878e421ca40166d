"""What is read behind a hit, with and without what pages know: as much is wanted, and both are counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import after_hit
from m2lite import Model
from m2lite.storage import syscalls

pytestmark = [
    pytest.mark.slow,  # not in the fast ring: it computes a text several times
    pytest.mark.skipif(not syscalls.AVAILABLE, reason="residency is controlled on Linux only"),
]


def test_after_hit(bundled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Model.open(bundled_model, ctx=512, load="direct", draft="off") as model:
        assert model.runner.residency is not None
        model.runner.residency.fit = lambda: None  # type: ignore[method-assign]
        model.use_disk()
        ids = model.encode_prompt(after_hit.TEXT.read_text())[:400]
        traces = [after_hit.record(model, ids)]
        bench = after_hit.Bench(model, [ids], None)
        heats = [after_hit.heat_of(bench, 0)]
        assert np.isfinite(heats[0]).all() and heats[0].any()
        lines = after_hit.measure(bench, 0.5, 1, 8, heats).split("\n")
        assert [line.split()[3] for line in lines] == ["without", "with"]
        rows = [[float(x.rstrip("%")) for x in line.split()[4:]] for line in lines]
        assert all(0 < row[0] < row[1] < 9 * 4 * 8 * 0.0553 and 0 < row[2] < 100 for row in rows)  # MB and %
        ids = np.zeros((2, 8), np.int32)
        after_hit.Routed(traces).chosen(5, 3, ids)
        assert np.array_equal(ids, np.sort(traces[0][3:5, 1]))
