"""Arithmetic on 16 lanes: operators, functions, masks, tables. Sees lanes, never an address, a format or a model.

`a + b`, `a < b` and the like act per lane, scalars are broadcast, and nothing is contracted into an fma. `>>` brings in
zeros. A value of type `f32x16` or `i32x16` is always 16 lanes, whatever the machine has.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from llvmlite import ir
from numba.core.extending import intrinsic
from numba.core.imputils import lower_builtin
from numba.core.types import Number
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from m2lite.simd import emit
from m2lite.simd.kinds import (
    F32x16,
    I32x16,
    Kind,
    Lanes,
    Signature,
    VectorType,
    f32x16,
    float32,
    i32x16,
    int64,
    lanes,
    mask16,
    resolved,
    uint16,
    vector,
)  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")
Build = Callable[..., "ir.Value | None"]


def operation(wanted: Signature[P, R]) -> Callable[[Build], Callable[P, R]]:
    """Decorates build(builder, *values), which emits LLVM IR, as a function of kernels."""

    def wrap(build: Build) -> Any:
        @functools.wraps(build)  # Numba takes the names of the arguments from it, less the first
        def typed(typingctx: Any, *given: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                value = build(builder, *args)
                return context.get_dummy_value() if value is None else value

            return resolved(wanted, given), codegen

        return intrinsic(typed)

    return wrap


# --- operators ----------------------------------------------------------------------------------------------------


def _kind_of(args: tuple[Any, ...]) -> Any:
    """The vector type that an operation on `args` works in, or None if it is none of ours."""
    found = {a for a in args if isinstance(a, VectorType)}
    rest = [a for a in args if not isinstance(a, VectorType)]
    return found.pop() if len(found) == 1 and all(isinstance(a, Number) for a in rest) else None


def _define(op: Any, builds: dict[Any, Build], result: Any = None) -> None:
    """`op` on every type in `builds`: LLVM values in, one out; `result` is the type where it is another one."""

    class Typing(AbstractTemplate):  # type: ignore[misc]
        key = op

        def generic(self, args: Any, kws: Any) -> Any:
            kind = _kind_of(args)
            if kind not in builds:
                return None
            wanted = (a if isinstance(a, VectorType) else kind.scalar for a in args)
            return signature(result or kind, *wanted)

    infer_global(op)(Typing)
    for kind, build in builds.items():
        scalar = kind.scalar or kind
        for pair in {(kind, kind), (kind, scalar), (scalar, kind)}:

            def lower(context: Any, builder: Any, sig: Any, args: Any, build: Build = build) -> Any:
                return build(builder, *(emit.wide(builder, v) for v in args))

            lower_builtin(op, *pair)(lower)


def _call(name: str) -> Build:
    return lambda builder, x, y: getattr(builder, name)(x, y)


for _op, _in_place, _float, _int in (
    (operator.add, operator.iadd, "fadd", "add"),
    (operator.sub, operator.isub, "fsub", "sub"),
    (operator.mul, operator.imul, "fmul", "mul"),
):
    for _one in (_op, _in_place):
        _define(_one, {f32x16: _call(_float), i32x16: _call(_int)})
_define(operator.truediv, {f32x16: _call("fdiv")})
_define(operator.and_, {i32x16: _call("and_"), mask16: _call("and_")})
_define(operator.or_, {i32x16: _call("or_"), mask16: _call("or_")})
_define(operator.lshift, {i32x16: _call("shl")})
_define(operator.rshift, {i32x16: _call("lshr")})
_COMPARISONS = {operator.lt: "<", operator.gt: ">", operator.le: "<=", operator.ge: ">=", operator.eq: "=="}
for _op, _sign in _COMPARISONS.items():
    _define(
        _op,
        {
            f32x16: lambda b, x, y, s=_sign: b.fcmp_ordered(s, x, y),
            i32x16: lambda b, x, y, s=_sign: b.icmp_signed(s, x, y),
        },
        result=mask16,
    )


# --- float32 ------------------------------------------------------------------------------------------------------


@operation(f32x16(lanes, lanes, lanes))
def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c per lane, rounded once."""
    return emit.fma_values(builder, *(emit.wide(builder, v) for v in (a, b, c)))


@operation(float32(float32, float32, float32))
def fma_scalar(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c of float32, rounded once."""
    return emit.call_llvm(builder, "llvm.fma.f32", emit.F32, [a, b, c])


splat = operation(f32x16(float32))(emit.wide)  # 16 copies


@operation(vector(mask16, vector, vector))
def where(builder: ir.IRBuilder, mask: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """x where the mask holds, else y, per lane; one of them may be a scalar."""
    return builder.select(mask, emit.wide(builder, x), emit.wide(builder, y))


def _bound(sign: str) -> Callable[[Lanes, Lanes], F32x16]:
    """bound(x, limit): x where x `sign` limit, else the limit, NaN included."""

    @operation(f32x16(lanes, lanes))
    def bound(builder: ir.IRBuilder, x: ir.Value, limit: ir.Value) -> ir.Value:
        x, limit = emit.wide(builder, x), emit.wide(builder, limit)
        return builder.select(builder.fcmp_ordered(sign, x, limit), x, limit)

    return bound


maximum, minimum = _bound(">"), _bound("<")
_to_f32, _to_i32, _same = operation(f32x16(i32x16)), operation(i32x16(f32x16)), operation(f32x16(f32x16))


def _llvm(name: str) -> Callable[[F32x16], F32x16]:
    return _same(lambda builder, x: emit.call_llvm(builder, f"llvm.{name}.v16f32", emit.V_F32, [x]))


_MAGIC = ir.Constant(emit.V_F32, [12582912.0] * emit.LANES)  # 1.5 * 2**23: the adder rounds to whole numbers

magnitude, root, floor = _llvm("fabs"), _llvm("sqrt"), _llvm("floor")
nearest = _same(lambda builder, x: builder.fsub(builder.fadd(x, _MAGIC), _MAGIC))
as_half = _same(lambda builder, x: emit.half_to_f32(builder, emit.f32_to_half(builder, x)))
to_i32 = _to_i32(lambda builder, x: builder.fptosi(x, emit.V_I32))
bits_of = _to_i32(lambda builder, x: builder.bitcast(x, emit.V_I32))
half_bits = _to_i32(lambda builder, x: builder.zext(emit.f32_to_half(builder, x), emit.V_I32))
from_bits = _to_f32(lambda builder, x: builder.bitcast(x, emit.V_F32))
from_half_bits = _to_f32(lambda builder, x: emit.half_to_f32(builder, builder.trunc(x, emit.V_I16)))
i32_to_f32 = _to_f32(lambda builder, x: builder.sitofp(x, emit.V_F32))  # exact below 2**24


@operation(i32x16(f32x16))
def round_to_i32(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Nearest integers, ties to even; |x| must be below 2**22."""
    shifted = builder.bitcast(builder.fadd(value, _MAGIC), emit.V_I32)
    return builder.sub(shifted, builder.bitcast(_MAGIC, emit.V_I32))


@operation(f32x16(f32x16, i32x16))
def scale_by_power(builder: ir.IRBuilder, value: ir.Value, exponent: ir.Value) -> ir.Value:
    """value * 2**exponent for exponents in -126..127, by adding to the exponent bits of a factor."""
    factor = builder.shl(builder.add(exponent, emit.const(127)), emit.const(23))
    return builder.fmul(value, builder.bitcast(factor, emit.V_F32))


@operation(float32(uint16))
def half_to_f32(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """The float16 with these bits, as float32."""
    return builder.extract_element(emit.half_to_f32(builder, emit.splat(builder, bits)), emit.I32(0))


# --- lanes together, and apart -------------------------------------------------------------------------------------

tree_sum = operation(float32(f32x16))(emit.tree_of)  # a fixed tree: lane i with i+8, then i+4, i+2, i+1


@operation(float32(f32x16))
def max_lanes(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
    """The largest of 16 lanes; a NaN lane loses against a number."""
    while v.type.count > 1:
        low, high = emit.halves(builder, v)
        v = builder.select(builder.fcmp_ordered(">", low, high), low, high)
    return builder.extract_element(v, emit.I32(0))


@operation(float32(f32x16, f32x16))
def max_abs(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """The largest |x| of two vectors; NaN counts as larger than infinity, so that it cannot be lost."""
    v = [builder.and_(builder.bitcast(x, emit.V_I32), emit.const(0x7FFFFFFF)) for x in (a, b)]
    while True:
        larger = builder.select(builder.icmp_signed(">", v[0], v[1]), v[0], v[1])
        if larger.type.count == 1:
            return builder.bitcast(builder.extract_element(larger, emit.I32(0)), emit.F32)
        v = emit.halves(builder, larger)


def _wide(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """An int64 as int32 in all lanes."""
    return emit.splat(builder, builder.trunc(x, emit.I32))


@operation(f32x16(lanes, int64, lanes))
def first_lanes(builder: ir.IRBuilder, value: ir.Value, n: ir.Value, otherwise: ir.Value) -> ir.Value:
    """Lane i of `value` for i < n, of `otherwise` behind; n may be anything."""
    is_first = builder.icmp_signed("<", emit.LANE_NUMBERS, _wide(builder, n))
    return builder.select(is_first, emit.wide(builder, value), emit.wide(builder, otherwise))


@operation(i32x16(int64))
def lane_bits(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """Bit i of `bits` in lane i, as 0 or 1."""
    return builder.and_(builder.lshr(_wide(builder, bits), emit.LANE_NUMBERS), emit.const(1))


@operation(f32x16(f32x16, int64))
def flip_signs(builder: ir.IRBuilder, value: ir.Value, bits: ir.Value) -> ir.Value:
    """The negative of lane i where bit i of `bits` is set."""
    signs = builder.shl(builder.lshr(_wide(builder, bits), emit.LANE_NUMBERS), emit.const(31))
    return builder.bitcast(builder.xor(builder.bitcast(value, emit.V_I32), signs), emit.V_F32)


# --- constants and tables ------------------------------------------------------------------------------------------


def zeros_of(kind: Kind[R]) -> Callable[[], R]:
    """zeros() -> a vector of that type."""
    return operation(kind())(lambda builder: ir.Constant(kind.llvm_type, None))


def constants(values: Any) -> Callable[[], F32x16]:
    """A function without arguments that gives a vector of these 16 float32."""
    return operation(f32x16())(lambda builder: ir.Constant(emit.V_F32, [float(v) for v in values]))


def lookup_of(values: list[int]) -> Callable[[I32x16], F32x16]:
    """look_up(codes) -> values[code] as float32; 16 signed bytes, and every code is below 16."""
    return operation(f32x16(i32x16))(lambda builder, codes: emit.look_up(builder, codes, values))


@operation(f32x16(f32x16, i32x16))
def lookup(builder: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
    """table[index] per lane: `table` is a vector, every index is in 0..15.

    A permutation where the processor has one for floats, lane by lane elsewhere.
    """
    if "avx512f" in emit.FEATURES:
        return emit.call_llvm(builder, "llvm.x86.avx512.permvar.sf.512", emit.V_F32, [table, index])
    if "avx2" in emit.FEATURES:
        half = ir.VectorType(emit.F32, 8)
        parts = []
        for part in emit.halves(builder, index):
            low, high = (
                emit.call_llvm(builder, "llvm.x86.avx2.permps", half, [t, part]) for t in emit.halves(builder, table)
            )
            is_high = builder.icmp_signed(">", part, emit.const(7, 8))
            parts.append(builder.select(is_high, high, low))
        return emit.joined(builder, *parts)
    out = ir.Constant(emit.V_F32, ir.Undefined)
    for lane in range(emit.LANES):
        value = builder.extract_element(table, builder.extract_element(index, emit.I32(lane)))
        out = builder.insert_element(out, value, emit.I32(lane))
    return out
