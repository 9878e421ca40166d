"""The K formats for kernels: to float32, and as tiles of integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir

from m2lite.formats.kernels.block import Unpacker, bits_at, half_at, number, write_minus, write_scaled
from m2lite.formats.kernels.tile import (
    Integers,
    Load,
    Step,
    TileForm,
    bits,
    byte_of,
    constant,
    high_half,
    loads_of,
    low_half,
    scale_at,
    times,
    with_bits,
)
from m2lite.simd.emit import RowAddresses, Vectors, load_tile
from m2lite.simd.jit import kernel
from m2lite.simd.kinds import Address
from m2lite.simd.memory import read_u8


@Unpacker
def unpack_q2_k(w: Address, out: Address) -> None:
    d, dmin = half_at(w + 80), half_at(w + 82)
    for i in range(16):  # group i: 16 weights, two bits each of 16 bytes
        packed = read_u8(w + i)
        q = bits_at(w + 16 + 32 * (i >> 3) + 16 * (i & 1), i & 6, 3)
        write_minus(out + 64 * i, d * number(packed & 15), q, dmin * number(packed >> 4))


@Unpacker
def unpack_q3_k(w: Address, out: Address) -> None:
    d = half_at(w + 108)
    for i in range(16):
        low, top = read_u8(w + 96 + (i & 7)) >> (4 * (i >> 3)), read_u8(w + 104 + (i & 3)) >> (2 * (i >> 2))
        scale = d * number(((low & 15) | ((top & 3) << 4)) - 32)
        high = bits_at(w + 16 * (i & 1), i >> 1, 1) << 2
        q = bits_at(w + 32 + 32 * (i >> 3) + 16 * (i & 1), i & 6, 3) | high
        write_scaled(out + 64 * i, scale, q - 4)


nibbles: int  # where they begin: Unpacker fills it in


@kernel
def scale_and_min(w: Address, g: int) -> tuple[int, int]:
    """Six bits each, for group g of 32: see formats/kquants.py; w is where the 12 bytes begin."""
    first, second = read_u8(w + (g & 3)), read_u8(w + 4 + (g & 3))
    if g < 4:
        return first & 63, second & 63
    third = read_u8(w + 4 + g)
    return (third & 15) | ((first >> 2) & 0x30), (third >> 4) | ((second >> 2) & 0x30)


def _unpack_q45_k(w: Address, out: Address) -> None:
    """Q5_K has fifth bits behind the scales, so that its nibbles lie 32 bytes further on than those of Q4_K."""
    d, dmin = half_at(w), half_at(w + 2)
    for g in range(8):
        scale_bits, min_bits = scale_and_min(w + 4, g)
        scale, low = d * number(scale_bits), dmin * number(min_bits)
        for i in range(2):
            q = bits_at(w + nibbles + 32 * (g >> 1) + 16 * i, 4 * (g & 1), 15)
            if nibbles == 48:
                q = q | (bits_at(w + 16 + 16 * i, g, 1) << 4)
            write_minus(out + 128 * g + 64 * i, scale, q, low)


unpack_q4_k = Unpacker(_unpack_q45_k, lambda: {"nibbles": 16})
unpack_q5_k = Unpacker(_unpack_q45_k, lambda: {"nibbles": 48})


@Unpacker
def unpack_q6_k(w: Address, out: Address) -> None:
    d = half_at(w + 208)
    for i in range(16):  # group i: 16 weights; 32 g + 16 (i & 1) is its place among the bytes of high pairs
        g, s, part = i >> 3, (i >> 1) & 3, 16 * (i & 1)
        low = bits_at(w + 64 * g + 32 * (s & 1) + part, 4 * (s >> 1), 15)
        high = bits_at(w + 128 + 32 * g + part, 2 * s, 3) << 4
        write_scaled(out + 64 * i, d * number(np.int8(read_u8(w + 192 + i))), (low | high) - 32)


def _scales_and_minima(builder: ir.IRBuilder, rows: RowAddresses) -> Callable[[int], tuple[Vectors, ir.Value]]:
    """Gives d s and dmin m of a group of Q4_K and Q5_K; the first 16 bytes hold d, dmin and 12 of 6-bit numbers.

    They are made when they are asked for: all at once would not fit into registers.
    """
    halves, first, second, third = load_tile(builder, rows, 0)
    d, dmin = low_half(builder, halves), high_half(builder, halves)
    scales = [bits(builder, first, 0, 63), bits(builder, third, 0, 15)]
    scales[1] = builder.or_(scales[1], bits(builder, first, 2, 0x30))
    minima = [bits(builder, second, 0, 63), bits(builder, third, 4, 15)]
    minima[1] = builder.or_(minima[1], bits(builder, second, 2, 0x30))

    def group(g: int) -> tuple[Vectors, ir.Value]:
        scale, minimum = (byte_of(builder, packed[g // 4], g % 4) for packed in (scales, minima))
        return [times(builder, d, scale)], times(builder, dmin, minimum)

    return group


def _q4_k_weights(builder: ir.IRBuilder, load: Load, step: int) -> Vectors:
    """The low halves of 32 bytes, then their high halves."""
    return [bits(builder, v, 4 * (step % 2), 15) for v in load(16 + 32 * (step // 2))]


def _q5_k_weights(builder: ir.IRBuilder, load: Load, step: int) -> Vectors:
    low = [bits(builder, v, 4 * (step % 2), 15) for v in load(48 + 32 * (step // 2))]
    return with_bits(builder, low, [bits(builder, v, step, 1, to=4) for v in load(16)])


def _read_q45_k(builder: ir.IRBuilder, form: TileForm, rows: RowAddresses, step: Step) -> None:
    scales_of, load = _scales_and_minima(builder, rows), loads_of(builder, form, rows)
    load(16)  # the first nibbles, or Q5_K's fifth bits
    for g in range(8):
        step(form.weights(builder, load, g), *scales_of(g))


def _q6_k_weights(builder: ir.IRBuilder, load: Load, step: int) -> Vectors:
    """128 low nibbles in 64 bytes and their high pairs in 32, twice."""
    half, quarter = divmod(step, 4)
    raw, high = load(64 * half + 32 * (quarter % 2)), load(128 + 32 * half)
    low = [bits(builder, v, 4 * (quarter // 2), 15) for v in raw]
    return with_bits(builder, low, [bits(builder, v, 2 * quarter, 3, to=4) for v in high])


def _read_q6_k(builder: ir.IRBuilder, form: TileForm, rows: RowAddresses, step: Step) -> None:
    """The weights, then 16 int8 scales and d."""
    packed = load_tile(builder, rows, 192)
    d, load = scale_at(builder, rows, 208), loads_of(builder, form, rows)

    def scale(i: int) -> ir.Value:
        four = packed[i // 4]
        byte = builder.ashr(builder.shl(four, constant(four, 24 - 8 * (i % 4))), constant(four, 24))
        return times(builder, d, byte)

    for s in range(8):
        step(form.weights(builder, load, s), [scale(2 * s), scale(2 * s + 1)])


tile_q4_k = TileForm("Q4_K", Integers(4), _read_q45_k, _q4_k_weights, has_minimum=True)
tile_q5_k = TileForm("Q5_K", Integers(5), _read_q45_k, _q5_k_weights, has_minimum=True)
tile_q6_k = TileForm("Q6_K", Integers(6, offset=32, n_groups=2), _read_q6_k, _q6_k_weights)
