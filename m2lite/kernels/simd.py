"""Vector types and operations for kernels. Sees addresses and lanes, never a format or a model.

A value of type `f32x16` or `i32x16` is always 16 lanes, whatever the machine has. Nothing here checks an address.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.extending import intrinsic, models, register_model
from numba.core.types import float32, float64, int32, int64, uint8, uint16, void
from numba.core.typing import Signature

from m2lite.kernels import emit


class VectorType(types.Type):
    """16 lanes of float32 or int32, or another LLVM type that is held in registers."""

    def __init__(self, name: str, llvm_type: ir.Type) -> None:
        super().__init__(name=name)
        self.llvm_type = llvm_type


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm_type)


f32x16 = VectorType("f32x16", emit.V_F32)
f32x8 = VectorType("f32x8", ir.VectorType(emit.F32, 8))
i32x16 = VectorType("i32x16", emit.V_I32)
I8_LANES = ir.VectorType(emit.I8, emit.LANES)


def operation(signature: Signature | Callable[..., Signature]) -> Any:
    """Decorates build(builder, *values), which emits LLVM IR, as a function of kernels.

    A signature that depends on the types of the arguments is a function of them.
    """

    def wrap(build: Callable[..., ir.Value | None]) -> Any:
        @functools.wraps(build)  # Numba takes the names of the arguments from it, less the first
        def typed(typingctx: Any, *kinds: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                value = build(builder, *args)
                return context.get_dummy_value() if value is None else value

            return signature if isinstance(signature, Signature) else signature(*kinds), codegen

        return intrinsic(typed)

    return wrap


# --- what kernels call ------------------------------------------------------------------------------------------

_of_two = operation(f32x16(f32x16, f32x16))
add = _of_two(lambda builder, a, b: builder.fadd(a, b))
sub = _of_two(lambda builder, a, b: builder.fsub(a, b))
mul = _of_two(lambda builder, a, b: builder.fmul(a, b))
div = _of_two(lambda builder, a, b: builder.fdiv(a, b))
maximum = _of_two(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


@operation(f32x16(f32x16, f32x16, f32x16))
def fma(builder, a, b, c):
    """a * b + c per lane, rounded once."""
    return emit.fma_values(builder, a, b, c)


@operation(float32(float32, float32, float32))
def fma_scalar(builder, a, b, c):
    """a * b + c of float32, rounded once."""
    return emit.call_llvm(builder, "llvm.fma.f32", emit.F32, [a, b, c])


@operation(f32x16(float32))
def splat(builder, x):
    """16 copies of a float32."""
    return emit.splat(builder, x)


@operation(f32x16(int64))
def load_f32(builder, address):
    """16 float32 at `address`."""
    return emit.load(builder, address, emit.V_F32)


@operation(f32x16(int64))
def load_f16(builder, address):
    """16 float16 at `address`, as float32."""
    return emit.half_to_f32(builder, emit.load(builder, address, emit.V_I16))


@operation(void(int64, f32x16))
def store_f32(builder, address, value):
    """Write 16 float32 to `address`."""
    emit.store(builder, value, address)


@operation(void(int64, f32x16))
def store_f16(builder, address, value):
    """Round 16 float32 to float16 (nearest, ties to even) and write them to `address`."""
    emit.store(builder, emit.f32_to_half(builder, value), address)


@operation(float32(f32x16))
def tree_sum(builder, value):
    """The 16 lanes added as a fixed tree: lane i with i+8, then i+4, i+2, i+1."""
    return emit.tree_of(builder, value)


@operation(float32(f32x16))
def max_lanes(builder, v):
    """The largest of 16 lanes; a NaN lane loses against a number."""
    while v.type.count > 1:
        low, high = emit.halves(builder, v)
        v = builder.select(builder.fcmp_ordered(">", low, high), low, high)
    return builder.extract_element(v, emit.I32(0))


@operation(float32(f32x16, f32x16))
def max_abs(builder, a, b):
    """The largest |x| of two vectors; NaN counts as larger than infinity, so that it cannot be lost."""
    v = [builder.and_(builder.bitcast(x, emit.V_I32), emit.const(0x7FFFFFFF)) for x in (a, b)]
    while True:
        larger = builder.select(builder.icmp_signed(">", v[0], v[1]), v[0], v[1])
        if larger.type.count == 1:
            return builder.bitcast(builder.extract_element(larger, emit.I32(0)), emit.F32)
        v = emit.halves(builder, larger)


@operation(f32x16(f32x16, f32x16))
def or_nan(builder, value, x):
    """`value` per lane, but NaN where x is NaN."""
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)


@operation(i32x16(f32x16))
def round_to_i32(builder, value):
    """Nearest integers, ties to even; |x| must be below 2**22."""
    magic = ir.Constant(emit.V_F32, [12582912.0] * emit.LANES)  # 1.5 * 2**23: the adder rounds to integers
    shifted = builder.bitcast(builder.fadd(value, magic), emit.V_I32)
    return builder.sub(shifted, builder.bitcast(magic, emit.V_I32))


@operation(f32x16(i32x16))
def i32_to_f32(builder, value):
    """int32 lanes as float32 (exact below 2**24)."""
    return builder.sitofp(value, emit.V_F32)


@operation(f32x16(f32x16, i32x16))
def scale_by_power(builder, value, exponent):
    """value * 2**exponent for exponents in -126..127, by adding to the exponent bits of a factor."""
    factor = builder.shl(builder.add(exponent, emit.const(127)), emit.const(23))
    return builder.fmul(value, builder.bitcast(factor, emit.V_F32))


@operation(f32x16(f32x16, f32x16, f32x16, f32x16))
def select_below(builder, x, limit, below, otherwise):
    """Per lane: `below` where x < limit, else `otherwise`."""
    return builder.select(builder.fcmp_ordered("<", x, limit), below, otherwise)


@operation(f32x16(f32x16, int64, f32x16))
def first_lanes(builder, value, n, otherwise):
    """Lane i of `value` for i < n, of `otherwise` behind; n may be anything."""
    is_first = builder.icmp_signed("<", emit.LANE_NUMBERS, emit.splat(builder, builder.trunc(n, emit.I32)))
    return builder.select(is_first, value, otherwise)


@operation(int32(int64, i32x16))
def clamp_and_store_i8(builder, address, v):
    """Clamp 16 int32 to -127..127, write them as int8 and return two sums, a + 65536 b: of places 0 and 1 modulo 4, of
    places 2 and 3."""
    v = builder.select(builder.icmp_signed(">", v, emit.const(127)), emit.const(127), v)
    v = builder.select(builder.icmp_signed("<", v, emit.const(-127)), emit.const(-127), v)
    emit.store(builder, builder.trunc(v, I8_LANES), address)
    places = ir.Constant(emit.V_I32, [16 * (lane // 2 % 2) for lane in range(emit.LANES)])
    return emit.call_llvm(builder, "llvm.vector.reduce.add.v16i32", emit.I32, [builder.shl(v, places)])


@operation(void(int64, i32x16))
def store_i8(builder, address, value):
    """Write 16 int32 in -128..127 as int8."""
    emit.store(builder, builder.trunc(value, I8_LANES), address)


def scatter_of(vector: VectorType, to_items: Callable[[ir.IRBuilder, ir.Value], ir.Value]) -> Any:
    """scatter(address, stride, value): lane i becomes an item at address + i * stride."""

    @operation(void(int64, int64, vector))
    def scatter(builder, address, stride, value):
        items = to_items(builder, value)
        for i in range(emit.LANES):
            emit.store(builder, builder.extract_element(items, emit.I32(i)), address)
            address = builder.add(address, stride)

    return scatter


scatter_f16 = scatter_of(f32x16, emit.f32_to_half)
scatter_i8 = scatter_of(i32x16, lambda builder, v: builder.trunc(v, I8_LANES))


@operation(void(int64, float32))
def write_f16(builder, address, value):
    """Round a float32 to float16 and write it to `address`."""
    half = emit.f32_to_half(builder, emit.splat(builder, value))
    emit.store(builder, builder.extract_element(half, emit.I32(0)), address)


def _access(kind: types.Type, llvm_type: ir.Type) -> tuple[Any, Any]:
    """(read, write) of one number at an address."""
    read = operation(kind(int64))(lambda builder, address: emit.load(builder, address, llvm_type))
    write = operation(void(int64, kind))(lambda builder, address, value: emit.store(builder, value, address))
    return read, write


read_f32, write_f32 = _access(float32, emit.F32)
read_f64, write_f64 = _access(float64, emit.F64)
read_i32, write_i32 = _access(int32, emit.I32)
read_i64, write_i64 = _access(int64, emit.I64)
read_u16, _ = _access(uint16, emit.I16)
read_u8, _ = _access(uint8, emit.I8)


@operation(float32(uint16))
def half_to_f32(builder, bits):
    """The float16 with these bits, as float32."""
    return builder.extract_element(emit.half_to_f32(builder, emit.splat(builder, bits)), emit.I32(0))


@operation(void(int64))
def prefetch(builder, address):
    """Ask for the cache line at `address`, into the second cache: what is ahead would displace what is in use."""
    emit.prefetch(builder, address, 2)


@operation(void(int64))
def expect_to_write(builder, address):
    """The cache line at `address` is fetched, for a later write; never faults."""
    emit.prefetch(builder, address, to_write=True)


@operation(void(*[int64] * 10))
def call_tile(builder, function, w, stride, n_store, n_blocks, x, n_x, out, out_stride, ahead):
    """Call the tile kernel at address `function` (see dot.py for the arguments): formats are data, not branches."""
    emit.call_address(builder, function, [w, stride, n_store, n_blocks, x, n_x, out, out_stride, ahead])


@operation(void(*[int64] * 8, float32, int64, int64))
def call_page(builder, function, state, q, k, v, n_valid, group, head_dim, scale, ahead, work):
    """Call the kernel of one KV page at address `function` (see attention.attend_address)."""
    emit.call_address(builder, function, [state, q, k, v, n_valid, group, head_dim, scale, ahead, work])


@operation(void(*[int64] * 6))
def call_share(builder, function, i, n, thread, after, args):
    """Call what does a share of a kernel's work at address `function` (see split.py)."""
    emit.call_address(builder, function, [i, n, thread, after, args])


@operation(void(*[int64] * 4))
def call_unpack(builder, function, w, n_blocks, out):
    """Call the row unpacker at address `function` (dot.unpack_address)."""
    emit.call_address(builder, function, [w, n_blocks, out])


# --- memory -------------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def scratch(typingctx: Any, n: Any) -> Any:
    """The address of n float32 vectors on the stack of the calling kernel; n is a literal."""
    count = n.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        area = cgutils.alloca_once(builder, ir.ArrayType(emit.V_F32, count))
        area.align = 64
        return builder.ptrtoint(area, emit.I64)

    return int64(n), codegen


@operation(int64(int64))
def take_number(builder, counter):
    """The int64 at address `counter`, which is one more afterwards; threads never get the same."""
    return builder.atomic_rmw("add", builder.inttoptr(counter, emit.I64.as_pointer()), emit.I64(1), "monotonic")


@operation(lambda address, value, n: void(int64, value, int64))
def store_lanes(builder, address, value, n):
    """Write all lanes to `address`, or lane 0 alone when n is 1."""
    with builder.if_else(builder.icmp_signed("!=", n, emit.I64(1))) as (whole, single):
        with whole:
            emit.store(builder, value, address)
        with single:
            emit.store(builder, builder.extract_element(value, emit.I32(0)), address)


def zeros_of(vector: VectorType) -> Any:
    """zeros() -> a vector of that type."""
    return operation(vector())(lambda builder: ir.Constant(vector.llvm_type, None))
