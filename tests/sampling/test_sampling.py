"""Sampling against a plain reading of its own documentation."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2lite.errors import M2liteError, UsageError
from m2lite.sampling.draw import Sampling, draw, exp_below_0, foresee, new_seed
from tests.bounded import bounded_work
from tests.sampling.plain import candidates, plain_draw, uniform

M64 = 2**64 - 1
PINNED = [951, 568, 136, 531, 778, 309, 321, 457]


def philox4x64(key: tuple[int, int], counter: list[int]) -> int:
    """First output word of Philox4x64-10, from the paper of Salmon and others (2011)."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & M64, (p0 >> 64) ^ c3 ^ k1, p0 & M64
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & M64, (k1 + 0xBB67AE8584CAA73B) & M64
    return c0


def plain_candidates(logits: np.ndarray, s: Sampling) -> tuple[list[int], list[float]]:
    """The filters in their order, one Python float at a time."""
    ids = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))[: s.top_k or None]
    top = float(logits[ids[0]])
    weights = [math.exp((float(logits[i]) - top) / s.temperature) for i in ids]
    if s.top_p < 1:
        running, kept = 0.0, 0
        while kept < len(ids):
            running += weights[kept]
            kept += 1
            if running >= s.top_p * sum(weights):
                break
        ids, weights = ids[:kept], weights[:kept]
    kept = max(1, sum(w >= s.min_p for w in weights))
    return ids[:kept], weights[:kept]


@pytest.mark.parametrize(
    ("seed", "stream", "position"), [(0, 0, 0), (1, 2, 3), (M64, 5 << 32, 196_608), (7, M64, 2**40)]
)
def test_uniform_is_philox(seed: int, stream: int, position: int) -> None:
    assert uniform(seed, stream, position) == (philox4x64((seed, stream), [1, position, 0, 0]) >> 11) / 2**53


def test_philox_known_answer() -> None:
    """The reference vector of Random123 for a counter and key of all ones bits."""
    assert philox4x64((M64, M64), [M64] * 4) == 0x87B092C3013FE90B


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-20, 20), min_size=1, max_size=60),
    st.integers(0, 70),
    st.floats(0.05, 1),
    st.floats(0, 1),
    st.floats(0.1, 5),
)
def test_filters(values: list[int], top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    logits = np.array(values, np.float32) / 4  # few values, many ties
    sampling = Sampling(temperature, top_k, top_p, min_p, seed=0)
    ids, weights = candidates(logits, sampling)
    expected_ids, expected = plain_candidates(logits, sampling)
    # A weight on the very edge of top-p or min-p may fall either way between two exponentials.
    if len(ids) == len(expected_ids):
        assert ids.tolist() == expected_ids
        np.testing.assert_allclose(weights, expected, rtol=1e-12)
    else:
        n = min(len(ids), len(expected_ids))
        assert ids[:n].tolist() == expected_ids[:n]
        share = math.fsum(expected[:n]) / math.fsum(plain_candidates(logits, Sampling(temperature, top_k, 1, 0, 0))[1])
        assert abs(share - top_p) < 1e-9 or any(abs(w - min_p) < 1e-9 for w in [*expected, *weights.tolist()])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(st.integers(-20, 20), st.just(-0.0), st.just(-math.inf)), min_size=1, max_size=300),
    st.integers(0, 310),
    st.one_of(st.just(1.0), st.floats(0, 1)),
    st.one_of(st.just(0.0), st.floats(0, 1)),
    st.floats(1e-3, 5),
    st.integers(0, M64),
    st.integers(0, M64),
    st.integers(0, 1 << 40),
)
def test_compiled_draws_are_the_plain_ones(
    values: list[float], top_k: int, top_p: float, min_p: float, temperature: float, seed: int, stream: int, at: int
) -> None:
    logits = np.array(values, np.float32) / 4
    sampling = Sampling(temperature, top_k, top_p, min_p, seed)
    expected, share = plain_draw(logits, sampling, stream, at)
    if expected < 0:
        with pytest.raises(M2liteError, match="not finite"):
            draw(logits, sampling, stream, at)
    else:
        assert draw(logits, sampling, stream, at) == expected
        found, its_share = foresee(logits, sampling, stream, at)
        assert found == expected and its_share == pytest.approx(share, rel=1e-12)


def test_compiled_draws_of_a_large_vocabulary() -> None:
    rng = np.random.default_rng(5)
    drawn = rng.standard_normal(200_064).astype(np.float32) * 3
    for logits in (drawn, np.sort(drawn), np.sort(drawn)[::-1].copy()):
        for at in range(40):
            sampling = Sampling(1.5, top_k=(40, 0, 5000)[at % 3], top_p=(0.95, 1)[at % 2], min_p=at % 5 / 1000, seed=9)
            assert foresee(logits, sampling, 2, at) == plain_draw(logits, sampling, 2, at)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_draw_hides_a_bad_logit_among_many(bad: float) -> None:
    logits = np.random.default_rng(6).standard_normal(5000).astype(np.float32)
    logits[4321] = bad
    for top_k in (0, 40, 1000):
        with pytest.raises(M2liteError, match="not finite"):
            draw(logits, Sampling(top_k=top_k, seed=0))


def test_a_greedy_draft_says_how_far_it_is_ahead() -> None:
    greedy = Sampling(temperature=0, seed=0)
    logits = np.array([1.0, 3.0, 0.0, 3.0, 2.5], np.float32)
    assert foresee(logits, greedy) == (1, 0.5)  # a tie: the lowest id, and no more sure than the other
    logits[3] = -np.inf
    token, share = foresee(logits, greedy)
    assert token == 1 == draw(logits, greedy) and share == pytest.approx(1 / (1 + np.exp(-0.5)))
    with pytest.raises(M2liteError, match="not finite"):
        foresee(np.array([1.0, np.nan], np.float32), greedy)


def test_ties_go_to_the_lowest_id() -> None:
    logits = np.zeros(1000, np.float32)
    logits[500:] = -0.0
    assert candidates(logits, Sampling(top_k=5, top_p=1, seed=0))[0].tolist() == [0, 1, 2, 3, 4]
    logits[[300, 700, 900]] = 1
    assert candidates(logits, Sampling(top_k=2, top_p=1, seed=0))[0].tolist() == [300, 700]
    assert draw(logits, Sampling(temperature=0, seed=0)) == 300


def test_a_draw_depends_on_its_position_only() -> None:
    logits = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    sampling = Sampling(seed=3)
    forward = [draw(logits, sampling, 1, p) for p in range(50)]
    assert forward == [draw(logits.copy(), sampling, 1, p) for p in reversed(range(50))][::-1]
    assert forward != [draw(logits, sampling, 2, p) for p in range(50)]
    assert forward != [draw(logits, Sampling(seed=4), 1, p) for p in range(50)]


def test_frequencies() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.log(probabilities).astype(np.float32)
    n = 20_000
    counts = Counter(draw(logits, Sampling(1, 0, 1, 0, seed=1), 0, p) for p in range(n))
    for token, probability in enumerate(probabilities):
        # five standard deviations
        assert abs(counts[token] / n - probability) < 5 * math.sqrt(probability * (1 - probability) / n)


def test_known_draws() -> None:
    """Pinned: these ids must come out on every machine, processor and library version."""
    logits = (np.arange(1000, dtype=np.float32) * 7919 % 1000) / 200
    assert [draw(logits, Sampling(seed=42), 0, p) for p in range(8)] == PINNED


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(bad: float, temperature: float) -> None:
    logits = np.zeros(10, np.float32)
    logits[3] = bad
    with pytest.raises(M2liteError, match="not finite at position 7"):
        draw(logits, Sampling(temperature=temperature, seed=0), 0, 7)


def test_masked_tokens_are_never_drawn() -> None:
    logits = np.full(10, -np.inf, np.float32)
    logits[[2, 5]] = 0
    assert {draw(logits, Sampling(1, 0, 1, 0, seed=0), 0, p) for p in range(100)} == {2, 5}


def test_exp() -> None:
    x = -np.concatenate([np.linspace(0, 700, 100_001), [0, 1e-300, 5e-324, 1e5, np.inf]])
    exact = np.array([math.exp(max(v, -700)) for v in x])
    assert np.max(np.abs(exp_below_0(x) - exact) / np.spacing(exact)) <= 2
    assert exp_below_0(np.zeros(1))[0] == 1


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_p": 1.5}, {"min_p": math.nan}, {"top_k": -1}, {"seed": -1}, {"seed": 2**64}]
)
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Sampling(**options)  # type: ignore[arg-type]


def test_seeds_are_drawn() -> None:
    assert Sampling().seed != Sampling().seed
    assert 0 <= new_seed() < 2**32


def test_a_draw_copies_no_logits() -> None:
    """Nothing of the vocabulary's size is made: what a draw costs is one look at each logit."""
    logits = np.random.default_rng(0).standard_normal(200_064).astype(np.float32) * 3
    sampling = Sampling(seed=0)
    draw(logits, sampling)  # compiled
    with bounded_work(100, logits.nbytes / 10):
        drawn = draw(logits, sampling, 0, 7)
    assert drawn == plain_draw(logits, sampling, 0, 7)[0]
