"""Medians and how sure they are. Knows numbers only.

The interval of a median is exact where the sample allows it (m2lite/engine/ratios.py). Below six values no such
interval reaches 95 %; then it is a bootstrap one, which says less than it seems to.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from m2lite.engine.ratios import LEVEL, exact_rank

N_RESAMPLES = 10_000


@dataclass(frozen=True)
class Median:
    """A median with its interval; `method` says where that comes from, and what it is worth."""

    value: float
    low: float
    high: float
    n: int
    method: str

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def median_interval(values: Sequence[float], level: float = LEVEL) -> Median:
    """The median of at least one value."""
    ordered, n = sorted(values), len(values)
    value = statistics.median(ordered)
    rank = exact_rank(n, level)
    if rank is not None:
        k, coverage = rank
        return Median(value, ordered[k - 1], ordered[n - k], n, f"exact, {coverage:.1%}")
    if n == 1:
        return Median(value, value, value, n, "one value, no interval")
    draws = random.Random(0)
    medians = sorted(statistics.median(draws.choices(ordered, k=n)) for _ in range(N_RESAMPLES))
    cut = int((1 - level) / 2 * N_RESAMPLES)
    return Median(value, medians[cut], medians[-1 - cut], n, f"bootstrap, {n} values")


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Median:
    """The median of ours / theirs, pair by pair: what drifts with the machine cancels within a pair."""
    return median_interval([a / b for a, b in zip(ours, theirs, strict=True)])
