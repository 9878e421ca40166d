"""A format that nobody has: 256 numbers of 3 bits and one float16 scale, in 98 bytes. All pieces that a row names.

d, 64 x four low pairs as in Q2_K, 32 bytes of third bits (bit g belongs to group g of 32); w = d (q - 4).
"""
# mypy: ignore-errors

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from m2lite.formats.fields import Bytes, Floats, Parts, half_at, spread, weights_of
from m2lite.formats.kernels.block import Unpacker, bits_at, write_scaled
from m2lite.formats.kernels.block import half_at as half_of
from m2lite.formats.kernels.tile import Integers, TileForm, bits, loads_of, scale_at
from m2lite.formats.table import BlockFormat
from m2lite.quant.encoders.block import inverse_of, largest
from m2lite.simd.emit import const
from m2lite.simd.jit import kernel
from m2lite.simd.memory import load_f32, load_i32, scatter_u16, scatter_u32, scratch, store_i32
from m2lite.simd.vectors import half_bits, maximum, minimum, splat, to_i32

F = np.float32
# Compiled kernels are kept by name and by the text of the program, of which this file is no part: so it is in the name.
NAME = f"MADE_UP_{zlib.crc32(Path(__file__).read_bytes()):08X}"


# --- the definition ---------------------------------------------------------------------------------------------------


def parts(blocks: Bytes) -> Parts:
    lead = blocks.shape[:-1]
    low = spread(blocks[..., 2:66].reshape(*lead, 2, 32), (0, 2, 4, 6), 2).reshape(*lead, 8, 32)
    q = low | (spread(blocks[..., 66:], range(8), 1) << np.uint8(2))
    return q.reshape(*lead, 256).view(np.int8) - np.int8(4), np.repeat(half_at(blocks, 0), 8, axis=-1), None


def pack(weights: Floats) -> Bytes:
    """[n, 256] -> [n, 98]: the weight of largest magnitude becomes -4."""
    d = np.take_along_axis(weights, np.abs(weights).argmax(axis=-1, keepdims=True), axis=-1) / F(-4)
    with np.errstate(all="ignore"):
        inverse = np.where(d == 0, F(0), F(1) / d)
        q = (weights * inverse + F(4.5)).clip(0, 7).astype(np.uint8)
    shifted = (q.reshape(-1, 2, 4, 32) & np.uint8(3)) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    low = np.bitwise_or.reduce(shifted, axis=2).reshape(-1, 64)
    third = np.packbits(q.reshape(-1, 8, 32) >> np.uint8(2), axis=1, bitorder="little")[:, 0]
    return np.concatenate([d.astype("<f2").view(np.uint8), low, third], axis=1)


# --- kernels ----------------------------------------------------------------------------------------------------------


@Unpacker
def unpack(w, out):
    for i in range(16):
        g, part = i >> 1, 16 * (i & 1)
        low = bits_at(w + 2 + 32 * (g >> 2) + part, 2 * (g & 3), 3)
        third = bits_at(w + 66 + part, g, 1)
        write_scaled(out + 64 * i, half_of(w), (low | (third << 2)) - 4)


def _weights(builder, load, step):
    """Four too large: the offsets that kernels know begin with 8."""
    low = [bits(builder, v, 2 * (step % 4), 3) for v in load(2 + 32 * (step // 4))]
    third = [bits(builder, v, step, 1, to=2) for v in load(66)]
    return [builder.add(builder.or_(a, b), const(0x04040404, a.type.count)) for a, b in zip(low, third, strict=True)]


def _read(builder, form, rows, step):
    scale, load = scale_at(builder, rows), loads_of(builder, form, rows)
    for g in range(8):
        step(form.weights(builder, load, g), [scale])


tile = TileForm(NAME, Integers(4, offset=8), _read, _weights)


@kernel
def encode(x, importance, sigma, out, stride):
    q = scratch(256)
    top, _ = largest(x, 256)
    d = top / F(-4)
    inverse = inverse_of(d)
    for j in range(256):
        code = minimum(maximum(load_f32(x + 64 * j) * inverse + F(4.5), F(0)), F(7))
        store_i32(q + 64 * j, to_i32(code))
    scatter_u16(out, stride, half_bits(d))
    for word in range(16):
        packed = to_i32(splat(F(0)))
        for byte in range(4):
            for part in range(4):
                at = q + 64 * (128 * (word // 8) + 32 * part + 4 * (word % 8) + byte)
                packed = packed | ((load_i32(at) & 3) << (8 * byte + 2 * part))
        scatter_u32(out + 2 + 4 * word, stride, packed)
    for word in range(8):
        packed = to_i32(splat(F(0)))
        for byte in range(4):
            for g in range(8):
                packed = packed | ((load_i32(q + 64 * (32 * g + 4 * word + byte)) >> 2) << (8 * byte + g))
        scatter_u32(out + 66 + 4 * word, stride, packed)


HERE = "tests.formats.made_up"
ROW = BlockFormat(
    NAME, 1000, 256, 98, weights_of(parts), parts=parts, unpacker=f"{HERE}:unpack", tile=f"{HERE}:tile",
    encoder=f"{HERE}:encode", largest=65504.0 * 4,
)  # fmt: skip
