"""The tile kernels of formats with a tile of integers (contract and order of the sums: dot.py). Sees addresses.

A tile meets one activation row, a few rows with everything in registers, or up to GROUP rows with the unpacked tile in
memory. The sums are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from m2lite.formats.kernels.tile import TileForm
from m2lite.formats.table import FORMATS, piece
from m2lite.kernels.dots import GROUP, PANEL_BYTES, SCALE_AT, SCALED_SUM_AT, group_dots, integer_dots, prepare
from m2lite.kernels.row_dots import row_dots
from m2lite.simd import emit, kinds
from m2lite.simd.emit import Vectors
from m2lite.simd.far import far
from m2lite.simd.jit import kernel, specialise
from m2lite.simd.kinds import Address, F32x16, Pack, PackType, pack
from m2lite.simd.memory import expect_to_write, load_f32, scratch, store_f32, store_lanes
from m2lite.simd.packs import store_rows
from m2lite.simd.packs import zeros as no_sums
from m2lite.simd.vectors import operation, splat, zeros_of

ZERO = np.float32(0)


def add_step(
    builder: ir.IRBuilder, acc: ir.Value, dots: Vectors, scales: Vectors, minimum: ir.Value | None, row: ir.Value
) -> ir.Value:
    """acc after one fma per group, and one for the minimum."""
    n = acc.type.count
    x_scale = emit.splat(builder, emit.load(builder, row, emit.F32, SCALE_AT), n)
    for dot, scale in zip(dots, scales, strict=True):
        acc = emit.fma_values(builder, builder.sitofp(dot, acc.type), builder.fmul(scale, x_scale), acc)
    if minimum is not None:
        scaled_sum = emit.splat(builder, emit.load(builder, row, emit.F32, SCALED_SUM_AT), n)
        acc = emit.fma_values(builder, minimum, scaled_sum, acc)
    return acc


def prefetch_step(builder: ir.IRBuilder, form: TileForm, ahead: ir.Value, s: int, n_rows: int = 16) -> None:
    """The lines from `ahead` on that are step s's share of a block of n rows.

    All at once would keep the loads of this block waiting: K-quants streamed at two thirds of the speed. LLVM would put
    them together again but for the fence. They go to the second cache: two tiles of wide rows are more than a first
    cache of 32 kB holds, and a processor waits for fewer lines at once there (Zen 4: 19 GB/s instead of 30). Where the
    first is better, there is other code for it: a branch in the loop cost K-quants on AVX2 a fifth of their speed.
    """
    lines = range(0, n_rows * form.block_bytes, 64)
    for line in lines[s * len(lines) // form.n_steps : (s + 1) * len(lines) // form.n_steps]:
        emit.prefetch(builder, builder.add(ahead, emit.I64(line)), 3 if form.first_cache else 2)
    if form.n_steps > 1:
        emit.fence(builder)


# Rows of weights that meet a single activation row at once: more than 8 do not fit into AVX2's registers.
AT_ONCE, _SUMS = (8, kinds.f32x8) if emit.FORM == "avx2" else (16, kinds.f32x16)

# So many activation rows meet a tile as it is unpacked, without its going through memory. It takes 32 registers.
FEW = 4 if emit.FORM == "avx512vnni" else 1

# Of more rows, those that meet it on its way to memory, from where the others take it.
N_FIRST = 4 if emit.FORM == "avx512vnni" else 0


def _dot_block_of(form: TileForm) -> Any:
    """dot_block(acc, w, stride, x, ahead): acc after all steps of a block of AT_ONCE rows and the activation row at x.

    AVX2 multiplies the rows as they lie; nothing uses the tile's weights then, so they are not made.
    """

    @operation(_SUMS(_SUMS, *[types.int64] * 4))
    def dot_block(
        builder: ir.IRBuilder, acc: ir.Value, w: ir.Value, stride: ir.Value, x: ir.Value, ahead: ir.Value
    ) -> ir.Value:
        rows, steps = emit.rows_of(builder, w, stride, AT_ONCE), iter(range(form.n_steps))

        def step(weights: Vectors, scales: Vectors, minimum: ir.Value | None = None) -> None:
            nonlocal acc
            s = next(steps)
            row = builder.add(x, emit.I64(PANEL_BYTES * s))
            prefetch_step(builder, form, ahead, s, AT_ONCE)
            if emit.FORM == "avx2":
                dots = row_dots(builder, form, rows, s, row)
            else:
                dots = integer_dots(builder, form.integers, prepare(builder, form.integers, weights), [row])[0]
            acc = add_step(builder, acc, dots, scales, minimum, row)

        form.read(builder, form, rows, step)
        return acc

    return dot_block


def _dot_few_of(form: TileForm, n_rows: int) -> Any:
    """dot_few(accs, w, stride, x, ahead): the pack of n_rows sums after all steps of a block of 16 rows."""
    kind = PackType(kinds.f32x16, n_rows)

    @operation(kind(kind, *[types.int64] * 4))
    def dot_few(
        builder: ir.IRBuilder, accs: ir.Value, w: ir.Value, stride: ir.Value, x: ir.Value, ahead: ir.Value
    ) -> ir.Value:
        steps = iter(range(form.n_steps))
        sums = [builder.extract_value(accs, r) for r in range(n_rows)]

        def step(weights: Vectors, scales: Vectors, minimum: ir.Value | None = None) -> None:
            nonlocal x
            prefetch_step(builder, form, ahead, next(steps))
            _add_rows(builder, form, sums, prepare(builder, form.integers, weights), scales, minimum, x)
            x = builder.add(x, emit.I64(n_rows * PANEL_BYTES))

        form.read(builder, form, emit.rows_of(builder, w, stride), step)
        return emit.pack_of(builder, sums)

    return dot_few


def _add_rows(
    builder: ir.IRBuilder, form: TileForm, sums: Vectors, tile: Vectors, scales: Vectors, minimum: ir.Value | None,
    x: ir.Value,
) -> None:  # fmt: skip
    """Adds a step's products with the rows at x to `sums`, one for each."""
    rows = [builder.add(x, emit.I64(PANEL_BYTES * r)) for r in range(len(sums))]
    for r, dots in enumerate(integer_dots(builder, form.integers, tile, rows)):
        sums[r] = add_step(builder, sums[r], dots, scales, minimum, rows[r])


def _unpack_tile_of(form: TileForm, n_rows: int) -> Any:
    """unpack_tile(w, stride, out, x, x_step, sums, ahead): the steps of one block of 16 rows, `step_vectors` vectors
    each, to memory, and their products with n_rows activation rows at x added to the sums, a vector each in memory.

    x_step: bytes from step to step of the panel. Unpacking shuffles and dots multiply: side by side they take as long
    as the longer of them, but a processor does not see far enough ahead to overlap one after the other.
    """

    @operation(types.void(*[types.int64] * 7))
    def unpack_tile(
        builder: ir.IRBuilder, w: ir.Value, stride: ir.Value, out: ir.Value, x: ir.Value, x_step: ir.Value,
        sums: ir.Value, ahead: ir.Value,
    ) -> None:  # fmt: skip
        steps = iter(range(form.n_steps))
        places = [builder.add(sums, emit.I64(64 * r)) for r in range(n_rows)]
        accs = [emit.load(builder, place, emit.V_F32) for place in places]

        def step(weights: Vectors, scales: Vectors, minimum: ir.Value | None = None) -> None:
            nonlocal out, x
            prefetch_step(builder, form, ahead, next(steps))
            tile = prepare(builder, form.integers, weights)
            for v in [*tile, *scales] + ([] if minimum is None else [minimum]):
                emit.store(builder, v, out)
                out = builder.add(out, emit.I64(64))
            _add_rows(builder, form, accs, tile, scales, minimum, x)
            x = builder.add(x, x_step)

        form.read(builder, form, emit.rows_of(builder, w, stride), step)
        for acc, place in zip(accs, places, strict=True):
            emit.store(builder, acc, place)

    return unpack_tile


def _load_step_of(form: TileForm) -> Any:
    """load_step(at): the vectors of a step that `unpack_tile` has written, as a pack."""
    n = form.step_vectors

    @operation(PackType(kinds.i32x16, n)(types.int64))
    def load_step(builder: ir.IRBuilder, at: ir.Value) -> ir.Value:
        return emit.pack_of(builder, [emit.load(builder, at, emit.V_I32, 64 * i) for i in range(n)])

    return load_step


def _dot_rows_of(form: TileForm, n_rows: int) -> Any:
    """dot_rows(step, x, sums): adds a step's products with n rows at x to their sums, a vector each in memory."""

    @operation(types.void(pack, types.int64, types.int64))
    def dot_rows(builder: ir.IRBuilder, step: ir.Value, x: ir.Value, sums: ir.Value) -> None:
        vectors = [builder.extract_value(step, i) for i in range(form.step_vectors)]
        rows = [builder.add(x, emit.I64(PANEL_BYTES * r)) for r in range(n_rows)]
        floats = [builder.bitcast(v, emit.V_F32) for v in vectors[8:]]
        scales = floats[: form.integers.n_groups]
        minimum = floats[-1] if form.has_minimum else None

        def add(dots: list[Vectors], scales: Vectors, minimum: ir.Value | None) -> None:
            for r, row in enumerate(rows):
                acc = emit.load(builder, sums, emit.V_F32, 64 * r)
                acc = add_step(builder, acc, dots[r], scales, minimum, row)
                emit.store(builder, acc, builder.add(sums, emit.I64(64 * r)))

        if emit.FORM == "avx2" and len(scales) == 2:
            for g, scale in enumerate(scales):  # whose dots are out of the registers before the next come
                dots = group_dots(builder, form.integers, vectors[:8], rows, g)
                add([[dot] for dot in dots], [scale], None)
                emit.fence(builder)
        else:
            add(integer_dots(builder, form.integers, vectors[:8], rows), scales, minimum)

    return dot_rows


zeros = zeros_of(_SUMS)

# Names that `specialise` fills in: the templates below see them as globals.
block_bytes: int
step_vectors: int
tile_vectors: int
n_steps: int
n_rows: int
n_first: int
dot_block: Callable[[F32x16, Address, int, Address, Address], F32x16]
dot_few: Callable[[Pack, Address, int, Address, Address], Pack]
unpack_tile: Callable[[Address, int, Address, Address, int, Address, Address], None]
load_step: Callable[[Address], Pack]
dot_four: Callable[[Pack, Address, Address], None]
dot_two: Callable[[Pack, Address, Address], None]
dot_one: Callable[[Pack, Address, Address], None]
few_rows: Callable[..., None]
other_rows: Callable[..., None]


def _one(
    w: Address, stride: int, n_store: int, n_blocks: int, x: Address, n_x: int, out: Address, out_stride: int,
    ahead: Address,
) -> None:  # fmt: skip
    for first in range(0, n_store, AT_ONCE):
        acc, rows = zeros(), w + first * stride
        rows_ahead = ahead + first * stride
        for b in range(n_blocks // n_steps):
            at = rows + b * block_bytes
            acc = dot_block(acc, at, stride, x + b * n_steps * PANEL_BYTES, rows_ahead + b * AT_ONCE * block_bytes)
        store_lanes(out + 4 * first, acc, n_store)


def _few(
    w: Address, stride: int, n_store: int, n_blocks: int, x: Address, n_x: int, out: Address, out_stride: int,
    ahead: Address,
) -> None:  # fmt: skip
    """n_x is n_rows, which the compiler knows: the sums stay in registers, and so do the weights."""
    accs = no_sums(n_rows)
    for b in range(n_blocks // n_steps):
        at, tile_ahead = w + b * block_bytes, ahead + b * 16 * block_bytes
        accs = dot_few(accs, at, stride, x + b * n_steps * n_rows * PANEL_BYTES, tile_ahead)
    sums = scratch(n_rows)
    store_rows(sums, 64, accs)
    for t in range(n_rows):
        store_lanes(out + t * out_stride, load_f32(sums + 64 * t), n_store)


def _many(
    w: Address, stride: int, n_store: int, n_blocks: int, x: Address, n_x: int, out: Address, out_stride: int,
    ahead: Address,
) -> None:  # fmt: skip
    """The sums stay in memory: those of GROUP rows do not fit into registers, and each is touched once a step."""
    sums, tile = scratch(GROUP), scratch(tile_vectors)
    x_step = n_x * PANEL_BYTES
    for t in range(n_x):
        store_f32(sums + 64 * t, splat(ZERO))
        expect_to_write(out + t * out_stride)
    for b in range(n_blocks // n_steps):
        at, panel, tile_ahead = w + b * block_bytes, x + b * n_steps * x_step, ahead + b * 16 * block_bytes
        unpack_tile(at, stride, tile, panel, x_step, sums, tile_ahead)
        for s in range(n_steps):
            weights, rows, t = load_step(tile + 64 * step_vectors * s), panel + s * x_step, n_first
            while t + 4 <= n_x:
                dot_four(weights, rows + PANEL_BYTES * t, sums + 64 * t)
                t += 4
            if t + 2 <= n_x:
                dot_two(weights, rows + PANEL_BYTES * t, sums + 64 * t)
                t += 2
            if t < n_x:
                dot_one(weights, rows + PANEL_BYTES * t, sums + 64 * t)
    for t in range(n_x):
        store_lanes(out + t * out_stride, load_f32(sums + 64 * t), n_store)


def _by_rows(
    w: Address, stride: int, n_store: int, n_blocks: int, x: Address, n_x: int, out: Address, out_stride: int,
    ahead: Address,
) -> None:  # fmt: skip
    if n_x == n_rows:
        few_rows(w, stride, n_store, n_blocks, x, n_x, out, out_stride, ahead)
    else:
        other_rows(w, stride, n_store, n_blocks, x, n_x, out, out_stride, ahead)


def by_rows(name: str, n_rows: int, few_rows: Any, other_rows: Any) -> Any:
    """The kernel that is the first for n_rows activation rows and the second for any other number.

    `name` tells it apart in Numba's cache.
    """
    names = {"n_rows": n_rows, "few_rows": few_rows, "other_rows": other_rows}
    return kernel(specialise(_by_rows, f"by_rows_{n_rows}_{name}", **names))


def form_of(name: str, first_cache: bool) -> TileForm:
    """A format's, with what is asked for going into that cache."""
    form: TileForm = piece(FORMATS[name].tile)
    return replace(form, first_cache=first_cache)


def tile_function(name: str, first_cache: bool) -> Any:
    """The compiled kernel of a format, for 1 to GROUP activation rows."""
    form = form_of(name, first_cache)
    name += "_first" * first_cache
    names = {
        "block_bytes": form.block_bytes,
        "n_steps": form.n_steps,
        "step_vectors": form.step_vectors,
        "tile_vectors": form.n_steps * form.step_vectors,
        "dot_block": _dot_block_of(form),
        "n_first": N_FIRST,
        "unpack_tile": _unpack_tile_of(form, N_FIRST),
        "load_step": _load_step_of(form),
        "dot_four": _dot_rows_of(form, 4),
        "dot_two": _dot_rows_of(form, 2),
        "dot_one": _dot_rows_of(form, 1),
    }
    rows = far()(specialise(_many, f"many_rows_{name}_int8", **names))
    for n in range(2, FEW + 1):
        few = names | {"n_rows": n, "dot_few": _dot_few_of(form, n)}
        rows = by_rows(f"{name}_int8", n, far()(specialise(_few, f"rows_{n}_{name}", **few)), rows)
    one_row = kernel(specialise(_one, f"one_row_{name}_int8", **names))
    return by_rows(f"{name}_int8", 1, one_row, rows)
