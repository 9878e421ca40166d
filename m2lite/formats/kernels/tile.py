"""What a format with a tile of integers says of it, and pieces to read blocks with, as LLVM IR. Knows no product.

`TileForm.read` reads one block of 16 rows and hands over its steps, 32 weights each:

    step(weights, scales, minimum)    weight = scale x (byte - offset) - minimum

weights: 8 vectors, lane i of vector d has weights 4d..4d+3 of row i, a byte each, as `Integers` says; scales: a float32
vector per group, exact products of the format's own; minimum: a float32 vector, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from llvmlite import ir

from m2lite.formats.table import FORMATS
from m2lite.simd import emit
from m2lite.simd.emit import I16, I32, RowAddresses, Vectors, const, gather, half_to_f32, load_tile


@dataclass(frozen=True)
class Integers:
    """What the weight bytes of a format are: below 2**bits and `offset` too large, or (8 bits) signed as they stand."""

    bits: int
    offset: int = 0
    n_groups: int = 1  # scales per 32 weights: 1, or 2 of 16 weights each
    can_change_sign: bool = False  # signed bytes of which none is -128

    @property
    def is_signed(self) -> bool:
        return self.bits == 8


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
    first_cache: bool = False  # whether weights are asked for into the first cache, else into the second

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


def constant(v: ir.Value, value: int) -> ir.Constant:
    """An integer in every lane that v has."""
    return const(value, v.type.count)


def floats(v: ir.Value) -> ir.VectorType:
    return ir.VectorType(emit.F32, v.type.count)


def bits(builder: ir.IRBuilder, v: ir.Value, shift: int, mask: int, to: int = 0) -> ir.Value:
    """In every byte: its bits from `shift` on, as many as the byte `mask` has, moved to bit `to`."""
    if shift > to:
        v = builder.lshr(v, constant(v, shift - to))
    elif shift < to:
        v = builder.shl(v, constant(v, to - shift))
    return builder.and_(v, constant(v, (mask << to) * 0x01010101))


def byte_of(builder: ir.IRBuilder, v: ir.Value, i: int) -> ir.Value:
    """Byte i of every lane, as int32."""
    return builder.and_(builder.lshr(v, constant(v, 8 * i)) if i else v, constant(v, 255))


def low_half(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
    return half_to_f32(builder, builder.trunc(v, ir.VectorType(I16, v.type.count)))


def high_half(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
    return low_half(builder, builder.lshr(v, constant(v, 16)))


def scale_at(builder: ir.IRBuilder, rows: RowAddresses, offset: int = 0) -> ir.Value:
    return half_to_f32(builder, gather(builder, rows, offset, I16))


def times(builder: ir.IRBuilder, d: ir.Value, integers: ir.Value) -> ir.Value:
    return builder.fmul(d, builder.sitofp(integers, floats(integers)))


def negative(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
    return builder.fmul(v, ir.Constant(v.type, [-1.0] * v.type.count))


def with_bits(builder: ir.IRBuilder, low: Vectors, high: Vectors) -> Vectors:
    return [builder.or_(a, b) for a, b in zip(low, high, strict=True)]


def loads_of(builder: ir.IRBuilder, form: TileForm, rows: RowAddresses) -> Load:
    """What was loaded for one step is there for the next."""
    n_bytes = 16 if isinstance(form.weights, Nibbles) else 32
    return cache(lambda offset: [v for at in range(offset, offset + n_bytes, 16) for v in load_tile(builder, rows, at)])


def of_nibbles(builder: ir.IRBuilder, form: TileForm, rows: RowAddresses, step: Step) -> None:
    """A block of 32: a float16 scale, a float16 minimum if there is one, fifth bits if there are some, nibbles."""
    assert isinstance(form.weights, Nibbles)
    both = gather(builder, rows, 0, I32) if form.has_minimum else None
    fifth = None if form.weights.fifth is None else gather(builder, rows, form.weights.fifth, I32)
    weights = form.weights(builder, loads_of(builder, form, rows), 0)
    if fifth is not None:
        weights = _with_fifth(builder, weights, fifth)
    if both is None:
        step(weights, [scale_at(builder, rows)])
    else:
        step(weights, [low_half(builder, both)], negative(builder, high_half(builder, both)))


def _with_fifth(builder: ir.IRBuilder, low: Vectors, fifth: ir.Value) -> Vectors:
    """Bit i of `fifth` above the nibble of weight i: a product spreads four bits into four bytes."""
    out = []
    for d, v in enumerate(low):
        four = builder.and_(builder.lshr(fifth, constant(v, 4 * d)), constant(v, 15))
        spread = builder.and_(builder.mul(four, constant(v, 0x00204081)), constant(v, 0x01010101))
        out.append(builder.or_(v, builder.shl(spread, constant(v, 4))))
    return out
