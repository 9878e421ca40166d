"""Choice of experts and the products with stacked experts. Sees scores, addresses and counts; knows no layer."""

from __future__ import annotations

import numpy as np
from numba.core.types import int64

from m2lite.kernels.elementwise import sigmoid16
from m2lite.kernels.matmul import coming, tile_at
from m2lite.simd.far import far
from m2lite.simd.jit import kernel
from m2lite.simd.kinds import Address
from m2lite.simd.memory import load_f32, read_f32, read_i32, store_f32, write_f32, write_i32
from m2lite.simd.split import Split
from m2lite.simd.vectors import fma, splat

F = np.float32
ZERO = F(0.0)
TILE_OVERHEAD = 4  # what unpacking a tile costs, in activation rows: balances experts with few rows against many


@far(returns=int64)
def route(
    scores: Address, bias: Address, n_rows: int, n_experts: int, n_padded: int, n_used: int, ids: Address,
    weights: Address,
) -> int:  # fmt: skip
    """Per row: s = sigmoid(scores); the n_used largest of s + bias (ties: lowest id), written in ascending id order.

    ids int32 and weights float32 are [n_rows, n_used]; weights = s / sum of the chosen s, added in ascending id order.
    scores is [n_rows, n_padded], n_padded the next multiple of 16, and is overwritten by s. Returns the number of rows
    with a NaN or infinite score; their ids are still in range.
    """
    n_bad = 0
    for t in range(n_rows):
        row = scores + 4 * n_padded * t
        chosen, sums, finite = ids + 4 * n_used * t, weights + 4 * n_used * t, True
        for i in range(0, 4 * n_experts, 64):
            store_f32(row + i, sigmoid16(load_f32(row + i)))
        for e in range(n_experts):
            finite = finite and np.isfinite(read_f32(row + 4 * e) + read_f32(bias + 4 * e))
        n = 0
        for e in range(n_experts):  # the largest so far in falling order, equal ones by rising id
            value = read_f32(row + 4 * e) + read_f32(bias + 4 * e)
            if n == n_used and not value > read_f32(sums + 4 * (n_used - 1)):
                continue
            at = min(n, n_used - 1)
            while finite and at > 0 and read_f32(sums + 4 * (at - 1)) < value:
                write_f32(sums + 4 * at, read_f32(sums + 4 * (at - 1)))
                write_i32(chosen + 4 * at, read_i32(chosen + 4 * (at - 1)))
                at -= 1
            write_f32(sums + 4 * at, value)
            write_i32(chosen + 4 * at, np.int32(e))
            n = min(n + 1, n_used)
        for j in range(1, n_used):  # insertion sort: eight ids
            e, i = read_i32(chosen + 4 * j), j
            while i > 0 and read_i32(chosen + 4 * (i - 1)) > e:
                write_i32(chosen + 4 * i, read_i32(chosen + 4 * (i - 1)))
                i -= 1
            write_i32(chosen + 4 * i, e)
        total = ZERO
        for j in range(n_used):
            total += read_f32(row + 4 * read_i32(chosen + 4 * j))
        for j in range(n_used):
            s = read_f32(row + 4 * read_i32(chosen + 4 * j))
            write_f32(weights + 4 * (n_used * t + j), s / total)
        n_bad += 0 if finite else 1
    return n_bad


@far(returns=int64)
def group_pairs(
    ids: Address, n_rows: int, n_experts: int, n_used: int, counts: Address, active: Address, starts: Address,
    rows: Address, slots: Address,
) -> int:  # fmt: skip
    """Sort the (row, expert) pairs by expert. Returns the number of experts that were chosen at all.

    ids: int32 [n_rows, n_used]. Out, all int32: active[g] expert of group g, ascending; starts[g] its first pair
    (starts[n] = number of pairs); rows[p] the row of pair p; slots[t, j] the pair of row t's j-th expert.
    counts: scratch [n_experts].
    """
    for e in range(n_experts):
        write_i32(counts + 4 * e, np.int32(0))
    for i in range(n_rows * n_used):
        at = counts + 4 * read_i32(ids + 4 * i)
        write_i32(at, np.int32(read_i32(at) + 1))
    n_active, first = 0, 0
    for e in range(n_experts):
        count = read_i32(counts + 4 * e)
        if count > 0:
            write_i32(active + 4 * n_active, np.int32(e))
            write_i32(starts + 4 * n_active, np.int32(first))
            n_active += 1
        write_i32(counts + 4 * e, np.int32(first))
        first += count
    write_i32(starts + 4 * n_active, np.int32(first))
    for t in range(n_rows):
        for j in range(n_used):
            at = counts + 4 * read_i32(ids + 4 * (t * n_used + j))
            p = read_i32(at)
            write_i32(at, np.int32(p + 1))
            write_i32(rows + 4 * p, np.int32(t))
            write_i32(slots + 4 * (t * n_used + j), p)
    return n_active


@kernel
def share_of(part: int, n_parts: int, n_tiles: int, starts: Address, n_active: int) -> tuple[int, int]:
    """(begin, end) of a part, in cost: each of an expert's n_tiles costs its pairs and TILE_OVERHEAD."""
    total = n_tiles * (read_i32(starts + 4 * n_active) - read_i32(starts) + TILE_OVERHEAD * n_active)
    return -(-part * total // n_parts), -(-(part + 1) * total // n_parts)


@kernel
def tiles_of(
    i: int, n_tiles: int, begin: int, end: int, active: Address, starts: Address
) -> tuple[int, int, int, int, int]:
    """(expert, its first pair, its number of pairs, its first tile, its last tile + 1) of chosen expert i in a share.

    A tile belongs to the share in which its cost begins. Pairs are counted from starts[0], as in pack_groups.
    """
    base = read_i32(starts)
    first = read_i32(starts + 4 * i) - base
    n_x = read_i32(starts + 4 * i + 4) - base - first
    cost, step = n_tiles * (first + TILE_OVERHEAD * i), n_x + TILE_OVERHEAD
    first_tile, end_tile = max(0, -((cost - begin) // step)), min(n_tiles, -((cost - end) // step))
    return read_i32(active + 4 * i), first, n_x, first_tile, end_tile


@kernel
def next_of(
    i: int, part: int, n_parts: int, after: int, n_tiles: int, active: Address, starts: Address, n_active: int
) -> tuple[int | np.int32, int]:
    """(expert, tile) that a thread reads behind what `part` has of chosen expert i, or (-1, 0).

    That is the next expert of the part, or the first of part `after`.
    """
    if i + 1 < n_active:
        begin, end = share_of(part, n_parts, n_tiles, starts, n_active)
        e, _, _, first_tile, end_tile = tiles_of(i + 1, n_tiles, begin, end, active, starts)
        if first_tile < end_tile:
            return e, first_tile
    if after < n_parts:
        begin, end = share_of(after, n_parts, n_tiles, starts, n_active)
        for k in range(i, n_active):
            e, _, _, first_tile, end_tile = tiles_of(k, n_tiles, begin, end, active, starts)
            if first_tile < end_tile:
                return e, first_tile
    return np.int32(-1), 0


@kernel
def address_in(w: Address, slice_bytes: int, stride: int, e: int | np.int32, tile: int) -> Address:
    """Of a tile of an expert; 0 where there is none."""
    return w + e * slice_bytes + 16 * stride * tile if e >= 0 else Address(0)


@far()
def experts_up_part(
    part: int, n_parts: int, thread: int, after: int, h: Address, gate_tile: int, gate: Address, gate_slice: int,
    up_tile: int, up: Address, up_slice: int, n_ff: int, n_blocks: int, gate_panel: Address, gate_row: int,
    up_panel: Address, up_row: int, active: Address, starts: Address, n_active: int, scratch: Address,
    scratch_bytes: int,
) -> None:  # fmt: skip
    """h[p] = silu(x[p] @ gate[e].T) * (x[p] @ up[e].T) for all pairs p of each chosen expert e; h is [pairs, n_ff].

    Pairs are counted from starts[0]. scratch: scratch_bytes for each thread, two tiles of 64 bytes a row of the largest
    expert.
    """
    n_tiles, gate_stride, up_stride = (n_ff + 15) // 16, gate_slice // n_ff, up_slice // n_ff
    begin, end = share_of(part, n_parts, n_tiles, starts, n_active)
    for i in range(n_active):
        e, first, n_x, first_tile, end_tile = tiles_of(i, n_tiles, begin, end, active, starts)
        if first_tile >= end_tile:
            continue
        next_e, next_tile = next_of(i, part, n_parts, after, n_tiles, active, starts, n_active)
        gate_w, next_gate = gate + e * gate_slice, address_in(gate, gate_slice, gate_stride, next_e, next_tile)
        up_w, next_up = up + e * up_slice, address_in(up, up_slice, up_stride, next_e, next_tile)
        gate_x, up_x = gate_panel + first * gate_row, up_panel + first * up_row
        g = scratch + thread * scratch_bytes
        u = g + 64 * n_x
        for tile in range(first_tile, end_tile):
            r = min(tile * 16, n_ff - 16)
            ahead = coming(gate_w, next_gate, 16 * gate_stride, tile, end_tile)
            tile_at(gate_tile, 0, gate_w + r * gate_stride, gate_stride, 16, n_blocks, gate_x, n_x, g, 64, ahead)
            ahead = coming(up_w, next_up, 16 * up_stride, tile, end_tile)
            tile_at(up_tile, 0, up_w + r * up_stride, up_stride, 16, n_blocks, up_x, n_x, u, 64, ahead)
            for t in range(n_x):
                gate_value = load_f32(g + 64 * t)
                silu = gate_value * sigmoid16(gate_value)
                store_f32(h + 4 * ((first + t) * n_ff + r), silu * load_f32(u + 64 * t))


@far()
def experts_down_part(
    part: int, n_parts: int, thread: int, after: int, y: Address, tile: int, w: Address, slice_bytes: int, n_out: int,
    n_blocks: int, panel: Address, panel_row: int, active: Address, starts: Address, n_active: int,
) -> None:  # fmt: skip
    """y[p] = h[p] @ w[e].T for all pairs p of each chosen expert e; y is [pairs, n_out]; pairs as in experts_up."""
    n_tiles, stride = (n_out + 15) // 16, slice_bytes // n_out
    begin, end = share_of(part, n_parts, n_tiles, starts, n_active)
    for i in range(n_active):
        e, first, n_x, first_tile, end_tile = tiles_of(i, n_tiles, begin, end, active, starts)
        if first_tile >= end_tile:
            continue
        next_e, next_tile = next_of(i, part, n_parts, after, n_tiles, active, starts, n_active)
        here, next_w = w + e * slice_bytes, address_in(w, slice_bytes, stride, next_e, next_tile)
        x = panel + first * panel_row
        for k in range(first_tile, end_tile):
            ahead = coming(here, next_w, 16 * stride, k, end_tile)
            tile_at(tile, k, here, stride, n_out, n_blocks, x, n_x, y + 4 * first * n_out, 4 * n_out, ahead)


@far()
def combine_part(
    part: int, n_parts: int, x: Address, total: Address, y: Address, slots: Address, weights: Address, n_rows: int,
    n_used: int, n: int, first: int, last: int,
) -> None:  # fmt: skip
    """x[t] += sum over j of weights[t, j] * y[slots[t, j]], the sum taken in ascending expert order from zero.

    Only pairs first..last - 1 are in y; the sums so far are kept in `total` [n_rows, n] until the last pair has come.
    """
    n_pairs = n_rows * n_used
    for t in range(part * n_rows // n_parts, (part + 1) * n_rows // n_parts):
        for i in range(0, 4 * n, 64):
            at = 4 * n * t + i
            sums = load_f32(total + at) if first > 0 else splat(ZERO)
            for j in range(n_used):
                slot = read_i32(slots + 4 * (t * n_used + j))
                if first <= slot < last:
                    w = read_f32(weights + 4 * (t * n_used + j))
                    sums = fma(w, load_f32(y + 4 * n * (slot - first) + i), sums)
            if last == n_pairs:
                store_f32(x + at, load_f32(x + at) + sums)
            else:
                store_f32(total + at, sums)


combine = Split(combine_part)
experts_up = Split(experts_up_part, in_chunks=True)
experts_down = Split(experts_down_part, in_chunks=True)
