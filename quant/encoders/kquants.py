"""Encoders of Q4_K, Q5_K and Q6_K: searched, with an importance or without."""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from m2lite.kernels.jit import kernel
from m2lite.kernels.simd import load_f32, read_f32, scratch, splat, store_f32
from m2lite.quant.encoders.affine import N_SUB, SUB_BYTES, round_super, search_super, weigh_k
from m2lite.quant.encoders.signed import MOST_SUBS, super_search, tops_of, whole_grid
from m2lite.quant.lanes import half_bits, load_i32, scatter_u16, scatter_u32, store_i32, to_i32, transpose

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
    w, codes, q, words = scratch(256), scratch(MOST_SUBS), scratch(256), scratch(48)
    weigh_q6_k(x, importance, w)
    d = search_scales_q6_k(x, w, codes)
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
def write_low_nibbles(q, out, stride):
    """128 bytes: in each 32, the low nibbles of 32 codes and, above them, of the next 32."""
    words = scratch(32)
    for chunk in range(4):
        for word in range(8):
            packed = to_i32(splat(ZERO))
            for byte in range(4):
                at = q + 64 * (64 * chunk + 4 * word + byte)
                packed = packed | (((load_i32(at) & 15) | ((load_i32(at + SUB_BYTES) & 15) << 4)) << (8 * byte))
            store_i32(words + 64 * (8 * chunk + word), packed)
    transpose(words, 64, out, stride)
    transpose(words + 1024, 64, out + 64, stride)


@kernel
def write_high_bits(q, out, stride):
    """32 bytes: bit i of byte k is bit 4 of code 32 i + k."""
    for word in range(8):
        packed = to_i32(splat(ZERO))
        for byte in range(4):
            for sub in range(N_SUB):
                high = load_i32(q + sub * SUB_BYTES + 64 * (4 * word + byte)) >> 4
                packed = packed | (high << (8 * byte + sub))
        scatter_u32(out + 4 * word, stride, packed)


@kernel
def search_q4_k(x, importance, sigma, out, stride):
    w, codes, q = scratch(256), scratch(16), scratch(256)
    weigh_k(x, importance, w)
    d, d_min = search_super(x, w, 15, codes)
    write_super_head(d, d_min, codes, out, stride)
    round_super(x, 15, d, d_min, codes, q)
    write_low_nibbles(q, out + 16, stride)


@kernel
def search_q5_k(x, importance, sigma, out, stride):
    w, codes, q = scratch(256), scratch(16), scratch(256)
    weigh_k(x, importance, w)
    d, d_min = search_super(x, w, 31, codes)
    write_super_head(d, d_min, codes, out, stride)
    round_super(x, 31, d, d_min, codes, q)
    write_high_bits(q, out + 16, stride)
    write_low_nibbles(q, out + 48, stride)
