"""Fields of packed blocks as arrays: scales, nibbles, bits. Knows no format. The last axis is always the block's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Words = NDArray[np.uint32]

# What the blocks of an integer format are made of: integers [..., n], a scale per 16 or 32 of them, and a minimum per
# scale or None. A weight is scale x integer - minimum; scales and minima are exact in float32.
Parts = tuple[NDArray[Any], Floats, Floats | None]


# Decorates functions that unpack: a block may hold any bytes, so a scale may be infinite or NaN.
quiet = np.errstate(all="ignore")


def weights_of(take_apart: Callable[[Bytes], Parts]) -> Callable[[Bytes], Floats]:
    """unpack(blocks) of a format whose parts `take_apart` gives."""

    @quiet
    def unpack(blocks: Bytes) -> Floats:
        integers, scales, minima = take_apart(blocks)
        weights = scales[..., None] * integers.reshape(*scales.shape, -1).astype(np.float32)
        return (weights if minima is None else weights - minima[..., None]).reshape(integers.shape)

    return unpack


def unpack_of_gguf(ggml_type: int) -> Callable[[Bytes], Floats]:
    """unpack(blocks) of 256 weights as the gguf package does it; its versions from 0.17 on all give the same bits."""

    @quiet
    def unpack(blocks: Bytes) -> Floats:
        import gguf  # 200 ms, and few files have such blocks

        row = np.ascontiguousarray(blocks).reshape(1, -1)  # of more it takes 16 at a time
        weights: Floats = gguf.quants.dequantize(row, gguf.GGMLQuantizationType(ggml_type))
        return weights.reshape(*blocks.shape[:-1], 256)

    return unpack


def half_at(blocks: Bytes, at: int) -> Floats:
    """[..., 1]: the float16 in bytes `at` and `at + 1`."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2").astype(np.float32)


def words_at(blocks: Bytes, at: int, n: int, n_bytes: int = 4) -> Words:
    """[..., n]: n unsigned integers of `n_bytes` bytes, from byte `at` on."""
    return np.ascontiguousarray(blocks[..., at : at + n * n_bytes]).view(f"<u{n_bytes}").astype(np.uint32)


def spread(values: NDArray[np.unsignedinteger], shifts: Sequence[int], n_bits: int) -> Bytes:
    """[..., len(shifts), n]: `n_bits` bits of every one of n values, once for each shift."""
    moved = values[..., None, :] >> np.array(shifts, values.dtype)[:, None]
    return (moved & values.dtype.type((1 << n_bits) - 1)).astype(np.uint8)


def each(values: NDArray[np.unsignedinteger], shifts: Sequence[int], n_bits: int) -> Words:
    """[..., n * len(shifts)]: as `spread`, but all the shifts of one value stand side by side."""
    moved = values[..., None].astype(np.uint32) >> np.array(shifts, np.uint32)
    return (moved & np.uint32((1 << n_bits) - 1)).reshape(*values.shape[:-1], -1)


def nibbles(values: Bytes) -> Bytes:
    """[..., 2, n]: the low halves of n bytes, then the high halves."""
    return spread(values, (0, 4), 4)


def low_then_high(blocks: Bytes, at: int) -> Bytes:
    """[..., 32]: 16 bytes from byte `at` on, their low nibbles, then their high ones."""
    return nibbles(blocks[..., at : at + 16]).reshape(*blocks.shape[:-1], 32)
