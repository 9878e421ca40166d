"""How the blocks of each format become tiles of integers, as LLVM IR. Sees 16 rows of one block; knows no product.

Every function reads one block of 16 rows (row r at w + r stride) and hands over its steps, 32 weights each:

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
from m2lite.kernels.emit import I8, I16, I32, V_F32, V_I16, V_I32, const, gather, half_to_f32, load_tile
from m2lite.storage.blocks import E2M1_DOUBLED, FORMATS
from m2lite.storage.iquants import IQ4_VALUES


class Step(Protocol):
    def __call__(self, weights: Vectors, scales: Vectors, minimum: ir.Value | None = None) -> None: ...


Reader = Callable[[ir.IRBuilder, ir.Value, ir.Value, Step], None]


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


# --- pieces ----------------------------------------------------------------------------------------------------------


def _bits(builder: ir.IRBuilder, v: ir.Value, shift: int, mask: int) -> ir.Value:
    """In every byte: its bits from `shift` on, as many as the byte `mask` has."""
    moved = builder.lshr(v, const(shift)) if shift else v
    return builder.and_(moved, const(mask * 0x01010101))


def _nibbles(builder: ir.IRBuilder, raw: Vectors) -> Vectors:
    """16 low halves, then 16 high halves."""
    return [_bits(builder, v, shift, 15) for shift in (0, 4) for v in raw]


def _byte_of(builder: ir.IRBuilder, v: ir.Value, i: int) -> ir.Value:
    """Byte i of every lane, as int32."""
    return builder.and_(builder.lshr(v, const(8 * i)) if i else v, const(255))


def _low_half(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
    return half_to_f32(builder, builder.trunc(v, V_I16))


def _high_half(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
    return half_to_f32(builder, builder.trunc(builder.lshr(v, const(16)), V_I16))


def _at(builder: ir.IRBuilder, w: ir.Value, offset: int) -> ir.Value:
    return builder.add(w, emit.I64(offset))


def _scale_at(builder: ir.IRBuilder, w: ir.Value, stride: ir.Value, offset: int = 0) -> ir.Value:
    return half_to_f32(builder, gather(builder, _at(builder, w, offset), stride, I16))


def _times(builder: ir.IRBuilder, d: ir.Value, integers: ir.Value) -> ir.Value:
    return builder.fmul(d, builder.sitofp(integers, V_F32))


def _negative(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
    return builder.fmul(v, ir.Constant(V_F32, [-1.0] * emit.LANES))


# --- blocks of 32 ----------------------------------------------------------------------------------------------------


def _q4_0(builder: ir.IRBuilder, w: ir.Value, stride: ir.Value, step: Step) -> None:
    step(_nibbles(builder, load_tile(builder, w, stride, 2)), [_scale_at(builder, w, stride)])


def _q4_1(builder: ir.IRBuilder, w: ir.Value, stride: ir.Value, step: Step) -> None:
    both = gather(builder, w, stride, I32)
    minimum = _negative(builder, _high_half(builder, both))
    step(_nibbles(builder, load_tile(builder, w, stride, 4)), [_low_half(builder, both)], minimum)


def _with_fifth(builder: ir.IRBuilder, low: Vectors, fifth: ir.Value) -> Vectors:
    """Bit i of `fifth` above the nibble of weight i: a product spreads four bits into four bytes."""
    out = []
    for d, v in enumerate(low):
        four = builder.and_(builder.lshr(fifth, const(4 * d)), const(15))
        spread = builder.and_(builder.mul(four, const(0x00204081)), const(0x01010101))
        out.append(builder.or_(v, builder.shl(spread, const(4))))
    return out


def _q5_0(builder: ir.IRBuilder, w: ir.Value, stride: ir.Value, step: Step) -> None:
    fifth = gather(builder, _at(builder, w, 2), stride, I32)
    low = _nibbles(builder, load_tile(builder, w, stride, 6))
    step(_with_fifth(builder, low, fifth), [_scale_at(builder, w, stride)])


def _q5_1(builder: ir.IRBuilder, w: ir.Value, stride: ir.Value, step: Step) -> None:
    both, fifth = gather(builder, w, stride, I32), gather(builder, _at(builder, w, 4), stride, I32)
    low = _nibbles(builder, load_tile(builder, w, stride, 8))
    minimum = _negative(builder, _high_half(builder, both))
    step(_with_fifth(builder, low, fifth), [_low_half(builder, both)], minimum)


def _q8_0(builder: ir.IRBuilder, w: ir.Value, stride: ir.Value, step: Step) -> None:
    raw = load_tile(builder, w, stride, 2) + load_tile(builder, w, stride, 18)
    step(raw, [_scale_at(builder, w, stride)])


def _iq4_nl(builder: ir.IRBuilder, w: ir.Value, stride: ir.Value, step: Step) -> None:
    codes = _nibbles(builder, load_tile(builder, w, stride, 2))
    values = IQ4_VALUES.tolist()
    step([emit.look_up_bytes(builder, v, values) for v in codes], [_scale_at(builder, w, stride)])


def _mxfp4(builder: ir.IRBuilder, w: ir.Value, stride: ir.Value, step: Step) -> None:
    """The scale is half of 2**(e - 127), since the values are doubled; e below 2 makes it a denormal."""
    e = builder.zext(gather(builder, w, stride, I8), V_I32)
    normal = builder.shl(builder.sub(e, const(1)), const(23))
    denormal = builder.shl(const(0x00200000), builder.and_(e, const(1)))
    scale = builder.select(builder.icmp_unsigned("<", e, const(2)), denormal, normal)
    codes = _nibbles(builder, load_tile(builder, w, stride, 1))
    values = [v + 16 for v in E2M1_DOUBLED.tolist()]
    step([emit.look_up_bytes(builder, v, values) for v in codes], [builder.bitcast(scale, V_F32)])


# --- super-blocks of 256 ---------------------------------------------------------------------------------------------


def _scales_and_minima(builder: ir.IRBuilder, w: ir.Value, stride: ir.Value) -> tuple[Vectors, Vectors]:
    """d s and dmin m of the 8 groups of Q4_K and Q5_K; the first 16 bytes hold d, dmin and 12 of 6-bit numbers."""
    halves, first, second, third = load_tile(builder, w, stride, 0)
    d, dmin = _low_half(builder, halves), _high_half(builder, halves)
    scales = [_bits(builder, first, 0, 63), _bits(builder, third, 0, 15)]
    scales[1] = builder.or_(scales[1], _bits(builder, first, 2, 0x30))
    minima = [_bits(builder, second, 0, 63), _bits(builder, third, 4, 15)]
    minima[1] = builder.or_(minima[1], _bits(builder, second, 2, 0x30))
    return (
        [_times(builder, d, _byte_of(builder, scales[g // 4], g % 4)) for g in range(8)],
        [_times(builder, dmin, _byte_of(builder, minima[g // 4], g % 4)) for g in range(8)],
    )


def _q4_k(builder: ir.IRBuilder, w: ir.Value, stride: ir.Value, step: Step) -> None:
    scales, minima = _scales_and_minima(builder, w, stride)
    for pair in range(4):  # the low halves of 32 bytes, then their high halves
        raw = load_tile(builder, w, stride, 16 + 32 * pair) + load_tile(builder, w, stride, 32 + 32 * pair)
        for half in (0, 1):
            g = 2 * pair + half
            step([_bits(builder, v, 4 * half, 15) for v in raw], [scales[g]], minima[g])


def _q5_k(builder: ir.IRBuilder, w: ir.Value, stride: ir.Value, step: Step) -> None:
    scales, minima = _scales_and_minima(builder, w, stride)
    fifth = load_tile(builder, w, stride, 16) + load_tile(builder, w, stride, 32)
    for pair in range(4):
        raw = load_tile(builder, w, stride, 48 + 32 * pair) + load_tile(builder, w, stride, 64 + 32 * pair)
        for half in (0, 1):
            g = 2 * pair + half
            low = [_bits(builder, v, 4 * half, 15) for v in raw]
            high = [builder.shl(_bits(builder, v, g, 1), const(4)) for v in fifth]
            weights = [builder.or_(a, b) for a, b in zip(low, high, strict=True)]
            step(weights, [scales[g]], minima[g])


def _q6_k(builder: ir.IRBuilder, w: ir.Value, stride: ir.Value, step: Step) -> None:
    """128 low nibbles in 64 bytes and their high pairs in 32, twice; then 16 int8 scales and d."""
    packed = load_tile(builder, w, stride, 192)
    d = _scale_at(builder, w, stride, 208)

    def scale(i: int) -> ir.Value:
        byte = builder.ashr(builder.shl(packed[i // 4], const(24 - 8 * (i % 4))), const(24))
        return _times(builder, d, byte)

    for half in (0, 1):
        low = [load_tile(builder, w, stride, 64 * half + 16 * i) for i in range(4)]
        high = load_tile(builder, w, stride, 128 + 32 * half) + load_tile(builder, w, stride, 144 + 32 * half)
        for quarter in range(4):
            part = low[2 * (quarter % 2)] + low[2 * (quarter % 2) + 1]
            nibbles = [_bits(builder, v, 4 * (quarter // 2), 15) for v in part]
            top = [builder.shl(_bits(builder, v, 2 * quarter, 3), const(4)) for v in high]
            first = 8 * half + 2 * quarter
            weights = [builder.or_(a, b) for a, b in zip(nibbles, top, strict=True)]
            step(weights, [scale(first), scale(first + 1)])


def _iq4_xs(builder: ir.IRBuilder, w: ir.Value, stride: ir.Value, step: Step) -> None:
    """d, 8 high pairs of scales, 8 low nibbles, then 8 x 16 bytes as in IQ4_NL; scales count from -32."""
    start, low = gather(builder, w, stride, I32), gather(builder, _at(builder, w, 4), stride, I32)
    d, high, values = _low_half(builder, start), builder.lshr(start, const(16)), IQ4_VALUES.tolist()
    for g in range(8):
        nibble = builder.and_(builder.lshr(low, const(4 * g)), const(15))
        pair = builder.and_(builder.lshr(high, const(2 * g)), const(3))
        scale = builder.sub(builder.or_(nibble, builder.shl(pair, const(4))), const(32))
        codes = _nibbles(builder, load_tile(builder, w, stride, 8 + 16 * g))
        step([emit.look_up_bytes(builder, v, values) for v in codes], [_times(builder, d, scale)])


TILES = {
    form.name: form
    for form in (
        TileForm("Q4_0", Integers(4, offset=8), _q4_0),
        TileForm("Q4_1", Integers(4), _q4_1, has_minimum=True),
        TileForm("Q5_0", Integers(5, offset=16), _q5_0),
        TileForm("Q5_1", Integers(5), _q5_1, has_minimum=True),
        TileForm("Q8_0", Integers(8), _q8_0),
        TileForm("IQ4_NL", Integers(8), _iq4_nl),
        TileForm("MXFP4", Integers(5, offset=16), _mxfp4),
        TileForm("Q4_K", Integers(4), _q4_k, has_minimum=True),
        TileForm("Q5_K", Integers(5), _q5_k, has_minimum=True),
        TileForm("Q6_K", Integers(6, offset=32, n_groups=2), _q6_k),
        TileForm("IQ4_XS", Integers(8), _iq4_xs),
    )
}
