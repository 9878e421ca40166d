"""Operations on packed integers that unpackers of weights need: bytes to lanes, bits of lanes, tables.

As simd.py: 16 lanes, addresses, nothing checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from m2lite.kernels import emit
from m2lite.kernels.simd import f32x16, i32x16


def _joined_bytes(n_parts: int, is_signed: bool) -> Any:
    """16 bytes from n addresses, 16 / n from each, as int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.VectorType(emit.I8, emit.LANES // n_parts)
        parts = [emit.load(builder, a, kind) for a in args]
        return (builder.sext if is_signed else builder.zext)(emit.merged(builder, parts), emit.V_I32)

    return codegen


@intrinsic
def load_u8(typingctx: Any, address: Any) -> Any:
    """16 unsigned bytes as int32."""
    return i32x16(types.int64), _joined_bytes(1, is_signed=False)


@intrinsic
def load_i8(typingctx: Any, address: Any) -> Any:
    """16 signed bytes as int32."""
    return i32x16(types.int64), _joined_bytes(1, is_signed=True)


@intrinsic
def load_pair(typingctx: Any, a: Any, b: Any) -> Any:
    """8 signed bytes at each of two addresses, as int32."""
    return i32x16(types.int64, types.int64), _joined_bytes(2, is_signed=True)


@intrinsic
def load_quad(typingctx: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """4 signed bytes at each of four addresses, as int32."""
    return i32x16(*[types.int64] * 4), _joined_bytes(4, is_signed=True)


def _with_scalar(build: Any) -> Any:
    """An operation on int32 lanes and an integer that is the same for all of them."""

    @intrinsic
    def operation(typingctx: Any, v: Any, x: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return build(builder, args[0], emit.splat(builder, builder.trunc(args[1], emit.I32)))

        return i32x16(i32x16, types.int64), codegen

    return operation


shift_left = _with_scalar(lambda builder, v, x: builder.shl(v, x))
shift_right = _with_scalar(lambda builder, v, x: builder.lshr(v, x))
and_bits = _with_scalar(lambda builder, v, x: builder.and_(v, x))
add_int = _with_scalar(lambda builder, v, x: builder.add(v, x))
mul_int = _with_scalar(lambda builder, v, x: builder.mul(v, x))


def _int_lanes(build: Any) -> Any:
    @intrinsic
    def operation(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return build(builder, *args)

        return i32x16(i32x16, i32x16), codegen

    return operation


or_i32 = _int_lanes(lambda builder, a, b: builder.or_(a, b))
shift_right_by = _int_lanes(lambda builder, v, n: builder.lshr(v, n))


@intrinsic
def lane_bits(typingctx: Any, bits: Any) -> Any:
    """Bit i of `bits` in lane i, as 0 or 1."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = builder.lshr(emit.splat(builder, builder.trunc(args[0], emit.I32)), emit.LANE_NUMBERS)
        return builder.and_(v, emit.const(1))

    return i32x16(types.int64), codegen


@intrinsic
def flip_signs(typingctx: Any, value: Any, bits: Any) -> Any:
    """The negative of lane i where bit i of `bits` is set."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = builder.lshr(emit.splat(builder, builder.trunc(args[1], emit.I32)), emit.LANE_NUMBERS)
        signs = builder.shl(v, emit.const(31))
        return builder.bitcast(builder.xor(builder.bitcast(args[0], emit.V_I32), signs), emit.V_F32)

    return f32x16(f32x16, types.int64), codegen


def lookup_of(values: list[int]) -> Any:
    """look_up(codes) -> values[code] as float32; 16 signed bytes, and every code is below 16."""

    @intrinsic
    def look_up(typingctx: Any, codes: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit.look_up(builder, args[0], values)

        return f32x16(i32x16), codegen

    return look_up
