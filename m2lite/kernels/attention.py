"""Grouped-query attention over KV pages (layout in pages.py). Sees addresses of pages; knows no timeline, no layer.

For one row and one head, always in this order whatever the chunk, the threads or the batch:

    score[p] = scale * (q[0] k[0][p], then one fma for each further dimension)           a lane is a position
    p = exp(score - the page's maximum); the sum of p (16 lanes, fixed tree); the sum of p[j] * v[j], j ascending
    pages ascending are merged into the block's running (maximum, sum, vector), blocks of 16 pages into the row's,
    both sides scaled by exp(own maximum - new maximum)

In a q8_0 page the products of 32 dimensions are summed first, and score = fma(scale of k, that sum, score); v is
weighted by p * scale of v, rounded once. A "state" is the running triple of all query heads of one kv head:
float32 [group][head_dim] vectors, then maxima and sums, each padded to whole vectors of 16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from m2lite.kernels.elementwise import exp16
from m2lite.kernels.pages import PAGE
from m2lite.simd import emit
from m2lite.simd.far import far
from m2lite.simd.jit import address_of, inner, kernel, specialise
from m2lite.simd.kinds import Address, F32x16, Int, Scalar, float32, int64, void
from m2lite.simd.memory import (
    load_f16,
    load_f32,
    load_i8,
    prefetch,
    read_address,
    read_f32,
    read_i32,
    store_f32,
    write_f32,
)
from m2lite.simd.packs import add_rows_scaled, fma_rows, merge_rows, store_rows, zeros
from m2lite.simd.split import Split
from m2lite.simd.vectors import first_lanes, fma, i32_to_f32, max_lanes, maximum, operation, splat, tree_sum

F = np.float32
ZERO, ONE, MINUS_INFINITY = F(0.0), F(1.0), F(-np.inf)
BLOCK = 16  # pages; where one row's work may be cut
ROWS = 16  # rows that share a page while it is in the cache


@operation(void(*[int64] * 8, float32, int64, int64))
def call_page(
    builder: ir.IRBuilder, function: ir.Value, state: ir.Value, q: ir.Value, k: ir.Value, v: ir.Value,
    n_valid: ir.Value, group: ir.Value, head_dim: ir.Value, scale: ir.Value, ahead: ir.Value, work: ir.Value,
) -> None:  # fmt: skip
    """Call the kernel of one KV page at address `function` (see attend_address)."""
    emit.call_address(builder, function, [state, q, k, v, n_valid, group, head_dim, scale, ahead, work])


# --- sizes and places ----------------------------------------------------------------------------------------------


@inner
def set_size(left: int) -> int:
    """How many of `left` heads are computed together next; maxima and sums of such a set lie in one vector."""
    if left >= 6:
        return 6
    if left >= 4:
        return 4
    return 2 if left >= 2 else 1


@inner
def n_sets(group: int) -> int:
    """At most so many sets."""
    return group // 6 + 2


@kernel
def state_bytes(group: int, head_dim: int) -> int:
    return 4 * group * head_dim + 128 * n_sets(group)


@inner
def work_places(work: Address, group: int) -> tuple[Address, Address, Address]:
    """Where scratch for one page lies, behind 128 bytes for maxima and sums: factors, scores, weights."""
    scores = work + 128 + 128 * n_sets(group)
    return work + 128, scores, scores + 4 * PAGE * group


@kernel
def state_places(scratch: Address, group: int, head_dim: int) -> tuple[Address, Address, Address]:
    """Where a part's states lie, behind scratch for one page: ROWS of a block, ROWS of rows, one for each block."""
    states = work_places(scratch, group)[2] + 4 * PAGE * group
    totals = states + ROWS * state_bytes(group, head_dim)
    return states, totals, totals + ROWS * state_bytes(group, head_dim)


# --- a tile of 16 lanes and H query heads, whose sums stay in registers --------------------------------------------

Scores = Callable[[Address, Address, Address, int, Address, int, Address, int], None]
Values = Callable[[Address, Address, Address, Address, Address, int, int, int, Address, int], None]

# Names that `specialise` fills in. Sums of 6 heads, a vector of the tile and a factor: 15 of AVX2's 16 registers.
H: int  # heads
item: int  # bytes of a number of K or V
is_q8: bool
load: Callable[[Address], F32x16]
scores_6: Scores
scores_4: Scores
scores_2: Scores
scores_1: Scores
values_6: Values
values_4: Values
values_2: Values
values_1: Values
tile_scores: Callable[[Address, Address, Address, int, Address, int, int, Address, int], None]
tile_values: Callable[[Address, Address, Address, Address, int, int, int, int, Address, int], None]
page_scores: Callable[[Address, Address, Address, int, int, int, Address], None]
page_values: Callable[[Address, Address, Address, Address, int, int, int, Address, Address], None]


@inner
def load_q8(address: Address) -> F32x16:
    return i32_to_f32(load_i8(address))


def _scores(
    out: Address, q: Address, tile: Address, stride: int, scales: Address, head_dim: int, ahead: Address,
    ahead_step: int,
) -> None:  # fmt: skip
    """out[H, 16 of 64] = q[H, head_dim] @ tile[head_dim, 16], for q8_0 with scales[head_dim / 32, 16 of 64], else 0.

    The tile's rows are `stride` bytes apart. Meanwhile the cache lines from `ahead` on are asked for.
    """
    n = 32 if is_q8 else head_dim
    for i in range(0, head_dim, n):
        sums = zeros(H)
        for d in range(i, i + n, 2):
            prefetch(ahead + d * ahead_step)
            sums = fma_rows(sums, q + 4 * d, 4 * head_dim, load(tile + stride * d))
            sums = fma_rows(sums, q + 4 * d + 4, 4 * head_dim, load(tile + stride * d + stride))
        if not is_q8:
            store_rows(out, 4 * PAGE, sums)
        else:
            if i == 0:
                store_rows(out, 4 * PAGE, zeros(H))
            add_rows_scaled(out, 4 * PAGE, sums, load_f16(scales + 2 * PAGE * (i // 32)))


def _values(
    acc: Address, keep: Address, take: Address, p: Address, tile: Address, stride: int, n_valid: int, head_dim: int,
    ahead: Address, ahead_step: int,
) -> None:  # fmt: skip
    """acc[H, 16 of head_dim] = acc * keep[H] + (p[H, :n_valid] @ tile[:n_valid, 16]) * take[H]; p is [H, 64]."""
    sums = zeros(H)
    for j in range(n_valid):
        prefetch(ahead + j * ahead_step)
        sums = fma_rows(sums, p + 4 * j, 4 * PAGE, load(tile + stride * j))
    merge_rows(acc, 4 * head_dim, sums, keep, take)


def _tile_scores(
    out: Address, q: Address, tile: Address, stride: int, scales: Address, group: int, head_dim: int, ahead: Address,
    ahead_step: int,
) -> None:  # fmt: skip
    """_scores for all heads of a group."""
    h = 0
    while h < group:
        to, x, n = out + 4 * PAGE * h, q + 4 * head_dim * h, set_size(group - h)
        if n == 6:
            scores_6(to, x, tile, stride, scales, head_dim, ahead, ahead_step)
        elif n == 4:
            scores_4(to, x, tile, stride, scales, head_dim, ahead, ahead_step)
        elif n == 2:
            scores_2(to, x, tile, stride, scales, head_dim, ahead, ahead_step)
        else:
            scores_1(to, x, tile, stride, scales, head_dim, ahead, ahead_step)
        h += n


def _tile_values(
    acc: Address, factors: Address, p: Address, tile: Address, stride: int, n_valid: int, group: int, head_dim: int,
    ahead: Address, ahead_step: int,
) -> None:  # fmt: skip
    """_values for all heads of a group; factors: keep[16], take[16] of each set."""
    h = 0
    while h < group:
        to, w, n = acc + 4 * head_dim * h, p + 4 * PAGE * h, set_size(group - h)
        if n == 6:
            values_6(to, factors, factors + 64, w, tile, stride, n_valid, head_dim, ahead, ahead_step)
        elif n == 4:
            values_4(to, factors, factors + 64, w, tile, stride, n_valid, head_dim, ahead, ahead_step)
        elif n == 2:
            values_2(to, factors, factors + 64, w, tile, stride, n_valid, head_dim, ahead, ahead_step)
        else:
            values_1(to, factors, factors + 64, w, tile, stride, n_valid, head_dim, ahead, ahead_step)
        h += n
        factors += 128


# --- one page ------------------------------------------------------------------------------------------------------


@inner
def page_top(scores: Address, n_valid: int, scale: np.float32) -> Scalar:
    """scores[64] *= scale, -inf from n_valid on; returns their maximum."""
    top = splat(MINUS_INFINITY)
    for i in range(0, PAGE, 16):
        s = load_f32(scores + 4 * i)
        s = fma(s, ZERO, s * scale)  # infinity becomes NaN: its weight 0 would hide it
        s = first_lanes(s, n_valid - i, MINUS_INFINITY)
        store_f32(scores + 4 * i, s)
        top = maximum(s, top)
    return max_lanes(top)


@inner
def page_weights(scores: Address, top: Scalar) -> Scalar:
    """scores = exp(scores - top), in place; returns their sum."""
    total = splat(ZERO)
    for i in range(0, 4 * PAGE, 64):
        p = exp16(load_f32(scores + i) - top)
        store_f32(scores + i, p)
        total = total + p
    return tree_sum(total)


@inner
def merge_sums(sums: Address, tops: Address, totals: Address, factors: Address) -> None:
    """(maximum, sum) of up to 16 heads at `sums` takes those at `tops`, `totals` in; factors = keep[16], take[16]."""
    old, new = load_f32(sums), load_f32(tops)
    top = maximum(new, old)
    keep, take = exp16(old - top), exp16(new - top)
    store_f32(factors, keep)
    store_f32(factors + 64, take)
    store_f32(sums, top)
    store_f32(sums + 64, fma(load_f32(totals), take, load_f32(sums + 64) * keep))


@far(scale=types.float32)
def page_softmax(
    state: Address, scores: Address, factors: Address, n_valid: int, group: int, head_dim: int, scale: np.float32,
    work: Address,
) -> None:  # fmt: skip
    """scores[group, 64] become p; (maximum, sum) of the state take the page's in; factors = keep, take of each set."""
    sums, h = state + 4 * group * head_dim, 0
    while h < group:
        n = set_size(group - h)
        for i in range(n):
            write_f32(work + 4 * i, page_top(scores + 4 * PAGE * (h + i), n_valid, scale))
        for i in range(n):
            total = page_weights(scores + 4 * PAGE * (h + i), read_f32(work + 4 * i))
            write_f32(work + 64 + 4 * i, total)
        merge_sums(sums, work, work + 64, factors)
        h += n
        sums += 128
        factors += 128


def _page_scores(
    scores: Address, q: Address, k: Address, n_valid: int, group: int, head_dim: int, ahead: Address
) -> None:
    """scores[group, 64] = q . k of the first n_valid positions, in whole tiles; behind int8 k are its scales."""
    for lane in range(0, n_valid, 16):
        scales = k + PAGE * head_dim + 2 * lane if is_q8 else Address(0)
        next_k = ahead + item * lane * head_dim
        tile_scores(scores + 4 * lane, q, k + item * lane, item * PAGE, scales, group, head_dim, next_k, 16 * item)


@inner
def scale_weights(weights: Address, p: Address, scales: Address, group: int) -> None:
    """weights[group, 64] = p[group, 64] * scales[64]."""
    for i in range(0, PAGE, 16):
        scale = load_f16(scales + 2 * i)
        for at in range(4 * i, 4 * PAGE * group, 4 * PAGE):
            store_f32(weights + at, load_f32(p + at) * scale)


def _page_values(
    acc: Address, factors: Address, p: Address, v: Address, n_valid: int, group: int, head_dim: int, ahead: Address,
    weights: Address,
) -> None:  # fmt: skip
    """acc[group, head_dim] takes sum of p * v in, for int8 v with scales. weights: scratch [group, 64]."""
    for d in range(0, head_dim, 16):
        if is_q8 and d % 32 == 0:
            scale_weights(weights, p, v + PAGE * head_dim + 2 * PAGE * (d // 32), group)
        w, next_v = weights if is_q8 else p, ahead + item * PAGE * d
        tile_values(acc + 4 * d, factors, w, v + item * d, item * head_dim, n_valid, group, head_dim, next_v, 16 * item)


def _attend_page(
    state: Address, q: Address, k: Address, v: Address, n_valid: int, group: int, head_dim: int, scale: np.float32,
    ahead: Address, work: Address,
) -> None:  # fmt: skip
    """A state takes n_valid positions of a page's K and V of one kv head in. `ahead`: K that will be needed next."""
    factors, scores, weights = work_places(work, group)
    page_scores(scores, q, k, n_valid, group, head_dim, ahead)
    page_softmax(state, scores, factors, n_valid, group, head_dim, scale, work)
    page_values(state, factors, scores, v, n_valid, group, head_dim, ahead + (v - k), weights)


@functools.cache
def attend_address(kv: str) -> int:
    """Compile _attend_page for a type of KV and return its address."""
    names: dict[str, Any] = {"is_q8": False, "item": 2, "load": load_f16}
    if kv == "q8_0":
        names = {"is_q8": True, "item": 1, "load": load_q8}

    def build(made: Any, template: Callable[..., None], end: str = "", **more: int) -> None:
        name = template.__name__[1:]
        names[name + end] = made(specialise(template, f"{name}_{kv}{end}", **names, **more))

    for n in (6, 4, 2, 1):
        build(inner, _scores, f"_{n}", H=n)
        build(inner, _values, f"_{n}", H=n)
    for made, templates in ((far(), (_tile_scores, _tile_values)), (inner, (_page_scores, _page_values))):
        for template in templates:
            build(made, template)
    signature = types.void(*[types.int64] * 7, types.float32, *[types.int64] * 2)
    return address_of(specialise(_attend_page, f"attend_page_{kv}", **names), signature)


# --- states --------------------------------------------------------------------------------------------------------


@inner
def clear_state(state: Address, group: int, head_dim: int) -> None:
    for i in range(0, 4 * group * head_dim, 64):
        store_f32(state + i, splat(ZERO))
    for i in range(4 * group * head_dim, state_bytes(group, head_dim), 128):
        at = state + i
        store_f32(at, splat(MINUS_INFINITY))
        store_f32(at + 64, splat(ZERO))


@inner
def merge_state(into: Address, state: Address, group: int, head_dim: int, factors: Address) -> None:
    """The triple at `into` takes the one of the next block in."""
    offset, h = 4 * group * head_dim, 0
    while h < group:
        merge_sums(into + offset, state + offset, state + offset + 64, factors)
        n = set_size(group - h)
        for i in range(n):
            keep, take = read_f32(factors + 4 * i), read_f32(factors + 64 + 4 * i)
            for at in range(4 * head_dim * (h + i), 4 * head_dim * (h + i + 1), 64):
                store_f32(into + at, fma(load_f32(state + at), take, load_f32(into + at) * keep))
        h += n
        offset += 128


@inner
def finish_state(out: Address, state: Address, group: int, head_dim: int) -> None:
    """out[group, head_dim] = vectors / sums."""
    sums, h = state + 4 * group * head_dim + 64, 0
    while h < group:
        n = set_size(group - h)
        for i in range(n):
            inverse = ONE / read_f32(sums + 4 * i)
            for at in range(4 * head_dim * (h + i), 4 * head_dim * (h + i + 1), 64):
                store_f32(out + at, load_f32(state + at) * inverse)
        h += n
        sums += 128


# --- rows and parts ------------------------------------------------------------------------------------------------


@inner
def n_pages_of(positions: Address, t: Int) -> int:
    return read_i32(positions + 4 * t) // PAGE + 1


@inner
def n_blocks_of(positions: Address, t: int) -> int:
    return read_i32(positions + 4 * t) // (PAGE * BLOCK) + 1


@inner
def page_at(tables: Address, t: Int, page: Int) -> Address:
    return read_address(read_address(tables + 8 * t) + 8 * page)


@inner
def page_ahead(page: int, t: int, tables: Address, positions: Address, n_rows: Int) -> Address:
    """The page that attend_block reads next; its own for rows behind the first of a shared page: they ask for none."""
    own = page_at(tables, t, page)
    if t > 0 and page < n_pages_of(positions, t - 1) and page_at(tables, t - 1, page) == own:
        return own
    for u in range(t + 1, t + n_rows + 1):
        p = page + u // n_rows
        if p < n_pages_of(positions, u % n_rows) and page_at(tables, u % n_rows, p) != own:
            return page_at(tables, u % n_rows, p)
    return own


@inner
def attend_block(
    block: int, states: Address, q: Address, q_step: int, tables: Address, positions: Address, n_rows: Int,
    offset: int, shape: tuple[int, int, int, int], scale: np.float32, work: Address,
) -> None:  # fmt: skip
    """states[t] = the block's triple of each row; a page is read by all rows before the next one is touched."""
    page_function, group, head_dim, half_bytes = shape
    step, n_pages = state_bytes(group, head_dim), 0
    for t in range(n_rows):
        clear_state(states + t * step, group, head_dim)
        n_pages = max(n_pages, n_pages_of(positions, t))
    for page in range(block * BLOCK, min((block + 1) * BLOCK, n_pages)):
        for t in range(n_rows):
            n_valid = min(PAGE, read_i32(positions + 4 * t) + 1 - page * PAGE)
            if n_valid > 0:
                k = page_at(tables, t, page) + offset
                call_page(
                    page_function, states + t * step, q + t * q_step, k, k + half_bytes, n_valid, group, head_dim,
                    scale, page_ahead(page, t, tables, positions, n_rows) + offset, work,
                )  # fmt: skip


@inner
def attend_rows(
    first: int, last: int, out: Address, q: Address, q_step: int, tables: Address, positions: Address, n_rows: int,
    offset: int, shape: tuple[int, int, int, int], scale: np.float32, scratch: Address,
) -> None:  # fmt: skip
    """Blocks first to last of up to ROWS rows, for one kv head; a row that is cut comes alone.

    A row's later blocks (first > 0) stay in scratch for join_parts, as does its state while blocks are missing.
    """
    _, group, head_dim, _ = shape
    step = state_bytes(group, head_dim)
    states, totals, blocks = state_places(scratch, group, head_dim)
    if first > 0:
        one = np.int64(1)  # not a literal, of which Numba would compile a copy
        for b in range(first, last):
            attend_block(b, blocks + b * step, q, q_step, tables, positions, one, offset, shape, scale, scratch)
        return
    for t in range(n_rows):
        clear_state(totals + t * step, group, head_dim)
    for b in range(last):
        attend_block(b, states, q, q_step, tables, positions, n_rows, offset, shape, scale, scratch)
        for t in range(n_rows):
            if b < n_blocks_of(positions, t):
                merge_state(totals + t * step, states + t * step, group, head_dim, scratch)
    for t in range(n_rows):
        if n_blocks_of(positions, t) <= last:
            finish_state(out + t * q_step, totals + t * step, group, head_dim)


@kernel
def part_begin(part: int, n_parts: int, positions: Address, n_rows: int, n_kv_heads: int) -> tuple[int, int, int]:
    """(kv head, row, block) where a part begins when n_parts share all pages evenly, cut between blocks."""
    n_pages = 0
    for t in range(n_rows):
        n_pages += n_pages_of(positions, t)
    kv_head, at = part * n_pages * n_kv_heads // n_parts // n_pages, part * n_pages * n_kv_heads // n_parts % n_pages
    t = 0
    while at >= n_pages_of(positions, t):
        at -= n_pages_of(positions, t)
        t += 1
    return kv_head, t, at // BLOCK


@far(scale=types.float32)
def attend_part(
    part: int, n_parts: int, out: Address, q: Address, tables: Address, positions: Address, n_rows: int, n_heads: int,
    n_kv_heads: int, head_dim: int, layer_offset: int, scale: np.float32, page: int, head_bytes: int, scratch: Address,
    scratch_bytes: int,
) -> None:  # fmt: skip
    """out[T, n_heads, head_dim] = softmax(scale * q K) V over positions 0..positions[t] of the pages at tables[t].

    positions: int32; tables: addresses of int64 page addresses; page: attend_address of the type of KV, of which one
    head takes head_bytes in a page; scratch: scratch_bytes for each part.
    """
    group, q_step = n_heads // n_kv_heads, 4 * head_dim * n_heads
    kv_head, t, block = part_begin(part, n_parts, positions, n_rows, n_kv_heads)
    end_head, end_row, end_block = part_begin(part + 1, n_parts, positions, n_rows, n_kv_heads)
    while (kv_head, t, block) < (end_head, end_row, end_block):
        is_last = kv_head == end_head and t == end_row
        n, last = 1, end_block if is_last else n_blocks_of(positions, t)
        if block == 0 and not is_last:
            n = min(ROWS, (end_row if kv_head == end_head else n_rows) - t)
            for i in range(t, t + n):
                last = max(last, n_blocks_of(positions, i))
        at = 4 * head_dim * (t * n_heads + kv_head * group)
        attend_rows(
            block, last, out + at, q + at, q_step, tables + 8 * t, positions + 4 * t, n,
            layer_offset + kv_head * head_bytes, (page, group, head_dim, head_bytes // 2), scale,
            scratch + part * scratch_bytes,
        )  # fmt: skip
        t, block = t + n, 0
        if t == n_rows:
            kv_head, t = kv_head + 1, 0


@far(scale=types.float32)
def join_parts(
    n_parts: int, out: Address, q: Address, tables: Address, positions: Address, n_rows: int, n_heads: int,
    n_kv_heads: int, head_dim: int, layer_offset: int, scale: np.float32, page: int, head_bytes: int, scratch: Address,
    scratch_bytes: int,
) -> None:  # fmt: skip
    """Rows that were cut: the later parts' blocks are merged, in order, into the state of the part with block 0."""
    group = n_heads // n_kv_heads
    step, owner = state_bytes(group, head_dim), 0
    for part in range(1, n_parts):
        kv_head, t, block = part_begin(part, n_parts, positions, n_rows, n_kv_heads)
        end_head, end_row, end_block = part_begin(part + 1, n_parts, positions, n_rows, n_kv_heads)
        goes_on = kv_head == end_head and t == end_row
        last = end_block if goes_on else n_blocks_of(positions, t)
        _, total, _ = state_places(scratch + owner * scratch_bytes, group, head_dim)
        if block > 0:
            _, _, blocks = state_places(scratch + part * scratch_bytes, group, head_dim)
            for b in range(block, last):
                merge_state(total, blocks + b * step, group, head_dim, scratch)
            if not goes_on:
                finish_state(out + 4 * head_dim * (t * n_heads + kv_head * group), total, group, head_dim)
        if block == 0 or not goes_on:
            owner = part


def attend_scratch_bytes(n_heads: int, n_kv_heads: int, head_dim: int, n_positions: int) -> int:
    """Scratch of one thread for rows at positions below n_positions."""
    group, n_blocks = n_heads // n_kv_heads, (n_positions - 1) // (PAGE * BLOCK) + 1
    return int(state_places(Address(0), group, head_dim)[2]) + n_blocks * int(state_bytes(group, head_dim))


attend = Split(attend_part, end=join_parts)
