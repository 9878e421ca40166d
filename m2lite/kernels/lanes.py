"""Arithmetic on 16 lanes: operators, masks, bits, tables, transposition. Sees addresses and lanes, never a format.

`a + b`, `a < b` and the like act per lane, scalars are broadcast, and nothing is contracted into an fma. `>>` brings in
zeros. Encoders work on 16 blocks at once: a vector holds the same position of each, so that every search is free of
branches and its sums run in the order of the plain loop. Nothing here checks an address.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.core.extending import register_model
from numba.core.imputils import lower_builtin
from numba.core.types import Number, float32, int32, int64, void
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from m2lite.kernels import emit
from m2lite.kernels.simd import I8_LANES, VectorType, _VectorModel, f32x16, i32x16, operation, scatter_of


class MaskType(VectorType):
    """16 truth values."""


register_model(MaskType)(_VectorModel)
mask16 = MaskType("mask16", ir.VectorType(ir.IntType(1), emit.LANES))
_SCALAR = {f32x16: float32, i32x16: int32}


# --- operators ----------------------------------------------------------------------------------------------------


def _kind_of(args):
    """The vector type that an operation on `args` works in, or None if it is none of ours."""
    found = {a for a in args if isinstance(a, VectorType)}
    if len(found) != 1:
        return None
    rest = [a for a in args if not isinstance(a, VectorType)]
    return found.pop() if all(isinstance(a, Number) for a in rest) else None


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


@operation(lambda mask, x, y: x(mask, x, x))
def where(builder, mask, x, y):
    """x where the mask holds, else y, per lane."""
    return builder.select(mask, x, y)


_to_f32, _to_i32, _same = operation(f32x16(i32x16)), operation(i32x16(f32x16)), operation(f32x16(f32x16))


def _llvm(name: str) -> Any:
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


def _bound(sign: str) -> Any:
    """bound(x, limit): x where x `sign` limit, else the limit, NaN included."""

    @operation(f32x16(f32x16, float32))
    def bound(builder, x, limit):
        limit = emit.splat(builder, limit)
        return builder.select(builder.fcmp_ordered(sign, x, limit), x, limit)

    return bound


at_least, at_most = _bound(">"), _bound("<")


def _wide(builder, x):
    """An int64 as int32 in all lanes."""
    return emit.splat(builder, builder.trunc(x, emit.I32))


@operation(i32x16(int64))
def lane_bits(builder, bits):
    """Bit i of `bits` in lane i, as 0 or 1."""
    return builder.and_(builder.lshr(_wide(builder, bits), emit.LANE_NUMBERS), emit.const(1))


@operation(f32x16(f32x16, int64))
def flip_signs(builder, value, bits):
    """The negative of lane i where bit i of `bits` is set."""
    signs = builder.shl(builder.lshr(_wide(builder, bits), emit.LANE_NUMBERS), emit.const(31))
    return builder.bitcast(builder.xor(builder.bitcast(value, emit.V_I32), signs), emit.V_F32)


# --- memory -------------------------------------------------------------------------------------------------------


def _from_bytes(builder, addresses):
    """16 signed bytes, as many from each address, as int32."""
    kind = ir.VectorType(emit.I8, emit.LANES // len(addresses))
    return builder.sext(emit.merged(builder, [emit.load(builder, a, kind) for a in addresses]), emit.V_I32)


_from_one = operation(i32x16(int64))
load_i32 = _from_one(lambda builder, a: emit.load(builder, a, emit.V_I32))
load_u8 = _from_one(lambda builder, a: builder.zext(emit.load(builder, a, I8_LANES), emit.V_I32))
load_i8 = _from_one(lambda builder, a: _from_bytes(builder, [a]))
load_pair = operation(i32x16(int64, int64))(lambda builder, a, b: _from_bytes(builder, [a, b]))
load_quad = operation(i32x16(*[int64] * 4))(lambda builder, a, b, c, d: _from_bytes(builder, [a, b, c, d]))

_store = operation(void(int64, i32x16))
store_i32 = _store(lambda builder, address, v: emit.store(builder, v, address))
store_u16 = _store(lambda builder, address, v: emit.store(builder, builder.trunc(v, emit.V_I16), address))

scatter_u32 = scatter_of(i32x16, lambda builder, v: v)
scatter_u16 = scatter_of(i32x16, lambda builder, v: builder.trunc(v, emit.V_I16))
scatter_u8 = scatter_of(i32x16, lambda builder, v: builder.trunc(v, I8_LANES))


def _interleaved(builder, a, b, size, upper):
    """Groups of `size` lanes taken from a and b in turn, each from the lower or upper half of its 2 * size lanes."""
    mask = []
    for start in range(0, emit.LANES, 2 * size):
        first = start + (size if upper else 0)
        mask += list(range(first, first + size)) + list(range(emit.LANES + first, emit.LANES + first + size))
    return builder.shuffle_vector(a, b, ir.Constant(emit.V_I32, mask))


@operation(void(*[int64] * 4))
def transpose(builder, source, source_stride, to, to_stride):
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


@operation(i32x16(int64, int64))
def load_first_u8(builder, address, n):
    """The n < 16 bytes at `address` in the first lanes, zeros behind; reads no further."""
    out = cgutils.alloca_once_value(builder, ir.Constant(I8_LANES, [0] * emit.LANES))
    with cgutils.for_range(builder, n) as loop:
        byte = emit.load(builder, builder.add(address, loop.index), emit.I8)
        builder.store(builder.insert_element(builder.load(out), byte, builder.trunc(loop.index, emit.I32)), out)
    return builder.zext(builder.load(out), emit.V_I32)


@operation(void(*[int64] * 6))
def call_encoder(builder, function, x, importance, sigma, out, stride):
    """Call the encoder of 16 blocks at address `function` (quant/encode.py)."""
    emit.call_address(builder, function, [x, importance, sigma, out, stride])


# --- tables -------------------------------------------------------------------------------------------------------


def lookup_of(values: list[int]) -> Any:
    """look_up(codes) -> values[code] as float32; 16 signed bytes, and every code is below 16."""
    return operation(f32x16(i32x16))(lambda builder, codes: emit.look_up(builder, codes, values))


def constants(values: Any) -> Any:
    """A function without arguments that gives a vector of these 16 float32."""
    return operation(f32x16())(lambda builder: ir.Constant(emit.V_F32, [float(v) for v in values]))


@operation(f32x16(f32x16, i32x16))
def lookup(builder, table, index):
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
