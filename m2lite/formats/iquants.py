"""The IQ formats, codes that point into tables of small numbers: the tables. NumPy, from bytes to numbers only."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2lite.formats.fields import Bytes, Parts, each, half_at, low_then_high, nibbles, words_at

F = np.float32

# What a 4-bit code of IQ4_NL and IQ4_XS stands for.
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
IQ1_DELTA = F(0.125)  # IQ1 moves all weights of a group up or down by this


@cache
def grid(name: str) -> NDArray[np.int8]:
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


def parts_iq4_nl(blocks: Bytes) -> Parts:
    """18 bytes: d, 16 x two codes: low nibbles are weights 0-15, high nibbles 16-31. w = d value."""
    return IQ4_VALUES[low_then_high(blocks, 2)], half_at(blocks, 0), None


def parts_iq4_xs(blocks: Bytes) -> Parts:
    """136 bytes: d, high pairs of 8 scales, their low nibbles, 8 x 16 bytes as in IQ4_NL. w = d (s - 32) value."""
    low = each(blocks[..., 4:8], (0, 4), 4)
    high = each(words_at(blocks, 2, 1, 2), range(0, 16, 2), 2)
    scale = (low | (high << np.uint32(4))).astype(np.int8) - np.int8(32)
    lead = blocks.shape[:-1]
    codes = nibbles(blocks[..., 8:].reshape(*lead, 8, 16)).reshape(*lead, 256)
    return IQ4_VALUES[codes], half_at(blocks, 0) * scale.astype(F), None
