"""Encoders of the formats that need no search: bytes as formats/ defines them, 16 blocks at a time.

`encode_X(x, importance, sigma, out, stride)`: x is scratch, position j of block i at x + 64 j + 4 i; block i goes to
out + i * stride.
"""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from m2lite.kernels.jit import kernel
from m2lite.kernels.simd import load_f32, read_f32, read_i32, scratch, store_f32, write_f32, write_i32
from m2lite.quant.lanes import (
    at_least,
    at_most,
    bits_of,
    floor,
    from_bits,
    half_bits,
    load_i32,
    magnitude,
    scatter_u8,
    scatter_u16,
    scatter_u32,
    store_i32,
    to_i32,
    where,
    whole,
)

F = np.float32
ZERO, ONE = F(0.0), F(1.0)
FAR = F(1e9)  # what a block of subnormals can produce beyond is not a number that a code could hold


@kernel
def largest(x, n):
    """Per block: the weight of largest magnitude (the first of equals) and that magnitude."""
    top, size = whole(ZERO), whole(F(-1.0))  # so that the first is taken, whatever it is
    for j in range(n):
        v = load_f32(x + 64 * j)
        a = magnitude(v)
        top = where(a > size, v, top)
        size = where(a > size, a, size)
    return top, size


@kernel
def range_of(x, n):
    """Per block: the smallest and the largest weight; of 0 and -0 the first (NumPy's depends on the CPU)."""
    low, high = load_f32(x), load_f32(x)
    for j in range(1, n):
        v = load_f32(x + 64 * j)
        low = where(v < low, v, low)
        high = where(v > high, v, high)
    return low, high


@kernel
def inverse_of(d):
    """1 / d, 0 where d is 0."""
    return where(d == whole(ZERO), whole(ZERO), ONE / d)


@kernel
def code_of(scaled, highest):
    """Truncated to 0..highest; 0 for what is not a number of any block that can be stored."""
    safe = where(magnitude(scaled) < FAR, scaled, whole(ZERO))
    return at_most(at_least(safe, ZERO), F(highest))


@kernel
def write_nibbles(q, out, stride):
    """Byte k of a block = code k | code k + 16 << 4, for 32 codes (int32 lanes at q)."""
    for word in range(4):
        packed = load_i32(q + 256 * word) & 15
        for byte in range(4):
            at = q + 64 * (4 * word + byte)
            both = (load_i32(at) & 15) | ((load_i32(at + 1024) & 15) << 4)
            packed = packed | (both << (8 * byte))
        scatter_u32(out + 4 * word, stride, packed)


@kernel
def write_fifth_bits(q, out, stride):
    """Bit k of 4 bytes = bit 4 of code k."""
    bits = (load_i32(q) >> 4) & 1
    for j in range(1, 32):
        bits = bits | (((load_i32(q + 64 * j) >> 4) & 1) << j)
    scatter_u32(out, stride, bits)


@kernel
def signed_codes(x, q, n_codes):
    """Codes 0..n_codes - 1 of 32 weights; the one of largest magnitude becomes -n_codes / 2 exactly. Returns d."""
    top, _ = largest(x, 32)
    d = top / F(-(n_codes // 2))
    inverse = inverse_of(d)
    for j in range(32):
        scaled = load_f32(x + 64 * j) * inverse + F(n_codes // 2 + 0.5)
        store_i32(q + 64 * j, to_i32(code_of(scaled, n_codes - 1)))
    return d


@kernel
def offset_codes(x, q, n_codes):
    """Codes 0..n_codes - 1 between the smallest and the largest of 32 weights. Returns d and the smallest."""
    low, high = range_of(x, 32)
    d = (high - low) / F(n_codes - 1)
    inverse = inverse_of(d)
    for j in range(32):
        scaled = (load_f32(x + 64 * j) - low) * inverse + F(0.5)
        store_i32(q + 64 * j, to_i32(code_of(scaled, n_codes - 1)))
    return d, low


@kernel
def encode_q4_0(x, importance, sigma, out, stride):
    q = scratch(32)
    scatter_u16(out, stride, half_bits(signed_codes(x, q, 16)))
    write_nibbles(q, out + 2, stride)


@kernel
def encode_q5_0(x, importance, sigma, out, stride):
    q = scratch(32)
    scatter_u16(out, stride, half_bits(signed_codes(x, q, 32)))
    write_fifth_bits(q, out + 2, stride)
    write_nibbles(q, out + 6, stride)


@kernel
def encode_q4_1(x, importance, sigma, out, stride):
    q = scratch(32)
    d, low = offset_codes(x, q, 16)
    scatter_u16(out, stride, half_bits(d))
    scatter_u16(out + 2, stride, half_bits(low))
    write_nibbles(q, out + 4, stride)


@kernel
def encode_q5_1(x, importance, sigma, out, stride):
    q = scratch(32)
    d, low = offset_codes(x, q, 32)
    scatter_u16(out, stride, half_bits(d))
    scatter_u16(out + 2, stride, half_bits(low))
    write_fifth_bits(q, out + 4, stride)
    write_nibbles(q, out + 8, stride)


@kernel
def encode_q8_0(x, importance, sigma, out, stride):
    """d = max |w| / 127; halves are rounded away from zero."""
    _, size = largest(x, 32)
    d = size / F(127)
    inverse = inverse_of(d)
    scatter_u16(out, stride, half_bits(d))
    for word in range(8):
        packed = to_i32(whole(ZERO))
        for byte in range(4):
            scaled = load_f32(x + 64 * (4 * word + byte)) * inverse
            safe = where(magnitude(scaled) < FAR, scaled, whole(ZERO))
            a = magnitude(safe)
            down = floor(a)
            code = to_i32(down + floor(F(2) * (a - down)))
            signed = where(safe < ZERO, 0 - code, code)
            packed = packed | ((signed & 255) << (8 * byte))
        scatter_u32(out + 2 + 4 * word, stride, packed)


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
    d = from_bits(where(e < 2, to_i32(whole(ZERO)) + 0x00200000 << (e & 1), (e - 1) << 23))
    q = area + 64
    for j in range(32):
        v = load_f32(x + 64 * j)
        a = magnitude(v)
        best, code = a, whole(ZERO)
        for i in range(7):
            error = magnitude(d * F(MX_STEPS[i]) - a)
            code = where(error < best, whole(F(i + 1)), code)
            best = where(error < best, error, best)
        negative = (v < ZERO) & (code > ZERO)
        store_i32(q + 64 * j, to_i32(where(negative, code + F(8), code)))
    write_nibbles(q, out + 1, stride)


@kernel
def bf16_bits(v):
    """Round to nearest even; a NaN stays one."""
    bits = bits_of(v)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 64, rounded)
