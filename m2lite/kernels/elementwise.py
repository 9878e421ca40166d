"""Kernels that go over rows once: norms, rotation, activation panels, embedding, sums. Sees addresses, no layer.

Every row is computed by one thread in a fixed order: 16 virtual lanes and a fixed tree for sums. Addresses and strides
are in bytes, values are float32, row lengths are multiples of 32. `part` of `n_parts` says which rows a call does.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core.types import float32

from m2lite.kernels.dots import GROUP, HALF_SUM_AT, PANEL_BYTES, SCALE_AT, SCALED_SUM_AT, SUM_AT
from m2lite.simd import emit
from m2lite.simd.far import far
from m2lite.simd.jit import inner
from m2lite.simd.kinds import Address, F32x16, Int, int64, void
from m2lite.simd.memory import clamp_and_store_i8, load_f32, read_f32, read_i32, store_f32, write_f32, write_i32
from m2lite.simd.split import Split
from m2lite.simd.vectors import (
    fma,
    fma_scalar,
    i32_to_f32,
    max_abs,
    maximum,
    operation,
    round_to_i32,
    scale_by_power,
    splat,
    tree_sum,
    where,
)

F = np.float32
ZERO, ONE, MINUS_ONE = F(0.0), F(1.0), F(-1.0)

# exp(x) = 2**n exp(r), r = x - n ln 2, |r| <= ln 2 / 2; ln 2 in two parts; Taylor of degree 7 (relative error 1.2e-7).
LOG2_E, MINUS_LN2_HIGH, MINUS_LN2_LOW = F(1.44269504), F(-0.693359375), F(2.12194440e-4)
EXP_LOWEST, EXP_HIGHEST = F(-87.0), F(88.0)  # below: exactly 0; above: clamped
C7, C6, C5, C4, C3, C2 = F(1 / 5040), F(1 / 720), F(1 / 120), F(1 / 24), F(1 / 6), F(0.5)

SMALLEST_AMAX = F(1e-30)  # a block of activations below this counts as zeros
INT8_MAX = F(127.0)


@inner
def exp16(x: F32x16) -> F32x16:
    """exp per lane; exactly 0 below EXP_LOWEST; NaN stays NaN."""
    clamped = where(x > EXP_HIGHEST, EXP_HIGHEST, maximum(x, EXP_LOWEST))
    n = round_to_i32(clamped * LOG2_E)
    steps = i32_to_f32(n)
    r = fma(steps, MINUS_LN2_LOW, fma(steps, MINUS_LN2_HIGH, clamped))
    p = fma(C7, r, C6)
    p = fma(p, r, C5)
    p = fma(p, r, C4)
    p = fma(p, r, C3)
    p = fma(p, r, C2)
    p = fma(p, r, ONE)
    p = fma(p, r, ONE)
    found: F32x16 = where(x == x, where(x < EXP_LOWEST, ZERO, scale_by_power(p, n)), x)
    return found


@inner
def sigmoid16(x: F32x16) -> F32x16:
    """1 / (1 + exp(-x)) per lane."""
    return ONE / (ONE + exp16(x * MINUS_ONE))


@operation(void(int64, int64, int64, int64))
def call_unpack(builder: ir.IRBuilder, function: ir.Value, w: ir.Value, n_blocks: ir.Value, out: ir.Value) -> None:
    """Call the row unpacker at address `function` (dot.unpack_address)."""
    emit.call_address(builder, function, [w, n_blocks, out])


@far()
def embed_rows(
    unpack: int, w: Address, row_bytes: int, n_blocks: int, tokens: Address, n_rows: int, out: Address, out_stride: int
) -> None:
    """out[t] = row tokens[t] of w as float32; tokens is int32."""
    for t in range(n_rows):
        call_unpack(unpack, w + read_i32(tokens + 4 * t) * row_bytes, n_blocks, out + t * out_stride)


@far()
def add_rows(x: Address, y: Address, n_rows: int, n: int) -> None:
    """x[t] += y[t]; both [n_rows, n], contiguous."""
    for i in range(0, 4 * n_rows * n, 64):
        store_f32(x + i, load_f32(x + i) + load_f32(y + i))


@far()
def read_part(part: int, n_parts: int, address: Address, n_bytes: int, sums: Address) -> None:
    """Load n_bytes in steps of 256 and keep maxima: what plain reading costs. sums: float32 [n_parts], meaningless."""
    begin, end = part * n_bytes // n_parts // 256 * 256, (part + 1) * n_bytes // n_parts // 256 * 256
    a, b, c, d = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    for i in range(begin, end, 256):
        at = address + i
        a, b = maximum(a, load_f32(at)), maximum(b, load_f32(at + 64))
        c, d = maximum(c, load_f32(at + 128)), maximum(d, load_f32(at + 192))
    write_f32(sums + 4 * part, tree_sum((a + b) + (c + d)))


@inner
def norm_scale(x: Address, n: int, eps: np.float32) -> np.float32:
    """1 / sqrt(mean of squares + eps) of a row of n."""
    squares = splat(ZERO)
    for i in range(0, 4 * n, 64):
        v = load_f32(x + i)
        squares = fma(v, v, squares)
    mean = tree_sum(squares) / F(n)
    return F(ONE / np.sqrt(mean + eps))


@far(eps=float32)
def rms_norm(out: Address, x: Address, weight: Address, n_rows: int, n: int, eps: np.float32) -> None:
    """out[t] = x[t] / rms(x[t]) * weight; [n_rows, n], contiguous; out may be x."""
    for t in range(n_rows):
        row = x + 4 * n * t
        scale = norm_scale(row, n, eps)
        for i in range(0, 4 * n, 64):
            store_f32(out + 4 * n * t + i, load_f32(row + i) * scale * load_f32(weight + i))


@far(eps=float32)
def norm_rope(
    x: Address, weight: Address, angles: Address, positions: Address, n_rows: int, n_heads: int, head_dim: int,
    rotary_dim: int, eps: np.float32,
) -> None:  # fmt: skip
    """RMS norm over the whole row of n_heads * head_dim, then rotation of the first rotary_dim of each head, in place.

    angles: [position][cos of rotary_dim / 2, sin of rotary_dim / 2]; positions: int32. Pairs: (j, j + rotary_dim / 2).
    """
    n, half = n_heads * head_dim, rotary_dim // 2
    for t in range(n_rows):
        row = x + 4 * n * t
        scale = norm_scale(row, n, eps)
        for i in range(0, 4 * n, 64):
            store_f32(row + i, load_f32(row + i) * scale * load_f32(weight + i))
        table = angles + read_i32(positions + 4 * t) * rotary_dim * 4
        for h in range(n_heads):
            head = row + 4 * head_dim * h
            for j in range(half):
                c, s = read_f32(table + 4 * j), read_f32(table + 4 * (half + j))
                a, b = read_f32(head + 4 * j), read_f32(head + 4 * (half + j))
                write_f32(head + 4 * j, fma_scalar(-b, s, a * c))
                write_f32(head + 4 * (half + j), fma_scalar(a, s, b * c))


# --- activation panels (layout in dot.py) --------------------------------------------------------------------------


@inner
def write_sums(at: Address, both: Int) -> np.int32:
    """Write -8 a and -8 b as int16 where `both` is a + 65536 b, and return a + b."""
    a = np.int32(np.int16(both))
    b = (both - a) >> 16
    write_i32(at, np.int32((-8 * a & 0xFFFF) | (-8 * b << 16)))
    return np.int32(a + b)


@inner
def pack_row_int8(panel: Address, step: int, x: Address, n_blocks: int) -> None:
    """One row into every `step` bytes of a panel: 32 int8, scale = amax / 127, sums (dots.SUM_AT); to nearest even."""
    for b in range(n_blocks):
        low, high = load_f32(x + 128 * b), load_f32(x + 128 * b + 64)
        amax = max_abs(low, high)
        scale = amax / INT8_MAX
        inverse = INT8_MAX / amax if amax > SMALLEST_AMAX else ZERO
        at = panel + b * step
        first = clamp_and_store_i8(at, round_to_i32(low * inverse))
        second = clamp_and_store_i8(at + 16, round_to_i32(high * inverse))
        write_f32(at + SCALE_AT, scale)
        total = write_sums(at + SUM_AT, first + second)
        write_f32(at + SCALED_SUM_AT, -(scale * F(total)))
        write_sums(at + HALF_SUM_AT, first)


@inner
def pack_row_float(panel: Address, step: int, x: Address, n_blocks: int) -> None:
    """One row into every `step` bytes of a panel: 32 float32."""
    for b in range(n_blocks):
        store_f32(panel + b * step, load_f32(x + 128 * b))
        store_f32(panel + b * step + 64, load_f32(x + 128 * b + 64))


@inner
def pack_one(panel: Address, x: Address, t: int, n_rows: int, n_blocks: int, is_int8: int) -> None:
    """Row t of a panel of n_rows from the float32 row at x."""
    start = t // GROUP * GROUP
    size = min(GROUP, n_rows - start)
    if is_int8:
        pack_row_int8(panel + (start * n_blocks + t - start) * PANEL_BYTES, size * PANEL_BYTES, x, n_blocks)
    else:
        pack_row_float(panel + (start * n_blocks + t - start) * 128, size * 128, x, n_blocks)


@far()
def pack_part(
    part: int, n_parts: int, panel: Address, x: Address, x_stride: int, n_rows: int, n_blocks: int, is_int8: int
) -> None:
    for t in range(part * n_rows // n_parts, (part + 1) * n_rows // n_parts):
        pack_one(panel, x + t * x_stride, t, n_rows, n_blocks, is_int8)


@far()
def pack_groups_part(
    part: int, n_parts: int, panel: Address, x: Address, x_stride: int, rows: Address, starts: Address, n_groups: int,
    n_blocks: int, is_int8: int,
) -> None:  # fmt: skip
    """Panels of several groups side by side: group g is pairs starts[g]..starts[g + 1], pair p is row rows[p] of x.

    Pairs are counted from starts[0], so that a slab of groups has buffers of its own.
    """
    row_bytes, base = n_blocks * (PANEL_BYTES if is_int8 else 128), read_i32(starts)
    n_pairs = read_i32(starts + 4 * n_groups) - base
    first, last = part * n_pairs // n_parts, (part + 1) * n_pairs // n_parts
    for g in range(n_groups):
        begin, end = read_i32(starts + 4 * g) - base, read_i32(starts + 4 * g + 4) - base
        for p in range(max(first, begin), min(last, end)):
            row = x + read_i32(rows + 4 * (base + p)) * x_stride
            pack_one(panel + begin * row_bytes, row, p - begin, end - begin, n_blocks, is_int8)


read_memory = Split(read_part)
pack = Split(pack_part)
pack_groups = Split(pack_groups_part)
