"""What kernels do with memory: load and store vectors and numbers, transpose, prefetch, scratch. Checks no address.

Encoders work on 16 blocks at once: a vector holds the same position of each, so that every search is free of branches
and its sums run in the order of the plain loop. `scatter_...` and `transpose` bring blocks in and out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.core.extending import intrinsic

from m2lite.simd import emit
from m2lite.simd.kinds import (
    Address,
    Int,
    Kind,
    address,
    f32x16,
    float32,
    float64,
    i32x16,
    int32,
    int64,
    uint8,
    uint16,
    vector,
    void,
)  # fmt: skip
from m2lite.simd.vectors import operation

T = TypeVar("T")
I8_LANES = ir.VectorType(emit.I8, emit.LANES)

# --- vectors --------------------------------------------------------------------------------------------------------


def _from_bytes(builder: ir.IRBuilder, addresses: list[ir.Value]) -> ir.Value:
    """16 signed bytes, as many from each address, as int32."""
    kind = ir.VectorType(emit.I8, emit.LANES // len(addresses))
    return builder.sext(emit.merged(builder, [emit.load(builder, a, kind) for a in addresses]), emit.V_I32)


_f32_at, _i32_at = operation(f32x16(address)), operation(i32x16(address))
load_f32 = _f32_at(lambda builder, a: emit.load(builder, a, emit.V_F32))
load_f16 = _f32_at(lambda builder, a: emit.half_to_f32(builder, emit.load(builder, a, emit.V_I16)))
load_i32 = _i32_at(lambda builder, a: emit.load(builder, a, emit.V_I32))
load_u8 = _i32_at(lambda builder, a: builder.zext(emit.load(builder, a, I8_LANES), emit.V_I32))
load_i8 = _i32_at(lambda builder, a: _from_bytes(builder, [a]))
load_pair = operation(i32x16(address, address))(lambda builder, a, b: _from_bytes(builder, [a, b]))
load_quad = operation(i32x16(address, address, address, address))(
    lambda builder, a, b, c, d: _from_bytes(builder, [a, b, c, d])
)


@operation(i32x16(address, int64))
def load_first_u8(builder: ir.IRBuilder, address: ir.Value, n: ir.Value) -> ir.Value:
    """The n < 16 bytes at `address` in the first lanes, zeros behind; reads no further."""
    out = cgutils.alloca_once_value(builder, ir.Constant(I8_LANES, [0] * emit.LANES))
    with cgutils.for_range(builder, n) as loop:
        byte = emit.load(builder, builder.add(address, loop.index), emit.I8)
        builder.store(builder.insert_element(builder.load(out), byte, builder.trunc(loop.index, emit.I32)), out)
    return builder.zext(builder.load(out), emit.V_I32)


_store_f32, _store_i32 = operation(void(address, f32x16)), operation(void(address, i32x16))
store_f32 = _store_f32(lambda builder, a, v: emit.store(builder, v, a))
store_f16 = _store_f32(lambda builder, a, v: emit.store(builder, emit.f32_to_half(builder, v), a))  # ties to even
store_i32 = _store_i32(lambda builder, a, v: emit.store(builder, v, a))
store_u16 = _store_i32(lambda builder, a, v: emit.store(builder, builder.trunc(v, emit.V_I16), a))
store_i8 = _store_i32(lambda builder, a, v: emit.store(builder, builder.trunc(v, I8_LANES), a))


@operation(int32(address, i32x16))
def clamp_and_store_i8(builder: ir.IRBuilder, address: ir.Value, v: ir.Value) -> ir.Value:
    """Clamp 16 int32 to -127..127, write them as int8 and return two sums, a + 65536 b: of places 0 and 1 modulo 4, of
    places 2 and 3."""
    v = builder.select(builder.icmp_signed(">", v, emit.const(127)), emit.const(127), v)
    v = builder.select(builder.icmp_signed("<", v, emit.const(-127)), emit.const(-127), v)
    emit.store(builder, builder.trunc(v, I8_LANES), address)
    places = ir.Constant(emit.V_I32, [16 * (lane // 2 % 2) for lane in range(emit.LANES)])
    return emit.call_llvm(builder, "llvm.vector.reduce.add.v16i32", emit.I32, [builder.shl(v, places)])


@operation(void(address, vector, int64))
def store_lanes(builder: ir.IRBuilder, address: ir.Value, value: ir.Value, n: ir.Value) -> None:
    """Write all lanes to `address`, or lane 0 alone when n is 1."""
    with builder.if_else(builder.icmp_signed("!=", n, emit.I64(1))) as (whole, single):
        with whole:
            emit.store(builder, value, address)
        with single:
            emit.store(builder, builder.extract_element(value, emit.I32(0)), address)


def _scatter_of(
    kind: Kind[T], to_items: Callable[[ir.IRBuilder, ir.Value], ir.Value]
) -> Callable[[Address, Int, T], None]:
    """scatter(address, stride, value): lane i becomes an item at address + i * stride."""

    @operation(void(address, int64, kind))
    def scatter(builder: ir.IRBuilder, address: ir.Value, stride: ir.Value, value: ir.Value) -> None:
        items = to_items(builder, value)
        for i in range(emit.LANES):
            emit.store(builder, builder.extract_element(items, emit.I32(i)), address)
            address = builder.add(address, stride)

    return scatter


scatter_f16 = _scatter_of(f32x16, emit.f32_to_half)
scatter_u32 = _scatter_of(i32x16, lambda builder, v: v)
scatter_u16 = _scatter_of(i32x16, lambda builder, v: builder.trunc(v, emit.V_I16))
scatter_u8 = scatter_i8 = _scatter_of(i32x16, lambda builder, v: builder.trunc(v, I8_LANES))


def _interleaved(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, size: int, upper: bool) -> ir.Value:
    """Groups of `size` lanes taken from a and b in turn, each from the lower or upper half of its 2 * size lanes."""
    mask = []
    for start in range(0, emit.LANES, 2 * size):
        first = start + (size if upper else 0)
        mask += list(range(first, first + size)) + list(range(emit.LANES + first, emit.LANES + first + size))
    return builder.shuffle_vector(a, b, ir.Constant(emit.V_I32, mask))


@operation(void(address, int64, address, int64))
def transpose(
    builder: ir.IRBuilder, source: ir.Value, source_stride: ir.Value, to: ir.Value, to_stride: ir.Value
) -> None:
    """16 rows of 16 32-bit words at `source` -> its transposition at `to`; strides in bytes."""
    rows = [emit.load(builder, emit.row_at(builder, source, source_stride, i), emit.V_I32) for i in range(emit.LANES)]
    size = 1
    while size < emit.LANES:
        out = list(rows)
        for i in range(emit.LANES):
            if not i & size:
                out[i] = _interleaved(builder, rows[i], rows[i + size], size, False)
                out[i + size] = _interleaved(builder, rows[i], rows[i + size], size, True)
        rows, size = out, 2 * size
    for i, row in enumerate(rows):
        emit.store(builder, row, emit.row_at(builder, to, to_stride, i))


# --- numbers --------------------------------------------------------------------------------------------------------


def _access(kind: Kind[T], llvm_type: ir.Type) -> tuple[Callable[[Address], Any], Callable[[Address, T], None]]:
    """(read, write) of one number at an address."""
    read = operation(kind(address))(lambda builder, a: emit.load(builder, a, llvm_type))
    write = operation(void(address, kind))(lambda builder, a, value: emit.store(builder, value, a))
    return read, write


read_f32: Callable[[Address], np.float32]
read_f64: Callable[[Address], np.float64]
read_i32: Callable[[Address], int]
read_i64: Callable[[Address], int]
read_u16: Callable[[Address], int]
read_u8: Callable[[Address], int]
read_address: Callable[[Address], Address]
read_f32, write_f32 = _access(float32, emit.F32)
read_f64, write_f64 = _access(float64, emit.F64)
read_i32, write_i32 = _access(int32, emit.I32)
read_i64, write_i64 = _access(int64, emit.I64)
read_u16, _ = _access(uint16, emit.I16)
read_u8, _ = _access(uint8, emit.I8)
read_address, _ = _access(int64, emit.I64)


@operation(void(address, float32))
def write_f16(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """Round a float32 to float16 and write it to `address`."""
    half = emit.f32_to_half(builder, emit.splat(builder, value))
    emit.store(builder, builder.extract_element(half, emit.I32(0)), address)


@operation(int64(address))
def take_number(builder: ir.IRBuilder, counter: ir.Value) -> ir.Value:
    """The int64 at address `counter`, which is one more afterwards; threads never get the same."""
    return builder.atomic_rmw("add", builder.inttoptr(counter, emit.I64.as_pointer()), emit.I64(1), "monotonic")


# --- places -------------------------------------------------------------------------------------------------------


@operation(void(address))
def prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Ask for the cache line at `address`, into the second cache: what is ahead would displace what is in use."""
    emit.prefetch(builder, address, 2)


@operation(void(address))
def expect_to_write(builder: ir.IRBuilder, address: ir.Value) -> None:
    """The cache line at `address` is fetched, for a later write; never faults."""
    emit.prefetch(builder, address, to_write=True)


def _scratch(typingctx: Any, n: Any) -> Any:
    count = n.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        area = cgutils.alloca_once(builder, ir.ArrayType(emit.V_F32, count))
        area.align = 64
        return builder.ptrtoint(area, emit.I64)

    return address(n), codegen


# The address of n float32 vectors on the stack of the calling kernel; n is a literal.
_literal: Any = intrinsic(prefer_literal=True)
scratch: Callable[[int], Address] = _literal(_scratch)
