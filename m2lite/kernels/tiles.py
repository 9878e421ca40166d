"""How the blocks of each format become tiles of integers, as LLVM IR. Sees 16 rows of one block; knows no product.

Every function reads one block of 16 rows and hands over its steps, 32 weights each:

    step(weights, scales, minimum)    weight = scale x (byte - offset) - minimum

weights: 8 vectors, lane i of vector d has weights 4d..4d+3 of row i, a byte each, as `Integers` says; scales: a float32
vector per group, exact products of the format's own; minimum: a float32 vector, or None. Formats as in storage/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from llvmlite import ir

from m2lite.kernels import emit
from m2lite.kernels.dots import Integers, Vectors
from m2lite.kernels.emit import I8, I16, I32, RowAddresses, const, gather, half_to_f32, load_tile
from m2lite.storage.blocks import E2M1_DOUBLED, FORMATS
from m2lite.storage.iquants import IQ4_VALUES


class Step(Protocol):
    def __call__(self, weights: Vectors, scales: Vectors, minimum: ir.Value | None = None) -> None: ...


Reader = Callable[[ir.IRBuilder, RowAddresses, Step], None]


@dataclass(frozen=True)
class TileForm:
    """A format with a tile of integers: what the bytes are, and what reads a block of them."""

    name: str
    integers: Integers
    read: Reader
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


# What codes of 4 bits stand for, as `Integers` has it.
IQ4_BYTES = IQ4_VALUES.tolist()
MXFP4_BYTES = [v + 16 for v in E2M1_DOUBLED.tolist()]


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


def nibbles(builder: ir.IRBuilder, raw: Vectors) -> Vectors:
    """16 low halves, then 16 high halves."""
    return [bits(builder, v, shift, 15) for shift in (0, 4) for v in raw]


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


# --- blocks of 32 ----------------------------------------------------------------------------------------------------


def _q4_0(builder: ir.IRBuilder, rows: RowAddresses, step: Step) -> None:
    step(nibbles(builder, load_tile(builder, rows, 2)), [_scale_at(builder, rows)])


def _q4_1(builder: ir.IRBuilder, rows: RowAddresses, step: Step) -> None:
    both = gather(builder, rows, 0, I32)
    minimum = _negative(builder, _high_half(builder, both))
    step(nibbles(builder, load_tile(builder, rows, 4)), [_low_half(builder, both)], minimum)


def _with_fifth(builder: ir.IRBuilder, low: Vectors, fifth: ir.Value) -> Vectors:
    """Bit i of `fifth` above the nibble of weight i: a product spreads four bits into four bytes."""
    out = []
    for d, v in enumerate(low):
        four = builder.and_(builder.lshr(fifth, _const(v, 4 * d)), _const(v, 15))
        spread = builder.and_(builder.mul(four, _const(v, 0x00204081)), _const(v, 0x01010101))
        out.append(builder.or_(v, builder.shl(spread, _const(v, 4))))
    return out


def _q5_0(builder: ir.IRBuilder, rows: RowAddresses, step: Step) -> None:
    fifth = gather(builder, rows, 2, I32)
    low = nibbles(builder, load_tile(builder, rows, 6))
    step(_with_fifth(builder, low, fifth), [_scale_at(builder, rows)])


def _q5_1(builder: ir.IRBuilder, rows: RowAddresses, step: Step) -> None:
    both, fifth = gather(builder, rows, 0, I32), gather(builder, rows, 4, I32)
    low = nibbles(builder, load_tile(builder, rows, 8))
    minimum = _negative(builder, _high_half(builder, both))
    step(_with_fifth(builder, low, fifth), [_low_half(builder, both)], minimum)


def _q8_0(builder: ir.IRBuilder, rows: RowAddresses, step: Step) -> None:
    raw = load_tile(builder, rows, 2) + load_tile(builder, rows, 18)
    step(raw, [_scale_at(builder, rows)])


def _iq4_nl(builder: ir.IRBuilder, rows: RowAddresses, step: Step) -> None:
    codes = nibbles(builder, load_tile(builder, rows, 2))
    step([emit.look_up_bytes(builder, v, IQ4_BYTES) for v in codes], [_scale_at(builder, rows)])


def _mxfp4(builder: ir.IRBuilder, rows: RowAddresses, step: Step) -> None:
    """The scale is half of 2**(e - 127), since the values are doubled; e below 2 makes it a denormal.

    (e - 1) 2**23 are its bits from e = 2 on, (e + 1) 2**21 below, and the larger number is the right one.
    """
    e = builder.zext(gather(builder, rows, 0, I8), ir.VectorType(I32, rows.n))
    quarter = builder.shl(e, _const(e, 21))
    normal = builder.sub(builder.shl(quarter, _const(e, 2)), _const(e, 1 << 23))
    denormal = builder.add(quarter, _const(e, 1 << 21))
    scale = builder.select(builder.icmp_signed(">", normal, denormal), normal, denormal)
    codes = nibbles(builder, load_tile(builder, rows, 1))
    step([emit.look_up_bytes(builder, v, MXFP4_BYTES) for v in codes], [builder.bitcast(scale, _floats(scale))])


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


def _q4_k(builder: ir.IRBuilder, rows: RowAddresses, step: Step) -> None:
    scales_of = _scales_and_minima(builder, rows)
    for pair in range(4):  # the low halves of 32 bytes, then their high halves
        raw = load_tile(builder, rows, 16 + 32 * pair) + load_tile(builder, rows, 32 + 32 * pair)
        for half in (0, 1):
            g = 2 * pair + half
            step([bits(builder, v, 4 * half, 15) for v in raw], *scales_of(g))


def _q5_k(builder: ir.IRBuilder, rows: RowAddresses, step: Step) -> None:
    scales_of = _scales_and_minima(builder, rows)
    fifth = load_tile(builder, rows, 16) + load_tile(builder, rows, 32)
    for pair in range(4):
        raw = load_tile(builder, rows, 48 + 32 * pair) + load_tile(builder, rows, 64 + 32 * pair)
        for half in (0, 1):
            g = 2 * pair + half
            low = [bits(builder, v, 4 * half, 15) for v in raw]
            high = [bits(builder, v, g, 1, to=4) for v in fifth]
            weights = [builder.or_(a, b) for a, b in zip(low, high, strict=True)]
            step(weights, *scales_of(g))


def _q6_k(builder: ir.IRBuilder, rows: RowAddresses, step: Step) -> None:
    """128 low nibbles in 64 bytes and their high pairs in 32, twice; then 16 int8 scales and d."""
    packed = load_tile(builder, rows, 192)
    d = _scale_at(builder, rows, 208)

    def scale(i: int) -> ir.Value:
        four = packed[i // 4]
        byte = builder.ashr(builder.shl(four, _const(four, 24 - 8 * (i % 4))), _const(four, 24))
        return _times(builder, d, byte)

    for half in (0, 1):
        low = [load_tile(builder, rows, 64 * half + 16 * i) for i in range(4)]
        high = load_tile(builder, rows, 128 + 32 * half) + load_tile(builder, rows, 144 + 32 * half)
        for quarter in range(4):
            part = low[2 * (quarter % 2)] + low[2 * (quarter % 2) + 1]
            lower = [bits(builder, v, 4 * (quarter // 2), 15) for v in part]
            top = [bits(builder, v, 2 * quarter, 3, to=4) for v in high]
            first = 8 * half + 2 * quarter
            weights = [builder.or_(a, b) for a, b in zip(lower, top, strict=True)]
            step(weights, [scale(first), scale(first + 1)])


def _iq4_xs(builder: ir.IRBuilder, rows: RowAddresses, step: Step) -> None:
    """d, 8 high pairs of scales, 8 low nibbles, then 8 x 16 bytes as in IQ4_NL; scales count from -32."""
    start, low = gather(builder, rows, 0, I32), gather(builder, rows, 4, I32)
    d, high = _low_half(builder, start), builder.lshr(start, _const(low, 16))
    for g in range(8):
        nibble = builder.and_(builder.lshr(low, _const(low, 4 * g)), _const(low, 15))
        pair = builder.and_(builder.lshr(high, _const(low, 2 * g)), _const(low, 3))
        scale = builder.sub(builder.or_(nibble, builder.shl(pair, _const(low, 4))), _const(low, 32))
        codes = nibbles(builder, load_tile(builder, rows, 8 + 16 * g))
        step([emit.look_up_bytes(builder, v, IQ4_BYTES) for v in codes], [_times(builder, d, scale)])


TILES = {
    form.name: form
    for form in (
        TileForm("Q4_0", Integers(4, offset=8), _q4_0),
        TileForm("Q4_1", Integers(4), _q4_1, has_minimum=True),
        TileForm("Q5_0", Integers(5, offset=16), _q5_0),
        TileForm("Q5_1", Integers(5), _q5_1, has_minimum=True),
        TileForm("Q8_0", Integers(8), _q8_0),
        TileForm("IQ4_NL", Integers(8, can_change_sign=True), _iq4_nl),
        TileForm("MXFP4", Integers(5, offset=16), _mxfp4),
        TileForm("Q4_K", Integers(4), _q4_k, has_minimum=True),
        TileForm("Q5_K", Integers(5), _q5_k, has_minimum=True),
        TileForm("Q6_K", Integers(6, offset=32, n_groups=2), _q6_k),
        TileForm("IQ4_XS", Integers(8, can_change_sign=True), _iq4_xs),
    )
}
