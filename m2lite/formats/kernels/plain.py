"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 for kernels: to float32, and as tiles of integers."""

from __future__ import annotations

from llvmlite import ir

from m2lite.formats.kernels.block import Unpacker, bits_at, half_at, long_at, write_plus, write_scaled
from m2lite.formats.kernels.tile import Integers, Nibbles, Step, TileForm, loads_of, of_nibbles, scale_at
from m2lite.simd.emit import RowAddresses
from m2lite.simd.kinds import Address
from m2lite.simd.memory import load_i8
from m2lite.simd.vectors import lane_bits


@Unpacker
def unpack_q4_0(w: Address, out: Address) -> None:
    for i in range(2):
        write_scaled(out + 64 * i, half_at(w), bits_at(w + 2, 4 * i, 15) - 8)


@Unpacker
def unpack_q4_1(w: Address, out: Address) -> None:
    for i in range(2):
        write_plus(out + 64 * i, half_at(w), bits_at(w + 4, 4 * i, 15), half_at(w + 2))


@Unpacker
def unpack_q5_0(w: Address, out: Address) -> None:
    for i in range(2):
        fifth = lane_bits(long_at(w + 2) >> (16 * i)) << 4
        write_scaled(out + 64 * i, half_at(w), (bits_at(w + 6, 4 * i, 15) | fifth) - 16)


@Unpacker
def unpack_q5_1(w: Address, out: Address) -> None:
    for i in range(2):
        fifth = lane_bits(long_at(w + 4) >> (16 * i)) << 4
        write_plus(out + 64 * i, half_at(w), bits_at(w + 8, 4 * i, 15) | fifth, half_at(w + 2))


@Unpacker
def unpack_q8_0(w: Address, out: Address) -> None:
    for i in range(2):
        write_scaled(out + 64 * i, half_at(w), load_i8(w + 2 + 16 * i))


def _read_q8_0(builder: ir.IRBuilder, form: TileForm, rows: RowAddresses, step: Step) -> None:
    step(form.weights(builder, loads_of(builder, form, rows), 0), [scale_at(builder, rows)])


tile_q4_0 = TileForm("Q4_0", Integers(4, offset=8), of_nibbles, Nibbles(2))
tile_q4_1 = TileForm("Q4_1", Integers(4), of_nibbles, Nibbles(4), has_minimum=True)
tile_q5_0 = TileForm("Q5_0", Integers(5, offset=16), of_nibbles, Nibbles(6, fifth=2))
tile_q5_1 = TileForm("Q5_1", Integers(5), of_nibbles, Nibbles(8, fifth=4), has_minimum=True)
tile_q8_0 = TileForm("Q8_0", Integers(8), _read_q8_0, lambda builder, load, step: load(2))
