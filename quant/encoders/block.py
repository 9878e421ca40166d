"""What encoders of 16 blocks are made of. Sees addresses and lanes.

`encode_X(x, importance, sigma, out, stride)` and `search_X` of the same: x is scratch, position j of block i at
x + 64 j + 4 i; importance: float32 of the blocks' columns, or 0; sigma: a float32 of each block's row, the mean of its
squares; block i goes to out + i * stride.
"""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from m2lite.simd.jit import kernel
from m2lite.simd.memory import load_f32, load_i32, read_f32, scatter_u32, store_f32
from m2lite.simd.vectors import magnitude, root, splat, where

F = np.float32
ZERO, ONE = F(0.0), F(1.0)
FAR = F(1e9)  # what a block of subnormals can produce beyond is not a number that a code could hold


@kernel
def largest(x, n):
    """Per block: the weight of largest magnitude (the first of equals) and that magnitude."""
    top, size = splat(ZERO), splat(F(-1.0))  # so that the first is taken, whatever it is
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
    return where(d == splat(ZERO), splat(ZERO), ONE / d)


@kernel
def write_nibbles(q, out, stride, n, half):
    """Of n codes (int32 lanes at q), in each 2 * half: byte k = low nibble of code k | that of code k + half << 4."""
    for word in range(n // 8):
        first = q + 64 * (2 * half * (4 * word // half) + 4 * word % half)
        packed = load_i32(q) * 0
        for byte in range(4):
            at = first + 64 * byte
            both = (load_i32(at) & 15) | ((load_i32(at + 64 * half) & 15) << 4)
            packed = packed | (both << (8 * byte))
        scatter_u32(out + 4 * word, stride, packed)


@kernel
def write_high_bits(q, out, stride, n_parts):
    """32 bytes: byte k has the bits above the low nibbles of codes k, k + 32, ..., n_parts times 8 / n_parts bits."""
    for word in range(8):
        packed = load_i32(q) * 0
        for byte in range(4):
            for part in range(n_parts):
                high = load_i32(q + 64 * (32 * part + 4 * word + byte)) >> 4
                packed = packed | (high << (8 * byte + 8 // n_parts * part))
        scatter_u32(out + 4 * word, stride, packed)


@kernel
def write_fifth_bits(q, out, stride):
    """Bit k of 4 bytes = bit 4 of code k."""
    bits = (load_i32(q) >> 4) & 1
    for j in range(1, 32):
        bits = bits | (((load_i32(q + 64 * j) >> 4) & 1) << j)
    scatter_u32(out, stride, bits)


@kernel
def sum_squares(x, n):
    total = splat(ZERO)
    for j in range(n):
        v = load_f32(x + 64 * j)
        total = total + v * v
    return total


@kernel
def weigh_by_importance(x, importance, sigma, w, n):
    """w = importance * sqrt(sigma + x**2)."""
    for j in range(n):
        v = load_f32(x + 64 * j)
        store_f32(w + 64 * j, splat(read_f32(importance + 4 * j)) * root(sigma + v * v))
