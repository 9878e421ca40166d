"""Encoders of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: plain ones, bytes as ggml has them, and searches with an importance."""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from m2lite.quant.encoders.affine import SUB, search_offset_block
from m2lite.quant.encoders.block import (
    FAR,
    inverse_of,
    largest,
    range_of,
    weigh_by_importance,
    write_fifth_bits,
    write_nibbles,
)
from m2lite.quant.encoders.signed import block_search, tops_of, whole_grid
from m2lite.simd.jit import kernel
from m2lite.simd.memory import load_f32, scatter_u16, scatter_u32, scratch, store_i32
from m2lite.simd.vectors import floor, half_bits, magnitude, maximum, minimum, splat, to_i32, where

F = np.float32
ZERO = F(0.0)


@kernel
def code_of(scaled, highest):
    """Truncated to 0..highest; 0 for what is not a number of any block that can be stored."""
    safe = where(magnitude(scaled) < FAR, scaled, splat(ZERO))
    return minimum(maximum(safe, ZERO), F(highest))


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
    write_nibbles(q, out + 2, stride, 32, 16)


@kernel
def encode_q5_0(x, importance, sigma, out, stride):
    q = scratch(32)
    scatter_u16(out, stride, half_bits(signed_codes(x, q, 32)))
    write_fifth_bits(q, out + 2, stride)
    write_nibbles(q, out + 6, stride, 32, 16)


@kernel
def encode_q4_1(x, importance, sigma, out, stride):
    q = scratch(32)
    d, low = offset_codes(x, q, 16)
    scatter_u16(out, stride, half_bits(d))
    scatter_u16(out + 2, stride, half_bits(low))
    write_nibbles(q, out + 4, stride, 32, 16)


@kernel
def encode_q5_1(x, importance, sigma, out, stride):
    q = scratch(32)
    d, low = offset_codes(x, q, 32)
    scatter_u16(out, stride, half_bits(d))
    scatter_u16(out + 2, stride, half_bits(low))
    write_fifth_bits(q, out + 4, stride)
    write_nibbles(q, out + 8, stride, 32, 16)


@kernel
def encode_q8_0(x, importance, sigma, out, stride):
    """d = max |w| / 127; halves are rounded away from zero."""
    _, size = largest(x, 32)
    d = size / F(127)
    inverse = inverse_of(d)
    scatter_u16(out, stride, half_bits(d))
    for word in range(8):
        packed = to_i32(splat(ZERO))
        for byte in range(4):
            scaled = load_f32(x + 64 * (4 * word + byte)) * inverse
            safe = where(magnitude(scaled) < FAR, scaled, splat(ZERO))
            a = magnitude(safe)
            down = floor(a)
            code = to_i32(down + floor(F(2) * (a - down)))
            signed = where(safe < ZERO, 0 - code, code)
            packed = packed | ((signed & 255) << (8 * byte))
        scatter_u32(out + 2 + 4 * word, stride, packed)


_round_q4_0 = block_search("q4_0", whole_grid(8), tops_of(-8.0, 8.0, -1.5, 1.5, 0.25), -8.0)
_round_q5_0 = block_search("q5_0", whole_grid(16), tops_of(-16.0, 16.0, -1.5, 1.5, 0.25), -16.0)


@kernel
def search_q4_0(x, importance, sigma, out, stride):
    w, q = scratch(32), scratch(32)
    weigh_by_importance(x, importance, load_f32(sigma), w, 32)
    scatter_u16(out, stride, half_bits(_round_q4_0(x, w, q)))
    write_nibbles(q, out + 2, stride, 32, 16)


@kernel
def search_q5_0(x, importance, sigma, out, stride):
    w, q = scratch(32), scratch(32)
    weigh_by_importance(x, importance, load_f32(sigma), w, 32)
    scatter_u16(out, stride, half_bits(_round_q5_0(x, w, q)))
    write_fifth_bits(q, out + 2, stride)
    write_nibbles(q, out + 6, stride, 32, 16)


@kernel
def search_q4_1(x, importance, sigma, out, stride):
    q = scratch(SUB)
    d, low = search_offset_block(x, importance, sigma, 15, q)
    scatter_u16(out, stride, half_bits(d))
    scatter_u16(out + 2, stride, half_bits(low))
    write_nibbles(q, out + 4, stride, 32, 16)


@kernel
def search_q5_1(x, importance, sigma, out, stride):
    q = scratch(SUB)
    d, low = search_offset_block(x, importance, sigma, 31, q)
    scatter_u16(out, stride, half_bits(d))
    scatter_u16(out + 2, stride, half_bits(low))
    write_fifth_bits(q, out + 4, stride)
    write_nibbles(q, out + 8, stride, 32, 16)
