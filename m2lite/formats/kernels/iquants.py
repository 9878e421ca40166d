"""The IQ formats for kernels: to float32, and those of 4 bits as tiles of integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from m2lite.formats import iquants
from m2lite.formats.kernels.block import Unpacker, bits_at, half_at, long_at, nibble_at, number
from m2lite.formats.kernels.tile import (
    Integers,
    Nibbles,
    Step,
    TileForm,
    constant,
    loads_of,
    low_half,
    of_nibbles,
    times,
)
from m2lite.simd.emit import I32, RowAddresses, gather
from m2lite.simd.jit import kernel
from m2lite.simd.kinds import Address, F32x16, I32x16, Int, Scalar
from m2lite.simd.memory import load_pair, load_quad, read_u8, read_u16, store_f32
from m2lite.simd.vectors import flip_signs, half_to_f32, i32_to_f32, lookup_of, splat

HALF, QUARTER = np.float32(0.5), np.float32(0.25)
DELTA = iquants.IQ1_DELTA

# Names that Unpacker fills in: the templates below see them as globals.
grid: npt.NDArray[np.int8]
signs: npt.NDArray[np.int8]
look_up: Callable[[I32x16], F32x16]


def _grids(name: str) -> dict[str, Any]:
    """Read when a format is first compiled: they come from the gguf package."""
    return {"grid": iquants.grid(name).reshape(-1), "signs": iquants.sign_bytes()}


def _four_bits() -> dict[str, Any]:
    return {"look_up": lookup_of(iquants.IQ4_VALUES.tolist())}


def _iq4_nl(w: Address, out: Address) -> None:
    for i in range(2):
        store_f32(out + 64 * i, half_at(w) * look_up(bits_at(w + 2, 4 * i, 15)))


@kernel
def write_signed(out: Address, scale: Scalar, values: I32x16, packed: Int) -> None:
    """out[16] = (scale value) sign; a set bit of `packed` is a minus."""
    store_f32(out, flip_signs(scale * i32_to_f32(values), packed))


def _iq2_xxs(w: Address, out: Address) -> None:
    d, table = half_at(w), Address(grid.ctypes.data)
    for i in range(16):  # 16 weights: two codes
        word, s = long_at(w + 6 + 8 * (i >> 1)), 14 * (i & 1)
        at = w + 2 + 8 * (i >> 1) + 2 * (i & 1)
        packed = signs[(word >> s) & 127] | (np.int64(signs[(word >> (s + 7)) & 127]) << 8)
        values = load_pair(table + 8 * read_u8(at), table + 8 * read_u8(at + 1))
        write_signed(out + 64 * i, d * (HALF + number(word >> 28)) * QUARTER, values, packed)


def _iq2_xs(w: Address, out: Address) -> None:
    d, table = half_at(w), Address(grid.ctypes.data)
    for i in range(16):
        a, b = np.int64(read_u16(w + 2 + 4 * i)), np.int64(read_u16(w + 4 + 4 * i))
        values = load_pair(table + 8 * (a & 511), table + 8 * (b & 511))
        packed = signs[a >> 9] | (np.int64(signs[b >> 9]) << 8)
        write_signed(out + 64 * i, d * (HALF + number(nibble_at(w + 66, i))) * QUARTER, values, packed)


def _iq2_s(w: Address, out: Address) -> None:
    d, table = half_at(w), Address(grid.ctypes.data)
    for i in range(16):
        high = nibble_at(w + 66, i)
        a = read_u8(w + 2 + 2 * i) | ((high & 3) << 8)
        b = read_u8(w + 3 + 2 * i) | ((high >> 2) << 8)
        packed = np.int64(read_u16(w + 34 + 2 * i))
        scale = d * (HALF + number(nibble_at(w + 74, i))) * QUARTER
        write_signed(out + 64 * i, scale, load_pair(table + 8 * a, table + 8 * b), packed)


@kernel
def four_codes(table: Address, codes: Address, high: int) -> I32x16:
    """16 numbers: the four bytes at `codes` with four bits of `high` above them say which places of the table."""
    a, b = read_u8(codes) | ((high & 1) << 8), read_u8(codes + 1) | ((high & 2) << 7)
    c, d = read_u8(codes + 2) | ((high & 4) << 6), read_u8(codes + 3) | ((high & 8) << 5)
    return load_quad(table + 4 * a, table + 4 * b, table + 4 * c, table + 4 * d)


def _iq3_xxs(w: Address, out: Address) -> None:
    d, table = half_at(w), Address(grid.ctypes.data)
    for i in range(16):
        word, s = long_at(w + 66 + 4 * (i >> 1)), 14 * (i & 1)
        packed = signs[(word >> s) & 127] | (np.int64(signs[(word >> (s + 7)) & 127]) << 8)
        values = four_codes(table, w + 2 + 4 * i, 0)
        write_signed(out + 64 * i, d * (HALF + number(word >> 28)) * HALF, values, packed)


def _iq3_s(w: Address, out: Address) -> None:
    d, table = half_at(w), Address(grid.ctypes.data)
    for i in range(16):
        values = four_codes(table, w + 2 + 4 * i, nibble_at(w + 66, i))
        scale = d * number(1 + 2 * nibble_at(w + 106, i >> 1))
        write_signed(out + 64 * i, scale, values, np.int64(read_u16(w + 74 + 2 * i)))


@kernel
def write_shifted(out: Address, scale: Scalar, values: I32x16, is_down: Int) -> None:
    """out[16] = scale (value + delta), delta negative where a bit of `is_down` is set."""
    store_f32(out, scale * (i32_to_f32(values) + flip_signs(splat(DELTA), is_down)))


def _iq1_s(w: Address, out: Address) -> None:
    d, table = half_at(w), Address(grid.ctypes.data)
    for i in range(16):
        word = np.int64(read_u16(w + 34 + 2 * (i >> 1)))
        high = word >> (6 * (i & 1))
        a, b = read_u8(w + 2 + 2 * i) | ((high & 7) << 8), read_u8(w + 3 + 2 * i) | (((high >> 3) & 7) << 8)
        scale = d * number(2 * ((word >> 12) & 7) + 1)
        write_shifted(out + 64 * i, scale, load_pair(table + 8 * a, table + 8 * b), -(word >> 15))


def _iq1_m(w: Address, out: Address) -> None:
    table, bits = Address(grid.ctypes.data), 0
    for i in range(4):
        bits |= (read_u16(w + 48 + 2 * i) >> 12) << (4 * i)
    d = half_to_f32(np.uint16(bits))
    for i in range(16):
        high = read_u8(w + 32 + i)
        a, b = read_u8(w + 2 * i) | ((high & 7) << 8), read_u8(w + 1 + 2 * i) | (((high >> 4) & 7) << 8)
        scale = d * number(2 * ((read_u16(w + 48 + 2 * (i >> 2)) >> (3 * (i & 3))) & 7) + 1)
        is_down = 0xFF * ((high >> 3) & 1) | 0xFF00 * (high >> 7)
        write_shifted(out + 64 * i, scale, load_pair(table + 8 * a, table + 8 * b), is_down)


def _iq4_xs(w: Address, out: Address) -> None:
    d, high = half_at(w), np.int64(read_u16(w + 2))
    for g in range(8):
        scale = d * number((nibble_at(w + 4, g) | (((high >> (2 * g)) & 3) << 4)) - 32)
        for i in range(2):
            store_f32(out + 128 * g + 64 * i, scale * look_up(bits_at(w + 8 + 16 * g, 4 * i, 15)))


unpack_iq2_xxs = Unpacker(_iq2_xxs, lambda: _grids("IQ2_XXS"))
unpack_iq2_xs = Unpacker(_iq2_xs, lambda: _grids("IQ2_XS"))
unpack_iq2_s = Unpacker(_iq2_s, lambda: _grids("IQ2_S"))
unpack_iq3_xxs = Unpacker(_iq3_xxs, lambda: _grids("IQ3_XXS"))
unpack_iq3_s = Unpacker(_iq3_s, lambda: _grids("IQ3_S"))
unpack_iq1_s = Unpacker(_iq1_s, lambda: _grids("IQ1_S"))
unpack_iq1_m = Unpacker(_iq1_m, lambda: _grids("IQ1_S"))
unpack_iq4_nl = Unpacker(_iq4_nl, _four_bits)
unpack_iq4_xs = Unpacker(_iq4_xs, _four_bits)


def _read_iq4_xs(builder: ir.IRBuilder, form: TileForm, rows: RowAddresses, step: Step) -> None:
    """d, 8 high pairs of scales, 8 low nibbles, then 8 x 16 bytes as in IQ4_NL; scales count from -32."""
    start, low = gather(builder, rows, 0, I32), gather(builder, rows, 4, I32)
    d, high, load = low_half(builder, start), builder.lshr(start, constant(low, 16)), loads_of(builder, form, rows)
    for g in range(8):
        nibble = builder.and_(builder.lshr(low, constant(low, 4 * g)), constant(low, 15))
        pair = builder.and_(builder.lshr(high, constant(low, 2 * g)), constant(low, 3))
        scale = builder.sub(builder.or_(nibble, builder.shl(pair, constant(low, 4))), constant(low, 32))
        weights = form.weights(builder, load, g)
        step(weights, [times(builder, d, scale)])


_VALUES = iquants.IQ4_VALUES.tolist()
tile_iq4_nl = TileForm("IQ4_NL", Integers(8, can_change_sign=True), of_nibbles, Nibbles(2, table=_VALUES))
tile_iq4_xs = TileForm("IQ4_XS", Integers(8, can_change_sign=True), _read_iq4_xs, Nibbles(8, step=16, table=_VALUES))
