"""benchmarks/intervals.py against what can be computed by hand."""

from __future__ import annotations

import random

import pytest

from intervals import exact_rank, median_interval, paired_ratio

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long


def test_ranks_are_those_of_the_sign_test() -> None:
    assert exact_rank(5) is None  # 1 - 2 / 32 = 93.75 %
    assert exact_rank(6) == (1, 1 - 2 / 64)
    assert exact_rank(7) == (1, 1 - 2 / 128)
    assert exact_rank(9) == (2, 1 - 2 * 10 / 512)
    k, coverage = exact_rank(100) or (0, 0)
    assert k == 40 and coverage == pytest.approx(0.9648, abs=1e-4)


def test_seven_values_span_their_interval() -> None:
    found = median_interval([3, 1, 2, 5, 4, 7, 6])
    assert (found.value, found.low, found.high, found.n) == (4, 1, 7, 7)
    assert found.method == "exact, 98.4%"


def test_few_values_are_resampled_and_say_so() -> None:
    found = median_interval([1.0, 2.0, 3.0])
    assert found.method == "bootstrap, 3 values" and (found.low, found.value, found.high) == (1, 2, 3)
    assert found == median_interval([3.0, 1.0, 2.0])
    assert median_interval([2.5]).method == "one value, no interval"


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draws = random.Random(1)
    hits = 0
    for _ in range(2000):
        found = median_interval([draws.expovariate(1) for _ in range(9)])
        hits += found.low <= 0.6931 <= found.high
    assert 0.95 < hits / 2000 < 0.975  # 96.1 % by the binomial distribution


def test_drift_cancels_within_pairs() -> None:
    found = paired_ratio([2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32])
    assert (found.value, found.low, found.high) == (2, 2, 2)
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio([1, 2], [1])
