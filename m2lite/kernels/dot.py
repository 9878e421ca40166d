"""Tile kernels: per block format, 16 weight rows times n activation rows. Sees addresses; knows blocks, no tensor.

A tile kernel is called by address (`simd.call_tile`) with

    tile(w, stride, n_store, n_blocks, x, n_x, out, out_stride)

    out[t, r] = sum over blocks b of  w[r, b] . x[t, b]      r < 16, t < n_x

w: address of row 0; stride: bytes from row to row (0 with n_store = 1 computes one row alone); n_store: 16 or 1;
n_blocks: blocks of 32 weights per row; out is float32, out_stride in bytes. x is an activation panel:

  int8     40 bytes per row and block: 32 int8, float32 scale, int32 -8 x (sum of the int8)
  float32  128 bytes per row and block: 32 float32

A panel holds its rows in groups of 8, 4, 2 and 1 (as many of each as fit, in that order); a group of T rows is laid
out [block][T][bytes], so that one address register serves all of its rows. Rows t.. of a group begin at
t * n_blocks * bytes, whatever the groups: a panel of one row is simply the row.

Order of the sum, the same for every group size, tile and vector width:
  int8     one fma per block of 32, in block order: acc = fma(f32(exact integer dot), w scale * x scale, acc)
  float32  16 virtual lanes, lane i takes weights i, i+16, i+32, ... one fma each; then a fixed tree over the lanes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from m2lite.kernels import emit, simd
from m2lite.kernels.jit import address_of, kernel, specialise
from m2lite.kernels.simd import fma_rows, pack_get, prefetch, store_f32, store_sums, store_tile, zeros

BLOCK = 32  # weights per step of every tile kernel

Vectors = list[ir.Value]


STEP_BYTES = {"int8": 40, "float32": 128}  # of an activation panel, per row and block


def panel_bytes(kind: str, n_rows: int, n: int) -> int:
    """Bytes of a panel of n_rows rows of n values."""
    return n_rows * (n // BLOCK) * STEP_BYTES[kind]


# --- weights into vectors: the only part that a format has to bring ------------------------------------------------


def _q4_0_tile(builder: ir.IRBuilder, w: ir.Value, stride: ir.Value) -> tuple[Vectors, ir.Value]:
    """18 bytes: float16 scale, 16 bytes; low nibbles are weights 0-15, high nibbles 16-31, each minus 8."""
    scale = emit.half_to_f32(builder, emit.gather_u16(builder, w, stride))
    raw = emit.load_tile(builder, w, stride, 2)
    mask = emit.const(0x0F0F0F0F)
    low = [builder.and_(v, mask) for v in raw]
    high = [builder.and_(builder.lshr(v, emit.const(4)), mask) for v in raw]
    return low + high, scale


def _q8_0_tile(builder: ir.IRBuilder, w: ir.Value, stride: ir.Value) -> tuple[Vectors, ir.Value]:
    """34 bytes: float16 scale, 32 int8; +128 makes them unsigned."""
    scale = emit.half_to_f32(builder, emit.gather_u16(builder, w, stride))
    raw = emit.load_tile(builder, w, stride, 2) + emit.load_tile(builder, w, stride, 18)
    return [builder.xor(v, emit.const(0x80808080 - (1 << 32))) for v in raw], scale


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
    """How kernels read one block format: bytes of 32 weights, unpack to float32, and the int8 tile where one exists."""

    step_bytes: int
    unpack: Callable[[ir.IRBuilder, ir.Value], Vectors]
    tile: Callable[[ir.IRBuilder, ir.Value, ir.Value], tuple[Vectors, ir.Value]] | None = None
    offset: int = 0  # added to the signed weights to make the tile's bytes unsigned
    bits: int = 8  # the tile's bytes stay below 2**bits


WEIGHTS = {
    "Q4_0": WeightForm(18, _q4_0_unpack, _q4_0_tile, offset=8, bits=4),
    "Q8_0": WeightForm(34, _q8_0_unpack, _q8_0_tile, offset=128, bits=8),
    "F16": WeightForm(64, _f16_unpack),
    "BF16": WeightForm(64, _bf16_unpack),
    "F32": WeightForm(128, _f32_unpack),
}


# --- tile kernels, built from the table ----------------------------------------------------------------------------


def _step_of(form: WeightForm) -> Any:
    """acc[t] = fma(integer dot of block b, scales, acc[t]) for all rows t of a pack."""
    assert form.tile is not None

    @intrinsic
    def step(typingctx: Any, acc: Any, w: Any, stride: Any, x: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            acc_value, w_value, stride_value, x_value = args
            weights, w_scale = form.tile(builder, w_value, stride_value)
            out = []
            for t in range(acc.n):
                at = t * STEP_BYTES["int8"]
                dot = emit.splat(builder, emit.load(builder, x_value, emit.I32, at + 36))
                if form.offset != 8:
                    dot = builder.shl(dot, emit.const((form.offset // 8).bit_length() - 1))
                for d, vector in enumerate(weights):
                    four = emit.load(builder, x_value, emit.I32, at + 4 * d)
                    dot = emit.dot4(builder, dot, vector, four, form.bits)
                x_scale = emit.load(builder, x_value, emit.F32, at + 32)
                scale = builder.fmul(w_scale, emit.splat(builder, x_scale))
                value = builder.extract_value(acc_value, t)
                out.append(emit.fma_values(builder, builder.sitofp(dot, emit.V_F32), scale, value))
            return emit.pack_of(builder, out)

        return acc(acc, types.int64, types.int64, types.int64), codegen

    return step


def unpack_of(name: str) -> Any:
    """unpack(w) -> a pack of 2 vectors: 32 weights at address w as float32."""
    form = WEIGHTS[name]

    @intrinsic
    def unpack(typingctx: Any, w: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit.pack_of(builder, form.unpack(builder, args[0]))

        return simd.PackType(simd.f32x16, 2)(types.int64), codegen

    return unpack


# Names that `specialise` fills in: the templates below see them as globals.
n_rows = step_bytes = x_bytes = 0
step: Any = None
unpack: Any = None
rows_8: Any = None
rows_4: Any = None
rows_2: Any = None
rows_1: Any = None


def _int8_rows(w, stride, n_store, n_blocks, x, out, out_stride):
    acc = zeros(n_rows)
    ahead = w + 16 * stride
    for b in range(n_blocks):
        for line in range(0, 16 * step_bytes, 64):
            prefetch(ahead + b * 16 * step_bytes + line)
        acc = step(acc, w + b * step_bytes, stride, x + b * x_bytes)
    store_tile(acc, n_store, out, out_stride)


def _float_rows(w, stride, n_store, n_blocks, x, out, out_stride):
    for r in range(n_store):
        acc = zeros(n_rows)
        for b in range(n_blocks):
            acc = fma_rows(acc, unpack(w + r * stride + b * step_bytes), x + b * x_bytes)
        store_sums(acc, out + 4 * r, out_stride)


def _tile(w, stride, n_store, n_blocks, x, n_x, out, out_stride):
    t = 0
    row = n_blocks * x_bytes
    while n_x - t >= 8:
        rows_8(w, stride, n_store, n_blocks, x + t * row, out + t * out_stride, out_stride)
        t += 8
    if n_x - t >= 4:
        rows_4(w, stride, n_store, n_blocks, x + t * row, out + t * out_stride, out_stride)
        t += 4
    if n_x - t >= 2:
        rows_2(w, stride, n_store, n_blocks, x + t * row, out + t * out_stride, out_stride)
        t += 2
    if n_x - t >= 1:
        rows_1(w, stride, n_store, n_blocks, x + t * row, out + t * out_stride, out_stride)


def _unpack_row(w, n_blocks, out):
    for b in range(n_blocks):
        values = unpack(w + b * step_bytes)
        store_f32(out + b * 128, pack_get(values, 0))
        store_f32(out + b * 128 + 64, pack_get(values, 1))


GROUPS = (8, 4, 2, 1)


def _tile_function(name: str, kind: str) -> Any:
    """The tile kernel of one format and kind of activations, with a compiled inner loop per group size."""
    form, template = WEIGHTS[name], (_int8_rows if kind == "int8" else _float_rows)
    inner = _step_of(form) if kind == "int8" else unpack_of(name)
    rows = {}
    for n in GROUPS:
        names = {
            "n_rows": n,
            "step_bytes": form.step_bytes,
            "x_bytes": n * STEP_BYTES[kind],
            "step": inner,
            "unpack": inner,
        }
        rows[f"rows_{n}"] = kernel(specialise(template, f"rows_{name}_{kind}_{n}", **names))
    return specialise(_tile, f"tile_{name}_{kind}", x_bytes=STEP_BYTES[kind], **rows)


def activation_kind(name: str, generic: bool = False) -> str:
    """ "int8" where the format has an integer tile, else "float32"; `generic` forces float32."""
    return "float32" if generic or WEIGHTS[name].tile is None else "int8"


@cache
def tile_address(name: str, kind: str) -> int:
    """Compile the tile kernel of format `name` for activations of `kind` and return its address."""
    return address_of(_tile_function(name, kind), types.void(*([types.int64] * 8)))


@cache
def unpack_address(name: str) -> int:
    """Compile unpack_row(w, n_blocks, out): one row of weights to float32, and return its address."""
    names = {"unpack": unpack_of(name), "step_bytes": WEIGHTS[name].step_bytes}
    return address_of(specialise(_unpack_row, f"unpack_{name}", **names), types.void(*([types.int64] * 3)))
