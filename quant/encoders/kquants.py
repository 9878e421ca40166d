"""Encoders of Q4_K, Q5_K and Q6_K: searched, with an importance or without."""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from m2lite.quant.encoders.affine import N_SUB, round_super, search_super, weigh_k
from m2lite.quant.encoders.block import write_high_bits, write_nibbles
from m2lite.quant.encoders.signed import MOST_SUBS, super_search, tops_of, whole_grid
from m2lite.simd.jit import kernel
from m2lite.simd.memory import load_f32, read_f32, scatter_u16, scatter_u32, scratch, store_f32
from m2lite.simd.vectors import half_bits, splat, to_i32

F = np.float32
ZERO = F(0.0)

search_scales_q6_k, round_q6_k = super_search(
    "q6_k", whole_grid(32), 16, tops_of(-32.0, 32.0, -1.5, 1.6, 0.25)[:13], -32.0,
    top_code=F(-128.0), least_code=F(-128.0), most_code=F(127.0), n_neighbours=5,
)  # fmt: skip


@kernel
def weigh_q6_k(x, importance, w):
    """x**2, or the importance itself."""
    for j in range(256):
        v = load_f32(x + 64 * j)
        store_f32(w + 64 * j, splat(read_f32(importance + 4 * j)) if importance else v * v)


@kernel
def search_q6_k(x, importance, sigma, out, stride):
    w, codes, q = scratch(256), scratch(MOST_SUBS), scratch(256)
    weigh_q6_k(x, importance, w)
    d = search_scales_q6_k(x, w, codes)
    round_q6_k(x, d, codes, q)
    write_nibbles(q, out, stride, 256, 64)
    for half in range(2):
        write_high_bits(q + 64 * 128 * half, out + 128 + 32 * half, stride, 4)
    for word in range(4):
        packed = to_i32(splat(ZERO))
        for byte in range(4):
            packed = packed | ((to_i32(load_f32(codes + 64 * (4 * word + byte))) & 255) << (8 * byte))
        scatter_u32(out + 192 + 4 * word, stride, packed)
    scatter_u16(out + 208, stride, half_bits(d))


@kernel
def write_super_head(d, d_min, codes, out, stride):
    """16 bytes: d, d_min, then 8 scales and 8 offsets of 6 bits, the upper two of the last four in the first eight."""
    scatter_u16(out, stride, half_bits(d))
    scatter_u16(out + 2, stride, half_bits(d_min))
    zero = to_i32(splat(ZERO))
    scales, offsets, rest = zero, zero, zero
    for j in range(4):
        s, m = to_i32(load_f32(codes + 64 * j)), to_i32(load_f32(codes + 64 * (N_SUB + j)))
        s4, m4 = to_i32(load_f32(codes + 64 * (j + 4))), to_i32(load_f32(codes + 64 * (N_SUB + j + 4)))
        scales = scales | ((s | ((s4 >> 4) << 6)) << (8 * j))
        offsets = offsets | ((m | ((m4 >> 4) << 6)) << (8 * j))
        rest = rest | (((s4 & 15) | ((m4 & 15) << 4)) << (8 * j))
    scatter_u32(out + 4, stride, scales)
    scatter_u32(out + 8, stride, offsets)
    scatter_u32(out + 12, stride, rest)


@kernel
def search_q4_k(x, importance, sigma, out, stride):
    w, codes, q = scratch(256), scratch(16), scratch(256)
    weigh_k(x, importance, w)
    d, d_min = search_super(x, w, 15, codes)
    write_super_head(d, d_min, codes, out, stride)
    round_super(x, 15, d, d_min, codes, q)
    write_nibbles(q, out + 16, stride, 256, 32)


@kernel
def search_q5_k(x, importance, sigma, out, stride):
    w, codes, q = scratch(256), scratch(16), scratch(256)
    weigh_k(x, importance, w)
    d, d_min = search_super(x, w, 31, codes)
    write_super_head(d, d_min, codes, out, stride)
    round_super(x, 31, d, d_min, codes, q)
    write_high_bits(q, out + 16, stride, 8)
    write_nibbles(q, out + 48, stride, 256, 32)
