"""Encoders of IQ4_NL and IQ4_XS: searched, with an importance or without."""
# mypy: ignore-errors

from __future__ import annotations

import itertools

import numpy as np

from m2lite.formats.iquants import IQ4_VALUES
from m2lite.quant.encoders.block import sum_squares, weigh_by_importance, write_nibbles
from m2lite.quant.encoders.signed import MOST_SUBS, block_search, super_search, tops_of
from m2lite.simd.jit import kernel
from m2lite.simd.memory import load_f32, scatter_u16, scatter_u32, scratch, store_f32
from m2lite.simd.vectors import constants, half_bits, lookup, splat, to_i32, where

F = np.float32
ZERO = F(0.0)
_VALUES = IQ4_VALUES.tolist()
_MIDDLES = [(a + b) / 2 for a, b in itertools.pairwise(_VALUES)]
MIDDLE = F(_MIDDLES[7])
iq4_values = constants(_VALUES)
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


_IQ4 = {"value": iq4_value, "code": iq4_code}
_IQ4_TOPS = tops_of(-127.0, 113.0, -7.0, 9.0, 2.0)
round_iq4_nl = block_search("iq4_nl", _IQ4, _IQ4_TOPS, -127.0)
search_scales_iq4_xs, round_iq4_xs = super_search(
    "iq4_xs", _IQ4, 32, _IQ4_TOPS, -127.0,
    top_code=F(-32.0), least_code=F(-32.0), most_code=F(31.0), n_neighbours=3,
)  # fmt: skip


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
def search_iq4_nl(x, importance, sigma, out, stride):
    w, q = scratch(32), scratch(32)
    weigh_iq4(x, importance, w, 32, 32)
    scatter_u16(out, stride, half_bits(round_iq4_nl(x, w, q)))
    write_nibbles(q, out + 2, stride, 32, 16)


@kernel
def search_iq4_xs(x, importance, sigma, out, stride):
    w, codes, q = scratch(256), scratch(MOST_SUBS), scratch(256)
    weigh_iq4(x, importance, w, 256, 32)
    d = search_scales_iq4_xs(x, w, codes)
    round_iq4_xs(x, d, codes, q)
    low, high = to_i32(splat(ZERO)), to_i32(splat(ZERO))
    for sub in range(8):
        s = to_i32(load_f32(codes + 64 * sub)) + 32
        low = low | ((s & 15) << (4 * sub))
        high = high | ((s >> 4) << (2 * sub))
    scatter_u16(out, stride, half_bits(d))
    scatter_u16(out + 2, stride, high)
    scatter_u32(out + 4, stride, low)
    write_nibbles(q, out + 8, stride, 256, 16)
