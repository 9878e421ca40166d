"""Vector types and operations for kernels. Sees addresses and lanes, never a format or a model.

A value of type `f32x16` or `i32x16` is always 16 lanes, whatever the machine has. Nothing here checks an address.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.extending import intrinsic, models, register_model

from m2lite.kernels import emit


class VectorType(types.Type):
    """16 lanes of float32 or int32; `addresses` packs use a plain 64-bit integer."""

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


# --- what kernels call ------------------------------------------------------------------------------------------


def _binary(name: str, result: types.Type, build: Any) -> Any:
    @intrinsic
    def operation(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return build(builder, *args)

        return result(a, b), codegen

    operation.__name__ = name
    return operation


add = _binary("add", f32x16, lambda builder, a, b: builder.fadd(a, b))
sub = _binary("sub", f32x16, lambda builder, a, b: builder.fsub(a, b))
mul = _binary("mul", f32x16, lambda builder, a, b: builder.fmul(a, b))
div = _binary("div", f32x16, lambda builder, a, b: builder.fdiv(a, b))


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c per lane, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit.fma_values(builder, *args)

    return f32x16(f32x16, f32x16, f32x16), codegen


@intrinsic
def splat(typingctx: Any, x: Any) -> Any:
    """16 copies of a float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit.splat(builder, args[0])

    return f32x16(types.float32), codegen


@intrinsic
def load_f32(typingctx: Any, address: Any) -> Any:
    """16 float32 at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit.load(builder, args[0], emit.V_F32)

    return f32x16(types.int64), codegen


@intrinsic
def load_f16(typingctx: Any, address: Any) -> Any:
    """16 float16 at `address`, as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit.half_to_f32(builder, emit.load(builder, args[0], emit.V_I16))

    return f32x16(types.int64), codegen


@intrinsic
def store_f32(typingctx: Any, address: Any, value: Any) -> Any:
    """Write 16 float32 to `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit.store(builder, args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.int64, f32x16), codegen


@intrinsic
def store_f16(typingctx: Any, address: Any, value: Any) -> Any:
    """Round 16 float32 to float16 (nearest, ties to even) and write them to `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half = emit.f32_to_half(builder, args[1])
        emit.store(builder, half, args[0])
        return context.get_dummy_value()

    return types.void(types.int64, f32x16), codegen


@intrinsic
def tree_sum(typingctx: Any, value: Any) -> Any:
    """The 16 lanes added as a fixed tree: lane i with i+8, then i+4, i+2, i+1."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit.tree_of(builder, args[0])

    return types.float32(f32x16), codegen


@intrinsic
def max_lanes(typingctx: Any, value: Any) -> Any:
    """The largest of 16 lanes; a NaN lane loses against a number."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = args[0]
        while v.type.count > 1:
            low, high = emit.halves(builder, v)
            v = builder.select(builder.fcmp_ordered(">", low, high), low, high)
        return builder.extract_element(v, emit.I32(0))

    return types.float32(f32x16), codegen


maximum = _binary("maximum", f32x16, lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


@intrinsic
def max_abs(typingctx: Any, a: Any, b: Any) -> Any:
    """The largest |x| of two vectors; NaN counts as larger than infinity, so that it cannot be lost."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = [builder.and_(builder.bitcast(x, emit.V_I32), emit.const(0x7FFFFFFF)) for x in args]
        while True:
            larger = builder.select(builder.icmp_signed(">", v[0], v[1]), v[0], v[1])
            if larger.type.count == 1:
                return builder.bitcast(builder.extract_element(larger, emit.I32(0)), emit.F32)
            v = emit.halves(builder, larger)

    return types.float32(f32x16, f32x16), codegen


@intrinsic
def or_nan(typingctx: Any, value: Any, x: Any) -> Any:
    """`value` per lane, but NaN where x is NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, x = args
        return builder.select(builder.fcmp_unordered("uno", x, x), x, value)

    return f32x16(f32x16, f32x16), codegen


@intrinsic
def round_to_i32(typingctx: Any, value: Any) -> Any:
    """Nearest integers, ties to even; |x| must be below 2**22."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        magic = ir.Constant(emit.V_F32, [12582912.0] * emit.LANES)  # 1.5 * 2**23: the adder rounds to integers
        shifted = builder.bitcast(builder.fadd(args[0], magic), emit.V_I32)
        return builder.sub(shifted, builder.bitcast(magic, emit.V_I32))

    return i32x16(f32x16), codegen


@intrinsic
def i32_to_f32(typingctx: Any, value: Any) -> Any:
    """int32 lanes as float32 (exact below 2**24)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sitofp(args[0], emit.V_F32)

    return f32x16(i32x16), codegen


@intrinsic
def scale_by_power(typingctx: Any, value: Any, exponent: Any) -> Any:
    """value * 2**exponent for exponents in -126..127, by adding to the exponent bits of a factor."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        factor = builder.shl(builder.add(args[1], emit.const(127)), emit.const(23))
        return builder.fmul(args[0], builder.bitcast(factor, emit.V_F32))

    return f32x16(f32x16, i32x16), codegen


@intrinsic
def select_below(typingctx: Any, x: Any, limit: Any, below: Any, otherwise: Any) -> Any:
    """Per lane: `below` where x < limit, else `otherwise`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, limit, below, otherwise = args
        return builder.select(builder.fcmp_ordered("<", x, limit), below, otherwise)

    return f32x16(f32x16, f32x16, f32x16, f32x16), codegen


@intrinsic
def first_lanes(typingctx: Any, value: Any, n: Any, otherwise: Any) -> Any:
    """Lane i of `value` for i < n, of `otherwise` behind; n may be anything."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, n, otherwise = args
        is_first = builder.icmp_signed("<", emit.LANE_NUMBERS, emit.splat(builder, builder.trunc(n, emit.I32)))
        return builder.select(is_first, value, otherwise)

    return f32x16(f32x16, types.int64, f32x16), codegen


@intrinsic
def clamp_and_store_i8(typingctx: Any, address: Any, value: Any) -> Any:
    """Clamp 16 int32 to -127..127, write them as int8 and return two sums, a + 65536 b: of places 0 and 1 modulo 4, of
    places 2 and 3."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = args[1]
        v = builder.select(builder.icmp_signed(">", v, emit.const(127)), emit.const(127), v)
        v = builder.select(builder.icmp_signed("<", v, emit.const(-127)), emit.const(-127), v)
        emit.store(builder, builder.trunc(v, ir.VectorType(emit.I8, emit.LANES)), args[0])
        places = ir.Constant(emit.V_I32, [16 * (lane // 2 % 2) for lane in range(emit.LANES)])
        return emit.call_llvm(builder, "llvm.vector.reduce.add.v16i32", emit.I32, [builder.shl(v, places)])

    return types.int32(types.int64, i32x16), codegen


@intrinsic
def store_i8(typingctx: Any, address: Any, value: Any) -> Any:
    """Write 16 int32 in -128..127 as int8."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit.store(builder, builder.trunc(args[1], ir.VectorType(emit.I8, emit.LANES)), args[0])
        return context.get_dummy_value()

    return types.void(types.int64, i32x16), codegen


def scatter_of(vector: types.Type, to_items: Any) -> Any:
    """scatter(address, stride, value): lane i becomes an item at address + i * stride."""

    @intrinsic
    def scatter(typingctx: Any, address: Any, stride: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            at, step, lanes = args
            items = to_items(builder, lanes)
            for i in range(emit.LANES):
                emit.store(builder, builder.extract_element(items, emit.I32(i)), at)
                at = builder.add(at, step)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, vector), codegen

    return scatter


scatter_f16 = scatter_of(f32x16, emit.f32_to_half)
scatter_i8 = scatter_of(i32x16, lambda builder, v: builder.trunc(v, ir.VectorType(emit.I8, emit.LANES)))


@intrinsic
def write_f16(typingctx: Any, address: Any, value: Any) -> Any:
    """Round a float32 to float16 and write it to `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half = emit.f32_to_half(builder, emit.splat(builder, args[1]))
        emit.store(builder, builder.extract_element(half, emit.I32(0)), args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


def _scalar_access(name: str, kind: types.Type, llvm_type: ir.Type) -> tuple[Any, Any]:
    @intrinsic
    def read(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit.load(builder, args[0], llvm_type)

        return kind(types.int64), codegen

    @intrinsic
    def write(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit.store(builder, args[1], args[0])
            return context.get_dummy_value()

        return types.void(types.int64, kind), codegen

    read.__name__, write.__name__ = f"read_{name}", f"write_{name}"
    return read, write


read_f32, write_f32 = _scalar_access("f32", types.float32, emit.F32)
read_i32, write_i32 = _scalar_access("i32", types.int32, emit.I32)
read_i64, write_i64 = _scalar_access("i64", types.int64, emit.I64)
read_u16, _ = _scalar_access("u16", types.uint16, emit.I16)
read_u8, _ = _scalar_access("u8", types.uint8, emit.I8)


@intrinsic
def half_to_f32(typingctx: Any, bits: Any) -> Any:
    """The float16 with these bits, as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_element(emit.half_to_f32(builder, emit.splat(builder, args[0])), emit.I32(0))

    return types.float32(types.uint16), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at `address`, into the second cache: what is ahead would displace what is in use."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit.prefetch(builder, args[0], 2)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _call_address(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Call the function at the address that is the first argument with the others; it returns nothing."""
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in args[1:]])
    builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
    return context.get_dummy_value()


@intrinsic
def call_tile(typingctx: Any, function: Any, w: Any, stride: Any, n_store: Any, n_blocks: Any, x: Any, n_x: Any,
              out: Any, out_stride: Any, ahead: Any) -> Any:  # fmt: skip
    """Call the tile kernel at address `function` (see dot.py for the arguments): formats are data, not branches."""
    return types.void(*([types.int64] * 10)), _call_address


@intrinsic
def call_page(typingctx: Any, function: Any, state: Any, q: Any, k: Any, v: Any, n_valid: Any, group: Any,
              head_dim: Any, scale: Any, ahead: Any, work: Any) -> Any:  # fmt: skip
    """Call the kernel of one KV page at address `function` (see attention.attend_address)."""
    return types.void(*[types.int64] * 8, types.float32, types.int64, types.int64), _call_address


@intrinsic
def call_unpack(typingctx: Any, function: Any, w: Any, n_blocks: Any, out: Any) -> Any:
    """Call the row unpacker at address `function` (dot.unpack_address)."""
    return types.void(*([types.int64] * 4)), _call_address


# --- memory -------------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def scratch(typingctx: Any, n: Any) -> Any:
    """The address of n float32 vectors on the stack of the calling kernel; n is a literal."""
    count = n.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        area = cgutils.alloca_once(builder, ir.ArrayType(emit.V_F32, count))
        area.align = 64
        return builder.ptrtoint(area, emit.I64)

    return types.int64(n), codegen


@intrinsic
def take_number(typingctx: Any, counter: Any) -> Any:
    """The int64 at address `counter`, which is one more afterwards; threads never get the same."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], emit.I64.as_pointer())
        return builder.atomic_rmw("add", pointer, emit.I64(1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def store_lanes(typingctx: Any, address: Any, value: Any, n: Any) -> Any:
    """Write all lanes to `address`, or lane 0 alone when n is 1."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, vector, count = args
        with builder.if_else(builder.icmp_signed("!=", count, emit.I64(1))) as (whole, single):
            with whole:
                emit.store(builder, vector, at)
            with single:
                emit.store(builder, builder.extract_element(vector, emit.I32(0)), at)
        return context.get_dummy_value()

    return types.void(types.int64, value, types.int64), codegen


@intrinsic
def expect_to_write(typingctx: Any, address: Any) -> Any:
    """The cache line at `address` is fetched, for a later write; never faults."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit.prefetch(builder, args[0], to_write=True)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def zeros_of(vector: VectorType) -> Any:
    """zeros() -> a vector of that type."""

    @intrinsic
    def zeros(typingctx: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return ir.Constant(vector.llvm_type, None)

        return vector(), codegen

    return zeros


@intrinsic
def fma_scalar(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c of float32, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit.call_llvm(builder, "llvm.fma.f32", emit.F32, list(args))

    return types.float32(types.float32, types.float32, types.float32), codegen
