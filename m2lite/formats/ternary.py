"""TQ1_0 and TQ2_0: 256 numbers that are -1, 0 or 1, and their float16 scale. NumPy, from bytes to numbers only."""

from __future__ import annotations

import numpy as np

from m2lite.formats.fields import Bytes, Floats, half_at, quiet, spread

_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)


def _digits(values: Bytes, n: int) -> Bytes:
    """[..., n * values]: digit k in base 3 of a byte is the top one of (byte 3**k mod 256) / 256."""
    moved = (values[..., None, :] * _POWERS[:n, None]).astype(np.uint16) * np.uint16(3)
    return (moved >> np.uint16(8)).astype(np.uint8).reshape(*values.shape[:-1], -1)


def _scaled(d: Floats, q: Bytes) -> Floats:
    """w = d (q - 1)."""
    return d * (q.astype(np.float32) - np.float32(1))


@quiet
def unpack_tq1_0(blocks: Bytes) -> Floats:
    """54 bytes: 32 and 16 x five digits of base 3, 4 x four, d."""
    digits = [_digits(blocks[..., a:b], n) for a, b, n in ((0, 32, 5), (32, 48, 5), (48, 52, 4))]
    return _scaled(half_at(blocks, 52), np.concatenate(digits, axis=-1))


@quiet
def unpack_tq2_0(blocks: Bytes) -> Floats:
    """66 bytes: 64 x four 2-bit numbers, d."""
    lead = blocks.shape[:-1]
    q = spread(blocks[..., :64].reshape(*lead, 2, 32), (0, 2, 4, 6), 2)
    return _scaled(half_at(blocks, 64), q.reshape(*lead, 256))
