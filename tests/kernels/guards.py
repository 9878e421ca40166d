"""Runs kernels on memory that ends (and begins) at unreadable pages; a stray SIMD access kills this process.

Vector loads from addresses are never bounds-checked, so this is the only way to see one. Run as a child process.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from itertools import product
from typing import Any

import numpy as np

from m2lite.kernels import dot, fast, reference
from tests.kernels import cases

PAGE = mmap.PAGESIZE
_keep: list[Any] = []


def guarded(values: np.ndarray[Any, Any], at_end: bool) -> int:
    """The address of a copy of `values` whose last (first) byte is the last (first) before an unreadable page."""
    n_bytes = values.nbytes
    n_pages = (n_bytes + PAGE - 1) // PAGE
    area = mmap.mmap(-1, (n_pages + 2) * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (base, base + (n_pages + 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) == 0
    start = base + (n_pages + 1) * PAGE - n_bytes if at_end else base + PAGE
    ctypes.memmove(start, np.ascontiguousarray(values).ctypes.data, n_bytes)
    _keep.append(area)
    return start


def run_products(rng: np.random.Generator, at_end: bool, formats: tuple[str, ...]) -> None:
    for name in formats:
        k = 3 * dot.step_of(name)
        for kind in {"float32", dot.activation_kind(name)}:
            for n_out in (48, 37, 5):
                w = cases.weights_of(rng, name, (n_out, k))
                for n_x in (1, 2, 3, 4, 7, 8, 16, 65):
                    x = guarded(rng.standard_normal((n_x, k)).astype(np.float32), at_end)
                    panel = guarded(np.zeros(dot.panel_bytes(kind, n_x, k), np.uint8), at_end)
                    out = guarded(np.zeros((n_x, n_out), np.float32), at_end)
                    fast.pack(1, panel, x, 4 * k, n_x, k // 32, int(kind == "int8"))
                    address = guarded(w, at_end)
                    tile = fast.tile_address(name, kind)
                    row_bytes = dot.panel_bytes(kind, 1, k)
                    fast.matmul(1, out, 4 * n_out, tile, address, w.shape[-1], n_out, k // 32, panel, row_bytes, n_x)
                _keep.clear()
        w = cases.weights_of(rng, name, (2, k))
        rows, tokens = (guarded(v, at_end) for v in (np.zeros((2, k), np.float32), np.arange(2, dtype=np.int32)))
        unpack = fast.unpack_address(name)
        fast.embed_rows(unpack, guarded(w, at_end), w.shape[-1], k // 32, tokens, 2, rows, 4 * k)
        _keep.clear()


def run_attention(rng: np.random.Generator, at_end: bool) -> None:
    shapes = ((4, 2, 32), (6, 1, 64), (2, 2, 128), (7, 1, 48), (13, 1, 16))
    for (n_heads, n_kv, head_dim), is_q8 in product(shapes, (0, 1)):
        if is_q8 and head_dim % 32:
            continue
        n_rows, n = 2, n_heads * head_dim
        page = np.zeros(n_kv, reference.page_dtype(head_dim, is_q8))
        pages = [guarded(page, at_end) for _ in range(2)]
        table = np.array(pages, np.int64)
        where = guarded(np.array([pages[0], pages[1]], np.int64), at_end)
        slots, positions = (guarded(np.array(v, np.int32), at_end) for v in ([63, 63], [63, 127]))
        kv = [guarded(rng.standard_normal((n_rows, n_kv * head_dim)).astype(np.float32), at_end) for _ in range(2)]
        fast.append_kv(*kv, where, 0, slots, n_rows, n_kv, head_dim, is_q8)
        tables = guarded(np.full(n_rows, guarded(table, at_end), np.int64), at_end)
        q = guarded(rng.standard_normal((n_rows, n)).astype(np.float32), at_end)
        weight = guarded(np.ones(n, np.float32), at_end)
        rotary = head_dim // 2
        angles = guarded(np.zeros((128, rotary), np.float32), at_end)
        fast.norm_rope(q, weight, angles, positions, n_rows, n_heads, head_dim, rotary, np.float32(1e-6))
        scratch_bytes = fast.attend_scratch_bytes(n_heads, n_kv, head_dim, 128)
        out, scratch = (
            guarded(np.zeros((n_rows, n), np.float32), at_end),
            guarded(np.zeros(scratch_bytes, np.uint8), at_end),
        )
        scale = np.float32(head_dim**-0.5)
        where = (out, q, tables, positions, n_rows, n_heads, n_kv, head_dim, 0, scale)
        page_function, head_bytes = fast.attend_address(cases.KV_TYPES[is_q8]), page.nbytes // n_kv
        fast.attend(1, *where, page_function, head_bytes, scratch, scratch_bytes)
        fast.rms_norm(out, q, weight, n_rows, n, np.float32(1e-6))
        fast.add_rows(out, q, n_rows, n)
        _keep.clear()


def run_experts(rng: np.random.Generator, at_end: bool) -> None:
    n_rows, n_experts, n_used, n, n_ff = 3, 12, 4, 64, 96
    pairs = n_rows * n_used

    def new(shape: Any, dtype: Any = np.float32) -> int:
        return guarded(np.zeros(shape, dtype), at_end)

    scores = guarded(rng.standard_normal((n_rows, 16)).astype(np.float32), at_end)
    ids, weights = new((n_rows, n_used), np.int32), new((n_rows, n_used))
    assert fast.route(scores, new(16), n_rows, n_experts, 16, n_used, ids, weights) == 0
    active, starts, rows, slots = (new(s, np.int32) for s in (n_experts, n_experts + 1, pairs, pairs))
    n_active = fast.group_pairs(ids, n_rows, n_experts, n_used, new(n_experts, np.int32), active, starts, rows, slots)
    order = guarded(np.arange(pairs, dtype=np.int32), at_end)
    for name in ("Q4_0", "Q8_0", "F16"):
        kind = dot.activation_kind(name)
        up = cases.weights_of(rng, name, (n_experts, n_ff, n))
        down = cases.weights_of(rng, name, (n_experts, n, n_ff))
        w, w2 = guarded(up, at_end), guarded(down, at_end)
        x, h, y = (
            guarded(rng.standard_normal((n_rows, n)).astype(np.float32), at_end),
            new((pairs, n_ff)),
            new((pairs, n)),
        )
        panel = new(dot.panel_bytes(kind, pairs, n), np.uint8)
        panel_2 = new(dot.panel_bytes(kind, pairs, n_ff), np.uint8)
        tile, is_int8 = fast.tile_address(name, kind), int(kind == "int8")
        fast.pack_groups(1, panel, x, 4 * n, rows, starts, n_active, n // 32, is_int8)
        row, row_2 = (dot.panel_bytes(kind, 1, size) for size in (n, n_ff))
        slice_bytes = up.nbytes // n_experts
        fast.experts_up(
            1, h, tile, w, slice_bytes, tile, w, slice_bytes, n_ff, n // 32, panel, row, panel, row,
            active, starts, n_active, new((2, n_rows, 16)), 2 * n_rows * 64,
        )  # fmt: skip
        fast.pack_groups(1, panel_2, h, 4 * n_ff, order, starts, n_active, n_ff // 32, is_int8)
        fast.experts_down(1, y, tile, w2, slice_bytes, n, n_ff // 32, panel_2, row_2, active, starts, n_active)
        fast.combine(1, x, new((n_rows, n)), y, slots, weights, n_rows, n_used, n, 0, pairs)


if __name__ == "__main__":
    generator = np.random.default_rng(4)
    for end in (True, False):
        run_products(generator, end, cases.ALL if "all" in sys.argv else cases.FEW)
        run_attention(generator, end)
        run_experts(generator, end)
    print("no stray access")
