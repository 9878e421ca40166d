"""The kinds of values in kernels, as Numba sees them; kinds.pyi says how a type checker does. Knows no operation.

A kernel is Python that Numba compiles, and its annotations are for readers and mypy. A kind says the same to Numba:
`f32x16(address)` is the signature of what takes an address and returns 16 float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.extending import models, register_model

from m2lite.simd import emit


class VectorType(types.Type):
    """16 lanes of numbers or truth values, or another LLVM type that is held in registers."""

    def __init__(self, name: str, llvm_type: ir.Type, scalar: Any = None) -> None:
        super().__init__(name=name)
        self.llvm_type, self.scalar = llvm_type, scalar


class PackType(VectorType):
    """n vectors side by side, held in registers."""

    def __init__(self, element: VectorType, n: int) -> None:
        super().__init__(f"Pack({element.name},{n})", ir.ArrayType(element.llvm_type, n))


@register_model(PackType)
@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm_type)


class Open(types.Type):
    """Stands in a signature for the vector that a caller gives, or for its scalar, which is meant in all lanes."""


int32, int64, uint16, uint8 = types.int32, types.int64, types.uint16, types.uint8
float32, float64, void = types.float32, types.float64, types.void
address = int64
f32x16 = VectorType("f32x16", emit.V_F32, float32)
i32x16 = VectorType("i32x16", emit.V_I32, int32)
mask16 = VectorType("mask16", ir.VectorType(ir.IntType(1), emit.LANES))
f32x8 = VectorType("f32x8", ir.VectorType(emit.F32, 8))
lanes = vector = pack = Open("vector")

Address = np.int64  # in kernels it is a conversion
F32x16 = I32x16 = Mask16 = Pack = Scalar = Lanes = Int = Kind = Signature = object


def resolved(signature: Any, given: tuple[Any, ...]) -> Any:
    """The signature with what stands for a vector replaced by what the caller gives."""
    found = [kind for kind, wanted in zip(given, signature.args, strict=True) if isinstance(wanted, Open)]
    if not found:
        return signature
    own = next((kind for kind in found if isinstance(kind, VectorType)), f32x16)
    args = [
        wanted if not isinstance(wanted, Open) else kind if isinstance(kind, VectorType) else own.scalar
        for kind, wanted in zip(given, signature.args, strict=True)
    ]
    returns = own if isinstance(signature.return_type, Open) else signature.return_type
    return returns(*args)
