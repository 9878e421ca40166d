"""Tile kernels: per block format, 16 weight rows times n activation rows. Sees addresses; knows blocks, no tensor.

A tile kernel is called by address (`simd.call_tile`) with

    tile(w, stride, n_store, n_blocks, x, n_x, out, out_stride)

    out[t, r] = sum over blocks b of  w[r, b] . x[t, b]      r < 16, t < n_x

w: address of row 0; stride: bytes from row to row (0 with n_store = 1 computes one row alone); n_store: 16 or 1;
n_blocks: steps of 32 weights per row; out is float32, out_stride in bytes. x is an activation panel:

  int8     48 bytes per row and block: 32 int8, their float32 scale, and sums of them (dots.PANEL)
  float32  128 bytes per row and block: 32 float32

A panel holds its rows in groups of up to 32 (only the last one is smaller); a group of T rows is laid out
[block][T][bytes], so that a block's weights are unpacked once for the T rows. A group that begins with row t begins at
t * n_blocks * bytes: a panel of one row is simply the row.

A format without a tile of integers runs on float32 panels: "fast" is a format with one, the others are "generic".

Order of the sum, the same for every group size, tile and vector width:
  int8     per block of 32, in block order: one fma per scale of the weights (one, or two of 16 weights each),
           acc = fma(f32(exact integer dot), w scale * x scale, acc), and where the format has a minimum one more,
           acc = fma(minimum, -(x scale * sum of the int8), acc)
  float32  16 virtual lanes, lane i takes weights i, i+16, i+32, ... one fma each; then a fixed tree over the lanes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from m2lite.kernels import FAST_FORMATS, emit, simd
from m2lite.kernels import unpack as loops
from m2lite.kernels.dots import PANEL, Vectors, integer_dots, prepare
from m2lite.kernels.jit import address_of, kernel, specialise
from m2lite.kernels.packs import PackType, pack_get
from m2lite.kernels.row_dots import ROW_FORMS, row_dots
from m2lite.kernels.simd import (
    fma,
    load_f32,
    scratch,
    splat,
    store_f32,
    store_lanes,
    tree_sum,
    write_f32,
    zeros_of,
)
from m2lite.kernels.tiles import TILES, TileForm
from m2lite.storage.blocks import FORMATS

ZERO = np.float32(0)
BLOCK = 32  # weights per step of every tile kernel
PANEL_BYTES = PANEL.BYTES

STEP_BYTES = {"int8": PANEL.BYTES, "float32": 128}  # of an activation panel, per row and block
GROUP = 32  # rows of a panel that share one pass over a tile


def panel_bytes(kind: str, n_rows: int, n: int) -> int:
    """Bytes of a panel of n_rows rows of n values."""
    return n_rows * (n // BLOCK) * STEP_BYTES[kind]


# --- weights to float32 -------------------------------------------------------------------------------------------


def _scale_of(builder: ir.IRBuilder, w: ir.Value) -> ir.Value:
    half = emit.splat(builder, emit.load(builder, w, emit.I16))
    return emit.half_to_f32(builder, half)


def _bytes_to_f32(builder: ir.IRBuilder, v: ir.Value, offset: int) -> ir.Value:
    """16 unsigned bytes minus `offset`, as float32."""
    wide = builder.sub(builder.zext(v, emit.V_I32), emit.const(offset))
    return builder.sitofp(wide, emit.V_F32)


def _q4_0_unpack(builder: ir.IRBuilder, w: ir.Value) -> Vectors:
    raw = emit.load(builder, w, ir.VectorType(emit.I8, 16), 2)
    low = builder.and_(raw, emit.const(15, 16, emit.I8))
    high = builder.lshr(raw, emit.const(4, 16, emit.I8))
    scale = _scale_of(builder, w)
    return [builder.fmul(_bytes_to_f32(builder, v, 8), scale) for v in (low, high)]


def _q8_0_unpack(builder: ir.IRBuilder, w: ir.Value) -> Vectors:
    scale = _scale_of(builder, w)
    raw = [emit.load(builder, w, ir.VectorType(emit.I8, 16), o) for o in (2, 18)]
    return [builder.fmul(builder.sitofp(builder.sext(v, emit.V_I32), emit.V_F32), scale) for v in raw]


def _f32_unpack(builder: ir.IRBuilder, w: ir.Value) -> Vectors:
    return [emit.load(builder, w, emit.V_F32, o) for o in (0, 64)]


def _f16_unpack(builder: ir.IRBuilder, w: ir.Value) -> Vectors:
    return [emit.half_to_f32(builder, emit.load(builder, w, emit.V_I16, o)) for o in (0, 32)]


def _bf16_unpack(builder: ir.IRBuilder, w: ir.Value) -> Vectors:
    raw = [builder.zext(emit.load(builder, w, emit.V_I16, o), emit.V_I32) for o in (0, 32)]
    return [builder.bitcast(builder.shl(v, emit.const(16)), emit.V_F32) for v in raw]


@dataclass(frozen=True)
class WeightForm:
    """How kernels turn one block format into float32.

    `unpack` brings a step of 32 weights into registers; without it, kernels/unpack.py writes a whole block to scratch.
    """

    step_bytes: int
    unpack: Callable[[ir.IRBuilder, ir.Value], Vectors] | None = None
    step: int = BLOCK  # weights


WEIGHTS = {
    "Q4_0": WeightForm(18, _q4_0_unpack),
    "Q8_0": WeightForm(34, _q8_0_unpack),
    "F16": WeightForm(64, _f16_unpack),
    "BF16": WeightForm(64, _bf16_unpack),
    "F32": WeightForm(128, _f32_unpack),
} | {name: WeightForm(FORMATS[name].n_bytes, step=FORMATS[name].n_weights) for name in loops.NAMES}


assert TILES.keys() == FAST_FORMATS


# --- tile kernels, built from the tables ---------------------------------------------------------------------------


def _add_step(
    builder: ir.IRBuilder, acc: ir.Value, dots: Vectors, scales: Vectors, minimum: ir.Value | None, row: ir.Value
) -> ir.Value:
    """acc after one fma per group, and one for the minimum."""
    n = acc.type.count
    x_scale = emit.splat(builder, emit.load(builder, row, emit.F32, PANEL.SCALE), n)
    for dot, scale in zip(dots, scales, strict=True):
        acc = emit.fma_values(builder, builder.sitofp(dot, acc.type), builder.fmul(scale, x_scale), acc)
    if minimum is not None:
        scaled_sum = emit.splat(builder, emit.load(builder, row, emit.F32, PANEL.SCALED_SUM), n)
        acc = emit.fma_values(builder, minimum, scaled_sum, acc)
    return acc


def _prefetch_step(builder: ir.IRBuilder, form: TileForm, ahead: ir.Value, s: int, n_rows: int = 16) -> None:
    """The lines from `ahead` on that are step s's share of a block of n rows.

    All at once would keep the loads of this block waiting: K-quants streamed at two thirds of the speed. LLVM would put
    them together again but for the fence. They go to the second cache: two tiles of wide rows are more than a first
    cache of 32 kB holds, and a processor waits for fewer lines at once there (Zen 4: 19 GB/s instead of 30).
    """
    lines = range(0, n_rows * form.block_bytes, 64)
    for line in lines[s * len(lines) // form.n_steps : (s + 1) * len(lines) // form.n_steps]:
        emit.prefetch(builder, builder.add(ahead, emit.I64(line)), 2)
    if form.n_steps > 1:
        emit.fence(builder)


AHEAD = 32  # rows: the tile after the next; of short rows (`ffn_down_exps`) one tile is read before it has come

# Rows of weights that meet a single activation row at once: more than 8 do not fit into AVX2's registers.
AT_ONCE, _SUMS = (8, simd.f32x8) if emit.FORM == "avx2" else (16, simd.f32x16)

# Of several activation rows, those that meet a tile while it is unpacked. It takes 32 registers: with 16 it costs 10 to
# 40 % instead.
FOUR_AT_FIRST, TWO_AT_FIRST = (4, 2) if emit.FORM == "avx512vnni" else (0, 0)


def _dot_block_of(form: TileForm) -> Any:
    """dot_block(acc, w, stride, x, ahead): acc after all steps of a block of AT_ONCE rows and the activation row at x.

    AVX2 multiplies the rows as they lie; nothing uses the tile's weights then, so they are not made.
    """

    @intrinsic
    def dot_block(typingctx: Any, acc: Any, w: Any, stride: Any, x: Any, ahead: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            acc_value, w_value, stride_value, x_value, ahead_value = args
            rows, steps = emit.rows_of(builder, w_value, stride_value, AT_ONCE), iter(range(form.n_steps))

            def step(weights: Vectors, scales: Vectors, minimum: ir.Value | None = None) -> None:
                nonlocal acc_value
                s = next(steps)
                row = builder.add(x_value, emit.I64(PANEL.BYTES * s))
                _prefetch_step(builder, form, ahead_value, s, AT_ONCE)
                if emit.FORM == "avx2":
                    dots = row_dots(builder, form.integers, ROW_FORMS[form.name], rows, s, row)
                else:
                    dots = integer_dots(builder, form.integers, prepare(builder, form.integers, weights), [row])[0]
                acc_value = _add_step(builder, acc_value, dots, scales, minimum, row)

            form.read(builder, rows, step)
            return acc_value

        return _SUMS(_SUMS, *[types.int64] * 4), codegen

    return dot_block


def _unpack_tile_of(form: TileForm, n_rows: int) -> Any:
    """unpack_tile(w, stride, out, x, x_step, sums, ahead): the steps of one block of 16 rows, `step_vectors` vectors
    each, to memory, and their products with n_rows activation rows at x added to the sums, a vector each in memory.

    x_step: bytes from step to step of the panel. Unpacking shuffles and dots multiply: side by side they take as long
    as the longer of them, but a processor does not see far enough ahead to overlap one after the other.
    """

    @intrinsic
    def unpack_tile(typingctx: Any, w: Any, stride: Any, out: Any, x: Any, x_step: Any, sums: Any, ahead: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            w_value, stride_value, at, x_value, x_step_value, sums_value, ahead_value = args
            steps = iter(range(form.n_steps))
            places = [builder.add(sums_value, emit.I64(64 * r)) for r in range(n_rows)]
            accs = [emit.load(builder, place, emit.V_F32) for place in places]

            def step(weights: Vectors, scales: Vectors, minimum: ir.Value | None = None) -> None:
                nonlocal at, x_value
                _prefetch_step(builder, form, ahead_value, next(steps))
                tile = prepare(builder, form.integers, weights)
                for v in [*tile, *scales] + ([] if minimum is None else [minimum]):
                    emit.store(builder, v, at)
                    at = builder.add(at, emit.I64(64))
                rows = [builder.add(x_value, emit.I64(PANEL.BYTES * r)) for r in range(n_rows)]
                for r, dots in enumerate(integer_dots(builder, form.integers, tile, rows)):
                    accs[r] = _add_step(builder, accs[r], dots, scales, minimum, rows[r])
                x_value = builder.add(x_value, x_step_value)

            form.read(builder, emit.rows_of(builder, w_value, stride_value), step)
            for acc, place in zip(accs, places, strict=True):
                emit.store(builder, acc, place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return unpack_tile


def _load_step_of(form: TileForm) -> Any:
    """load_step(at): the vectors of a step that `unpack_tile` has written, as a pack."""
    kind = PackType(simd.i32x16, form.step_vectors)

    @intrinsic
    def load_step(typingctx: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit.pack_of(builder, [emit.load(builder, args[0], emit.V_I32, 64 * i) for i in range(kind.n)])

        return kind(types.int64), codegen

    return load_step


def _dot_rows_of(form: TileForm, n_rows: int) -> Any:
    """dot_rows(step, x, sums): adds a step's products with n rows at x to their sums, a vector each in memory."""

    @intrinsic
    def dot_rows(typingctx: Any, step: Any, x: Any, sums: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            step_value, x_value, sums_value = args
            vectors = [builder.extract_value(step_value, i) for i in range(form.step_vectors)]
            rows = [builder.add(x_value, emit.I64(PANEL.BYTES * r)) for r in range(n_rows)]
            dots = integer_dots(builder, form.integers, vectors[:8], rows)
            floats = [builder.bitcast(v, emit.V_F32) for v in vectors[8:]]
            scales = floats[: form.integers.n_groups]
            minimum = floats[-1] if form.has_minimum else None
            for r, row in enumerate(rows):
                acc = emit.load(builder, sums_value, emit.V_F32, 64 * r)
                acc = _add_step(builder, acc, dots[r], scales, minimum, row)
                emit.store(builder, acc, builder.add(sums_value, emit.I64(64 * r)))
            return context.get_dummy_value()

        return types.void(step, types.int64, types.int64), codegen

    return dot_rows


def unpack_of(name: str) -> Any:
    """unpack(w) -> a pack of 2 vectors: 32 weights at address w as float32."""
    form = WEIGHTS[name]

    @intrinsic
    def unpack(typingctx: Any, w: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            assert form.unpack is not None
            return emit.pack_of(builder, form.unpack(builder, args[0]))

        return PackType(simd.f32x16, 2)(types.int64), codegen

    return unpack


zeros = zeros_of(_SUMS)

# Names that `specialise` fills in: the templates below see them as globals.
step_bytes = block_bytes = step_vectors = tile_vectors = 0
n_steps = 1
dot_block: Any = None
unpack_with_four: Any = None
unpack_with_two: Any = None
load_step: Any = None
dot_four: Any = None
dot_two: Any = None
dot_one: Any = None
unpack: Any = None
one_row: Any = None
many_rows: Any = None
unpack_block: Any = None
x_bytes = 0
step = 32
n_vectors = 2


def _int8_one(w, stride, n_store, n_blocks, x, n_x, out, out_stride):
    for first in range(0, n_store, AT_ONCE):
        acc, rows = zeros(), w + first * stride
        ahead = rows + AHEAD * stride
        for b in range(n_blocks // n_steps):
            at = rows + b * block_bytes
            acc = dot_block(acc, at, stride, x + b * n_steps * PANEL_BYTES, ahead + b * AT_ONCE * block_bytes)
        store_lanes(out + 4 * first, acc, n_store)


def _int8_many(w, stride, n_store, n_blocks, x, n_x, out, out_stride):
    """The sums stay in memory: those of 32 rows do not fit into registers, and each is touched once a step."""
    sums, tile, ahead = scratch(GROUP), scratch(tile_vectors), w + AHEAD * stride
    x_step, first = n_x * PANEL_BYTES, FOUR_AT_FIRST if n_x >= 4 else TWO_AT_FIRST
    for t in range(n_x):
        store_f32(sums + 64 * t, splat(ZERO))
    for b in range(n_blocks // n_steps):
        at, panel, tile_ahead = w + b * block_bytes, x + b * n_steps * x_step, ahead + b * 16 * block_bytes
        if FOUR_AT_FIRST and n_x >= 4:
            unpack_with_four(at, stride, tile, panel, x_step, sums, tile_ahead)
        else:
            unpack_with_two(at, stride, tile, panel, x_step, sums, tile_ahead)
        if n_x == first:
            continue
        for s in range(n_steps):
            weights, rows, t = load_step(tile + 64 * step_vectors * s), panel + s * x_step, first
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


def _float32_one(w, stride, n_store, n_blocks, x, n_x, out, out_stride):
    for r in range(n_store):
        acc = splat(ZERO)
        for b in range(n_blocks):
            values = unpack(w + r * stride + b * step_bytes)
            acc = fma(pack_get(values, 0), load_f32(x + b * 128), acc)
            acc = fma(pack_get(values, 1), load_f32(x + b * 128 + 64), acc)
        write_f32(out + 4 * r, tree_sum(acc))


def _float32_many(w, stride, n_store, n_blocks, x, n_x, out, out_stride):
    sums = scratch(GROUP)
    for r in range(n_store):
        for t in range(n_x):
            store_f32(sums + 64 * t, splat(ZERO))
        for b in range(n_blocks):
            values = unpack(w + r * stride + b * step_bytes)
            for t in range(n_x):
                at = x + (b * n_x + t) * 128
                acc = fma(pack_get(values, 0), load_f32(at), load_f32(sums + 64 * t))
                store_f32(sums + 64 * t, fma(pack_get(values, 1), load_f32(at + 64), acc))
        for t in range(n_x):
            write_f32(out + t * out_stride + 4 * r, tree_sum(load_f32(sums + 64 * t)))


def _blocks_one(w, stride, n_store, n_blocks, x, n_x, out, out_stride):
    """As _float32_one; a step is a block of the format, which goes through scratch."""
    values = scratch(n_vectors)
    for r in range(n_store):
        acc = splat(ZERO)
        for s in range(n_blocks * 32 // step):
            unpack_block(w + r * stride + s * step_bytes, values)
            for i in range(n_vectors):
                acc = fma(load_f32(values + 64 * i), load_f32(x + (s * n_vectors + i) * 64), acc)
        write_f32(out + 4 * r, tree_sum(acc))


def _blocks_many(w, stride, n_store, n_blocks, x, n_x, out, out_stride):
    """As _float32_many: a block is unpacked once for the n_x rows of a group."""
    values, sums = scratch(n_vectors), scratch(GROUP)
    for r in range(n_store):
        for t in range(n_x):
            store_f32(sums + 64 * t, splat(ZERO))
        for s in range(n_blocks * 32 // step):
            unpack_block(w + r * stride + s * step_bytes, values)
            for t in range(n_x):
                acc, at = load_f32(sums + 64 * t), x + (s * (n_vectors // 2) * n_x + t) * 128
                for i in range(n_vectors // 2):
                    acc = fma(load_f32(values + 128 * i), load_f32(at + 128 * n_x * i), acc)
                    acc = fma(load_f32(values + 128 * i + 64), load_f32(at + 128 * n_x * i + 64), acc)
                store_f32(sums + 64 * t, acc)
        for t in range(n_x):
            write_f32(out + t * out_stride + 4 * r, tree_sum(load_f32(sums + 64 * t)))


def _tile(w, stride, n_store, n_blocks, x, n_x, out, out_stride):
    for t in range(0, n_x, GROUP):
        group, rows = x + t * n_blocks * x_bytes, min(GROUP, n_x - t)
        if rows == 1:
            one_row(w, stride, n_store, n_blocks, group, rows, out + t * out_stride, out_stride)
        else:
            many_rows(w, stride, n_store, n_blocks, group, rows, out + t * out_stride, out_stride)


def _unpack_row(w, n_blocks, out):
    for b in range(n_blocks):
        values = unpack(w + b * step_bytes)
        store_f32(out + b * 128, pack_get(values, 0))
        store_f32(out + b * 128 + 64, pack_get(values, 1))


def _unpack_row_of_blocks(w, n_blocks, out):
    for s in range(n_blocks * 32 // step):
        unpack_block(w + s * step_bytes, out + 4 * s * step)


def _names_of_blocks(name: str) -> dict[str, Any]:
    """What the templates with `unpack_block` see."""
    form = WEIGHTS[name]
    names = {"step_bytes": form.step_bytes, "step": form.step, "n_vectors": form.step // 16}
    return names | {"unpack_block": loops.block_function(name)}


def _names_of_integers(form: TileForm) -> dict[str, Any]:
    """What the templates of integer tiles see."""
    return {
        "block_bytes": form.block_bytes,
        "n_steps": form.n_steps,
        "step_vectors": form.step_vectors,
        "tile_vectors": form.n_steps * form.step_vectors,
        "dot_block": _dot_block_of(form),
        "unpack_with_four": _unpack_tile_of(form, FOUR_AT_FIRST),
        "unpack_with_two": _unpack_tile_of(form, TWO_AT_FIRST),
        "load_step": _load_step_of(form),
        "dot_four": _dot_rows_of(form, 4),
        "dot_two": _dot_rows_of(form, 2),
        "dot_one": _dot_rows_of(form, 1),
    }


def _tile_function(name: str, kind: str) -> Any:
    """The tile kernel of one format and kind of activations."""
    form = WEIGHTS[name]
    names: dict[str, Any] = {"step_bytes": form.step_bytes}
    if kind == "int8":
        names = _names_of_integers(TILES[name])
        one, many = _int8_one, _int8_many
    elif form.unpack is not None:
        names |= {"unpack": unpack_of(name)}
        one, many = _float32_one, _float32_many
    else:
        names |= _names_of_blocks(name)
        one, many = _blocks_one, _blocks_many
    inner = {
        "one_row": kernel(specialise(one, f"one_row_{name}_{kind}", **names)),
        "many_rows": kernel(specialise(many, f"many_rows_{name}_{kind}", **names)),
    }
    return specialise(_tile, f"tile_{name}_{kind}", x_bytes=STEP_BYTES[kind], **inner)


def activation_kind(name: str, generic: bool = False) -> str:
    """ "int8" where the format has an integer tile, else "float32"; `generic` forces float32."""
    return "int8" if name in FAST_FORMATS and not generic else "float32"


@cache
def tile_address(name: str, kind: str) -> int:
    """Compile the tile kernel of format `name` for activations of `kind` and return its address."""
    return address_of(_tile_function(name, kind), types.void(*([types.int64] * 8)))


@cache
def unpack_address(name: str) -> int:
    """Compile unpack_row(w, n_blocks, out): one row of weights to float32, and return its address."""
    form = WEIGHTS[name]
    if form.unpack is None:
        template, names = _unpack_row_of_blocks, _names_of_blocks(name)
    else:
        template, names = _unpack_row, {"unpack": unpack_of(name), "step_bytes": form.step_bytes}
    return address_of(specialise(template, f"unpack_{name}", **names), types.void(*([types.int64] * 3)))
