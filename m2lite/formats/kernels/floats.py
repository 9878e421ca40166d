"""F32, F16 and BF16 for kernels: 16 of them as float32 in registers, as LLVM IR."""

from __future__ import annotations

from llvmlite import ir

from m2lite.simd import emit


def unpack_f32(builder: ir.IRBuilder, w: ir.Value, offset: int) -> ir.Value:
    return emit.load(builder, w, emit.V_F32, offset)


def unpack_f16(builder: ir.IRBuilder, w: ir.Value, offset: int) -> ir.Value:
    return emit.half_to_f32(builder, emit.load(builder, w, emit.V_I16, offset))


def unpack_bf16(builder: ir.IRBuilder, w: ir.Value, offset: int) -> ir.Value:
    raw = builder.zext(emit.load(builder, w, emit.V_I16, offset), emit.V_I32)
    return builder.bitcast(builder.shl(raw, emit.const(16)), emit.V_F32)
