"""Every kernel again in plain NumPy, slow and obvious: the specification, the order of every sum, the debugging path.

Same names and arguments as fast.py; addresses are turned into arrays first. `fma32` multiplies and adds in float64 and
rounds once to float32: the product of two float32 is exact there, so it differs from a true fma only where the sum is
rounded twice, about once in 10**9. M2LITE_KERNELS=reference runs the whole model on this file.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from m2lite.formats.table import FORMATS, BlockFormat
from m2lite.kernels import elementwise as constants
from m2lite.kernels import layer
from m2lite.kernels.pages import LARGEST_AMAX

F = np.float32
F32 = npt.NDArray[np.float32]
PAGE, BLOCK = 64, 16
STEP_BYTES = {"int8": 48, "float32": 128}
GROUP = 64


def array_at(address: int, dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The memory at `address` as an array, without a copy."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * n_bytes).from_address(int(address)), dtype=dtype).reshape(shape)


def strided_at(address: int, n_rows: int, stride: int, n: int) -> F32:
    """float32 [n_rows, n] whose rows are `stride` bytes apart."""
    flat = array_at(address, np.uint8, ((n_rows - 1) * stride + 4 * n,))
    return np.lib.stride_tricks.as_strided(flat.view(np.float32), (n_rows, n), (stride, 4))


def fma32(a: Any, b: Any, c: Any) -> F32:
    """a * b + c in float32, rounded once."""
    return np.asarray(np.asarray(a, np.float64) * b + c).astype(F)


def lanes_dot(a: F32, b: F32) -> F32:
    """Sum of products over the last axis: 16 virtual lanes, then the fixed tree."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    a, b = np.broadcast_to(a, shape), np.broadcast_to(b, shape)
    acc = np.zeros((*shape[:-1], 16), F)
    for i in range(0, shape[-1], 16):
        acc = fma32(a[..., i : i + 16], b[..., i : i + 16], acc)
    return tree(acc)


def tree(v: F32) -> F32:
    """Sum of 16 lanes: i with i + 8, then i + 4, i + 2, i + 1."""
    while v.shape[-1] > 1:
        half = v.shape[-1] // 2
        v = v[..., :half] + v[..., half:]
    return v[..., 0]


def exp32(x: F32) -> F32:
    """The polynomial of elementwise.exp16."""
    c = constants
    clamped = np.where(x > c.EXP_HIGHEST, c.EXP_HIGHEST, np.where(x > c.EXP_LOWEST, x, c.EXP_LOWEST)).astype(F)
    n = np.rint(clamped * c.LOG2_E).astype(F)
    r = fma32(n, c.MINUS_LN2_LOW, fma32(n, c.MINUS_LN2_HIGH, clamped))
    p = fma32(c.C7, r, c.C6)
    for coefficient in (c.C5, c.C4, c.C3, c.C2, c.ONE, c.ONE):
        p = fma32(p, r, coefficient)
    out = p * np.ldexp(F(1), n.astype(np.int32))  # np.exp2 is one bit off for some whole numbers
    return np.where(np.isnan(x), x, np.where(x < c.EXP_LOWEST, F(0), out)).astype(F)


def sigmoid32(x: F32) -> F32:
    return F(1) / (F(1) + exp32(-x))


# --- weights -------------------------------------------------------------------------------------------------------

_KEYS: list[tuple[str, str]] = []  # those that were asked for


def tile_address(name: str, kind: str) -> int:
    """Not an address here: a key that says which format and kind of activations a matrix product uses."""
    if (name, kind) not in _KEYS:
        _KEYS.append((name, kind))
    return _KEYS.index((name, kind))


def unpack_address(name: str) -> int:
    return tile_address(name, "float32")


def weight_rows(key: int, w: int, stride: int, n_rows: int, n_blocks: int) -> tuple[BlockFormat, npt.NDArray[np.uint8]]:
    fmt = FORMATS[_KEYS[key][0]]
    n_bytes = n_blocks * 32 // fmt.n_weights * fmt.n_bytes
    flat = array_at(w, np.uint8, ((n_rows - 1) * stride + n_bytes,))
    return fmt, np.lib.stride_tricks.as_strided(flat, (n_rows, n_bytes), (stride, 1))


def floats_of(key: int, w: int, stride: int, n_rows: int, n_blocks: int) -> F32:
    fmt, raw = weight_rows(key, w, stride, n_rows, n_blocks)
    return fmt.unpack(raw.reshape(n_rows, -1, fmt.n_bytes)).reshape(n_rows, n_blocks * 32).astype(F)


def integers_of(key: int, w: int, stride: int, n_rows: int, n_blocks: int) -> tuple[npt.NDArray[np.int32], F32, Any]:
    """Weights [rows, blocks, 32], scales [rows, blocks, groups] and minima [rows, blocks] or None."""
    fmt, raw = weight_rows(key, w, stride, n_rows, n_blocks)
    assert fmt.parts is not None
    weights, scales, minima = fmt.parts(raw.reshape(n_rows, -1, fmt.n_bytes))
    minima = None if minima is None else minima.reshape(n_rows, n_blocks)
    return weights.astype(np.int32).reshape(n_rows, n_blocks, 32), scales.reshape(n_rows, n_blocks, -1), minima


# --- activation panels ---------------------------------------------------------------------------------------------


def groups_of(n_rows: int) -> list[tuple[int, int]]:
    """(first row, size) of the groups of a panel."""
    return [(start, min(GROUP, n_rows - start)) for start in range(0, n_rows, GROUP)]


def read_panel(kind: str, panel: int, n_rows: int, n_blocks: int) -> npt.NDArray[np.uint8]:
    """The bytes of a panel as [row, block, bytes]."""
    step = STEP_BYTES[kind]
    raw = array_at(panel, np.uint8, (n_rows * n_blocks * step,))
    rows = np.empty((n_rows, n_blocks, step), np.uint8)
    for start, size in groups_of(n_rows):
        group = raw[start * n_blocks * step :][: size * n_blocks * step].reshape(n_blocks, size, step)
        rows[start : start + size] = group.transpose(1, 0, 2)
    return rows


def write_panel(kind: str, panel: int, rows: npt.NDArray[np.uint8]) -> None:
    n_rows, n_blocks, step = rows.shape
    raw = array_at(panel, np.uint8, (n_rows * n_blocks * step,))
    for start, size in groups_of(n_rows):
        group = raw[start * n_blocks * step :][: size * n_blocks * step].reshape(n_blocks, size, step)
        group[:] = rows[start : start + size].transpose(1, 0, 2)


def panel_rows(x: F32, kind: str) -> npt.NDArray[np.uint8]:
    """float32 [rows, n] -> panel bytes [row, block, bytes]."""
    parts = np.ascontiguousarray(x).reshape(x.shape[0], -1, 32)
    if kind == "float32":
        return parts.view(np.uint8).reshape(*parts.shape[:2], 128)
    amax = np.abs(parts).max(axis=-1)
    scale = amax / F(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(amax > constants.SMALLEST_AMAX, F(127) / amax, F(0)).astype(F)
    q = np.clip(np.rint(parts * inverse[..., None]), -127, 127).astype(np.int8)
    pairs = q.reshape(*q.shape[:2], 2, 4, 2, 2).sum(axis=-1, dtype=np.int16).sum(axis=-2, dtype=np.int16)
    first, total = pairs[..., 0, :], pairs.sum(axis=-2, dtype=np.int16)
    scaled_sum = -(scale * total.sum(axis=-1).astype(F))
    behind = (scale[..., None], -8 * total, scaled_sum[..., None], -8 * first)
    return np.concatenate([q.view(np.uint8), *(v.view(np.uint8) for v in behind)], axis=-1)


def pack(n_parts: int, panel: int, x: int, x_stride: int, n_rows: int, n_blocks: int, is_int8: int) -> None:
    kind = "int8" if is_int8 else "float32"
    write_panel(kind, panel, panel_rows(strided_at(x, n_rows, x_stride, 32 * n_blocks), kind))


def pack_groups(
    n_parts: int, panel: int, x: int, x_stride: int, rows: int, starts: int, n_groups: int, n_blocks: int, is_int8: int
) -> None:
    kind = "int8" if is_int8 else "float32"
    first = array_at(starts, np.int32, (n_groups + 1,))
    index = array_at(rows + 4 * int(first[0]), np.int32, (int(first[-1] - first[0]),))
    first = first - first[0]
    values = strided_at(x, int(index.max()) + 1, x_stride, 32 * n_blocks)
    for g in range(n_groups):
        begin, end = int(first[g]), int(first[g + 1])
        write_panel(kind, panel + begin * n_blocks * STEP_BYTES[kind], panel_rows(values[index[begin:end]], kind))


# --- products ------------------------------------------------------------------------------------------------------


def product(key: int, w: int, stride: int, n_out: int, n_blocks: int, x: int, n_x: int) -> F32:
    """[n_x, n_out]: what a tile kernel computes."""
    kind = _KEYS[key][1]
    rows = read_panel(kind, x, n_x, n_blocks)
    if kind == "float32":
        values = rows.reshape(n_x, -1).view(np.float32)
        return lanes_dot(floats_of(key, w, stride, n_out, n_blocks)[None], values[:, None])
    weights, w_scales, minima = integers_of(key, w, stride, n_out, n_blocks)
    q = rows[..., :32].copy().view(np.int8).astype(np.int32)
    x_scales, scaled_sums = (rows[..., at : at + 4].copy().view(np.float32)[..., 0] for at in (32, 40))
    acc, size = np.zeros((n_x, n_out), F), 32 // w_scales.shape[-1]
    for b in range(n_blocks):
        for g in range(w_scales.shape[-1]):
            part = slice(g * size, (g + 1) * size)
            dots = q[:, b, part] @ weights[:, b, part].T
            acc = fma32(dots, w_scales[None, :, b, g] * x_scales[:, None, b], acc)
        if minima is not None:
            acc = fma32(minima[None, :, b], scaled_sums[:, None, b], acc)
    return acc


def matmul(
    n_parts: int, out: int, out_stride: int, tile: int, w: int, stride: int, n_out: int, n_blocks: int, x: int,
    x_stride: int, n_x: int,
) -> None:  # fmt: skip
    strided_at(out, n_x, out_stride, n_out)[:] = product(tile, w, stride, n_out, n_blocks, x, n_x)


def matmul_three(n_parts: int, n_blocks: int, n_x: int, *matrices: int) -> None:
    for i in range(0, len(matrices), 7):
        out, tile, w, stride, n_out, x, x_stride = matrices[i : i + 7]
        matmul(n_parts, out, 4 * n_out, tile, w, stride, n_out, n_blocks, x, x_stride, n_x)


def experts_up(
    n_parts: int, h: int, gate_tile: int, gate: int, gate_slice: int, up_tile: int, up: int, up_slice: int, n_ff: int,
    n_blocks: int, gate_panel: int, gate_row: int, up_panel: int, up_row: int, active: int, starts: int, n_active: int,
    scratch: int, scratch_bytes: int,
) -> None:  # fmt: skip
    first, experts = array_at(starts, np.int32, (n_active + 1,)), array_at(active, np.int32, (n_active,))
    first = first - first[0]
    for i, e in enumerate(experts.tolist()):
        begin, n_x = int(first[i]), int(first[i + 1] - first[i])
        g = product(
            gate_tile, gate + e * gate_slice, gate_slice // n_ff, n_ff, n_blocks, gate_panel + begin * gate_row, n_x
        )
        u = product(up_tile, up + e * up_slice, up_slice // n_ff, n_ff, n_blocks, up_panel + begin * up_row, n_x)
        array_at(h + 4 * begin * n_ff, np.float32, (n_x, n_ff))[:] = (g * sigmoid32(g)) * u


def experts_down(
    n_parts: int, y: int, tile: int, w: int, slice_bytes: int, n_out: int, n_blocks: int, panel: int, panel_row: int,
    active: int, starts: int, n_active: int,
) -> None:  # fmt: skip
    first, experts = array_at(starts, np.int32, (n_active + 1,)), array_at(active, np.int32, (n_active,))
    first = first - first[0]
    for i, e in enumerate(experts.tolist()):
        begin, n_x = int(first[i]), int(first[i + 1] - first[i])
        out = product(tile, w + e * slice_bytes, slice_bytes // n_out, n_out, n_blocks, panel + begin * panel_row, n_x)
        array_at(y + 4 * begin * n_out, np.float32, (n_x, n_out))[:] = out


# --- rows ----------------------------------------------------------------------------------------------------------


def embed_rows(
    unpack: int, w: int, row_bytes: int, n_blocks: int, tokens: int, n_rows: int, out: int, out_stride: int
) -> None:
    rows = strided_at(out, n_rows, out_stride, 32 * n_blocks)
    for t, token in enumerate(array_at(tokens, np.int32, (n_rows,)).tolist()):
        rows[t] = floats_of(unpack, w + token * row_bytes, row_bytes, 1, n_blocks)[0]


def add_rows(x: int, y: int, n_rows: int, n: int) -> None:
    array_at(x, np.float32, (n_rows, n))[:] += array_at(y, np.float32, (n_rows, n))


def normed(x: F32, weight: int, eps: float) -> F32:
    mean = lanes_dot(x, x) / F(x.shape[-1])
    scale = F(1) / np.sqrt(mean + F(eps))
    out: F32 = (x * scale[:, None]) * array_at(weight, np.float32, (x.shape[-1],))
    return out


def rms_norm(out: int, x: int, weight: int, n_rows: int, n: int, eps: float) -> None:
    array_at(out, np.float32, (n_rows, n))[:] = normed(array_at(x, np.float32, (n_rows, n)), weight, eps)


def norm_rope(
    x: int,
    weight: int,
    angles: int,
    positions: int,
    n_rows: int,
    n_heads: int,
    head_dim: int,
    rotary_dim: int,
    eps: float,
) -> None:
    rows = array_at(x, np.float32, (n_rows, n_heads * head_dim))
    heads = normed(rows, weight, eps).reshape(n_rows, n_heads, head_dim)
    where, half = array_at(positions, np.int32, (n_rows,)), rotary_dim // 2
    table = array_at(angles, np.float32, (int(where.max()) + 1, rotary_dim))[where][:, None]
    c, s = table[..., :half], table[..., half:]
    a, b = heads[..., :half].copy(), heads[..., half:rotary_dim].copy()
    heads[..., :half] = fma32(-b, s, a * c)
    heads[..., half:rotary_dim] = fma32(a, s, b * c)
    rows[:] = heads.reshape(rows.shape)


def route(
    scores: int, bias: int, n_rows: int, n_experts: int, n_padded: int, n_used: int, ids: int, weights: int
) -> int:
    padded = array_at(scores, np.float32, (n_rows, n_padded))
    padded[:] = sigmoid32(padded)
    values = padded[:, :n_experts]
    choice = values + array_at(bias, np.float32, (n_experts,))
    out, w = array_at(ids, np.int32, (n_rows, n_used)), array_at(weights, np.float32, (n_rows, n_used))
    finite = np.isfinite(choice).all(axis=1)
    for t in range(n_rows):
        order = np.argsort(-choice[t], kind="stable") if finite[t] else first_of(choice[t])
        out[t] = np.sort(order[:n_used])
        chosen = values[t, out[t]]
        total = F(0)
        for s in chosen:
            total = total + s
        w[t] = chosen / total
    return int((~finite).sum())


def first_of(choice: F32) -> npt.NDArray[np.int64]:
    """Any valid ids for a row that holds NaN: the caller stops, but no index may leave the range."""
    return np.arange(choice.shape[0])


def group_pairs(
    ids: int, n_rows: int, n_experts: int, n_used: int, counts: int, active: int, starts: int, rows: int, slots: int
) -> int:
    chosen = array_at(ids, np.int32, (n_rows, n_used))
    order = np.argsort(chosen.reshape(-1), kind="stable")
    experts, first = np.unique(chosen.reshape(-1)[order], return_index=True)
    array_at(active, np.int32, (len(experts),))[:] = experts
    array_at(starts, np.int32, (len(experts) + 1,))[:] = [*first.tolist(), order.size]
    array_at(rows, np.int32, (order.size,))[:] = order // n_used
    array_at(slots, np.int32, (order.size,))[order] = np.arange(order.size)
    return len(experts)


def combine(
    n_parts: int, x: int, total: int, y: int, slots: int, weights: int, n_rows: int, n_used: int, n: int, first: int,
    last: int,
) -> None:  # fmt: skip
    pair = array_at(slots, np.int32, (n_rows, n_used))
    outputs = array_at(y, np.float32, (last - first, n))
    w = array_at(weights, np.float32, (n_rows, n_used))
    kept = array_at(total, np.float32, (n_rows, n))
    sums = kept.copy() if first > 0 else np.zeros((n_rows, n), F)
    for j in range(n_used):
        here = (first <= pair[:, j]) & (pair[:, j] < last)
        sums[here] = fma32(w[here, j, None], outputs[pair[here, j] - first], sums[here])
    if last == n_rows * n_used:
        array_at(x, np.float32, (n_rows, n))[:] += sums
    else:
        kept[:] = sums


# --- KV pages and attention ----------------------------------------------------------------------------------------


def page_dtype(head_dim: int, is_q8: int) -> np.dtype[Any]:
    """K and V of one kv head in a page, side by side."""
    if not is_q8:
        return np.dtype([("k", np.float16, (head_dim, PAGE)), ("v", np.float16, (PAGE, head_dim))])
    scales = (np.float16, (head_dim // 32, PAGE))
    k, v = (np.int8, (head_dim, PAGE)), (np.int8, (PAGE, head_dim))
    return np.dtype([("k", *k), ("k_scales", *scales), ("v", *v), ("v_scales", *scales)])


def kv_head_bytes(head_dim: int, is_q8: int) -> int:
    return page_dtype(head_dim, is_q8).itemsize


def rounded_blocks(x: F32) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """[..., n] as int8 of the same shape and float16 scales [..., n / 32]; NaN and infinity give the scale NaN."""
    parts = x.reshape(*x.shape[:-1], -1, 32)
    amax = np.abs(parts).max(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scales = np.where(amax <= LARGEST_AMAX, amax / F(127), F(np.nan)).astype(np.float16)
        inverse = np.where(amax > constants.SMALLEST_AMAX, F(127) / amax, F(0)).astype(F)
        y = parts * inverse[..., None]
    y = np.where(y > -127, y, F(-127))
    return np.rint(np.where(y < 127, y, F(127))).astype(np.int8).reshape(x.shape), scales


def append_kv(
    k: int, v: int, pages: int, layer_offset: int, slots: int, n_rows: int, n_kv_heads: int, head_dim: int, is_q8: int
) -> None:
    addresses, slot = array_at(pages, np.int64, (n_rows,)) + layer_offset, array_at(slots, np.int32, (n_rows,))
    keys, values = (array_at(a, np.float32, (n_rows, n_kv_heads, head_dim)) for a in (k, v))
    for t in range(n_rows):
        page = array_at(int(addresses[t]), page_dtype(head_dim, is_q8), (n_kv_heads,))
        if is_q8:
            page["k"][..., slot[t]], page["k_scales"][..., slot[t]] = rounded_blocks(keys[t])
            page["v"][:, slot[t]], page["v_scales"][..., slot[t]] = rounded_blocks(values[t])
        else:
            page["k"][..., slot[t]], page["v"][:, slot[t]] = keys[t], values[t]


def attend_address(kv: str) -> int:
    """Not an address here, but whether pages are q8_0."""
    return int(kv == "q8_0")


def attend_scratch_bytes(n_heads: int, n_kv_heads: int, head_dim: int, n_positions: int) -> int:
    return 0


def attend(
    n_parts: int, out: int, q: int, tables: int, positions: int, n_rows: int, n_heads: int, n_kv_heads: int,
    head_dim: int, layer_offset: int, scale: float, page: int, head_bytes: int, scratch: int, scratch_bytes: int,
) -> None:  # fmt: skip
    group, dtype = n_heads // n_kv_heads, page_dtype(head_dim, page)
    queries = array_at(q, np.float32, (n_rows, n_kv_heads, group, head_dim))
    result = array_at(out, np.float32, (n_rows, n_kv_heads, group, head_dim))
    where = array_at(positions, np.int32, (n_rows,)).tolist()
    for t, table in enumerate(array_at(tables, np.int64, (n_rows,)).tolist()):
        addresses = array_at(table, np.int64, (where[t] // PAGE + 1,)) + layer_offset
        for h in range(n_kv_heads):
            pages = np.stack([array_at(int(a), dtype, (n_kv_heads,))[h] for a in addresses])
            result[t, h] = attend_group(queries[t, h], pages, where[t], F(scale))


class State:
    """A running (maximum, sum, vector) of a group of heads."""

    def __init__(self, group: int, head_dim: int) -> None:
        self.top = np.full(group, -np.inf, F)
        self.total = np.zeros(group, F)
        self.vector = np.zeros((group, head_dim), F)

    def merge(self, top: F32, total: F32, vector: F32) -> None:
        new_top = np.where(top > self.top, top, self.top)
        keep, take = exp32(self.top - new_top), exp32(top - new_top)
        self.total = fma32(total, take, self.total * keep)
        self.vector = fma32(vector, take[:, None], self.vector * keep[:, None])
        self.top = new_top


def attend_group(q: F32, pages: npt.NDArray[Any], position: int, scale: F) -> F32:
    """softmax(scale * q . K) V for the heads of a group: pages merged within blocks, blocks merged in order."""
    is_seen = np.arange(len(pages) * PAGE).reshape(len(pages), 1, PAGE) <= position
    scores = page_scores(q, pages) * scale
    scores[np.isinf(scores)] = np.nan  # its weight 0 would hide it
    scores = np.where(is_seen, scores, F(-np.inf))
    tops = scores.max(axis=-1)
    p = exp32(scores - tops[..., None])
    totals = np.zeros((*tops.shape, 16), F)
    for j in range(0, PAGE, 16):
        totals = totals + p[..., j : j + 16]
    values = page_values(p, pages, is_seen)
    row = State(*q.shape)
    for first in range(0, len(pages), BLOCK):
        block = State(*q.shape)
        for i in range(first, min(first + BLOCK, len(pages))):
            block.merge(tops[i], tree(totals[i]), values[i])
        row.merge(block.top, block.total, block.vector)
    return row.vector * (F(1) / row.total)[:, None]


def page_scores(q: F32, pages: npt.NDArray[Any]) -> F32:
    """[pages, group, 64] = q . k; dimensions ascending, in q8_0 by blocks of 32."""
    k, is_q8 = pages["k"].astype(F), pages["k"].dtype == np.int8
    width = 32 if is_q8 else k.shape[1]
    out = np.zeros((len(pages), len(q), PAGE), F)
    for i in range(0, k.shape[1], width):
        part = np.zeros_like(out)
        for d in range(i, i + width):
            part = fma32(q[:, d, None], k[:, None, d], part)
        out = fma32(part, pages["k_scales"][:, None, i // 32].astype(F), out) if is_q8 else part
    return out


def page_values(p: F32, pages: npt.NDArray[Any], is_seen: npt.NDArray[np.bool_]) -> F32:
    """[pages, group, head_dim] = p @ v, positions ascending; in q8_0 p is multiplied with the scale first."""
    v = pages["v"].astype(F)
    out = np.zeros((len(pages), p.shape[1], v.shape[2]), F)
    for j in range(PAGE):
        weights = p[..., j, None]
        if pages["v"].dtype == np.int8:
            weights = weights * np.repeat(pages["v_scales"][..., j].astype(F), 32, axis=-1)[:, None]
        out = np.where(is_seen[..., j, None], fma32(weights, v[:, None, j], out), out)
    return out


# --- importance ----------------------------------------------------------------------------------------------------


def add_squares(n_parts: int, sums: npt.NDArray[np.float64], x: F32, rows: Any, starts: Any, active: Any) -> None:
    for g, e in enumerate(active.tolist()):
        for p in range(int(starts[g]), int(starts[g + 1])):
            sums[e] += x[rows[p]].astype(np.float64) ** 2


steps = layer.interpreted(sys.modules[__name__])
