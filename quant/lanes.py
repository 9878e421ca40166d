"""Arithmetic on 16 lanes for the encoders: operators, masks, transposition. Sees addresses and lanes, never a format.

An encoder works on 16 blocks at once: a vector holds the same position of each, so that every search is free of
branches and its sums run in the order of the plain loop. `a + b`, `a < b` and the like act per lane, scalars are
broadcast, and nothing is contracted into an fma. Nothing here checks an address.
"""
# mypy: ignore-errors

from __future__ import annotations

import operator

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.extending import intrinsic
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from m2lite.kernels import emit
from m2lite.kernels.simd import VectorType, _VectorModel, f32x16, i32x16, scatter_of
from m2lite.kernels.simd import register_model as _register_model

__all__ = ["f32x16", "i32x16", "mask16"]


class MaskType(VectorType):
    """16 truth values."""


_register_model(MaskType)(_VectorModel)
mask16 = MaskType("mask16", ir.VectorType(ir.IntType(1), emit.LANES))
_SCALAR = {f32x16: types.float32, i32x16: types.int32}


# --- operators ----------------------------------------------------------------------------------------------------


def _kind_of(args):
    """The vector type that an operation on `args` works in, or None if it is none of ours."""
    found = {a for a in args if isinstance(a, VectorType)}
    if len(found) != 1:
        return None
    rest = [a for a in args if not isinstance(a, VectorType)]
    return found.pop() if all(isinstance(a, types.Number) for a in rest) else None


def _define(op, builds, result=None):
    """`op` on every type in `builds`: LLVM values in, one out; `result` is the type where it is another one."""

    class Typing(AbstractTemplate):
        key = op

        def generic(self, args, kws):
            kind = _kind_of(args)
            if kind not in builds:
                return None
            wanted = (a if isinstance(a, VectorType) else _SCALAR[kind] for a in args)
            return signature(result or kind, *wanted)

    infer_global(op)(Typing)
    for kind, build in builds.items():
        scalar = _SCALAR.get(kind, kind)
        for pair in {(kind, kind), (kind, scalar), (scalar, kind)}:

            def lower(context, builder, sig, args, build=build):
                wide = [
                    v if isinstance(t, VectorType) else emit.splat(builder, v)
                    for v, t in zip(args, sig.args, strict=True)
                ]
                return build(builder, *wide)

            lower_builtin(op, *pair)(lower)


def _shift(name):
    return lambda b, x, n: getattr(b, name)(x, n)


for _op, _in_place, _float, _int in (
    (operator.add, operator.iadd, "fadd", "add"),
    (operator.sub, operator.isub, "fsub", "sub"),
    (operator.mul, operator.imul, "fmul", "mul"),
):
    for _one in (_op, _in_place):
        _define(_one, {f32x16: _shift(_float), i32x16: _shift(_int)})
_define(operator.truediv, {f32x16: _shift("fdiv")})
_define(operator.and_, {i32x16: _shift("and_"), mask16: _shift("and_")})
_define(operator.or_, {i32x16: _shift("or_"), mask16: _shift("or_")})
_define(operator.lshift, {i32x16: _shift("shl")})
_define(operator.rshift, {i32x16: _shift("lshr")})
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


# --- functions ----------------------------------------------------------------------------------------------------


@intrinsic
def where(typingctx, mask, x, y):
    """x where the mask holds, else y, per lane."""

    def codegen(context, builder, sig, args):
        return builder.select(*args)

    return (x(mask, x, x), codegen) if x == y else None


def _unary(name, result, argument, build):
    @intrinsic
    def function(typingctx, x):
        def codegen(context, builder, sig, args):
            return build(builder, args[0])

        return result(argument), codegen

    function.__name__ = name
    return function


def _llvm(name):
    return lambda b, x: emit.call_llvm(b, f"llvm.{name}.v16f32", emit.V_F32, [x])


_MAGIC = ir.Constant(emit.V_F32, [12582912.0] * emit.LANES)  # 1.5 * 2**23: the adder rounds to whole numbers

magnitude = _unary("magnitude", f32x16, f32x16, _llvm("fabs"))
root = _unary("root", f32x16, f32x16, _llvm("sqrt"))
floor = _unary("floor", f32x16, f32x16, _llvm("floor"))
nearest = _unary("nearest", f32x16, f32x16, lambda b, x: b.fsub(b.fadd(x, _MAGIC), _MAGIC))
to_i32 = _unary("to_i32", i32x16, f32x16, lambda b, x: b.fptosi(x, emit.V_I32))
to_f32 = _unary("to_f32", f32x16, i32x16, lambda b, x: b.sitofp(x, emit.V_F32))
bits_of = _unary("bits_of", i32x16, f32x16, lambda b, x: b.bitcast(x, emit.V_I32))
from_bits = _unary("from_bits", f32x16, i32x16, lambda b, x: b.bitcast(x, emit.V_F32))
as_half = _unary("as_half", f32x16, f32x16, lambda b, x: emit.half_to_f32(b, emit.f32_to_half(b, x)))
whole = _unary("whole", f32x16, types.float32, emit.splat)


@intrinsic
def at_least(typingctx, x, low):
    """x, but `low` where x is smaller or NaN."""

    def codegen(context, builder, sig, args):
        bound = emit.splat(builder, args[1])
        return builder.select(builder.fcmp_ordered(">", args[0], bound), args[0], bound)

    return f32x16(f32x16, types.float32), codegen


@intrinsic
def at_most(typingctx, x, high):
    """x, but `high` where x is larger or NaN."""

    def codegen(context, builder, sig, args):
        bound = emit.splat(builder, args[1])
        return builder.select(builder.fcmp_ordered("<", args[0], bound), args[0], bound)

    return f32x16(f32x16, types.float32), codegen


def _load(name, kind, stored, widen=None):
    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            value = emit.load(builder, args[0], stored)
            return widen(builder, value) if widen else value

        return kind(types.int64), codegen

    load.__name__ = name
    return load


def _store(name, kind, narrow=None):
    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, sig, args):
            emit.store(builder, narrow(builder, args[1]) if narrow else args[1], args[0])
            return context.get_dummy_value()

        return types.void(types.int64, kind), codegen

    store.__name__ = name
    return store


_V_I8 = ir.VectorType(emit.I8, emit.LANES)
load_i32 = _load("load_i32", i32x16, emit.V_I32)
load_u8 = _load("load_u8", i32x16, _V_I8, lambda b, v: b.zext(v, emit.V_I32))
load_u16 = _load("load_u16", i32x16, emit.V_I16, lambda b, v: b.zext(v, emit.V_I32))
store_i32 = _store("store_i32", i32x16)
store_u16 = _store("store_u16", i32x16, lambda b, v: b.trunc(v, emit.V_I16))


@intrinsic
def half_bits(typingctx, x):
    """The bits of x as float16, in the low half of each lane."""

    def codegen(context, builder, sig, args):
        return builder.zext(emit.f32_to_half(builder, args[0]), emit.V_I32)

    return i32x16(f32x16), codegen


@intrinsic
def from_half_bits(typingctx, bits):
    """float32 from the low halves of each lane as float16."""

    def codegen(context, builder, sig, args):
        return emit.half_to_f32(builder, builder.trunc(args[0], emit.V_I16))

    return f32x16(i32x16), codegen


scatter_u32 = scatter_of(i32x16, lambda b, v: v)
scatter_u16 = scatter_of(i32x16, lambda b, v: b.trunc(v, emit.V_I16))
scatter_u8 = scatter_of(i32x16, lambda b, v: b.trunc(v, _V_I8))


def _interleaved(builder, a, b, size, upper):
    """Groups of `size` lanes taken from a and b in turn, each from the lower or upper half of its 2 * size lanes."""
    mask = []
    for start in range(0, emit.LANES, 2 * size):
        first = start + (size if upper else 0)
        mask += list(range(first, first + size)) + list(range(emit.LANES + first, emit.LANES + first + size))
    return builder.shuffle_vector(a, b, ir.Constant(emit.V_I32, mask))


@intrinsic
def transpose(typingctx, source, source_stride, to, to_stride):
    """16 rows of 16 32-bit words at `source` -> its transposition at `to`; strides in bytes."""

    def codegen(context, builder, sig, args):
        source, source_stride, to, to_stride = args
        rows = []
        for _ in range(emit.LANES):
            rows.append(emit.load(builder, source, emit.V_I32))
            source = builder.add(source, source_stride)
        size = 1
        while size < emit.LANES:
            out = list(rows)
            for i in range(emit.LANES):
                if not i & size:
                    out[i] = _interleaved(builder, rows[i], rows[i + size], size, False)
                    out[i + size] = _interleaved(builder, rows[i], rows[i + size], size, True)
            rows, size = out, 2 * size
        for row in rows:
            emit.store(builder, row, to)
            to = builder.add(to, to_stride)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 4)), codegen


def _lookup_value(builder, table, index):
    """table[index] per lane: a permutation where the processor has one for floats, lane by lane elsewhere."""
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


@intrinsic
def lookup(typingctx, table, index):
    """table[index] per lane; `table` is a vector, every index is in 0..15."""

    def codegen(context, builder, sig, args):
        return _lookup_value(builder, *args)

    return f32x16(f32x16, i32x16), codegen


@intrinsic
def load_first_u8(typingctx, address, n):
    """The n < 16 bytes at `address` in the first lanes, zeros behind; reads no further."""

    def codegen(context, builder, sig, args):
        address, n = args
        out = cgutils.alloca_once_value(builder, ir.Constant(_V_I8, [0] * emit.LANES))
        with cgutils.for_range(builder, n) as loop:
            byte = emit.load(builder, builder.add(address, loop.index), emit.I8)
            builder.store(builder.insert_element(builder.load(out), byte, builder.trunc(loop.index, emit.I32)), out)
        return builder.zext(builder.load(out), emit.V_I32)

    return i32x16(types.int64, types.int64), codegen


def constants(values):
    """A function without arguments that gives a vector of these 16 float32."""

    @intrinsic
    def vector(typingctx):
        def codegen(context, builder, sig, args):
            return ir.Constant(emit.V_F32, [float(v) for v in values])

        return f32x16(), codegen

    return vector


@intrinsic
def call_encoder(typingctx, function, x, importance, sigma, out, stride):
    """Call the encoder of 16 blocks at address `function` (encode.py)."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [emit.I64] * 5)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*([types.int64] * 6)), codegen
