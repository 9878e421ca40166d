"""Weights to encode: random blocks and all the odd ones. Knows no format."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def odd_rows(rng: np.random.Generator, n: int, width: int) -> F32:
    """float32[n, width], n a multiple of 10: a tenth each of zeros, ties, one-hot, constant, ... rows; all finite."""
    x = rng.standard_normal((n, width)).astype(np.float32) * np.exp2(rng.integers(-20, 8, (n, 1))).astype(np.float32)
    k = n // 10
    x[:k] = np.where(rng.random((k, width)) < 0.5, 0.0, -0.0)
    x[k : 2 * k] = rng.integers(-8, 9, (k, width))
    x[2 * k : 3 * k] *= np.float32(0)
    x[2 * k : 3 * k, 5::64] = rng.standard_normal((k, 1))
    x[3 * k : 4 * k] = rng.standard_normal((k, 1))
    x[4 * k : 5 * k] = -np.abs(x[4 * k : 5 * k])
    x[5 * k : 6 * k] *= np.float32(1e-38)
    x[6 * k : 7 * k] = rng.integers(-3, 3, (k, width)) * np.float32(1e-45)
    powers = np.exp2(rng.integers(-30, 5, (k, width))) * np.where(rng.random((k, width)) < 0.5, -1, 1)
    x[7 * k : 8 * k] = powers
    x[7 * k : 7 * k + k // 2] = np.nextafter(x[7 * k : 7 * k + k // 2], np.float32(0))
    x[8 * k : 9 * k] = rng.standard_t(3, (k, width))
    x[8 * k : 8 * k + k // 2, ::9] *= np.float32(1000)
    return x


def importance_of(rng: np.random.Generator, width: int) -> F32:
    """An importance over many orders of magnitude, with columns that nothing ever reached."""
    importance = np.exp(rng.standard_normal(width) * 2).astype(np.float32)
    importance[width // 4 : width // 2] *= np.float32(1e-12)
    importance[-32:] = 0
    return importance
