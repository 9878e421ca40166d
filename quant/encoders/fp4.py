"""The encoder of MXFP4: a power of two and the nearest of its values, no search."""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from m2lite.quant.encoders.block import largest, write_nibbles
from m2lite.simd.jit import kernel
from m2lite.simd.memory import (
    load_f32,
    load_i32,
    read_f32,
    read_i32,
    scatter_u8,
    scratch,
    store_f32,
    store_i32,
    write_f32,
    write_i32,
)
from m2lite.simd.vectors import from_bits, magnitude, splat, to_i32, where

F = np.float32
ZERO = F(0.0)


def _log2_ulps():
    """int32[320]: at 64 + e, how many float32 below 2**(e + 1 - 127) (with 24 bits, even where float32 has fewer)
    have a log2 that is rounded up to that power: MXFP4 takes its exponent from a log2 rounded to float32."""
    just_below = np.log2(1.0 - np.arange(1, 257) * 2.0**-24)
    powers = np.arange(-64, 256) + 1.0 - 127
    rounded = (powers[:, None] + just_below).astype(np.float32)
    return (rounded >= powers[:, None]).sum(axis=1).astype(np.int32)


LOG2_ULPS = _log2_ulps()
SUBNORMAL = np.int32(1 << 23)
TWO_64 = F(2.0**64)
MX_STEPS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


@kernel
def encode_mxfp4(x, importance, sigma, out, stride):
    """Byte 0 is the exponent of d, a power of two; codes are the nearest of 0 1 2 3 4 6 8 12 with a sign bit."""
    area = scratch(33)
    _, size = largest(x, 32)
    store_f32(area, size)
    for lane in range(16):
        at = area + 4 * lane
        shift = 0
        if read_i32(at) < SUBNORMAL:
            write_f32(at, read_f32(at) * TWO_64)
            shift = 64
        bits = read_i32(at)
        e = ((bits + LOG2_ULPS[(bits >> 23) + 64 - shift]) >> 23) - shift - 2 if bits != 0 else 0
        write_i32(at, np.int32(e & 255))
    e = load_i32(area)
    scatter_u8(out, stride, e)
    d = from_bits(where(e < 2, to_i32(splat(ZERO)) + 0x00200000 << (e & 1), (e - 1) << 23))
    q = area + 64
    for j in range(32):
        v = load_f32(x + 64 * j)
        a = magnitude(v)
        best, code = a, splat(ZERO)
        for i in range(7):
            error = magnitude(d * F(MX_STEPS[i]) - a)
            code = where(error < best, splat(F(i + 1)), code)
            best = where(error < best, error, best)
        negative = (v < ZERO) & (code > ZERO)
        store_i32(q + 64 * j, to_i32(where(negative, code + F(8), code)))
    write_nibbles(q, out + 1, stride, 32, 16)
