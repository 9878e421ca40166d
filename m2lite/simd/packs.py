"""Packs: n vectors side by side in registers, so that one kernel source serves several row counts. Sees no format.

What a pack reads and writes lies `stride` bytes apart, a row for each vector. Nothing here checks an address.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core.extending import intrinsic

from m2lite.simd import emit
from m2lite.simd.kinds import Address, Int, Pack, PackType, address, f32x16, int64, pack, void
from m2lite.simd.vectors import operation

_literal: Any = intrinsic(prefer_literal=True)


def _zeros(typingctx: Any, n: Any) -> Any:
    kind: Any = PackType(f32x16, n.literal_value)
    return kind(n), lambda context, builder, signature, args: ir.Constant(kind.llvm_type, None)


def _load_rows(typingctx: Any, n: Any, start: Any, stride: Any) -> Any:
    kind: Any = PackType(f32x16, n.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, start, stride = args
        places = (emit.row_at(builder, start, stride, i) for i in range(n.literal_value))
        return emit.pack_of(builder, [emit.load(builder, place, emit.V_F32) for place in places])

    return kind(n, int64, int64), codegen


# zeros(n) is a pack of n zero vectors, load_rows(n, start, stride) one of those at start + i * stride; n is a literal.
zeros: Callable[[int], Pack] = _literal(_zeros)
load_rows: Callable[[int, Address, Int], Pack] = _literal(_load_rows)


@operation(pack(pack, address, int64, f32x16))
def fma_rows(builder: ir.IRBuilder, acc: ir.Value, factors: ir.Value, stride: ir.Value, v: ir.Value) -> ir.Value:
    """acc[i] += factor_i * v for every vector i of the pack; factor_i is the float32 at factors + i * stride."""
    out = []
    for i in range(acc.type.count):
        wide = emit.splat(builder, emit.load(builder, emit.row_at(builder, factors, stride, i), emit.F32))
        out.append(emit.fma_values(builder, wide, v, builder.extract_value(acc, i)))
    return emit.pack_of(builder, out)


@operation(void(address, int64, pack))
def store_rows(builder: ir.IRBuilder, address: ir.Value, stride: ir.Value, pack: ir.Value) -> None:
    """Write vector i of a pack to address + i * stride."""
    for i in range(pack.type.count):
        emit.store(builder, builder.extract_value(pack, i), emit.row_at(builder, address, stride, i))


@operation(void(address, int64, pack, f32x16))
def add_rows_scaled(
    builder: ir.IRBuilder, address: ir.Value, stride: ir.Value, pack: ir.Value, scale: ir.Value
) -> None:
    """Row i at address + i * stride becomes fma(pack[i], scale, row i)."""
    for i in range(pack.type.count):
        at = emit.row_at(builder, address, stride, i)
        old = emit.load(builder, at, emit.V_F32)
        emit.store(builder, emit.fma_values(builder, builder.extract_value(pack, i), scale, old), at)


@operation(void(address, int64, pack, address, address))
def merge_rows(
    builder: ir.IRBuilder, address: ir.Value, stride: ir.Value, pack: ir.Value, keep: ir.Value, take: ir.Value
) -> None:
    """Row i at address + i * stride becomes fma(pack[i], take[i], row i * keep[i]); keep, take: addresses."""
    for i in range(pack.type.count):
        at = emit.row_at(builder, address, stride, i)
        kept, taken = (emit.splat(builder, emit.load(builder, a, emit.F32, 4 * i)) for a in (keep, take))
        old = builder.fmul(emit.load(builder, at, emit.V_F32), kept)
        emit.store(builder, emit.fma_values(builder, builder.extract_value(pack, i), taken, old), at)
