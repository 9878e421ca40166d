"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: 32 integers and their float16 scale. NumPy, from bytes to numbers only."""

from __future__ import annotations

import numpy as np

from m2lite.formats.fields import Bytes, Floats, Parts, each, half_at, low_then_high, quiet, words_at


def parts_q4_0(blocks: Bytes) -> Parts:
    """w[j] = d * (low nibble of byte j - 8), w[j + 16] = d * (high nibble of byte j - 8); d is f16."""
    return low_then_high(blocks, 2).view(np.int8) - np.int8(8), half_at(blocks, 0), None


def parts_q8_0(blocks: Bytes) -> Parts:
    """w[j] = d * q[j]; d is f16, q is int8."""
    return np.ascontiguousarray(blocks[..., 2:]).view(np.int8), half_at(blocks, 0), None


def _five_bits(blocks: Bytes, at: int) -> Bytes:
    """[..., 32]: a word of fifth bits, then 16 bytes of nibbles, from byte `at` on."""
    return low_then_high(blocks, at + 4) | (each(words_at(blocks, at, 1), range(32), 1).astype(np.uint8) << np.uint8(4))


def parts_q4_1(blocks: Bytes) -> Parts:
    return low_then_high(blocks, 4), half_at(blocks, 0), -half_at(blocks, 2)


@quiet
def unpack_q4_1(blocks: Bytes) -> Floats:
    """w = d q + m; d and m are f16, nibbles as in Q4_0. Added, not minus -m: a NaN keeps its sign."""
    return half_at(blocks, 0) * low_then_high(blocks, 4).astype(np.float32) + half_at(blocks, 2)


def parts_q5_0(blocks: Bytes) -> Parts:
    """w = d (q - 16); d is f16, then the fifth bits, then nibbles as in Q4_0."""
    return _five_bits(blocks, 2).view(np.int8) - np.int8(16), half_at(blocks, 0), None


def parts_q5_1(blocks: Bytes) -> Parts:
    return _five_bits(blocks, 4), half_at(blocks, 0), -half_at(blocks, 2)


@quiet
def unpack_q5_1(blocks: Bytes) -> Floats:
    """w = d q + m; d and m are f16, then the fifth bits, then nibbles."""
    return half_at(blocks, 0) * _five_bits(blocks, 4).astype(np.float32) + half_at(blocks, 2)
