"""The IQ and TQ formats: codes that point into tables of 4 or 8 small numbers. NumPy, from bytes to numbers only."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2lite.storage.fields import Bytes, Floats, Parts, each, half_at, nibbles, quiet, spread, words_at

F = np.float32
Numbers = NDArray[np.int8]

# What a 4-bit code of IQ4_NL and IQ4_XS stands for.
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
IQ1_DELTA = F(0.125)  # IQ1 moves all weights of a group up or down by this


@cache
def grid(name: str) -> Numbers:
    """[codes, 4 or 8]: the table of format `name`, as the gguf package has it."""
    import gguf.quants

    traits: Any = getattr(gguf.quants, name)
    traits.init_grid()
    return np.ascontiguousarray(traits.grid.reshape(traits.grid_shape), np.int8)


@cache
def sign_bytes() -> Bytes:
    """[128]: 7 bits -> 8 signs; the eighth makes their number even."""
    codes = np.arange(128, dtype=np.uint8)
    parity = np.bitwise_count(codes) & np.uint8(1)
    return codes | (parity << np.uint8(7))


def _signs(packed: Bytes) -> Floats:
    """[..., 8 n] of +1 and -1 from n bytes; a set bit is a minus."""
    return F(1) - F(2) * each(packed, range(8), 1).astype(F)


def _signed(blocks: Bytes, scale: Floats, values: Numbers, signs: Floats) -> Floats:
    """w = (scale value) sign; scale [..., groups], the others [..., 256] in any split."""
    lead, n_groups = blocks.shape[:-1], scale.shape[-1]
    numbers = values.reshape(*lead, n_groups, 256 // n_groups).astype(F)
    return (scale[..., None] * numbers).reshape(*lead, 256) * signs.reshape(*lead, 256)


@quiet
def unpack_iq2_xxs(blocks: Bytes) -> Floats:
    """66 bytes: d, 8 x (4 codes of 8 bits, 4 sign codes of 7 bits, scale of 4 bits). w = d (1/2 + s) / 4 value sign."""
    codes = np.ascontiguousarray(blocks[..., 2:]).reshape(*blocks.shape[:-1], 8, 8)[..., :4]
    words = words_at(blocks, 2, 16)[..., 1::2]
    scale = half_at(blocks, 0) * (F(0.5) + (words >> np.uint32(28)).astype(F)) * F(0.25)
    signs = _signs(sign_bytes()[each(words, (0, 7, 14, 21), 7)])
    return _signed(blocks, scale, grid("IQ2_XXS")[codes], signs)


@quiet
def unpack_iq2_xs(blocks: Bytes) -> Floats:
    """74 bytes: d, 32 x (code of 9 bits, sign code of 7 bits), 16 scales of 4 bits. w as in IQ2_XXS."""
    words = words_at(blocks, 2, 32, 2)
    scale = half_at(blocks, 0) * (F(0.5) + each(blocks[..., 66:], (0, 4), 4).astype(F)) * F(0.25)
    return _signed(blocks, scale, grid("IQ2_XS")[words & np.uint32(511)], _signs(sign_bytes()[words >> np.uint32(9)]))


@quiet
def unpack_iq2_s(blocks: Bytes) -> Floats:
    """82 bytes: d, 32 low bytes of codes, 32 of signs, 8 x four high pairs, 16 scales of 4 bits. w as in IQ2_XXS."""
    codes = blocks[..., 2:34] | (each(blocks[..., 66:74], (0, 2, 4, 6), 2) << np.uint32(8))
    scale = half_at(blocks, 0) * (F(0.5) + each(blocks[..., 74:], (0, 4), 4).astype(F)) * F(0.25)
    return _signed(blocks, scale, grid("IQ2_S")[codes], _signs(blocks[..., 34:66]))


@quiet
def unpack_iq3_xxs(blocks: Bytes) -> Floats:
    """98 bytes: d, 64 codes, 8 x (4 sign codes of 7 bits, scale of 4 bits). w = d (1/2 + s) / 2 value sign."""
    words = words_at(blocks, 66, 8)
    scale = half_at(blocks, 0) * (F(0.5) + (words >> np.uint32(28)).astype(F)) * F(0.5)
    signs = _signs(sign_bytes()[each(words, (0, 7, 14, 21), 7)])
    return _signed(blocks, scale, grid("IQ3_XXS")[blocks[..., 2:66]], signs)


@quiet
def unpack_iq3_s(blocks: Bytes) -> Floats:
    """110 bytes: d, 64 low bytes of codes, 64 high bits, 32 bytes of signs, 8 scales. w = d (1 + 2 s) value sign."""
    codes = blocks[..., 2:66] | (each(blocks[..., 66:74], range(8), 1) << np.uint32(8))
    scale = half_at(blocks, 0) * (F(1) + F(2) * each(blocks[..., 106:], (0, 4), 4).astype(F))
    return _signed(blocks, scale, grid("IQ3_S")[codes], _signs(blocks[..., 74:106]))


def _shifted(lead: tuple[int, ...], scale: Floats, codes: NDArray[np.uint32], is_down: NDArray[np.bool_]) -> Floats:
    """w = scale (value + delta); scale [..., groups], codes [..., 32] and is_down [..., 32 or 8]."""
    delta = np.where(is_down, -IQ1_DELTA, IQ1_DELTA).repeat(256 // is_down.shape[-1], axis=-1)
    values = grid("IQ1_S")[codes].reshape(*lead, 256).astype(F) + delta
    return scale.repeat(256 // scale.shape[-1], axis=-1) * values


@quiet
def unpack_iq1_s(blocks: Bytes) -> Floats:
    """50 bytes: d, 32 low bytes of codes, 8 x (four high triples, scale of 3 bits, sign of delta).

    w = d (2 s + 1) (value + delta)
    """
    words = words_at(blocks, 34, 8, 2)
    codes = blocks[..., 2:34] | (each(words, (0, 3, 6, 9), 3) << np.uint32(8))
    scale = half_at(blocks, 0) * (F(2) * ((words >> np.uint32(12)) & np.uint32(7)).astype(F) + F(1))
    return _shifted(blocks.shape[:-1], scale, codes, words >> np.uint32(15) != 0)


@quiet
def unpack_iq1_m(blocks: Bytes) -> Floats:
    """56 bytes: 32 low bytes of codes, 32 x (high triple, sign of delta), 4 x (four 3-bit scales, a nibble of d)."""
    words = words_at(blocks, 48, 4, 2)
    bits = (words >> np.uint32(12)) << np.array([0, 4, 8, 12], np.uint32)
    d = bits.sum(axis=-1, keepdims=True, dtype=np.uint32).astype(np.uint16).view(np.float16).astype(F)
    scale = d * (F(2) * each(words, (0, 3, 6, 9), 3).astype(F) + F(1))
    high = each(blocks[..., 32:48], (0, 4), 4)
    codes = blocks[..., :32] | ((high & np.uint32(7)) << np.uint32(8))
    return _shifted(blocks.shape[:-1], scale, codes, high >= 8)


def parts_iq4_nl(blocks: Bytes) -> Parts:
    """18 bytes: d, 16 x two codes: low nibbles are weights 0-15, high nibbles 16-31. w = d value."""
    codes = nibbles(blocks[..., 2:]).reshape(*blocks.shape[:-1], 32)
    return IQ4_VALUES[codes], half_at(blocks, 0), None


def parts_iq4_xs(blocks: Bytes) -> Parts:
    """136 bytes: d, high pairs of 8 scales, their low nibbles, 8 x 16 bytes as in IQ4_NL. w = d (s - 32) value."""
    low = each(blocks[..., 4:8], (0, 4), 4)
    high = each(words_at(blocks, 2, 1, 2), range(0, 16, 2), 2)
    scale = (low | (high << np.uint32(4))).astype(np.int8) - np.int8(32)
    lead = blocks.shape[:-1]
    codes = nibbles(blocks[..., 8:].reshape(*lead, 8, 16)).reshape(*lead, 256)
    return IQ4_VALUES[codes], half_at(blocks, 0) * scale.astype(F), None


@quiet
def unpack_tq1_0(blocks: Bytes) -> Floats:
    """54 bytes: 32 and 16 x five, 4 x four digits of base 3, d. Digit k is the top of 3 (byte 3**k mod 256) / 256."""
    lead = blocks.shape[:-1]
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
    parts = [blocks[..., None, begin:end] * powers[:n] for begin, end, n in ((0, 32, 5), (32, 48, 5), (48, 52, 4))]
    moved = np.concatenate([part.reshape(*lead, -1) for part in parts], axis=-1)
    q = ((moved.astype(np.uint16) * np.uint16(3)) >> np.uint16(8)).astype(np.int8) - np.int8(1)
    return half_at(blocks, 52) * q.astype(F)


@quiet
def unpack_tq2_0(blocks: Bytes) -> Floats:
    """66 bytes: 64 x four 2-bit numbers, d. w = d (q - 1)."""
    lead = blocks.shape[:-1]
    q = spread(blocks[..., :64].reshape(*lead, 2, 32), (0, 2, 4, 6), 2).reshape(*lead, 256)
    return half_at(blocks, 64) * (q.astype(np.int8) - np.int8(1)).astype(F)
