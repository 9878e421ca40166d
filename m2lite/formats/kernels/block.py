"""What unpackers of blocks are made of. Sees two addresses, no row and no tensor.

unpack_block(w, out): the block at address w becomes its float32 weights at address out, 16 at a time, with the
multiplications of the format's definition in the same order, so that the bits agree. Nothing beyond the block is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from m2lite.simd.jit import kernel, specialise
from m2lite.simd.kinds import Address, I32x16, Int, Scalar
from m2lite.simd.memory import load_u8, read_i32, read_u8, read_u16, store_f32
from m2lite.simd.vectors import half_to_f32, i32_to_f32


class Unpacker:
    """unpack_block(w, out) of a format: a template, and what gives the tables that it sees as globals."""

    def __init__(self, template: Callable[..., None], tables: Callable[[], dict[str, Any]] = dict) -> None:
        self._template, self._tables = template, tables

    def compiled_for(self, name: str) -> Any:
        """As a kernel; the tables are made now."""
        return kernel(specialise(self._template, f"unpack_block_{name}", **self._tables()))


@kernel
def number(x: Int) -> np.float32:
    """A small integer as float32."""
    return np.float32(np.int32(x))


@kernel
def half_at(w: Address) -> Scalar:
    return half_to_f32(read_u16(w))


@kernel
def long_at(w: Address) -> Int:
    """Four bytes as an unsigned integer."""
    return np.int64(read_i32(w)) & 0xFFFFFFFF


@kernel
def nibble_at(w: Address, i: int) -> int:
    """4-bit number i of those at w; the low half of a byte comes first."""
    return (read_u8(w + (i >> 1)) >> (4 * (i & 1))) & 15


@kernel
def bits_at(w: Address, shift: int, mask: int) -> I32x16:
    """16 integers: the bits of `mask` of the 16 bytes at w, moved right by `shift`."""
    return (load_u8(w) >> shift) & mask


@kernel
def write_scaled(out: Address, scale: Scalar, q: I32x16) -> None:
    """out[16] = scale q."""
    store_f32(out, scale * i32_to_f32(q))


@kernel
def write_plus(out: Address, scale: Scalar, q: I32x16, m: Scalar) -> None:
    """out[16] = scale q + m."""
    store_f32(out, scale * i32_to_f32(q) + m)


@kernel
def write_minus(out: Address, scale: Scalar, q: I32x16, m: Scalar) -> None:
    """out[16] = scale q - m."""
    store_f32(out, scale * i32_to_f32(q) - m)
