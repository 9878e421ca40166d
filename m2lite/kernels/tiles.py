"""How the blocks of each format become tiles of integers, as LLVM IR. Sees 16 rows of one block; knows no product.

Every function reads one block of 16 rows and hands over its steps, 32 weights each:

    step(weights, scales, minimum)    weight = scale x (byte - offset) - minimum

weights: 8 vectors, lane i of vector d has weights 4d..4d+3 of row i, a byte each, as `Integers` says; scales: a float32
vector per group, exact products of the format's own; minimum: a float32 vector, or None. Formats as in formats/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from llvmlite import ir

from m2lite.formats.fp4 import E2M1_DOUBLED
from m2lite.formats.iquants import IQ4_VALUES
from m2lite.formats.table import FORMATS
from m2lite.kernels import emit
from m2lite.kernels.dots import Integers, Vectors
from m2lite.kernels.emit import I8, I16, I32, RowAddresses, const, gather, half_to_f32, load_tile


class Step(Protocol):
    def __call__(self, weights: Vectors, scales: Vectors, minimum: ir.Value | None = None) -> None: ...


Load = Callable[[int], Vectors]  # the bytes at an offset of every row: 16, or 32 where weights are not of nibbles


@dataclass(frozen=True)
class Nibbles:
    """Weights of which 16 bytes hold 32: the low halves, then the high halves."""

    at: int  # offset of the bytes
    step: int = 0  # bytes from step to step
    fifth: int | None = None  # offset of four bytes, of which bit i belongs above the nibble of weight i
    table: list[int] | None = None  # what the nibbles stand for

    def __call__(self, builder: ir.IRBuilder, load: Load, step: int) -> Vectors:
        """The weights of a step, without their fifth bits."""
        raw = load(self.at + self.step * step)
        found = [bits(builder, v, shift, 15) for shift in (0, 4) for v in raw]
        return found if self.table is None else [emit.look_up_bytes(builder, v, self.table) for v in found]


@dataclass(frozen=True)
class TileForm:
    """A format with a tile of integers: what the bytes are, and what reads a block of them."""

    name: str
    integers: Integers
    read: Callable[[ir.IRBuilder, TileForm, RowAddresses, Step], None]
    weights: Callable[[ir.IRBuilder, Load, int], Vectors]  # of a step
    has_minimum: bool = False

    @property
    def block_bytes(self) -> int:
        return FORMATS[self.name].n_bytes

    @property
    def n_steps(self) -> int:
        """Steps of 32 weights in a block."""
        return FORMATS[self.name].n_weights // 32

    @property
    def step_vectors(self) -> int:
        """Vectors of 64 bytes that a step is."""
        return 8 + self.integers.n_groups + self.has_minimum


# --- pieces ----------------------------------------------------------------------------------------------------------


def _const(v: ir.Value, value: int) -> ir.Constant:
    """An integer in every lane that v has."""
    return const(value, v.type.count)


def _floats(v: ir.Value) -> ir.VectorType:
    return ir.VectorType(emit.F32, v.type.count)


def bits(builder: ir.IRBuilder, v: ir.Value, shift: int, mask: int, to: int = 0) -> ir.Value:
    """In every byte: its bits from `shift` on, as many as the byte `mask` has, moved to bit `to`."""
    if shift > to:
        v = builder.lshr(v, _const(v, shift - to))
    elif shift < to:
        v = builder.shl(v, _const(v, to - shift))
    return builder.and_(v, _const(v, (mask << to) * 0x01010101))


def _byte_of(builder: ir.IRBuilder, v: ir.Value, i: int) -> ir.Value:
    """Byte i of every lane, as int32."""
    return builder.and_(builder.lshr(v, _const(v, 8 * i)) if i else v, _const(v, 255))


def _low_half(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
    return half_to_f32(builder, builder.trunc(v, ir.VectorType(I16, v.type.count)))


def _high_half(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
    return _low_half(builder, builder.lshr(v, _const(v, 16)))


def _scale_at(builder: ir.IRBuilder, rows: RowAddresses, offset: int = 0) -> ir.Value:
    return half_to_f32(builder, gather(builder, rows, offset, I16))


def _times(builder: ir.IRBuilder, d: ir.Value, integers: ir.Value) -> ir.Value:
    return builder.fmul(d, builder.sitofp(integers, _floats(integers)))


def _negative(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
    return builder.fmul(v, ir.Constant(v.type, [-1.0] * v.type.count))


def _with_bits(builder: ir.IRBuilder, low: Vectors, high: Vectors) -> Vectors:
    return [builder.or_(a, b) for a, b in zip(low, high, strict=True)]


def _loads_of(builder: ir.IRBuilder, form: TileForm, rows: RowAddresses) -> Load:
    """What was loaded for one step is there for the next."""
    n_bytes = 16 if isinstance(form.weights, Nibbles) else 32
    return cache(lambda offset: [v for at in range(offset, offset + n_bytes, 16) for v in load_tile(builder, rows, at)])


# --- blocks of 32 ----------------------------------------------------------------------------------------------------


def _of_nibbles(builder: ir.IRBuilder, form: TileForm, rows: RowAddresses, step: Step) -> None:
    """A float16 scale, a float16 minimum if there is one, nibbles."""
    minimum = None
    if form.has_minimum:
        both = gather(builder, rows, 0, I32)
        minimum = _negative(builder, _high_half(builder, both))
    weights = form.weights(builder, _loads_of(builder, form, rows), 0)
    step(weights, [_low_half(builder, both) if form.has_minimum else _scale_at(builder, rows)], minimum)


def _of_five_bits(builder: ir.IRBuilder, form: TileForm, rows: RowAddresses, step: Step) -> None:
    """The same with the fifth bits before the nibbles."""
    both = gather(builder, rows, 0, I32) if form.has_minimum else None
    fifth = gather(builder, rows, form.weights.fifth, I32)
    low = form.weights(builder, _loads_of(builder, form, rows), 0)
    minimum = _negative(builder, _high_half(builder, both)) if form.has_minimum else None
    weights = _with_fifth(builder, low, fifth)
    step(weights, [_low_half(builder, both) if form.has_minimum else _scale_at(builder, rows)], minimum)


def _with_fifth(builder: ir.IRBuilder, low: Vectors, fifth: ir.Value) -> Vectors:
    """Bit i of `fifth` above the nibble of weight i: a product spreads four bits into four bytes."""
    out = []
    for d, v in enumerate(low):
        four = builder.and_(builder.lshr(fifth, _const(v, 4 * d)), _const(v, 15))
        spread = builder.and_(builder.mul(four, _const(v, 0x00204081)), _const(v, 0x01010101))
        out.append(builder.or_(v, builder.shl(spread, _const(v, 4))))
    return out


def _q8_0(builder: ir.IRBuilder, form: TileForm, rows: RowAddresses, step: Step) -> None:
    step(form.weights(builder, _loads_of(builder, form, rows), 0), [_scale_at(builder, rows)])


def _mxfp4(builder: ir.IRBuilder, form: TileForm, rows: RowAddresses, step: Step) -> None:
    """The scale is half of 2**(e - 127), since the values are doubled; e below 2 makes it a denormal.

    (e - 1) 2**23 are its bits from e = 2 on, (e + 1) 2**21 below, and the larger number is the right one.
    """
    e = builder.zext(gather(builder, rows, 0, I8), ir.VectorType(I32, rows.n))
    quarter = builder.shl(e, _const(e, 21))
    normal = builder.sub(builder.shl(quarter, _const(e, 2)), _const(e, 1 << 23))
    denormal = builder.add(quarter, _const(e, 1 << 21))
    scale = builder.select(builder.icmp_signed(">", normal, denormal), normal, denormal)
    weights = form.weights(builder, _loads_of(builder, form, rows), 0)
    step(weights, [builder.bitcast(scale, _floats(scale))])


# --- super-blocks of 256 ---------------------------------------------------------------------------------------------


def _scales_and_minima(builder: ir.IRBuilder, rows: RowAddresses) -> Callable[[int], tuple[Vectors, ir.Value]]:
    """Gives d s and dmin m of a group of Q4_K and Q5_K; the first 16 bytes hold d, dmin and 12 of 6-bit numbers.

    They are made when they are asked for: all at once would not fit into registers.
    """
    halves, first, second, third = load_tile(builder, rows, 0)
    d, dmin = _low_half(builder, halves), _high_half(builder, halves)
    scales = [bits(builder, first, 0, 63), bits(builder, third, 0, 15)]
    scales[1] = builder.or_(scales[1], bits(builder, first, 2, 0x30))
    minima = [bits(builder, second, 0, 63), bits(builder, third, 4, 15)]
    minima[1] = builder.or_(minima[1], bits(builder, second, 2, 0x30))

    def group(g: int) -> tuple[Vectors, ir.Value]:
        scale, minimum = (_byte_of(builder, packed[g // 4], g % 4) for packed in (scales, minima))
        return [_times(builder, d, scale)], _times(builder, dmin, minimum)

    return group


def _q4_k_weights(builder: ir.IRBuilder, load: Load, step: int) -> Vectors:
    """The low halves of 32 bytes, then their high halves."""
    return [bits(builder, v, 4 * (step % 2), 15) for v in load(16 + 32 * (step // 2))]


def _q5_k_weights(builder: ir.IRBuilder, load: Load, step: int) -> Vectors:
    low = [bits(builder, v, 4 * (step % 2), 15) for v in load(48 + 32 * (step // 2))]
    return _with_bits(builder, low, [bits(builder, v, step, 1, to=4) for v in load(16)])


def _q45_k(builder: ir.IRBuilder, form: TileForm, rows: RowAddresses, step: Step) -> None:
    scales_of, load = _scales_and_minima(builder, rows), _loads_of(builder, form, rows)
    load(16)  # the first nibbles, or Q5_K's fifth bits
    for g in range(8):
        step(form.weights(builder, load, g), *scales_of(g))


def _q6_k_weights(builder: ir.IRBuilder, load: Load, step: int) -> Vectors:
    """128 low nibbles in 64 bytes and their high pairs in 32, twice."""
    half, quarter = divmod(step, 4)
    raw, high = [load(64 * half + 32 * i) for i in (0, 1)], load(128 + 32 * half)
    low = [bits(builder, v, 4 * (quarter // 2), 15) for v in raw[quarter % 2]]
    return _with_bits(builder, low, [bits(builder, v, 2 * quarter, 3, to=4) for v in high])


def _q6_k(builder: ir.IRBuilder, form: TileForm, rows: RowAddresses, step: Step) -> None:
    """The weights, then 16 int8 scales and d."""
    packed = load_tile(builder, rows, 192)
    d, load = _scale_at(builder, rows, 208), _loads_of(builder, form, rows)

    def scale(i: int) -> ir.Value:
        four = packed[i // 4]
        byte = builder.ashr(builder.shl(four, _const(four, 24 - 8 * (i % 4))), _const(four, 24))
        return _times(builder, d, byte)

    for s in range(8):
        step(form.weights(builder, load, s), [scale(2 * s), scale(2 * s + 1)])


def _iq4_xs(builder: ir.IRBuilder, form: TileForm, rows: RowAddresses, step: Step) -> None:
    """d, 8 high pairs of scales, 8 low nibbles, then 8 x 16 bytes as in IQ4_NL; scales count from -32."""
    start, low = gather(builder, rows, 0, I32), gather(builder, rows, 4, I32)
    d, high, load = _low_half(builder, start), builder.lshr(start, _const(low, 16)), _loads_of(builder, form, rows)
    for g in range(8):
        nibble = builder.and_(builder.lshr(low, _const(low, 4 * g)), _const(low, 15))
        pair = builder.and_(builder.lshr(high, _const(low, 2 * g)), _const(low, 3))
        scale = builder.sub(builder.or_(nibble, builder.shl(pair, _const(low, 4))), _const(low, 32))
        weights = form.weights(builder, load, g)
        step(weights, [_times(builder, d, scale)])


# What codes of 4 bits stand for, as `Integers` has it.
_IQ4 = IQ4_VALUES.tolist()
_MXFP4 = [v + 16 for v in E2M1_DOUBLED.tolist()]

TILES = {
    form.name: form
    for form in (
        TileForm("Q4_0", Integers(4, offset=8), _of_nibbles, Nibbles(2)),
        TileForm("Q4_1", Integers(4), _of_nibbles, Nibbles(4), has_minimum=True),
        TileForm("Q5_0", Integers(5, offset=16), _of_five_bits, Nibbles(6, fifth=2)),
        TileForm("Q5_1", Integers(5), _of_five_bits, Nibbles(8, fifth=4), has_minimum=True),
        TileForm("Q8_0", Integers(8), _q8_0, lambda builder, load, step: load(2)),
        TileForm("IQ4_NL", Integers(8, can_change_sign=True), _of_nibbles, Nibbles(2, table=_IQ4)),
        TileForm("MXFP4", Integers(5, offset=16), _mxfp4, Nibbles(1, table=_MXFP4)),
        TileForm("Q4_K", Integers(4), _q45_k, _q4_k_weights, has_minimum=True),
        TileForm("Q5_K", Integers(5), _q45_k, _q5_k_weights, has_minimum=True),
        TileForm("Q6_K", Integers(6, offset=32, n_groups=2), _q6_k, _q6_k_weights),
        TileForm("IQ4_XS", Integers(8, can_change_sign=True), _iq4_xs, Nibbles(8, step=16, table=_IQ4)),
    )
}
