"""The block formats that are integers times scales, taken apart in NumPy. Knows bytes and numbers, no kernel.

INTEGERS[name]: uint8 [..., n_bytes] -> integers [..., n_weights], scales [..., n / 32 or n / 16], minima [..., n / 32]
or None: a weight is scale x integer - minimum, and scales and minima are exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2lite.storage.blocks import E2M1_DOUBLED, power_of_two
from m2lite.storage.fields import Bytes, Floats, each, half_at, nibbles, spread, words_at
from m2lite.storage.iquants import IQ4_VALUES
from m2lite.storage.kquants import scales_and_mins

F = np.float32
Parts = tuple[NDArray[Any], Floats, Floats | None]


def _low_then_high(blocks: Bytes, at: int) -> NDArray[np.int8]:
    """[..., 32]: 16 bytes from `at` on as 16 low and 16 high nibbles."""
    return nibbles(blocks[..., at : at + 16]).reshape(*blocks.shape[:-1], 32).astype(np.int8)


def _five_bits(blocks: Bytes, at: int) -> NDArray[np.int8]:
    fifth = each(words_at(blocks, at, 1), range(32), 1).astype(np.int8)
    return _low_then_high(blocks, at + 4) | (fifth << np.int8(4))


def _q8_0(blocks: Bytes) -> Parts:
    return np.ascontiguousarray(blocks[..., 2:]).view(np.int8), half_at(blocks, 0), None


def _mxfp4(blocks: Bytes) -> Parts:
    return E2M1_DOUBLED[_low_then_high(blocks, 1)], power_of_two(blocks[..., :1]), None


def _scaled(blocks: Bytes) -> tuple[Floats, Floats]:
    scales, minima = scales_and_mins(blocks[..., 4:16])
    return half_at(blocks, 0) * scales.astype(F), half_at(blocks, 2) * minima.astype(F)


def _q4_k(blocks: Bytes) -> Parts:
    lead = blocks.shape[:-1]
    return nibbles(blocks[..., 16:].reshape(*lead, 4, 32)).reshape(*lead, 256), *_scaled(blocks)


def _q5_k(blocks: Bytes) -> Parts:
    lead = blocks.shape[:-1]
    low = nibbles(blocks[..., 48:].reshape(*lead, 4, 32)).reshape(*lead, 8, 32)
    whole = low | (spread(blocks[..., 16:48], range(8), 1) << np.uint8(4))
    return whole.reshape(*lead, 256), *_scaled(blocks)


def _q6_k(blocks: Bytes) -> Parts:
    lead = blocks.shape[:-1]
    low = nibbles(blocks[..., :128].reshape(*lead, 2, 64)).reshape(*lead, 256)
    high = spread(blocks[..., 128:192].reshape(*lead, 2, 32), (0, 2, 4, 6), 2).reshape(*lead, 256)
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(F)
    return (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32), half_at(blocks, 208) * scales, None


def _iq4_xs(blocks: Bytes) -> Parts:
    lead = blocks.shape[:-1]
    low, high = each(blocks[..., 4:8], (0, 4), 4), each(words_at(blocks, 2, 1, 2), range(0, 16, 2), 2)
    scales = (low | (high << np.uint32(4))).astype(np.int8) - np.int8(32)
    codes = nibbles(blocks[..., 8:].reshape(*lead, 8, 16)).reshape(*lead, 256)
    return IQ4_VALUES[codes], half_at(blocks, 0) * scales.astype(F), None


INTEGERS: Mapping[str, Callable[[Bytes], Parts]] = {
    "Q4_0": lambda b: (_low_then_high(b, 2) - np.int8(8), half_at(b, 0), None),
    "Q4_1": lambda b: (_low_then_high(b, 4), half_at(b, 0), -half_at(b, 2)),
    "Q5_0": lambda b: (_five_bits(b, 2) - np.int8(16), half_at(b, 0), None),
    "Q5_1": lambda b: (_five_bits(b, 4), half_at(b, 0), -half_at(b, 2)),
    "Q8_0": _q8_0,
    "IQ4_NL": lambda b: (IQ4_VALUES[_low_then_high(b, 2)], half_at(b, 0), None),
    "MXFP4": _mxfp4,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
}
