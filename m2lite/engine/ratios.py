"""What ratios of paired times say: whether one setting is faster than another beyond the noise. Knows numbers only."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from m2lite.engine.tuned import Ratio

LEAST_NOISE = 0.003  # of a ratio: what is smaller is not worth a file


def summary(ratios: Sequence[float]) -> Ratio:
    """(lower quartile, median, upper quartile)."""
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, median, high


def noise_of(ratios: Sequence[float]) -> float:
    """How far from 1 the ratios of a setting with itself are."""
    low, _, high = summary(ratios)
    return max(high - 1, 1 - low, LEAST_NOISE)


def is_won(found: Mapping[str, Ratio], noise: Mapping[str, float]) -> bool:
    """Whether some work is faster beyond doubt, and none is slower."""
    is_faster = any(low > 1 + noise[work] for work, (low, _, _) in found.items())
    return is_faster and all(median > 1 - noise[work] for work, (_, median, _) in found.items())


def may_win(found: Mapping[str, Ratio], noise: Mapping[str, float]) -> bool:
    """The same after a few pairs: whether more of them can say so."""
    is_faster = any(median > 1 + noise[work] for work, (_, median, _) in found.items())
    return is_faster and all(high > 1 - noise[work] for work, (_, _, high) in found.items())
