"""Operations on packed integers that unpackers of weights need: bytes to lanes, bits of lanes, tables.

As simd.py: 16 lanes, addresses, nothing checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core.types import int64

from m2lite.kernels import emit
from m2lite.kernels.simd import f32x16, i32x16, operation


def _bytes(builder, *addresses):
    """16 bytes from n addresses, 16 / n from each."""
    kind = ir.VectorType(emit.I8, emit.LANES // len(addresses))
    return emit.merged(builder, [emit.load(builder, a, kind) for a in addresses])


@operation(i32x16(int64))
def load_u8(builder, address):
    """16 unsigned bytes as int32."""
    return builder.zext(_bytes(builder, address), emit.V_I32)


@operation(i32x16(int64))
def load_i8(builder, address):
    """16 signed bytes as int32."""
    return builder.sext(_bytes(builder, address), emit.V_I32)


@operation(i32x16(int64, int64))
def load_pair(builder, a, b):
    """8 signed bytes at each of two addresses, as int32."""
    return builder.sext(_bytes(builder, a, b), emit.V_I32)


@operation(i32x16(int64, int64, int64, int64))
def load_quad(builder, a, b, c, d):
    """4 signed bytes at each of four addresses, as int32."""
    return builder.sext(_bytes(builder, a, b, c, d), emit.V_I32)


def _wide(builder, x):
    """An int64 as int32 in all lanes."""
    return emit.splat(builder, builder.trunc(x, emit.I32))


_with_scalar = operation(i32x16(i32x16, int64))
shift_left = _with_scalar(lambda builder, v, x: builder.shl(v, _wide(builder, x)))
shift_right = _with_scalar(lambda builder, v, x: builder.lshr(v, _wide(builder, x)))
and_bits = _with_scalar(lambda builder, v, x: builder.and_(v, _wide(builder, x)))
add_int = _with_scalar(lambda builder, v, x: builder.add(v, _wide(builder, x)))
mul_int = _with_scalar(lambda builder, v, x: builder.mul(v, _wide(builder, x)))

_of_two = operation(i32x16(i32x16, i32x16))
or_i32 = _of_two(lambda builder, a, b: builder.or_(a, b))
shift_right_by = _of_two(lambda builder, v, n: builder.lshr(v, n))


@operation(i32x16(int64))
def lane_bits(builder, bits):
    """Bit i of `bits` in lane i, as 0 or 1."""
    return builder.and_(builder.lshr(_wide(builder, bits), emit.LANE_NUMBERS), emit.const(1))


@operation(f32x16(f32x16, int64))
def flip_signs(builder, value, bits):
    """The negative of lane i where bit i of `bits` is set."""
    signs = builder.shl(builder.lshr(_wide(builder, bits), emit.LANE_NUMBERS), emit.const(31))
    return builder.bitcast(builder.xor(builder.bitcast(value, emit.V_I32), signs), emit.V_F32)


def lookup_of(values: list[int]) -> Any:
    """look_up(codes) -> values[code] as float32; 16 signed bytes, and every code is below 16."""
    return operation(f32x16(i32x16))(lambda builder, codes: emit.look_up(builder, codes, values))
