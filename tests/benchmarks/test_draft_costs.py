"""What the measurement of drafts sets by hand is as it says, and the measurement runs on m2-tiny."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from draft_costs import Lots, break_even, measure_point, quoting, record_trace, set_lots, thinned
from m2lite import Model
from m2lite.bench_drafts import Setting

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.4])
def test_lots_share_as_much_as_they_should(overlap: float) -> None:
    lots = Lots(3, 64, 8, overlap)
    assert lots.measured_overlap() == pytest.approx(overlap, abs=0.02)
    ids, again = np.zeros((60, 8), np.int32), np.zeros((5, 8), np.int32)
    lots.chosen(2, 1000, ids)
    lots.chosen(2, 1010, again)
    assert ids.min() >= 0 and ids.max() < 64
    assert (np.diff(ids, axis=1) > 0).all()  # ascending, none twice
    assert np.array_equal(again, ids[10:15])


def test_break_even() -> None:
    assert break_even(1.5, 1) == pytest.approx(0.5)
    assert break_even(1.0, 3) == pytest.approx(0.0, abs=1e-6)
    assert break_even(3.0, 2) is None and break_even(4.5, 3) is None
    a = break_even(2.5, 3)
    assert a is not None and 1 + a + a**2 + a**3 == pytest.approx(2.5)


def test_text_that_quotes_itself() -> None:
    row = quoting(range(1000), 400)
    assert len(row) == 400
    new = sum(token not in row[:i] for i, token in enumerate(row))
    assert 120 < new < 240


def test_measuring_on_a_small_model(bundled_model: Path) -> None:
    """All settings say the given tokens; what is right is what the trace says."""
    with Model.open(bundled_model, ctx=1024) as model:
        trace = record_trace(model)
        share = [np.mean([said[k][1] for said in trace]) for k in range(3)]
        assert len(trace) > 300 and share[0] > 0.75
        few = thinned(trace, 0.5)
        assert np.mean([said[0][1] for said in few]) == pytest.approx(share[0] / 2, abs=0.06)
        assert set_lots(model, 0.25) == pytest.approx(0.25, abs=0.02)
        settings = [Setting("off"), Setting("mtp", 2), Setting("auto")]
        found = measure_point(model, 64, [[(0.9, True)] * 3] * 10, settings, 24, 1)
        assert found["mtp 2"]["acceptance"] == [1, 1] and found["mtp 2"]["tokens_per_step"] > 2.5
        found = measure_point(model, 0, [[(0.9, False)] * 3] * 10, settings, 24, 1)
        assert found["mtp 2"]["acceptance"][0] == 0 and found["mtp 2"]["tokens_per_step"] == 1
        assert found["off"]["speedup"] == 1
