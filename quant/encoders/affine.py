"""The search of formats with a scale and an offset: Q4_K, Q5_K, and Q4_1, Q5_1 with an importance.

A sub-block of 32 weights x with weights w of their errors wants a scale s and an offset m >= 0 (x ~ s q - m, q in
0..n_max). 21 scales around the range give 21 roundings, each with the s and m of least squares; the best is rounded
anew and refitted twice. A super-block rounds its 8 scales and offsets to 6 bits: every pair of neighbours is tried on
the weights themselves, then the two f16 factors are refitted and all pairs tried again. A step that does not lower
the error is not taken. tests/quant/search_reference.py has the same in NumPy.
"""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from m2lite.quant.encoders.block import range_of, sum_squares, weigh_by_importance
from m2lite.simd.jit import kernel
from m2lite.simd.memory import load_f32, scratch, store_f32, store_i32
from m2lite.simd.vectors import as_half, magnitude, maximum, minimum, nearest, root, splat, to_i32, where

F = np.float32
ZERO, ONE, INFINITY = F(0.0), F(1.0), F(np.inf)
N_SCALES, FIRST, STEP = 21, F(-1.5), F(0.15)
N_REFITS = 2
SINGULAR = F(1e-4)  # a determinant below this share of its terms is rounding error
N_SUB, SUB, N_CODES = 8, 32, 16
TOP = 63  # the largest 6-bit scale
SUB_BYTES = SUB * 64


@kernel
def reciprocal(x):
    """1 / x where x > 0, else 0."""
    return where(x > ZERO, ONE / x, splat(ZERO))


# --- weights of the errors ----------------------------------------------------------------------------------------


@kernel
def weigh_k(x, importance, w):
    """Weights of a super-block: |x| over its rms in the sub-block, or by importance with the super-block's rms."""
    if importance:
        sigma = sum_squares(x, N_SUB * SUB) * F(2.0 / 256.0)
        weigh_by_importance(x, importance, sigma, w, N_SUB * SUB)
    else:
        for sub in range(N_SUB):
            at = sub * SUB_BYTES
            rms = root(sum_squares(x + at, SUB) * F(1.0 / 32.0))
            for j in range(SUB):
                store_f32(w + at + 64 * j, rms + magnitude(load_f32(x + at + 64 * j)))


# --- one sub-block ------------------------------------------------------------------------------------------------


@kernel
def fit(sums, low, l_sums, best):
    """The least squares of one rounding, if it beats `best` (error, scale, minimum)."""
    sw, sy, syy, sxx = sums
    sl, sll, sly = l_sums
    error, scale, minimum = best
    both = sw * sll
    determinant = both - sl * sl
    inverse = ONE / determinant
    s = (sw * sly - sy * sl) * inverse
    offset = (sll * sy - sl * sly) * inverse
    e = (syy - s * sly) - offset * sy
    m = offset + low
    slx = sly + low * sl
    alone = slx / sll
    clamped = m > ZERO
    s = where(clamped, alone, s)
    e = where(clamped, sxx - alone * slx, e)
    m = where(clamped, splat(ZERO), m)
    better = (determinant > SINGULAR * both) & (s > ZERO) & (e < error)
    return where(better, e, error), where(better, s, scale), where(better, m, minimum)


@kernel
def search_affine(x, w, n_max):
    """Scale s and offset m >= 0 of 32 weights: x ~ s q - m."""
    y = scratch(SUB)
    low, high = range_of(x, SUB)
    low = minimum(low, ZERO)
    width = maximum(high - low, ZERO)  # so that 0 never is -0
    sw, sy, syy, sxx = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    for j in range(SUB):
        v, wj = load_f32(x + 64 * j), load_f32(w + 64 * j)
        yj = v - low
        store_f32(y + 64 * j, yj)
        t = wj * yj
        sw, sy, syy = sw + wj, sy + t, syy + t * yj
        sxx = sxx + (wj * v) * v
    sums = (sw, sy, syy, sxx)
    inverse = reciprocal(width)
    best = (splat(INFINITY), width * F(1.0 / n_max), low)
    for i in range(N_SCALES):
        steps = inverse * (F(n_max) + (FIRST + STEP * F(i)))
        sl, sll, sly = splat(ZERO), splat(ZERO), splat(ZERO)
        for j in range(SUB):
            yj = load_f32(y + 64 * j)
            q = minimum(nearest(yj * steps), F(n_max))
            t = load_f32(w + 64 * j) * q
            sl, sll, sly = sl + t, sll + t * q, sly + t * yj
        best = fit(sums, low, (sl, sll, sly), best)
    for _ in range(N_REFITS):
        steps, shift = reciprocal(best[1]), best[2] - low
        sl, sll, sly = splat(ZERO), splat(ZERO), splat(ZERO)
        for j in range(SUB):
            yj = load_f32(y + 64 * j)
            q = minimum(maximum(nearest((yj - shift) * steps), ZERO), F(n_max))
            t = load_f32(w + 64 * j) * q
            sl, sll, sly = sl + t, sll + t * q, sly + t * yj
        best = fit(sums, low, (sl, sll, sly), best)
    return best[1], ZERO - best[2]


# --- a super-block ------------------------------------------------------------------------------------------------


@kernel
def code(v, offset, inverse, n_max):
    """The code of a weight: (v + offset) / scale, rounded and cut to 0..n_max."""
    return minimum(maximum(nearest((v + offset) * inverse), ZERO), F(n_max))


@kernel
def choose_pair(x, w, n_max, d, d_min, s, m):
    """6-bit scale and offset of a sub-block and their error: the neighbours of s / d and m / d_min, tried."""
    s_near = nearest(s * reciprocal(d))
    m_near = nearest(m * reciprocal(d_min))
    error, s_best, m_best = splat(INFINITY), minimum(s_near, F(TOP)), minimum(m_near, F(TOP))
    for i in range(9):
        s_code = minimum(maximum(s_near + NEIGHBOURS[i // 3], ZERO), F(TOP))
        m_code = minimum(maximum(m_near + NEIGHBOURS[i % 3], ZERO), F(TOP))
        scale, offset = d * s_code, d_min * m_code
        inverse = reciprocal(scale)
        e = splat(ZERO)
        for j in range(SUB):
            v = load_f32(x + 64 * j)
            off = (scale * code(v, offset, inverse, n_max) - offset) - v
            e = e + (load_f32(w + 64 * j) * off) * off
        better = e < error
        error, s_best, m_best = where(better, e, error), where(better, s_code, s_best), where(better, m_code, m_best)
    return error, s_best, m_best


NEIGHBOURS = (F(0.0), F(-1.0), F(1.0))


@kernel
def choose_pairs(x, w, n_max, d, d_min, fits, codes):
    """choose_pair for all 8 sub-blocks: fits holds 8 s and 8 m, codes gets 8 and 8; returns the sum of the errors."""
    total = splat(ZERO)
    for sub in range(N_SUB):
        at, s_at, m_at = sub * SUB_BYTES, 64 * sub, 64 * (N_SUB + sub)
        s, m = load_f32(fits + s_at), load_f32(fits + m_at)
        e, s_code, m_code = choose_pair(x + at, w + at, n_max, d, d_min, s, m)
        store_f32(codes + s_at, s_code)
        store_f32(codes + m_at, m_code)
        total = total + e
    return total


@kernel
def refit_factors(x, w, n_max, d, d_min, codes):
    """d and d_min of least squares over the super-block, with the codes and roundings that it has."""
    saa, sab, sbb, sax, sbx = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    for sub in range(N_SUB):
        at = sub * SUB_BYTES
        a, b = load_f32(codes + 64 * sub), load_f32(codes + 64 * (N_SUB + sub))
        offset, inverse = d_min * b, reciprocal(d * a)
        sw, sq, sqq, sqx, sx = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
        for j in range(SUB):
            v, wj = load_f32(x + at + 64 * j), load_f32(w + at + 64 * j)
            q = code(v, offset, inverse, n_max)
            t = wj * q
            sw, sq, sqq, sqx, sx = sw + wj, sq + t, sqq + t * q, sqx + t * v, sx + wj * v
        saa, sab, sbb = saa + (a * a) * sqq, sab + (a * b) * sq, sbb + (b * b) * sw
        sax, sbx = sax + a * sqx, sbx + b * sx
    both = saa * sbb
    determinant = both - sab * sab
    inverse = ONE / determinant
    d_new = (sax * sbb - sab * sbx) * inverse
    min_new = (sab * sax - sbx * saa) * inverse
    good = (determinant > SINGULAR * both) & (d_new > ZERO) & (min_new >= ZERO)
    alone = (sax + d_min * sab) / saa
    d_new = where(good, d_new, where((saa > ZERO) & (alone > ZERO), alone, d))
    return as_half(d_new), as_half(where(good, min_new, d_min))


@kernel
def search_super(x, w, n_max, codes):
    """d, d_min (as f16) and 16 codes of a super-block."""
    fits, other = scratch(N_CODES), scratch(N_CODES)
    s_top, m_top = splat(ZERO), splat(ZERO)
    for sub in range(N_SUB):
        s, m = search_affine(x + sub * SUB_BYTES, w + sub * SUB_BYTES, n_max)
        store_f32(fits + 64 * sub, s)
        store_f32(fits + 64 * (N_SUB + sub), m)
        s_top, m_top = where(s > s_top, s, s_top), where(m > m_top, m, m_top)
    d, d_min = as_half(s_top * F(1.0 / TOP)), as_half(m_top * F(1.0 / TOP))
    error = choose_pairs(x, w, n_max, d, d_min, fits, codes)
    d_new, min_new = refit_factors(x, w, n_max, d, d_min, codes)
    better = choose_pairs(x, w, n_max, d_new, min_new, fits, other) < error
    for i in range(2 * N_SUB):
        store_f32(codes + 64 * i, where(better, load_f32(other + 64 * i), load_f32(codes + 64 * i)))
    return where(better, d_new, d), where(better, min_new, d_min)


@kernel
def round_super(x, n_max, d, d_min, codes, q):
    """q = the 256 codes as int32."""
    for sub in range(N_SUB):
        offset = d_min * load_f32(codes + 64 * (N_SUB + sub))
        inverse = reciprocal(d * load_f32(codes + 64 * sub))
        for j in range(SUB):
            at = sub * SUB_BYTES + 64 * j
            store_i32(q + at, to_i32(code(load_f32(x + at), offset, inverse, n_max)))


@kernel
def search_offset_block(x, importance, sigma, n_max, q):
    """d and minimum (as f16) and codes of a lone block of 32."""
    w = scratch(SUB)
    weigh_by_importance(x, importance, load_f32(sigma), w, SUB)
    s, m = search_affine(x, w, n_max)
    d, low = as_half(s), as_half(m)
    inverse = reciprocal(d)
    for j in range(SUB):
        store_i32(q + 64 * j, to_i32(code(load_f32(x + 64 * j), low, inverse, n_max)))
    return d, ZERO - low
