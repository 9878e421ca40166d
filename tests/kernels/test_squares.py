"""Sums of squares against their NumPy twin, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from m2lite.kernels import fast, reference
from m2lite.simd import jit


@pytest.mark.parametrize("n_threads", [1, 2])
def test_squares_equal_their_twin(n_threads: int) -> None:
    """Odd widths, experts without rows, rows of both signs and of extreme sizes; serial and parallel."""
    jit.start(n_threads)
    random = np.random.default_rng(8)
    for n, n_rows in ((1, 1), (32, 5), (99, 40)):
        x = (random.standard_normal((n_rows, n)) * 10.0 ** random.integers(-30, 30, (n_rows, n))).astype(np.float32)
        rows = random.integers(0, n_rows, 64).astype(np.int32)
        starts, active = np.array([0, 3, 3, 50, 64], np.int32), np.array([0, 2, 5, 6], np.int32)
        sums = [random.random((7, n))]
        sums.append(sums[0].copy())
        for module, total in zip((fast, reference), sums, strict=True):
            module.add_squares(n_threads, total, x, rows, starts, active)
        assert sums[0].tobytes() == sums[1].tobytes()
    jit.start(2)
