"""Blocks of weights to float32, one function per format. Sees two addresses, no row and no tensor.

unpack_block(w, out): the block at address w becomes its float32 weights at address out, 16 at a time, with the
multiplications of the format's definition (formats/) in the same order, so that the bits agree. Nothing beyond
the block is read. Tables come in through `specialise`, when a format is first compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from m2lite.formats import fp4, iquants
from m2lite.kernels.jit import kernel, specialise
from m2lite.kernels.simd import (
    add,
    half_to_f32,
    i32_to_f32,
    mul,
    read_i32,
    read_u8,
    read_u16,
    splat,
    store_f32,
    sub,
    write_f32,
)
from m2lite.kernels.simd_bits import (
    add_int,
    and_bits,
    flip_signs,
    lane_bits,
    load_i8,
    load_pair,
    load_quad,
    load_u8,
    lookup_of,
    mul_int,
    or_i32,
    shift_left,
    shift_right,
    shift_right_by,
)

HALF, QUARTER = np.float32(0.5), np.float32(0.25)
DELTA = iquants.IQ1_DELTA

# Names that `specialise` fills in: the templates below see them as globals.
grid = signs = powers = np.zeros(1, np.int8)
look_up: Any = None
nibbles = 0  # where they begin


@kernel
def number(x):
    """A small integer as float32."""
    return np.float32(np.int32(x))


@kernel
def half_at(w):
    return half_to_f32(read_u16(w))


@kernel
def long_at(w):
    """Four bytes as an unsigned integer."""
    return np.int64(read_i32(w)) & 0xFFFFFFFF


@kernel
def nibble_at(w, i):
    """4-bit number i of those at w; the low half of a byte comes first."""
    return (read_u8(w + (i >> 1)) >> (4 * (i & 1))) & 15


@kernel
def bits_at(w, shift, mask):
    """16 integers: the bits of `mask` of the 16 bytes at w, moved right by `shift`."""
    return and_bits(shift_right(load_u8(w), shift), mask)


@kernel
def write_scaled(out, scale, q):
    """out[16] = scale q."""
    store_f32(out, mul(splat(scale), i32_to_f32(q)))


@kernel
def write_plus(out, scale, q, m):
    """out[16] = scale q + m."""
    store_f32(out, add(mul(splat(scale), i32_to_f32(q)), splat(m)))


@kernel
def write_minus(out, scale, q, m):
    """out[16] = scale q - m."""
    store_f32(out, sub(mul(splat(scale), i32_to_f32(q)), splat(m)))


# --- blocks of 32 and 64 -------------------------------------------------------------------------------------------


def _q4_0(w, out):
    for i in range(2):
        write_scaled(out + 64 * i, half_at(w), add_int(bits_at(w + 2, 4 * i, 15), -8))


def _q4_1(w, out):
    for i in range(2):
        write_plus(out + 64 * i, half_at(w), bits_at(w + 4, 4 * i, 15), half_at(w + 2))


def _q5_0(w, out):
    for i in range(2):
        fifth = shift_left(lane_bits(long_at(w + 2) >> (16 * i)), 4)
        write_scaled(out + 64 * i, half_at(w), add_int(or_i32(bits_at(w + 6, 4 * i, 15), fifth), -16))


def _q5_1(w, out):
    for i in range(2):
        fifth = shift_left(lane_bits(long_at(w + 4) >> (16 * i)), 4)
        write_plus(out + 64 * i, half_at(w), or_i32(bits_at(w + 8, 4 * i, 15), fifth), half_at(w + 2))


def _q8_0(w, out):
    for i in range(2):
        write_scaled(out + 64 * i, half_at(w), load_i8(w + 2 + 16 * i))


def _iq4_nl(w, out):
    for i in range(2):
        store_f32(out + 64 * i, mul(splat(half_at(w)), look_up(bits_at(w + 2, 4 * i, 15))))


def _mxfp4(w, out):
    for i in range(2):
        store_f32(out + 64 * i, mul(splat(powers[read_u8(w)]), look_up(bits_at(w + 1, 4 * i, 15))))


def _nvfp4(w, out):
    for g in range(4):  # 16 weights: the low halves of 8 bytes, then their high halves
        both = load_pair(w + 4 + 8 * g, w + 4 + 8 * g)
        codes = and_bits(shift_right_by(both, shift_left(lane_bits(0xFF00), 2)), 15)
        store_f32(out + 64 * g, mul(splat(powers[read_u8(w + g)]), look_up(codes)))


# --- K: super-blocks of 256 ----------------------------------------------------------------------------------------


def _q2_k(w, out):
    d, dmin = half_at(w + 80), half_at(w + 82)
    for i in range(16):  # group i: 16 weights, two bits each of 16 bytes
        packed = read_u8(w + i)
        q = bits_at(w + 16 + 32 * (i >> 3) + 16 * (i & 1), i & 6, 3)
        write_minus(out + 64 * i, d * number(packed & 15), q, dmin * number(packed >> 4))


def _q3_k(w, out):
    d = half_at(w + 108)
    for i in range(16):
        low, top = read_u8(w + 96 + (i & 7)) >> (4 * (i >> 3)), read_u8(w + 104 + (i & 3)) >> (2 * (i >> 2))
        scale = d * number(((low & 15) | ((top & 3) << 4)) - 32)
        high = shift_left(bits_at(w + 16 * (i & 1), i >> 1, 1), 2)
        q = or_i32(bits_at(w + 32 + 32 * (i >> 3) + 16 * (i & 1), i & 6, 3), high)
        write_scaled(out + 64 * i, scale, add_int(q, -4))


@kernel
def scale_and_min(w, g):
    """Six bits each, for group g of 32: see kquants.scales_and_mins; w is where the 12 bytes begin."""
    first, second = read_u8(w + (g & 3)), read_u8(w + 4 + (g & 3))
    if g < 4:
        return first & 63, second & 63
    third = read_u8(w + 4 + g)
    return (third & 15) | ((first >> 2) & 0x30), (third >> 4) | ((second >> 2) & 0x30)


def _q4_k(w, out):
    """Q5_K as well: it has fifth bits behind the scales, so that its nibbles lie 32 bytes further on."""
    d, dmin = half_at(w), half_at(w + 2)
    for g in range(8):
        scale_bits, min_bits = scale_and_min(w + 4, g)
        scale, low = d * number(scale_bits), dmin * number(min_bits)
        for i in range(2):
            q = bits_at(w + nibbles + 32 * (g >> 1) + 16 * i, 4 * (g & 1), 15)
            if nibbles == 48:
                q = or_i32(q, shift_left(bits_at(w + 16 + 16 * i, g, 1), 4))
            write_minus(out + 128 * g + 64 * i, scale, q, low)


def _q6_k(w, out):
    d = half_at(w + 208)
    for i in range(16):  # group i: 16 weights; 32 g + 16 (i & 1) is its place among the bytes of high pairs
        g, s, part = i >> 3, (i >> 1) & 3, 16 * (i & 1)
        low = bits_at(w + 64 * g + 32 * (s & 1) + part, 4 * (s >> 1), 15)
        high = shift_left(bits_at(w + 128 + 32 * g + part, 2 * s, 3), 4)
        write_scaled(out + 64 * i, d * number(np.int8(read_u8(w + 192 + i))), add_int(or_i32(low, high), -32))


# --- IQ and TQ: super-blocks of 256 --------------------------------------------------------------------------------


@kernel
def write_signed(out, scale, values, packed):
    """out[16] = (scale value) sign; a set bit of `packed` is a minus."""
    store_f32(out, flip_signs(mul(splat(scale), i32_to_f32(values)), packed))


def _iq2_xxs(w, out):
    d, table = half_at(w), grid.ctypes.data
    for i in range(16):  # 16 weights: two codes
        word, s = long_at(w + 6 + 8 * (i >> 1)), 14 * (i & 1)
        at = w + 2 + 8 * (i >> 1) + 2 * (i & 1)
        packed = signs[(word >> s) & 127] | (np.int64(signs[(word >> (s + 7)) & 127]) << 8)
        values = load_pair(table + 8 * read_u8(at), table + 8 * read_u8(at + 1))
        write_signed(out + 64 * i, d * (HALF + number(word >> 28)) * QUARTER, values, packed)


def _iq2_xs(w, out):
    d, table = half_at(w), grid.ctypes.data
    for i in range(16):
        a, b = np.int64(read_u16(w + 2 + 4 * i)), np.int64(read_u16(w + 4 + 4 * i))
        values = load_pair(table + 8 * (a & 511), table + 8 * (b & 511))
        packed = signs[a >> 9] | (np.int64(signs[b >> 9]) << 8)
        write_signed(out + 64 * i, d * (HALF + number(nibble_at(w + 66, i))) * QUARTER, values, packed)


def _iq2_s(w, out):
    d, table = half_at(w), grid.ctypes.data
    for i in range(16):
        high = nibble_at(w + 66, i)
        a = read_u8(w + 2 + 2 * i) | ((high & 3) << 8)
        b = read_u8(w + 3 + 2 * i) | ((high >> 2) << 8)
        packed = np.int64(read_u16(w + 34 + 2 * i))
        scale = d * (HALF + number(nibble_at(w + 74, i))) * QUARTER
        write_signed(out + 64 * i, scale, load_pair(table + 8 * a, table + 8 * b), packed)


@kernel
def four_codes(table, codes, high):
    """16 numbers: the four bytes at `codes` with four bits of `high` above them say which places of the table."""
    a, b = read_u8(codes) | ((high & 1) << 8), read_u8(codes + 1) | ((high & 2) << 7)
    c, d = read_u8(codes + 2) | ((high & 4) << 6), read_u8(codes + 3) | ((high & 8) << 5)
    return load_quad(table + 4 * a, table + 4 * b, table + 4 * c, table + 4 * d)


def _iq3_xxs(w, out):
    d, table = half_at(w), grid.ctypes.data
    for i in range(16):
        word, s = long_at(w + 66 + 4 * (i >> 1)), 14 * (i & 1)
        packed = signs[(word >> s) & 127] | (np.int64(signs[(word >> (s + 7)) & 127]) << 8)
        values = four_codes(table, w + 2 + 4 * i, 0)
        write_signed(out + 64 * i, d * (HALF + number(word >> 28)) * HALF, values, packed)


def _iq3_s(w, out):
    d, table = half_at(w), grid.ctypes.data
    for i in range(16):
        values = four_codes(table, w + 2 + 4 * i, nibble_at(w + 66, i))
        scale = d * number(1 + 2 * nibble_at(w + 106, i >> 1))
        write_signed(out + 64 * i, scale, values, np.int64(read_u16(w + 74 + 2 * i)))


@kernel
def write_shifted(out, scale, values, is_down):
    """out[16] = scale (value + delta), delta negative where a bit of `is_down` is set."""
    store_f32(out, mul(splat(scale), add(i32_to_f32(values), flip_signs(splat(DELTA), is_down))))


def _iq1_s(w, out):
    d, table = half_at(w), grid.ctypes.data
    for i in range(16):
        word = np.int64(read_u16(w + 34 + 2 * (i >> 1)))
        high = word >> (6 * (i & 1))
        a, b = read_u8(w + 2 + 2 * i) | ((high & 7) << 8), read_u8(w + 3 + 2 * i) | (((high >> 3) & 7) << 8)
        scale = d * number(2 * ((word >> 12) & 7) + 1)
        write_shifted(out + 64 * i, scale, load_pair(table + 8 * a, table + 8 * b), -(word >> 15))


def _iq1_m(w, out):
    table, bits = grid.ctypes.data, 0
    for i in range(4):
        bits |= (read_u16(w + 48 + 2 * i) >> 12) << (4 * i)
    d = half_to_f32(np.uint16(bits))
    for i in range(16):
        high = read_u8(w + 32 + i)
        a, b = read_u8(w + 2 * i) | ((high & 7) << 8), read_u8(w + 1 + 2 * i) | (((high >> 4) & 7) << 8)
        scale = d * number(2 * ((read_u16(w + 48 + 2 * (i >> 2)) >> (3 * (i & 3))) & 7) + 1)
        is_down = 0xFF * ((high >> 3) & 1) | 0xFF00 * (high >> 7)
        write_shifted(out + 64 * i, scale, load_pair(table + 8 * a, table + 8 * b), is_down)


def _iq4_xs(w, out):
    d, high = half_at(w), np.int64(read_u16(w + 2))
    for g in range(8):
        scale = d * number((nibble_at(w + 4, g) | (((high >> (2 * g)) & 3) << 4)) - 32)
        for i in range(2):
            store_f32(out + 128 * g + 64 * i, mul(splat(scale), look_up(bits_at(w + 8 + 16 * g, 4 * i, 15))))


@kernel
def digit_of(q, power):
    """The top digit of 3 (q power mod 256) / 256, less 1: bytes hold five digits of base 3."""
    return add_int(shift_right(mul_int(and_bits(mul_int(q, power), 255), 3), 8), -1)


def _tq1_0(w, out):
    d, power = half_at(w + 52), 1
    for k in range(5):
        for i in range(2):
            write_scaled(out + 128 * k + 64 * i, d, digit_of(load_u8(w + 16 * i), power))
        write_scaled(out + 640 + 64 * k, d, digit_of(load_u8(w + 32), power))
        for j in range(4 if k < 4 else 0):
            digit = ((((np.int64(read_u8(w + 48 + j)) * power) & 255) * 3) >> 8) - 1
            write_f32(out + 960 + 16 * k + 4 * j, d * number(digit))
        power *= 3


def _tq2_0(w, out):
    d = half_at(w + 64)
    for i in range(16):
        q = bits_at(w + 32 * (i >> 3) + 16 * (i & 1), i & 6, 3)
        write_scaled(out + 64 * i, d, add_int(q, -1))


TEMPLATES: Mapping[str, Callable[..., None]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "IQ4_NL": _iq4_nl, "MXFP4": _mxfp4, "NVFP4": _nvfp4,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q4_k, "Q6_K": _q6_k,
    "IQ2_XXS": _iq2_xxs, "IQ2_XS": _iq2_xs, "IQ2_S": _iq2_s, "IQ3_XXS": _iq3_xxs, "IQ3_S": _iq3_s,
    "IQ1_S": _iq1_s, "IQ1_M": _iq1_m, "IQ4_XS": _iq4_xs, "TQ1_0": _tq1_0, "TQ2_0": _tq2_0,
}  # fmt: skip


def _tables_of(name: str) -> dict[str, Any]:
    """What the template of a format reads: tables as flat arrays."""
    if name in ("Q4_K", "Q5_K"):
        return {"nibbles": 16 if name == "Q4_K" else 48}
    if name in ("IQ4_NL", "IQ4_XS"):
        return {"look_up": lookup_of(iquants.IQ4_VALUES.tolist())}
    if name in ("MXFP4", "NVFP4"):
        powers = fp4.power_of_two(np.arange(256, dtype=np.uint8)) if name == "MXFP4" else fp4.UE4M3
        return {"look_up": lookup_of(fp4.E2M1_DOUBLED.tolist()), "powers": powers}
    if name.startswith("IQ"):
        table = iquants.grid("IQ1_S" if name == "IQ1_M" else name)
        return {"grid": table.reshape(-1), "signs": iquants.sign_bytes()}
    return {}


def block_function(name: str) -> Any:
    """unpack_block(w, out) of a format, as a kernel."""
    return kernel(specialise(TEMPLATES[name], f"unpack_block_{name}", **_tables_of(name)))
