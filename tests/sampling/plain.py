"""A draw in NumPy, to which kernels/draw.py is held."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from m2lite.sampling.draw import Logits, Sampling, exp_below_0, ranked


def plain_draw(logits: Logits, sampling: Sampling, stream: int = 0, position: int = 0) -> tuple[int, float]:
    """(id, share); the id is -1 for logits that are not finite."""
    if not math.isfinite(float(logits.max())):
        return -1, 0.0
    ids, weights = candidates(logits, sampling)
    steps = np.cumsum(weights)
    u = uniform(sampling.seed, stream, position)
    i = min(int(np.searchsorted(steps, u * steps[-1], side="right")), ids.size - 1)
    return int(ids[i]), float(weights[i] / steps[-1])


def candidates(logits: Logits, sampling: Sampling) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """ids[n] that survive the filters in rank order, and weights[n] proportional to their probabilities."""
    ids = ranked(logits, sampling.top_k)
    values = logits[ids].astype(np.float64)
    weights = exp_below_0((values - values[0]) / sampling.temperature)
    if sampling.top_p < 1:
        steps = np.cumsum(weights)
        kept = int(np.searchsorted(steps, sampling.top_p * steps[-1], side="left")) + 1
        ids, weights = ids[:kept], weights[:kept]
    if sampling.min_p > 0:
        kept = max(1, int(np.count_nonzero(weights >= sampling.min_p)))  # weights[0] is 1
        ids, weights = ids[:kept], weights[:kept]
    return ids, weights


def uniform(seed: int, stream: int, position: int) -> float:
    """The random number in [0, 1) that belongs to (seed, stream, position)."""
    generator = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=position << 64)
    return float(int(generator.random_raw()) >> 11) * 2.0**-53
