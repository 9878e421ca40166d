"""The tile kernel for many rows where the processor multiplies matrices of bytes (AMX). Sees addresses.

Contract and order of the sums: dot.py. One instruction multiplies 16 activation rows of 32 bytes, as they lie in the
panel, with a step's 8 vectors, as they are unpacked: row t of what it makes are the exact integer dots of activation
row t with the 16 weight rows. They go through memory, since nothing else takes them out of the matrix registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from m2lite.formats.kernels.tile import TileForm
from m2lite.kernels import integer_tiles
from m2lite.kernels.dots import GROUP, PANEL_BYTES, signed
from m2lite.kernels.integer_tiles import add_step, prefetch_step
from m2lite.simd import emit
from m2lite.simd.emit import Vectors
from m2lite.simd.jit import kernel, specialise
from m2lite.simd.kinds import Address, Pack, address, pack, void
from m2lite.simd.memory import expect_to_write, load_f32, scratch, store_f32, store_lanes
from m2lite.simd.packs import load_rows, store_rows
from m2lite.simd.vectors import operation, splat

ZERO = np.float32(0)
LEAST_ROWS = {1: 10, 2: 32}  # per groups of weights in a step: with fewer, the other forms are as fast
MOST_ROWS = 2 * GROUP  # of activations that share one pass over a tile
STEPS = 8  # that are unpacked, multiplied and added at a time: their sums must stay in half of a first cache
AT_ONCE = 8  # rows whose sums are in registers
_SUMS_BYTES = 16 * 64  # of 16 activation rows with 16 weight rows

# Matrix registers, by number: sums and activations of 16 rows, weights, sums and activations of the last few rows.
_SUMS, _X, _W, _LAST_SUMS, _LAST_X = range(5)


def _instruction(builder: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    emit.call_llvm(builder, f"llvm.x86.{name}", ir.VoidType(), list(args))


def _move(builder: ir.IRBuilder, name: str, register: int, address: ir.Value, stride: ir.Value) -> None:
    _instruction(builder, name, emit.I8(register), builder.inttoptr(address, emit.I8.as_pointer()), stride)


def _configure_of(n_groups: int) -> Any:
    """configure(room, n_last): the shapes of this thread's matrix registers; room: 64 bytes of memory.

    A group of weights is 32 or 16 bytes of an activation row. A shape without rows is refused.
    """
    width = 32 // n_groups
    shapes = {_SUMS: (16, 64), _X: (16, width), _W: (width // 4, 64), _LAST_SUMS: (0, 64), _LAST_X: (0, width)}
    config = [1] + [0] * 63
    for register, (n_rows, n_bytes) in shapes.items():
        config[16 + 2 * register], config[48 + register] = n_bytes, n_rows

    @operation(types.void(types.int64, types.int64))
    def configure(builder: ir.IRBuilder, room: ir.Value, n_last: ir.Value) -> None:
        bytes_ = ir.Constant(ir.VectorType(emit.I8, 64), config)
        is_none = builder.icmp_signed("==", n_last, emit.I64(0))
        n_rows = builder.trunc(builder.select(is_none, emit.I64(1), n_last), emit.I8)
        for register in (_LAST_SUMS, _LAST_X):
            bytes_ = builder.insert_element(bytes_, n_rows, emit.I32(48 + register))
        emit.store(builder, bytes_, room)
        _instruction(builder, "ldtilecfg", builder.inttoptr(room, emit.I8.as_pointer()))

    return configure


@operation(types.void())
def release(builder: ir.IRBuilder) -> None:
    """The matrix registers are empty again: the system keeps nothing of them when it switches threads."""
    _instruction(builder, "tilerelease")


def _multiply_of(form: TileForm, sums: int, activations: int) -> Any:
    """multiply(w, x, out): the dots of a step's weights at w with activation rows at x, group after group."""
    n_groups = form.integers.n_groups

    @operation(types.void(*[types.int64] * 3))
    def multiply(builder: ir.IRBuilder, w: ir.Value, x: ir.Value, out: ir.Value) -> None:
        for g in range(n_groups):
            rows = builder.add(x, emit.I64(32 // n_groups * g))
            _move(builder, "tileloadd64", _W, builder.add(w, emit.I64(512 // n_groups * g)), emit.I64(64))
            _move(builder, "tileloadd64", activations, rows, emit.I64(PANEL_BYTES))
            _instruction(builder, "tilezero", emit.I8(sums))
            _instruction(builder, "tdpbssd", *map(emit.I8, (sums, activations, _W)))
            _move(builder, "tilestored64", sums, builder.add(out, emit.I64(_SUMS_BYTES * g)), emit.I64(64))

    return multiply


@operation(void(address))
def ask(builder: ir.IRBuilder, x: ir.Value) -> None:
    """Brings AT_ONCE activation rows at x into the first cache."""
    for line in range(0, AT_ONCE * PANEL_BYTES, 64):
        emit.prefetch(builder, builder.add(x, emit.I64(line)))


@kernel
def place(x: Address, first: int, t: int, n_blocks: int, n_x: int) -> tuple[Address, int]:
    """(address of block `first` of row t in the panel at x, bytes from block to block there)."""
    group = t // GROUP * GROUP
    size = min(GROUP, n_x - group)
    return x + (group * n_blocks + first * size + t - group) * PANEL_BYTES, size * PANEL_BYTES


def _unpack_of(form: TileForm) -> Any:
    """unpack(w, stride, out, ahead): the steps of one block of 16 rows, `step_vectors` vectors each, to memory."""

    @operation(types.void(*[types.int64] * 4))
    def unpack(builder: ir.IRBuilder, w: ir.Value, stride: ir.Value, out: ir.Value, ahead: ir.Value) -> None:
        steps = iter(range(form.n_steps))

        def step(weights: Vectors, scales: Vectors, minimum: ir.Value | None = None) -> None:
            nonlocal out
            prefetch_step(builder, form, ahead, next(steps))
            for v in [*signed(builder, form.integers, weights), *scales] + ([] if minimum is None else [minimum]):
                emit.store(builder, v, out)
                out = builder.add(out, emit.I64(64))

        form.read(builder, form, emit.rows_of(builder, w, stride), step)

    return unpack


def _add_of(form: TileForm) -> Any:
    """add(accs, step, dots, x): the pack of sums after a step, whose dots with the rows at x are in memory."""
    n_groups = form.integers.n_groups

    @operation(pack(pack, types.int64, types.int64, types.int64))
    def add(builder: ir.IRBuilder, accs: ir.Value, step: ir.Value, dots: ir.Value, x: ir.Value) -> ir.Value:
        floats = [emit.load(builder, step, emit.V_F32, 64 * i) for i in range(8, form.step_vectors)]
        scales, minimum = floats[:n_groups], floats[-1] if form.has_minimum else None
        out = []
        for r in range(accs.type.count):
            found = [emit.load(builder, dots, emit.V_I32, _SUMS_BYTES * g + 64 * r) for g in range(n_groups)]
            row = builder.add(x, emit.I64(PANEL_BYTES * r))
            out.append(add_step(builder, builder.extract_value(accs, r), found, scales, minimum, row))
        return emit.pack_of(builder, out)

    return add


# Names that `specialise` fills in: the templates below see them as globals.
block_bytes: int
step_bytes: int
dots_bytes: int
tile_vectors: int
dots_vectors: int
n_steps: int
least_rows: int
configure: Callable[[Address, int], None]
unpack: Callable[[Address, int, Address, Address], None]
multiply: Callable[[Address, Address, Address], None]
multiply_last: Callable[[Address, Address, Address], None]
add: Callable[[Pack, Address, Address, Address], Pack]
few_rows: Callable[..., None]
many_rows: Callable[..., None]


def _rows(
    w: Address, stride: int, n_store: int, n_blocks: int, x: Address, n_x: int, out: Address, out_stride: int,
    ahead: Address,
) -> None:  # fmt: skip
    """n_x is at most MOST_ROWS: groups of GROUP, each of them some times 16."""
    sums, dots, steps = scratch(MOST_ROWS), scratch(dots_vectors), scratch(tile_vectors)
    n_last = n_x % 16
    for t in range(n_x):
        store_f32(sums + 64 * t, splat(ZERO))
        expect_to_write(out + t * out_stride)
    configure(dots, n_last)
    for first in range(0, n_blocks, STEPS):
        n = min(STEPS, n_blocks - first)
        for s in range(0, n, n_steps):
            at = (first + s) // n_steps * block_bytes
            unpack(w + at, stride, steps + step_bytes * s, ahead + 16 * at)
        for t in range(0, n_x, 16):
            rows, x_step = place(x, first, t, n_blocks, n_x)
            next_first, next_t = (first, t + 16) if t + 16 < n_x else (first + STEPS, 0)
            next_rows, next_step = place(x, next_first, next_t, n_blocks, n_x)
            n_now = min(16, n_x - t)
            for s in range(n):
                step, found, at = steps + step_bytes * s, dots + dots_bytes * s, rows + s * x_step
                if n_now == 16:
                    multiply(step, at, found)
                else:
                    multiply_last(step, at, found)
            n_together = n_now // AT_ONCE * AT_ONCE
            for r in range(0, n_together, AT_ONCE):
                accs = load_rows(AT_ONCE, sums + 64 * (t + r), 64)
                for s in range(n):
                    found, at = dots + dots_bytes * s + 64 * r, rows + s * x_step + r * PANEL_BYTES
                    ask(next_rows + s * next_step + r * PANEL_BYTES)
                    accs = add(accs, steps + step_bytes * s, found, at)
                store_rows(sums + 64 * (t + r), 64, accs)
            for r in range(n_together, n_now):
                acc = load_rows(1, sums + 64 * (t + r), 64)
                for s in range(n):
                    found, at = dots + dots_bytes * s + 64 * r, rows + s * x_step + r * PANEL_BYTES
                    acc = add(acc, steps + step_bytes * s, found, at)
                store_rows(sums + 64 * (t + r), 64, acc)
    release()
    for t in range(n_x):
        store_lanes(out + t * out_stride, load_f32(sums + 64 * t), n_store)


def rows_function(name: str, first_cache: bool) -> Any:
    """The compiled kernel of a format on matrix registers, for 1 to MOST_ROWS activation rows."""
    form = integer_tiles.form_of(name, first_cache)
    n_groups = form.integers.n_groups
    names = {
        "block_bytes": form.block_bytes,
        "n_steps": form.n_steps,
        "step_bytes": 64 * form.step_vectors,
        "dots_bytes": _SUMS_BYTES * n_groups,
        "tile_vectors": STEPS * form.step_vectors,
        "dots_vectors": STEPS * n_groups * 16,
        "configure": _configure_of(n_groups),
        "unpack": _unpack_of(form),
        "multiply": _multiply_of(form, _SUMS, _X),
        "multiply_last": _multiply_of(form, _LAST_SUMS, _LAST_X),
        "add": _add_of(form),
    }
    return kernel(specialise(_rows, f"amx_rows_{name}{'_first' * first_cache}", **names))


def _by_rows(
    w: Address, stride: int, n_store: int, n_blocks: int, x: Address, n_x: int, out: Address, out_stride: int,
    ahead: Address,
) -> None:  # fmt: skip
    if n_x < least_rows:
        few_rows(w, stride, n_store, n_blocks, x, n_x, out, out_stride, ahead)
    else:
        many_rows(w, stride, n_store, n_blocks, x, n_x, out, out_stride, ahead)


def tile_function(name: str, first_cache: bool) -> Any:
    """The compiled kernel of a format, for 1 to MOST_ROWS activation rows; few do without matrix registers."""
    few, many = integer_tiles.tile_function(name, first_cache), rows_function(name, first_cache)
    least = LEAST_ROWS[integer_tiles.form_of(name, first_cache).integers.n_groups]
    names = {"least_rows": least, "few_rows": few, "many_rows": many}
    return kernel(specialise(_by_rows, f"amx_by_rows_{name}{'_first' * first_cache}", **names))
