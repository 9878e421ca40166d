"""F32, F16 and BF16, a number a block. NumPy, from bytes to numbers and back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from m2lite.formats.fields import Bytes, Floats


def _bytes_of(values: NDArray[np.generic]) -> Bytes:
    """The bytes of the last axis, in place."""
    return np.ascontiguousarray(values).view(np.uint8)


def unpack_f32(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f4")


def pack_f32(weights: Floats) -> Bytes:
    return _bytes_of(weights.astype("<f4"))


def unpack_f16(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f2").astype(np.float32)


def pack_f16(weights: Floats) -> Bytes:
    with np.errstate(over="ignore", under="ignore"):
        return _bytes_of(weights.astype("<f2"))


def unpack_bf16(blocks: Bytes) -> Floats:
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def pack_bf16(weights: Floats) -> Bytes:
    """Round to nearest even; a NaN stays one (its quiet bit is set, lest its cut-off leave an infinity)."""
    bits = np.ascontiguousarray(weights, np.float32).view(np.uint32)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint64(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(64)
    return _bytes_of(np.where(is_nan, quiet, rounded).astype("<u2"))
