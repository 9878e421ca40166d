"""Searched encoders of the formats with a scale alone: Q6_K, IQ4_NL, IQ4_XS, and Q4_0, Q5_0 with an importance.

A sub-block of weights x with weights w of their errors wants a scale s (x ~ s q, q in the grid of the format). Each
of `tops` is a value that the weight of largest magnitude is mapped to; of these roundings, each with the s of least
squares, the best is rounded anew and refitted twice. A super-block rounds its scales to whole multiples of an f16:
neighbours are tried on the weights themselves, then the f16 is refitted and they are tried again. A step that does
not lower the error is not taken. search_reference.py has the same in NumPy.
"""
# mypy: ignore-errors

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from m2lite.kernels.jit import kernel, specialise
from m2lite.kernels.simd import load_f32, read_f32, scratch, splat, store_f32
from m2lite.quant.lanes import (
    as_half,
    at_least,
    at_most,
    constants,
    half_bits,
    load_i32,
    lookup,
    magnitude,
    nearest,
    scatter_u16,
    scatter_u32,
    store_i32,
    to_i32,
    transpose,
    where,
)
from m2lite.quant.search_affine import NEIGHBOURS, sum_squares, weigh_by_importance
from m2lite.quant.search_plain import inverse_of, largest, write_fifth_bits, write_nibbles

F = np.float32
ZERO, INFINITY = F(0.0), F(np.inf)
N_REFITS = 2
MOST_SUBS = 16

# --- grids ----------------------------------------------------------------------------------------------------------

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MIDDLES = [(a + b) / 2 for a, b in itertools.pairwise(IQ4_VALUES)]
MIDDLE = F(_MIDDLES[7])
iq4_values = constants(IQ4_VALUES)
iq4_middles = constants((*_MIDDLES, np.inf))


@kernel
def iq4_code(v):
    """The index of the nearest of IQ4_VALUES, by halving."""
    middles = iq4_middles()
    at = where(v >= MIDDLE, to_i32(splat(F(8.0))), to_i32(splat(ZERO)))
    at = at + where(v >= lookup(middles, at + 3), to_i32(splat(F(4.0))), to_i32(splat(ZERO)))
    at = at + where(v >= lookup(middles, at + 1), to_i32(splat(F(2.0))), to_i32(splat(ZERO)))
    return at + where(v >= lookup(middles, at), to_i32(splat(F(1.0))), to_i32(splat(ZERO)))


@kernel
def iq4_value(v):
    return lookup(iq4_values(), iq4_code(v))


half_range = 8  # `specialise` fills it in: whole numbers from -half_range to half_range - 1


def _whole_value(v):
    return at_most(at_least(nearest(v), F(-half_range)), F(half_range - 1))


def _whole_code(v):
    return to_i32(whole_value(v) + F(half_range))


def _whole_grid(half_range: int) -> dict[str, Any]:
    value = kernel(specialise(_whole_value, f"value_{half_range}", half_range=half_range))
    code = kernel(specialise(_whole_code, f"code_{half_range}", half_range=half_range, whole_value=value))
    return {"value": value, "code": code}


def _tops(low: float, high: float, first: float, last: float, step: float) -> tuple[Any, ...]:
    """Targets of the largest weight around the two ends of a grid: plain ones first, so that ties stay there."""
    shifts = np.arange(first, last, step)
    return tuple(F(top + shift) for top in (low, high) for shift in shifts)


# --- templates: `specialise` fills in n, tops, value, code, ... ----------------------------------------------------

n = n_tops = n_sub = n_neighbours = 1
nominal = top_code = least_code = most_code = F(1.0)
tops = (F(1.0),)
value = code = whole_value = search_scale = choose_scale = choose_scales = None


def _search_scale(x, w):
    """Scale s of n weights: x ~ s q."""
    top, _ = largest(x, n)
    per_top = inverse_of(top)
    gain, scale = splat(ZERO), top * F(1.0 / nominal)
    for i in range(n_tops + N_REFITS):
        steps = per_top * tops[i] if i < n_tops else inverse_of(scale)
        slx, sll = splat(ZERO), splat(ZERO)
        for j in range(n):
            v = load_f32(x + 64 * j)
            q = value(v * steps)
            t = load_f32(w + 64 * j) * q
            slx, sll = slx + t * v, sll + t * q
        s = slx / sll
        g = s * slx
        better = (sll > ZERO) & (g > gain)
        gain, scale = where(better, g, gain), where(better, s, scale)
    return scale


def _choose_scale(x, w, d, s):
    """The code of a sub-block's scale, and the error: the neighbours of s / d, tried."""
    near = nearest(s * inverse_of(d))
    error, best = splat(INFINITY), at_most(at_least(near, least_code), most_code)
    for i in range(n_neighbours):
        s_code = at_most(at_least(near + STEPS[i], least_code), most_code)
        scale = d * s_code
        inverse = inverse_of(scale)
        e = splat(ZERO)
        for j in range(n):
            v = load_f32(x + 64 * j)
            off = scale * value(v * inverse) - v
            e = e + (load_f32(w + 64 * j) * off) * off
        better = e < error
        error, best = where(better, e, error), where(better, s_code, best)
    return error, best


STEPS = (*NEIGHBOURS, F(-2.0), F(2.0))


def _choose_scales(x, w, d, scales, codes):
    """choose_scale for all sub-blocks; the sum of the errors."""
    total = splat(ZERO)
    for sub in range(n_sub):
        e, s_code = choose_scale(x + 64 * n * sub, w + 64 * n * sub, d, load_f32(scales + 64 * sub))
        store_f32(codes + 64 * sub, s_code)
        total = total + e
    return total


def _refit_factor(x, w, d, codes):
    """The f16 factor of least squares, with the codes and roundings that the super-block has."""
    slx, sll = splat(ZERO), splat(ZERO)
    for sub in range(n_sub):
        a = load_f32(codes + 64 * sub)
        inverse = inverse_of(d * a)
        sqx, sqq = splat(ZERO), splat(ZERO)
        for j in range(n):
            v = load_f32(x + 64 * (n * sub + j))
            q = value(v * inverse)
            t = load_f32(w + 64 * (n * sub + j)) * q
            sqx, sqq = sqx + t * v, sqq + t * q
        slx, sll = slx + a * sqx, sll + (a * a) * sqq
    return as_half(where(sll > ZERO, slx / sll, d))


def _search_super(x, w, codes):
    """d (as f16) and the codes of the scales of a super-block."""
    scales, other = scratch(MOST_SUBS), scratch(MOST_SUBS)
    top, size = splat(ZERO), splat(F(-1.0))
    for sub in range(n_sub):
        s = search_scale(x + 64 * n * sub, w + 64 * n * sub)
        store_f32(scales + 64 * sub, s)
        top = where(magnitude(s) > size, s, top)
        size = where(magnitude(s) > size, magnitude(s), size)
    d = as_half(top * F(1.0 / top_code))
    error = choose_scales(x, w, d, scales, codes)
    d_new = refit_factor(x, w, d, codes)
    better = choose_scales(x, w, d_new, scales, other) < error
    for sub in range(n_sub):
        store_f32(codes + 64 * sub, where(better, load_f32(other + 64 * sub), load_f32(codes + 64 * sub)))
    return where(better, d_new, d)


refit_factor = None


def _round_super(x, d, codes, q):
    """q = the codes of all weights as int32."""
    for sub in range(n_sub):
        inverse = inverse_of(d * load_f32(codes + 64 * sub))
        for j in range(n * sub, n * sub + n):
            store_i32(q + 64 * j, code(load_f32(x + 64 * j) * inverse))


def _round_block(x, w, q):
    """d (as f16) and the codes of a lone block."""
    d = as_half(search_scale(x, w))
    inverse = inverse_of(d)
    for j in range(n):
        store_i32(q + 64 * j, code(load_f32(x + 64 * j) * inverse))
    return d


def _block_search(name: str, grid: dict[str, Any], tops: tuple[Any, ...], nominal: float) -> Any:
    names = {"n": 32, "tops": tops, "n_tops": len(tops), "nominal": F(nominal), **grid}
    names["search_scale"] = kernel(specialise(_search_scale, f"search_scale_{name}", **names))
    return kernel(specialise(_round_block, f"round_block_{name}", **names))


def _super_search(name: str, grid: dict[str, Any], n: int, tops: tuple[Any, ...], nominal: float, **names: Any) -> Any:
    names |= {"n": n, "n_sub": 256 // n, "tops": tops, "n_tops": len(tops), "nominal": F(nominal), **grid}
    for template in (_search_scale, _choose_scale, _choose_scales, _refit_factor, _search_super, _round_super):
        short = template.__name__.removeprefix("_")
        names[short] = kernel(specialise(template, f"{short}_{name}", **names))
    return names["search_super"], names["round_super"]


_IQ4 = {"value": iq4_value, "code": iq4_code}
_IQ4_TOPS = _tops(-127.0, 113.0, -7.0, 9.0, 2.0)
round_q4_0 = _block_search("q4_0", _whole_grid(8), _tops(-8.0, 8.0, -1.5, 1.5, 0.25), -8.0)
round_q5_0 = _block_search("q5_0", _whole_grid(16), _tops(-16.0, 16.0, -1.5, 1.5, 0.25), -16.0)
round_iq4_nl = _block_search("iq4_nl", _IQ4, _IQ4_TOPS, -127.0)
search_q6_k, round_q6_k = _super_search(
    "q6_k", _whole_grid(32), 16, _tops(-32.0, 32.0, -1.5, 1.6, 0.25)[:13], -32.0,
    top_code=F(-128.0), least_code=F(-128.0), most_code=F(127.0), n_neighbours=5,
)  # fmt: skip
search_iq4_xs, round_iq4_xs = _super_search(
    "iq4_xs", _IQ4, 32, _IQ4_TOPS, -127.0,
    top_code=F(-32.0), least_code=F(-32.0), most_code=F(31.0), n_neighbours=3,
)  # fmt: skip


# --- weights of the errors ----------------------------------------------------------------------------------------


@kernel
def weigh_iq4(x, importance, w, n, sub):
    """x**2 + the mean of its sub-block; with an importance, that times sqrt(2 mean of all n + x**2)."""
    if importance:
        weigh_by_importance(x, importance, sum_squares(x, n) * F(2.0 / n), w, n)
    else:
        for begin in range(0, n, sub):
            mean = sum_squares(x + 64 * begin, sub) * F(1.0 / sub)
            for j in range(begin, begin + sub):
                v = load_f32(x + 64 * j)
                store_f32(w + 64 * j, v * v + mean)


@kernel
def weigh_q6_k(x, importance, w):
    """x**2, or the importance itself."""
    for j in range(256):
        v = load_f32(x + 64 * j)
        store_f32(w + 64 * j, splat(read_f32(importance + 4 * j)) if importance else v * v)


# --- bytes --------------------------------------------------------------------------------------------------------


@kernel
def encode_q4_0(x, importance, sigma, out, stride):
    w, q = scratch(32), scratch(32)
    weigh_by_importance(x, importance, load_f32(sigma), w, 32)
    scatter_u16(out, stride, half_bits(round_q4_0(x, w, q)))
    write_nibbles(q, out + 2, stride)


@kernel
def encode_q5_0(x, importance, sigma, out, stride):
    w, q = scratch(32), scratch(32)
    weigh_by_importance(x, importance, load_f32(sigma), w, 32)
    scatter_u16(out, stride, half_bits(round_q5_0(x, w, q)))
    write_fifth_bits(q, out + 2, stride)
    write_nibbles(q, out + 6, stride)


@kernel
def encode_iq4_nl(x, importance, sigma, out, stride):
    w, q = scratch(32), scratch(32)
    weigh_iq4(x, importance, w, 32, 32)
    scatter_u16(out, stride, half_bits(round_iq4_nl(x, w, q)))
    write_nibbles(q, out + 2, stride)


@kernel
def encode_iq4_xs(x, importance, sigma, out, stride):
    w, codes, q, words = scratch(256), scratch(MOST_SUBS), scratch(256), scratch(32)
    weigh_iq4(x, importance, w, 256, 32)
    d = search_iq4_xs(x, w, codes)
    round_iq4_xs(x, d, codes, q)
    low, high = to_i32(splat(ZERO)), to_i32(splat(ZERO))
    for sub in range(8):
        s = to_i32(load_f32(codes + 64 * sub)) + 32
        low = low | ((s & 15) << (4 * sub))
        high = high | ((s >> 4) << (2 * sub))
    scatter_u16(out, stride, half_bits(d))
    scatter_u16(out + 2, stride, high)
    scatter_u32(out + 4, stride, low)
    for word in range(32):
        packed = to_i32(splat(ZERO))
        for byte in range(4):
            at = q + 64 * (32 * (word // 4) + 4 * (word % 4) + byte)
            packed = packed | ((load_i32(at) | (load_i32(at + 1024) << 4)) << (8 * byte))
        store_i32(words + 64 * word, packed)
    transpose(words, 64, out + 8, stride)
    transpose(words + 1024, 64, out + 72, stride)


@kernel
def encode_q6_k(x, importance, sigma, out, stride):
    w, codes, q, words = scratch(256), scratch(MOST_SUBS), scratch(256), scratch(48)
    weigh_q6_k(x, importance, w)
    d = search_q6_k(x, w, codes)
    round_q6_k(x, d, codes, q)
    for half in range(2):
        for word in range(16):
            packed = to_i32(splat(ZERO))
            for byte in range(4):
                at = q + 64 * (128 * half + 4 * word + byte)
                both = (load_i32(at) & 15) | ((load_i32(at + 4096) & 15) << 4)
                packed = packed | (both << (8 * byte))
            store_i32(words + 64 * (16 * half + word), packed)
        for word in range(8):
            packed = to_i32(splat(ZERO))
            for byte in range(4):
                at = q + 64 * (128 * half + 4 * word + byte)
                for part in range(4):
                    packed = packed | ((load_i32(at + 2048 * part) >> 4) << (8 * byte + 2 * part))
            store_i32(words + 64 * (32 + 8 * half + word), packed)
    transpose(words, 64, out, stride)
    transpose(words + 1024, 64, out + 64, stride)
    transpose(words + 2048, 64, out + 128, stride)
    for word in range(4):
        packed = to_i32(splat(ZERO))
        for byte in range(4):
            packed = packed | ((to_i32(load_f32(codes + 64 * (4 * word + byte))) & 255) << (8 * byte))
        scatter_u32(out + 192 + 4 * word, stride, packed)
    scatter_u16(out + 208, stride, half_bits(d))
