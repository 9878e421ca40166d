"""The layout of KV pages of 64 positions, and writing to them. Sees addresses of pages; knows no timeline, no layer.

For one layer and one kv head, side by side, so that what attention reads together lies together:

    f16:   K [head_dim][64], V [64][head_dim], float16
    q8_0:  K [head_dim][64] int8, its scales [head_dim / 32][64] float16; V [64][head_dim] int8, its scales alike

K is transposed: the lanes of a score are positions. A q8_0 scale belongs to 32 dimensions of one position: amax / 127,
rounded to float16, and the integers are the nearest (ties to even) to x * 127 / amax.
"""

from __future__ import annotations

import numpy as np

from m2lite.kernels.elementwise import INT8_MAX, SMALLEST_AMAX
from m2lite.simd.far import far
from m2lite.simd.jit import inner, kernel
from m2lite.simd.kinds import Address, F32x16, I32x16
from m2lite.simd.memory import load_f32, read_address, read_i32, scatter_f16, scatter_i8, store_f16, store_i8, write_f16
from m2lite.simd.vectors import max_abs, maximum, minimum, round_to_i32

F = np.float32
PAGE = 64
ZERO, NAN = F(0.0), F(np.nan)
LARGEST_AMAX = F(127 * 65504)  # above this, the scale is no float16
INT8_MIN = F(-127.0)


@kernel
def kv_head_bytes(head_dim: int, is_q8: int) -> int:
    """Bytes of K and V of one kv head in a page."""
    return 2 * PAGE * (head_dim // 32 * 34) if is_q8 else 2 * PAGE * head_dim * 2


@inner
def rounded(x: F32x16, inverse: np.float32) -> I32x16:
    """x * inverse as integers in -127..127; NaN as -127, which its scale makes NaN again."""
    y = maximum(x * inverse, INT8_MIN)
    return round_to_i32(minimum(y, INT8_MAX))


@inner
def block_scale(low: F32x16, high: F32x16) -> tuple[np.float32, np.float32]:
    """(scale, inverse) of 32 values. NaN and infinity give the scale NaN: what reads the block must notice."""
    amax = max_abs(low, high)
    scale = amax / INT8_MAX if amax <= LARGEST_AMAX else NAN
    return scale, INT8_MAX / amax if amax > SMALLEST_AMAX else ZERO


@inner
def append_head_f16(to: Address, slot: int, k: Address, v: Address, head_dim: int) -> None:
    """One position of one kv head, as float16."""
    half = 2 * PAGE * head_dim
    for i in range(0, head_dim, 16):
        scatter_f16(to + 2 * (PAGE * i + slot), 2 * PAGE, load_f32(k + 4 * i))
        store_f16(to + half + 2 * (slot * head_dim + i), load_f32(v + 4 * i))


@inner
def append_head_q8(to: Address, slot: int, k: Address, v: Address, head_dim: int) -> None:
    """One position of one kv head, as int8 with a float16 scale per 32 dimensions."""
    scales, half = PAGE * head_dim, PAGE * (head_dim // 32 * 34)
    for i in range(0, head_dim, 32):
        at_scale = to + scales + 2 * (PAGE * (i // 32) + slot)
        low, high = load_f32(k + 4 * i), load_f32(k + 4 * i + 64)
        scale, inverse = block_scale(low, high)
        write_f16(at_scale, scale)
        scatter_i8(to + PAGE * i + slot, PAGE, rounded(low, inverse))
        scatter_i8(to + PAGE * (i + 16) + slot, PAGE, rounded(high, inverse))
        low, high = load_f32(v + 4 * i), load_f32(v + 4 * i + 64)
        scale, inverse = block_scale(low, high)
        write_f16(at_scale + half, scale)
        store_i8(to + half + slot * head_dim + i, rounded(low, inverse))
        store_i8(to + half + slot * head_dim + i + 16, rounded(high, inverse))


@far()
def append_kv(
    k: Address, v: Address, pages: Address, layer_offset: int, slots: Address, n_rows: int, n_kv_heads: int,
    head_dim: int, is_q8: int,
) -> None:  # fmt: skip
    """Write k[t], v[t] (n_kv_heads * head_dim float32) into slot slots[t] of the page at pages[t].

    slots: int32 [n_rows]; pages: int64 [n_rows], addresses; layer_offset: of the layer's part of a page.
    """
    head_bytes = kv_head_bytes(head_dim, is_q8)
    for t in range(n_rows):
        page, slot = read_address(pages + 8 * t) + layer_offset, read_i32(slots + 4 * t)
        for h in range(n_kv_heads):
            to, at = page + h * head_bytes, 4 * head_dim * (n_kv_heads * t + h)
            if is_q8:
                append_head_q8(to, slot, k + at, v + at, head_dim)
            else:
                append_head_f16(to, slot, k + at, v + at, head_dim)
