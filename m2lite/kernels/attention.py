"""Grouped-query attention over KV pages of 64 positions. Sees addresses of pages; knows no timeline and no layer.

For one row and one head, always in this order whatever the chunk, the threads or the batch: pages ascending; within a
page the scores (16 virtual lanes, fixed tree), their maximum, p = exp(score - maximum), the sum of p (16 lanes, fixed
tree), the sum of p * v (positions ascending, one fma each); then the page is merged into the running
(maximum, sum, vector): both sides scaled by exp(own maximum - new maximum).
"""

from __future__ import annotations

import numpy as np
from numba import prange

from m2lite.kernels.elementwise import exp16
from m2lite.kernels.jit import Split, kernel
from m2lite.kernels.simd import (
    add,
    fma,
    fma_f16,
    fma_scalar,
    load_f16,
    load_f32,
    max_lanes,
    maximum,
    mul,
    pack_get,
    read_f32,
    read_i32,
    read_i64,
    splat,
    store_f32,
    sub,
    tree_sum,
    write_f32,
    zeros,
)

PAGE = 64
F = np.float32
ZERO, MINUS_INFINITY = F(0.0), F(-np.inf)


@kernel
def exp_scalar(x):
    return max_lanes(exp16(splat(x)))


@kernel
def page_scores(q, k, n_valid, head_dim, scale, scores):
    """scores[p] = scale * q . k[p] for p < n_valid, -inf above; returns the maximum."""
    for p in range(n_valid):
        lanes = splat(ZERO)
        for i in range(0, head_dim, 16):
            lanes = fma(load_f32(q + 4 * i), load_f16(k + 2 * (p * head_dim + i)), lanes)
        write_f32(scores + 4 * p, tree_sum(lanes) * scale)
    for p in range(n_valid, PAGE):
        write_f32(scores + 4 * p, MINUS_INFINITY)
    top = splat(MINUS_INFINITY)
    for i in range(0, 4 * PAGE, 64):
        top = maximum(load_f32(scores + i), top)
    return max_lanes(top)


@kernel
def page_weights(scores, top):
    """scores = exp(scores - top), in place; returns their sum."""
    total = splat(ZERO)
    for i in range(0, 4 * PAGE, 64):
        p = exp16(sub(load_f32(scores + i), splat(top)))
        store_f32(scores + i, p)
        total = add(total, p)
    return tree_sum(total)


@kernel
def merge_values(acc, scores, v, n_valid, head_dim, keep, take):
    """acc = acc * keep + (sum over p of scores[p] * v[p]) * take; 64 dimensions at a time, then 16."""
    d = 0
    while d + 64 <= head_dim:
        sums = zeros(4)
        for p in range(n_valid):
            sums = fma_f16(sums, read_f32(scores + 4 * p), v + 2 * (p * head_dim + d))
        at = acc + 4 * d
        store_f32(at, fma(pack_get(sums, 0), splat(take), mul(load_f32(at), splat(keep))))
        store_f32(at + 64, fma(pack_get(sums, 1), splat(take), mul(load_f32(at + 64), splat(keep))))
        store_f32(at + 128, fma(pack_get(sums, 2), splat(take), mul(load_f32(at + 128), splat(keep))))
        store_f32(at + 192, fma(pack_get(sums, 3), splat(take), mul(load_f32(at + 192), splat(keep))))
        d += 64
    while d < head_dim:
        one = zeros(1)
        for p in range(n_valid):
            one = fma_f16(one, read_f32(scores + 4 * p), v + 2 * (p * head_dim + d))
        at = acc + 4 * d
        store_f32(at, fma(pack_get(one, 0), splat(take), mul(load_f32(at), splat(keep))))
        d += 16


@kernel
def attend_head(out, q, table, layer_offset, kv_head, n_kv_heads, position, head_dim, scale, scores):
    """One row, one query head: out[head_dim] = softmax(scale * q . K) V over positions 0..position."""
    top, total = MINUS_INFINITY, ZERO
    for i in range(0, 4 * head_dim, 64):
        store_f32(out + i, splat(ZERO))
    for page in range(position // PAGE + 1):
        k = read_i64(table + 8 * page) + layer_offset + kv_head * PAGE * head_dim * 2
        n_valid = min(PAGE, position + 1 - page * PAGE)
        page_top = page_scores(q, k, n_valid, head_dim, scale, scores)
        page_total = page_weights(scores, page_top)
        new_top = max(top, page_top)
        keep, take = exp_scalar(top - new_top), exp_scalar(page_top - new_top)
        merge_values(out, scores, k + n_kv_heads * PAGE * head_dim * 2, n_valid, head_dim, keep, take)
        total = fma_scalar(page_total, take, total * keep)
        top = new_top
    inverse = F(1.0) / total
    for i in range(0, 4 * head_dim, 64):
        store_f32(out + i, mul(load_f32(out + i), splat(inverse)))


@kernel
def attend_part(
    part, n_parts, out, q, tables, positions, n_rows, n_heads, n_kv_heads, head_dim, layer_offset, scale, scratch
):
    """Tasks are (kv head, row) pairs; scratch holds 64 float32 per part."""
    n_tasks, per_kv = n_rows * n_kv_heads, n_heads // n_kv_heads
    scores = scratch + part * PAGE * 4
    for task in range(part * n_tasks // n_parts, (part + 1) * n_tasks // n_parts):
        kv_head, t = task // n_rows, task % n_rows
        table, position = read_i64(tables + 8 * t), read_i32(positions + 4 * t)
        for h in range(kv_head * per_kv, (kv_head + 1) * per_kv):
            at = 4 * head_dim * (t * n_heads + h)
            attend_head(out + at, q + at, table, layer_offset, kv_head, n_kv_heads, position, head_dim, scale, scores)


@kernel(parallel=True)
def attend_parallel(
    n_parts, out, q, tables, positions, n_rows, n_heads, n_kv_heads, head_dim, layer_offset, scale, scratch
):
    for part in prange(n_parts):
        attend_part(
            part,
            n_parts,
            out,
            q,
            tables,
            positions,
            n_rows,
            n_heads,
            n_kv_heads,
            head_dim,
            layer_offset,
            scale,
            scratch,
        )


attend = Split(attend_part, attend_parallel)
