"""The search of formats with a scale alone: Q6_K, IQ4_NL, IQ4_XS, and Q4_0, Q5_0 with an importance.

A sub-block of weights x with weights w of their errors wants a scale s (x ~ s q, q in the grid of the format). Each
of `tops` is a value that the weight of largest magnitude is mapped to; of these roundings, each with the s of least
squares, the best is rounded anew and refitted twice. A super-block rounds its scales to whole multiples of an f16:
neighbours are tried on the weights themselves, then the f16 is refitted and they are tried again. A step that does
not lower the error is not taken. tests/quant/search_reference.py has the same in NumPy.
"""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import numpy as np

from m2lite.quant.encoders.affine import NEIGHBOURS
from m2lite.quant.encoders.block import inverse_of, largest
from m2lite.simd.jit import kernel, specialise
from m2lite.simd.memory import load_f32, scratch, store_f32, store_i32
from m2lite.simd.vectors import as_half, magnitude, maximum, minimum, nearest, splat, to_i32, where

F = np.float32
ZERO, INFINITY = F(0.0), F(np.inf)
N_REFITS = 2
MOST_SUBS = 16


half_range = 8  # `specialise` fills it in: whole numbers from -half_range to half_range - 1


def _whole_value(v):
    return minimum(maximum(nearest(v), F(-half_range)), F(half_range - 1))


def _whole_code(v):
    return to_i32(whole_value(v) + F(half_range))


def whole_grid(half_range: int) -> dict[str, Any]:
    value = kernel(specialise(_whole_value, f"value_{half_range}", half_range=half_range))
    code = kernel(specialise(_whole_code, f"code_{half_range}", half_range=half_range, whole_value=value))
    return {"value": value, "code": code}


def tops_of(low: float, high: float, first: float, last: float, step: float) -> tuple[Any, ...]:
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
    error, best = splat(INFINITY), minimum(maximum(near, least_code), most_code)
    for i in range(n_neighbours):
        s_code = minimum(maximum(near + STEPS[i], least_code), most_code)
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


def block_search(name: str, grid: dict[str, Any], tops: tuple[Any, ...], nominal: float) -> Any:
    names = {"n": 32, "tops": tops, "n_tops": len(tops), "nominal": F(nominal), **grid}
    names["search_scale"] = kernel(specialise(_search_scale, f"search_scale_{name}", **names))
    return kernel(specialise(_round_block, f"round_block_{name}", **names))


def super_search(name: str, grid: dict[str, Any], n: int, tops: tuple[Any, ...], nominal: float, **names: Any) -> Any:
    names |= {"n": n, "n_sub": 256 // n, "tops": tops, "n_tops": len(tops), "nominal": F(nominal), **grid}
    for template in (_search_scale, _choose_scale, _choose_scales, _refit_factor, _search_super, _round_super):
        short = template.__name__.removeprefix("_")
        names[short] = kernel(specialise(template, f"{short}_{name}", **names))
    return names["search_super"], names["round_super"]
