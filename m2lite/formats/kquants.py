"""The K formats: super-blocks of 256 weights with a scale per 16 or 32. NumPy, from bytes to numbers only."""

from __future__ import annotations

import numpy as np

from m2lite.formats.fields import Bytes, Parts, half_at, nibbles, spread

F = np.float32


def scales_and_mins(packed: Bytes) -> tuple[Bytes, Bytes]:
    """[..., 8] and [..., 8] of 6 bits from the 12 bytes of Q4_K and Q5_K.

    Scales 0-3 and mins 0-3 are the low 6 bits of bytes 0-3 and 4-7; those of 4-7 are the nibbles of bytes 8-11 with
    the top 2 bits of bytes 0-3 and 4-7 above them.
    """
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    six, top = np.uint8(63), np.uint8(0x30)
    scales = np.concatenate([first & six, (third & np.uint8(15)) | ((first >> np.uint8(2)) & top)], axis=-1)
    mins = np.concatenate([second & six, (third >> np.uint8(4)) | ((second >> np.uint8(2)) & top)], axis=-1)
    return scales, mins


def _with_minimum(blocks: Bytes, q: Bytes) -> Parts:
    """w = (d s) q - (dmin m) for q [..., 8, 32]; d, dmin and the 12 bytes of scales begin the block."""
    scales, mins = scales_and_mins(blocks[..., 4:16])
    d, low = half_at(blocks, 0) * scales.astype(F), half_at(blocks, 2) * mins.astype(F)
    return q.reshape(*blocks.shape[:-1], 256), d, low


def parts_q4_k(blocks: Bytes) -> Parts:
    """144 bytes: d, dmin, 12 bytes of scales and mins, 4 x 32 bytes whose nibbles are two groups of 32."""
    return _with_minimum(blocks, nibbles(blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32)))


def parts_q5_k(blocks: Bytes) -> Parts:
    """176 bytes: as Q4_K, with 32 bytes of fifth bits (bit g belongs to group g) before the nibbles."""
    lead = blocks.shape[:-1]
    low = nibbles(blocks[..., 48:].reshape(*lead, 4, 32)).reshape(*lead, 8, 32)
    return _with_minimum(blocks, low | (spread(blocks[..., 16:48], range(8), 1) << np.uint8(4)))


def parts_q6_k(blocks: Bytes) -> Parts:
    """210 bytes: 128 x two low nibbles, 64 x four high pairs, 16 int8 scales, d. w = d s (q - 32)."""
    lead = blocks.shape[:-1]
    low = nibbles(blocks[..., :128].reshape(*lead, 2, 64)).reshape(*lead, 8, 32)
    high = spread(blocks[..., 128:192].reshape(*lead, 2, 32), (0, 2, 4, 6), 2).reshape(*lead, 8, 32)
    q = (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    scale = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return q.reshape(*lead, 256), half_at(blocks, 208) * scale.astype(F), None
