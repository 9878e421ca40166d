"""The TQ formats for kernels: to float32."""

from __future__ import annotations

import numpy as np

from m2lite.formats.kernels.block import Unpacker, bits_at, half_at, number, write_scaled
from m2lite.simd.jit import kernel
from m2lite.simd.kinds import Address, I32x16
from m2lite.simd.memory import load_u8, read_u8, write_f32


@kernel
def digit_of(q: I32x16, power: int) -> I32x16:
    """The top digit of 3 (q power mod 256) / 256, less 1: bytes hold five digits of base 3."""
    return ((((q * power) & 255) * 3) >> 8) - 1


@Unpacker
def unpack_tq1_0(w: Address, out: Address) -> None:
    d, power = half_at(w + 52), 1
    for k in range(5):
        for i in range(2):
            write_scaled(out + 128 * k + 64 * i, d, digit_of(load_u8(w + 16 * i), power))
        write_scaled(out + 640 + 64 * k, d, digit_of(load_u8(w + 32), power))
        for j in range(4 if k < 4 else 0):
            digit = ((((np.int64(read_u8(w + 48 + j)) * power) & 255) * 3) >> 8) - 1
            write_f32(out + 960 + 16 * k + 4 * j, d * number(digit))
        power *= 3


@Unpacker
def unpack_tq2_0(w: Address, out: Address) -> None:
    d = half_at(w + 64)
    for i in range(16):
        q = bits_at(w + 32 * (i >> 3) + 16 * (i & 1), i & 6, 3)
        write_scaled(out + 64 * i, d, q - 1)
