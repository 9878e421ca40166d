"""Packs: n vectors side by side in registers, so that one kernel source serves several row counts. Sees no format.

What a pack reads and writes lies `stride` bytes apart, a row for each vector. Nothing here checks an address.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic, models, register_model

from m2lite.kernels import emit
from m2lite.kernels.simd import VectorType, f32x16


class PackType(types.Type):
    """n vectors side by side, held in registers."""

    def __init__(self, element: VectorType, n: int) -> None:
        super().__init__(name=f"Pack({element.name},{n})")
        self.element, self.n = element, n


@register_model(PackType)
class _PackModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, ir.ArrayType(fe_type.element.llvm_type, fe_type.n))


@intrinsic(prefer_literal=True)
def zeros(typingctx: Any, n: Any) -> Any:
    """A pack of n zero vectors; n is a literal."""
    kind = PackType(f32x16, n.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.ArrayType(emit.V_F32, kind.n), None)

    return kind(n), codegen


@intrinsic(prefer_literal=True)
def pack_get(typingctx: Any, pack: Any, i: Any) -> Any:
    """Vector i of a pack; i is a literal."""
    index = i.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_value(args[0], index)

    return pack.element(pack, i), codegen


def _at_row(builder: ir.IRBuilder, address: ir.Value, stride: ir.Value, i: int) -> ir.Value:
    return builder.add(address, builder.mul(stride, emit.I64(i))) if i else address


@intrinsic
def fma_rows(typingctx: Any, acc: Any, factors: Any, stride: Any, v: Any) -> Any:
    """acc[i] += factor_i * v for every vector i of the pack; factor_i is the float32 at factors + i * stride."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        acc_value, address, step, vector = args
        out = []
        for i in range(acc.n):
            wide = emit.splat(builder, emit.load(builder, _at_row(builder, address, step, i), emit.F32))
            out.append(emit.fma_values(builder, wide, vector, builder.extract_value(acc_value, i)))
        return emit.pack_of(builder, out)

    return acc(acc, types.int64, types.int64, f32x16), codegen


@intrinsic
def store_rows(typingctx: Any, address: Any, stride: Any, pack: Any) -> Any:
    """Write vector i of a pack to address + i * stride."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for i in range(pack.n):
            emit.store(builder, builder.extract_value(args[2], i), _at_row(builder, args[0], args[1], i))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, pack), codegen


@intrinsic
def add_rows_scaled(typingctx: Any, address: Any, stride: Any, pack: Any, scale: Any) -> Any:
    """Row i at address + i * stride becomes fma(pack[i], scale, row i); `scale` is a vector."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for i in range(pack.n):
            at = _at_row(builder, args[0], args[1], i)
            old = emit.load(builder, at, emit.V_F32)
            new = emit.fma_values(builder, builder.extract_value(args[2], i), args[3], old)
            emit.store(builder, new, at)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, pack, f32x16), codegen


@intrinsic
def merge_rows(typingctx: Any, address: Any, stride: Any, pack: Any, keep: Any, take: Any) -> Any:
    """Row i at address + i * stride becomes fma(pack[i], take[i], row i * keep[i]); keep, take: addresses."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for i in range(pack.n):
            at = _at_row(builder, args[0], args[1], i)
            kept, taken = (emit.splat(builder, emit.load(builder, a, emit.F32, 4 * i)) for a in args[3:])
            old = builder.fmul(emit.load(builder, at, emit.V_F32), kept)
            emit.store(builder, emit.fma_values(builder, builder.extract_value(args[2], i), taken, old), at)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, pack, types.int64, types.int64), codegen
