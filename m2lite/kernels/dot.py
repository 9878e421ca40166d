"""Tile kernels: per block format, 16 weight rows times n activation rows. Sees addresses; knows blocks, no tensor.

A tile kernel is called by address (`matmul.call_tile`) with

    tile(w, stride, n_store, n_blocks, x, n_x, out, out_stride, ahead)

    out[t, r] = sum over blocks b of  w[r, b] . x[t, b]      r < 16, t < n_x

w: address of row 0; stride: bytes from row to row (0 with n_store = 1 computes one row alone); n_store: 16 or 1;
n_blocks: steps of 32 weights per row; out is float32, out_stride in bytes; ahead: what will be read soon, as many bytes
as the 16 rows are: they are asked for, never touched. x is an activation panel:

  int8     48 bytes per row and block: 32 int8, their float32 scale, and sums of them (dots.SUM_AT)
  float32  128 bytes per row and block: 32 float32

A panel holds its rows in groups of up to 64 (only the last one is smaller); a group of T rows is laid out
[block][T][bytes], so that a block's weights are unpacked once for the T rows. A group that begins with row t begins at
t * n_blocks * bytes: a panel of one row is simply the row.

A format whose row has no tile of integers runs on float32 panels: "fast" is a format with one, the others are
"generic".

Order of the sum, the same for every group size, tile and vector width:
  int8     per block of 32, in block order: one fma per scale of the weights (one, or two of 16 weights each),
           acc = fma(f32(exact integer dot), w scale * x scale, acc), and where the format has a minimum one more,
           acc = fma(minimum, -(x scale * sum of the int8), acc)
  float32  16 virtual lanes, lane i takes weights i, i+16, i+32, ... one fma each; then a fixed tree over the lanes
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from m2lite.formats.table import FORMATS, piece
from m2lite.kernels import amx, amx_tiles
from m2lite.kernels.dots import GROUP, PANEL_BYTES
from m2lite.kernels.integer_tiles import by_rows, tile_function
from m2lite.simd import emit, kinds
from m2lite.simd.emit import Vectors
from m2lite.simd.jit import address_of, kernel, specialise
from m2lite.simd.kinds import Address, Pack, PackType, pack
from m2lite.simd.memory import load_f32, scratch, store_f32, write_f32
from m2lite.simd.packs import store_rows
from m2lite.simd.packs import zeros as no_sums
from m2lite.simd.tuning import VALUES
from m2lite.simd.vectors import fma, operation, splat, tree_sum

ZERO = np.float32(0)
BLOCK = 32  # weights per step of every tile kernel

STEP_BYTES = {"int8": PANEL_BYTES, "float32": 128}  # of an activation panel, per row and block


def panel_bytes(kind: str, n_rows: int, n: int) -> int:
    """Bytes of a panel of n_rows rows of n values."""
    return n_rows * (n // BLOCK) * STEP_BYTES[kind]


# --- tile kernels, built from the tables ---------------------------------------------------------------------------


def _floats_of(name: str) -> Callable[[ir.IRBuilder, ir.Value], Vectors]:
    """What brings 32 weights of a float format into registers."""
    fmt = FORMATS[name]
    load = piece(fmt.unpacker)
    return lambda builder, w: [load(builder, w, offset) for offset in (0, 16 * fmt.n_bytes)]


def unpack_of(name: str) -> Any:
    """unpack(w) -> a pack of 2 vectors: 32 weights at address w as float32."""
    signature, load = PackType(kinds.f32x16, 2)(types.int64), _floats_of(name)
    return operation(signature)(lambda builder, w: emit.pack_of(builder, load(builder, w)))


# Weight rows and activation rows whose sums are in registers at once.
W_ROWS, X_ROWS = (4, 4) if emit.FORM == "avx512vnni" else (2, 2)
N_SUMS = W_ROWS * X_ROWS


def _add_products_of(name: str, n_rows: int, n_x: int) -> Any:
    """add_products(sums, w, stride, x): sums[r * n_x + t] after 32 weights of row r times those of activation row t."""
    unpack, kind = _floats_of(name), PackType(kinds.f32x16, n_rows * n_x)

    @operation(kind(kind, *[types.int64] * 3))
    def add_products(builder: ir.IRBuilder, sums: ir.Value, w: ir.Value, stride: ir.Value, x: ir.Value) -> ir.Value:
        values = [[emit.load(builder, x, emit.V_F32, 128 * t + 64 * half) for half in (0, 1)] for t in range(n_x)]
        out = []
        for r in range(n_rows):
            weights = unpack(builder, builder.add(w, builder.mul(stride, emit.I64(r))))
            for t in range(n_x):
                total = builder.extract_value(sums, r * n_x + t)
                for weight, value in zip(weights, values[t], strict=True):
                    total = emit.fma_values(builder, weight, value, total)
                out.append(total)
        return emit.pack_of(builder, out)

    return add_products


def _write_sums_of(n_x: int) -> Any:
    """write_sums(sums, out, out_stride): the lanes of sums[r * n_x + t] added as a tree, to out[t, r]."""

    @operation(types.void(pack, types.int64, types.int64))
    def write_sums(builder: ir.IRBuilder, sums: ir.Value, out: ir.Value, out_stride: ir.Value) -> None:
        for i in range(sums.type.count):
            total = emit.tree_of(builder, builder.extract_value(sums, i))
            row = builder.add(out, builder.mul(out_stride, emit.I64(i % n_x)))
            emit.store(builder, total, builder.add(row, emit.I64(4 * (i // n_x))))

    return write_sums


write_together, write_apart = _write_sums_of(X_ROWS), _write_sums_of(1)

# Names that `specialise` fills in: the templates below see them as globals.
step_bytes: int
x_bytes: int
step: int
most_rows: int
n_vectors: int
group_rows: Callable[..., None]
add_together: Callable[[Pack, Address, int, Address], Pack]
add_apart: Callable[[Pack, Address, int, Address], Pack]
add_single: Callable[[Pack, Address, int, Address], Pack]
unpack: Callable[[Address], Pack]
unpack_block: Callable[[Address, Address], None]


def _float32(
    w: Address, stride: int, n_store: int, n_blocks: int, x: Address, n_x: int, out: Address, out_stride: int,
    ahead: Address,
) -> None:  # fmt: skip
    """Blocks of W_ROWS x X_ROWS sums in registers, then rows of x one by one."""
    if n_store == 1:
        for t in range(n_x):
            sums = no_sums(1)
            for b in range(n_blocks):
                sums = add_single(sums, w + b * step_bytes, stride, x + (b * n_x + t) * 128)
            write_apart(sums, out + t * out_stride, out_stride)
    else:
        n_together = n_x // X_ROWS * X_ROWS
        for r in range(0, n_store, W_ROWS):
            rows, at = w + r * stride, out + 4 * r
            for t in range(0, n_together, X_ROWS):
                sums = no_sums(N_SUMS)
                for b in range(n_blocks):
                    sums = add_together(sums, rows + b * step_bytes, stride, x + (b * n_x + t) * 128)
                write_together(sums, at + t * out_stride, out_stride)
            for t in range(n_together, n_x):
                sums = no_sums(W_ROWS)
                for b in range(n_blocks):
                    sums = add_apart(sums, rows + b * step_bytes, stride, x + (b * n_x + t) * 128)
                write_apart(sums, at + t * out_stride, out_stride)


def _blocks_one(
    w: Address, stride: int, n_store: int, n_blocks: int, x: Address, n_x: int, out: Address, out_stride: int,
    ahead: Address,
) -> None:  # fmt: skip
    """Row by row; a step is a block of the format, which goes through scratch."""
    values = scratch(n_vectors)
    for r in range(n_store):
        acc = splat(ZERO)
        for s in range(n_blocks * 32 // step):
            unpack_block(w + r * stride + s * step_bytes, values)
            for i in range(n_vectors):
                acc = fma(load_f32(values + 64 * i), load_f32(x + (s * n_vectors + i) * 64), acc)
        write_f32(out + 4 * r, tree_sum(acc))


def _blocks_many(
    w: Address, stride: int, n_store: int, n_blocks: int, x: Address, n_x: int, out: Address, out_stride: int,
    ahead: Address,
) -> None:  # fmt: skip
    """As _blocks_one: a block is unpacked once for the n_x rows of a group."""
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


def _tile(
    w: Address, stride: int, n_store: int, n_blocks: int, x: Address, n_x: int, out: Address, out_stride: int,
    ahead: Address,
) -> None:  # fmt: skip
    for t in range(0, n_x, most_rows):
        group, rows = x + t * n_blocks * x_bytes, min(most_rows, n_x - t)
        group_rows(w, stride, n_store, n_blocks, group, rows, out + t * out_stride, out_stride, ahead)


def _unpack_row(w: Address, n_blocks: int, out: Address) -> None:
    for b in range(n_blocks):
        store_rows(out + b * 128, 64, unpack(w + b * step_bytes))


def _unpack_row_of_blocks(w: Address, n_blocks: int, out: Address) -> None:
    for s in range(n_blocks * 32 // step):
        unpack_block(w + s * step_bytes, out + 4 * s * step)


def step_of(name: str) -> int:
    """Weights that are unpacked together: a block, or 32 floats."""
    return max(BLOCK, FORMATS[name].n_weights)


def _names_of(name: str) -> dict[str, Any]:
    """What the templates see of a format that float32 panels are multiplied with, or that is unpacked."""
    step = step_of(name)
    names = {"step": step, "step_bytes": FORMATS[name].row_bytes(step), "n_vectors": step // 16}
    if FORMATS[name].is_float:
        return names | {"unpack": unpack_of(name)}
    return names | {"unpack_block": piece(FORMATS[name].unpacker).compiled_for(name)}


def _tile_function(name: str, kind: str, uses_amx: bool, first_cache: bool) -> Any:
    """The tile kernel of one format and kind of activations."""
    form, most_rows = "", GROUP
    if kind == "int8" and uses_amx:
        form, most_rows, rows = "_amx", amx_tiles.MOST_ROWS, amx_tiles.tile_function(name, first_cache)
    elif kind == "int8":
        rows = tile_function(name, first_cache)
    elif FORMATS[name].is_float:
        products = {
            "add_together": _add_products_of(name, W_ROWS, X_ROWS), "add_apart": _add_products_of(name, W_ROWS, 1),
            "add_single": _add_products_of(name, 1, 1),
        }  # fmt: skip
        rows = kernel(specialise(_float32, f"rows_{name}_float32", **_names_of(name), **products))
    else:
        names = _names_of(name)
        one, many = (kernel(specialise(f, f"{f.__name__[1:]}_{name}", **names)) for f in (_blocks_one, _blocks_many))
        rows = by_rows(f"{name}_float32", 1, one, many)
    names = {"x_bytes": STEP_BYTES[kind], "most_rows": most_rows, "group_rows": rows}
    return specialise(_tile, f"tile_{name}_{kind}{form}{'_first' * first_cache}", **names)


def activation_kind(name: str) -> str:
    """ "int8" where the format has an integer tile, else "float32"."""
    return "int8" if FORMATS[name].tile else "float32"


def tile_address(name: str, kind: str) -> int:
    """Compile the tile kernel of format `name` for activations of `kind` and return its address."""
    is_int8 = kind == "int8"
    return _tile_address(name, kind, is_int8 and amx.is_used(), is_int8 and VALUES["first_cache"] > 0)


@cache
def _tile_address(name: str, kind: str, uses_amx: bool, first_cache: bool) -> int:
    return address_of(_tile_function(name, kind, uses_amx, first_cache), types.void(*([types.int64] * 9)))


@cache
def unpack_address(name: str) -> int:
    """Compile unpack_row(w, n_blocks, out): one row of weights to float32, and return its address."""
    template = _unpack_row if FORMATS[name].is_float else _unpack_row_of_blocks
    return address_of(specialise(template, f"unpack_{name}", **_names_of(name)), types.void(*([types.int64] * 3)))
