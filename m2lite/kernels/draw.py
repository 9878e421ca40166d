"""A draw from logits in one call: the filters of decode/sampling.py, for few and many candidates. Knows no options.

Every operation is the one that sampling.py has, in its order, so the ids are the same, bit for bit.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from m2lite.kernels.exp import EXP_FLOOR, LN2_HIGH, LN2_LOW, LOG2_E, TAYLOR
from m2lite.simd.jit import inner, kernel
from m2lite.simd.kinds import Int, Scalar

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint32]

MAX_TOP_K = 128  # longer lists are sorted faster than they are kept sorted
NOT_FINITE = -1
DIGIT_BITS = 11  # of a radix sort of 32 bits, in three passes
LOWEST_POWER = math.floor(EXP_FLOOR * LOG2_E) - 1
POWERS = 2.0 ** np.arange(LOWEST_POWER, 2)  # ldexp is a call; these products are as exact

U32 = np.uint64(0xFFFF_FFFF)
U1, U11, U32_BITS = np.uint64(1), np.uint64(11), np.uint64(32)
PHILOX = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
WEYL = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))


@kernel
def exp_below_0(x: Scalar) -> np.float64:
    """e**x for x <= 0: as sampling.exp_below_0."""
    x = max(x, EXP_FLOOR)
    n = np.rint(x * LOG2_E)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    y = TAYLOR[0]
    for i in range(1, 14):
        y = y * r + TAYLOR[i]
    power: np.float64 = y * POWERS[int(n) - LOWEST_POWER]
    return power


@inner
def high_product(a: np.uint64, b: np.uint64) -> np.uint64:
    """The upper 64 bits of a * b."""
    a0, a1, b0, b1 = a & U32, a >> U32_BITS, b & U32, b >> U32_BITS
    middle = a1 * b0 + (a0 * b0 >> U32_BITS)
    other = a0 * b1 + (middle & U32)
    return a1 * b1 + (middle >> U32_BITS) + (other >> U32_BITS)


@kernel
def uniform(seed: np.uint64, stream: np.uint64, position: np.uint64) -> float:
    """The random number in [0, 1) of (seed, stream, position): Philox4x64-10, as tests/sampling/plain.py::uniform."""
    k0, k1 = seed, stream
    c0, c1, c2, c3 = U1, position, np.uint64(0), np.uint64(0)
    for _ in range(10):
        h0, l0 = high_product(PHILOX[0], c0), PHILOX[0] * c0
        h1, l1 = high_product(PHILOX[1], c2), PHILOX[1] * c2
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = k0 + WEYL[0], k1 + WEYL[1]
    return np.float64(c0 >> U11) * 2.0**-53


@inner
def largest(logits: Logits, ids: Ids, values: Logits) -> bool:
    """The largest logits in falling order, equal ones by rising id. False where a logit is NaN or +infinity."""
    k, n, finite = len(ids), 0, True
    for i in range(len(logits)):
        value = logits[i]
        if n == k and value <= values[k - 1]:
            continue
        finite = finite and value < np.inf  # NaN comes here too: no comparison with it holds
        at = min(n, k - 1)
        while at > 0 and values[at - 1] < value:
            values[at], ids[at] = values[at - 1], ids[at - 1]
            at -= 1
        values[at], ids[at] = value, i
        n = min(n + 1, k)
    return finite


@inner
def rank_keys(logits: Logits) -> Keys:
    """uint32 that rise as the logits fall; -0 is 0."""
    raw, keys = logits.view(np.uint32), np.empty(len(logits), np.uint32)
    for i in range(len(logits)):
        bits = raw[i] if logits[i] != 0 else np.uint32(0)
        keys[i] = bits if bits >> 31 else bits ^ 0x7FFF_FFFF
    return keys


@inner
def largest_digit(keys: Keys, k: int) -> tuple[int, int]:
    """(d, n): the k smallest keys have a first digit of d or less, as n keys have."""
    counts = np.zeros(1 << DIGIT_BITS, np.int64)
    for i in range(len(keys)):
        counts[keys[i] >> (32 - DIGIT_BITS)] += 1
    digit, n = 0, counts[0]
    while n < k:
        digit += 1
        n += counts[digit]
    return digit, n


@kernel
def ranked(logits: Logits, k: int) -> Ids:
    """The first k ids by falling logit, equal ones by rising id, as sampling.ranked; sorts those in question."""
    all_keys = rank_keys(logits)
    last, n = largest_digit(all_keys, k)
    buffers, at = np.empty((4, n), np.uint32), 0
    ids, keys, next_ids, next_keys = buffers[0], buffers[1], buffers[2], buffers[3]
    for i in range(len(all_keys)):
        if all_keys[i] >> (32 - DIGIT_BITS) <= last:
            ids[at], keys[at] = i, all_keys[i]
            at += 1
    for shift in range(0, 32, DIGIT_BITS):
        places = np.zeros((1 << DIGIT_BITS) + 1, np.int64)
        for i in range(n):
            places[((keys[i] >> shift) & ((1 << DIGIT_BITS) - 1)) + 1] += 1
        for digit in range(1 << DIGIT_BITS):
            places[digit + 1] += places[digit]
        for i in range(n):
            digit = (keys[i] >> shift) & ((1 << DIGIT_BITS) - 1)
            next_keys[places[digit]], next_ids[places[digit]] = keys[i], ids[i]
            places[digit] += 1
        ids, next_ids, keys, next_keys = next_ids, ids, next_keys, keys
    first: Ids = ids[:k]
    return first


@inner
def draw_ranked(
    ids: Ids, values: Logits, temperature: float, top_p: float, min_p: float, seed: np.uint64, stream: np.uint64,
    position: np.uint64,
) -> tuple[Int, Scalar]:  # fmt: skip
    """(id, share): drawn from candidates in rank order, whose logits are `values`, and its probability among them."""
    n, total = len(values), 0.0
    steps, weights = np.empty(n, np.float64), np.empty(n, np.float64)
    for i in range(n):  # apart from the sums, which are one chain: these are computed several at a time
        weights[i] = exp_below_0((np.float64(values[i]) - np.float64(values[0])) / temperature)
    for i in range(n):
        total += weights[i]
        steps[i] = total
    kept = n
    if top_p < 1:
        kept = 1
        while steps[kept - 1] < top_p * total:
            kept += 1
    if min_p > 0:
        while kept > 1 and weights[kept - 1] < min_p:
            kept -= 1
    target, i = uniform(seed, stream, position) * steps[kept - 1], 0
    while i < kept - 1 and steps[i] <= target:
        i += 1
    return np.int64(ids[i]), weights[i] / steps[kept - 1]


@kernel
def draw_top_k(
    logits: Logits, top_k: int, temperature: float, top_p: float, min_p: float, seed: np.uint64, stream: np.uint64,
    position: np.uint64,
) -> tuple[Int, Scalar]:  # fmt: skip
    """(id, share): drawn from float32 logits [V] among the top_k (1 to V) largest, and its probability there.

    The id is NOT_FINITE where a logit is NaN or infinite. seed, stream and position are uint64.
    """
    ids, values = np.empty(top_k, np.int64), np.empty(top_k, np.float32)
    if not largest(logits, ids, values) or values[0] == -np.inf:
        return NOT_FINITE, 0.0
    return draw_ranked(ids, values, temperature, top_p, min_p, seed, stream, position)


@kernel
def draw_sorted(
    logits: Logits, top_k: int, temperature: float, top_p: float, min_p: float, seed: np.uint64, stream: np.uint64,
    position: np.uint64,
) -> tuple[Int, Scalar]:  # fmt: skip
    """As draw_top_k, whose time grows with top_k; this one sorts them all."""
    finite = True
    for i in range(len(logits)):
        finite = finite and logits[i] < np.inf
    ids = ranked(logits, top_k)
    if not finite or logits[ids[0]] == -np.inf:
        return NOT_FINITE, 0.0
    return draw_ranked(ids, logits[ids], temperature, top_p, min_p, seed, stream, position)


@kernel
def choose_largest(logits: Logits) -> tuple[Int, Scalar]:
    """(id, share): of the largest of float32 logits [V], V > 1, and its probability against the second; or NOT_FINITE.

    Of equal ones the lowest id.
    """
    ids, values = np.empty(2, np.int64), np.empty(2, np.float32)
    if not largest(logits, ids, values) or values[0] == -np.inf:
        return NOT_FINITE, 0.0
    return ids[0], 1.0 / (1.0 + exp_below_0(np.float64(values[1]) - np.float64(values[0])))
