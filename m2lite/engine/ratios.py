"""What ratios of paired times say: whether one setting is faster than another beyond the noise. Knows numbers only.

The interval of a median is exact where the sample allows it: between the k-th smallest and the k-th largest value lies
the true median with a probability that the binomial distribution gives, whatever the values' distribution.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

Ratio = tuple[float, float, float]  # of times before to times after: a median between the ends of its interval

LEVEL = 0.95
LEAST_NOISE = 0.003  # of a ratio: what is smaller is not worth a file


def exact_rank(n: int, level: float = LEVEL) -> tuple[int, float] | None:
    """(k, coverage) of the narrowest interval x(k) ... x(n + 1 - k) that holds the median with at least `level`."""
    found = None
    tail = 0.0
    for k in range(1, n // 2 + 1):
        tail += math.comb(n, k - 1) / 2**n
        if 1 - 2 * tail < level:
            break
        found = (k, 1 - 2 * tail)
    return found


def summary(ratios: Sequence[float]) -> Ratio:
    """The median with its interval; of fewer than six, with the extremes."""
    ordered, (k, _) = sorted(ratios), exact_rank(len(ratios)) or (1, 0.0)
    return ordered[k - 1], statistics.median(ordered), ordered[-k]


def noise_of(ratios: Sequence[float]) -> float:
    """How far from 1 the interval for a setting against itself reaches."""
    low, _, high = summary(ratios)
    return max(high - 1, 1 - low, LEAST_NOISE)


def is_won(found: Mapping[str, Ratio], noise: Mapping[str, float]) -> bool:
    """Whether some work is faster beyond doubt, and none is slower."""
    is_faster = any(low > 1 + noise[work] for work, (low, _, _) in found.items())
    return is_faster and all(median > 1 - noise[work] for work, (_, median, _) in found.items())


def may_win(found: Mapping[str, Ratio], noise: Mapping[str, float]) -> bool:
    """The same after a few pairs: whether more of them can say so."""
    is_faster = any(median > 1 + noise[work] / 2 for work, (_, median, _) in found.items())
    return is_faster and all(high > 1 - noise[work] for work, (_, _, high) in found.items())
