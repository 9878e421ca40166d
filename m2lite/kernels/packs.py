"""Packs: n vectors side by side in registers, so that one kernel source serves several row counts. Sees no format.

What a pack reads and writes lies `stride` bytes apart, a row for each vector. Nothing here checks an address.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core.extending import intrinsic, register_model
from numba.core.types import int64, void

from m2lite.kernels import emit
from m2lite.kernels.simd import VectorType, _VectorModel, f32x16, operation


class PackType(VectorType):
    """n vectors side by side, held in registers."""

    def __init__(self, element: VectorType, n: int) -> None:
        super().__init__(f"Pack({element.name},{n})", ir.ArrayType(element.llvm_type, n))


register_model(PackType)(_VectorModel)


@intrinsic(prefer_literal=True)
def zeros(typingctx: Any, n: Any) -> Any:
    """A pack of n zero vectors; n is a literal."""
    kind = PackType(f32x16, n.literal_value)
    return kind(n), lambda context, builder, signature, args: ir.Constant(kind.llvm_type, None)


@operation(lambda acc, factors, stride, v: acc(acc, int64, int64, f32x16))
def fma_rows(builder, acc, factors, stride, v):
    """acc[i] += factor_i * v for every vector i of the pack; factor_i is the float32 at factors + i * stride."""
    out = []
    for i in range(acc.type.count):
        wide = emit.splat(builder, emit.load(builder, emit.row_at(builder, factors, stride, i), emit.F32))
        out.append(emit.fma_values(builder, wide, v, builder.extract_value(acc, i)))
    return emit.pack_of(builder, out)


@intrinsic(prefer_literal=True)
def load_rows(typingctx: Any, n: Any, address: Any, stride: Any) -> Any:
    """A pack of n vectors: vector i is at address + i * stride; n is a literal."""
    kind = PackType(f32x16, n.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, address, stride = args
        places = (emit.row_at(builder, address, stride, i) for i in range(n.literal_value))
        return emit.pack_of(builder, [emit.load(builder, place, emit.V_F32) for place in places])

    return kind(n, int64, int64), codegen


@operation(lambda address, stride, pack: void(int64, int64, pack))
def store_rows(builder, address, stride, pack):
    """Write vector i of a pack to address + i * stride."""
    for i in range(pack.type.count):
        emit.store(builder, builder.extract_value(pack, i), emit.row_at(builder, address, stride, i))


@operation(lambda address, stride, pack, scale: void(int64, int64, pack, f32x16))
def add_rows_scaled(builder, address, stride, pack, scale):
    """Row i at address + i * stride becomes fma(pack[i], scale, row i); `scale` is a vector."""
    for i in range(pack.type.count):
        at = emit.row_at(builder, address, stride, i)
        old = emit.load(builder, at, emit.V_F32)
        emit.store(builder, emit.fma_values(builder, builder.extract_value(pack, i), scale, old), at)


@operation(lambda address, stride, pack, keep, take: void(int64, int64, pack, int64, int64))
def merge_rows(builder, address, stride, pack, keep, take):
    """Row i at address + i * stride becomes fma(pack[i], take[i], row i * keep[i]); keep, take: addresses."""
    for i in range(pack.type.count):
        at = emit.row_at(builder, address, stride, i)
        kept, taken = (emit.splat(builder, emit.load(builder, a, emit.F32, 4 * i)) for a in (keep, take))
        old = builder.fmul(emit.load(builder, at, emit.V_F32), kept)
        emit.store(builder, emit.fma_values(builder, builder.extract_value(pack, i), taken, old), at)
