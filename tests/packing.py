"""Weights to the bytes of a format whose bytes follow from the numbers by one formula: the encoders' slow twin.

For finite numbers; others spoil their block or vanish, as they do in ggml.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from m2lite.formats.fields import Bytes, Floats
from m2lite.formats.fp4 import E2M1_DOUBLED, power_of_two
from m2lite.formats.table import FORMATS, BlockFormat


def pack_rows(fmt: BlockFormat, weights: Floats) -> Bytes:
    """uint8[..., row_bytes] = the last axis of `weights`, row by row."""
    blocks = np.ascontiguousarray(weights, np.float32).reshape(-1, fmt.n_weights)
    return PACKERS[fmt.name](blocks).reshape(*weights.shape[:-1], fmt.row_bytes(weights.shape[-1]))


def _bytes_of(values: NDArray[np.generic]) -> Bytes:
    return np.ascontiguousarray(values).view(np.uint8)


def _whole_numbers(values: Floats) -> NDArray[np.int32]:
    """Truncated; 0 for what is not finite, which a bare cast would leave to the processor."""
    return np.where(np.isfinite(values), values, np.float32(0)).astype(np.int32)


def _q4_0(weights: Floats) -> Bytes:
    scale, q = _from_largest(weights, 8)
    return np.concatenate([scale, _to_4_bits(q)], axis=-1)


def _q8_0(weights: Floats) -> Bytes:
    """d = max |w| / 127; halves are rounded away from zero, as C's roundf does."""
    with np.errstate(all="ignore"):
        d = np.abs(weights).max(axis=-1, keepdims=True) / np.float32(127)
        inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
        scaled = weights * inverse
        magnitude = np.abs(scaled)
        whole = np.floor(magnitude)
        rounded = np.copysign(whole + np.floor(np.float32(2) * (magnitude - whole)), scaled)
        q = _whole_numbers(rounded).astype(np.int8)
        scale = _bytes_of(d.astype("<f2"))
    return np.concatenate([scale, q.view(np.uint8)], axis=-1)


def _to_4_bits(q: Bytes) -> Bytes:
    """[..., 16]: the low 4 bits of weights j and j + 16 in byte j."""
    return (q[..., :16] & np.uint8(15)) | (q[..., 16:] << np.uint8(4))


def _fifth_bits(q: Bytes) -> Bytes:
    """[..., 4]: bit 4 of 32 numbers, as bits of a little-endian word."""
    return np.packbits(q >> np.uint8(4), axis=-1, bitorder="little")


def _from_largest(weights: Floats, half: int) -> tuple[Bytes, Bytes]:
    """d as float16 [..., 2 bytes] and q [..., 32] for w = d (q - half), q = 0 ... 2 half - 1.

    The weight of largest magnitude becomes -half exactly: d = w / -half (so d carries a sign).
    """
    largest = np.take_along_axis(weights, np.abs(weights).argmax(axis=-1, keepdims=True), axis=-1)
    with np.errstate(all="ignore"):
        d = largest / np.float32(-half)
        inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
        q = _whole_numbers(weights * inverse + np.float32(half + 0.5)).clip(0, 2 * half - 1).astype(np.uint8)
        return _bytes_of(d.astype("<f2")), q


def _from_range(weights: Floats, largest: int) -> tuple[Bytes, Bytes]:
    """d, m as float16 [..., 4 bytes] and q [..., 32] for w = d q + m, q = 0 ... `largest`: m is the least weight."""
    low = weights.min(axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        d = (weights.max(axis=-1, keepdims=True) - low) / np.float32(largest)
        inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
        q = _whole_numbers((weights - low) * inverse + np.float32(0.5)).clip(0, largest).astype(np.uint8)
        return _bytes_of(np.concatenate([d, low], axis=-1).astype("<f2")), q


def _q4_1(weights: Floats) -> Bytes:
    scales, q = _from_range(weights, 15)
    return np.concatenate([scales, _to_4_bits(q)], axis=-1)


def _q5_0(weights: Floats) -> Bytes:
    scale, q = _from_largest(weights, 16)
    return np.concatenate([scale, _fifth_bits(q), _to_4_bits(q)], axis=-1)


def _q5_1(weights: Floats) -> Bytes:
    scales, q = _from_range(weights, 31)
    return np.concatenate([scales, _fifth_bits(q), _to_4_bits(q)], axis=-1)


def _mxfp4(weights: Floats) -> Bytes:
    """e = floor(log2 max |w|) - 2 + 127 (modulo 256: the bytes that gguf and ggml write for |w| < 2**-125), then the
    nearest value, the lowest code among equals. log2 is rounded to float32 once, so next to a power it may round up.
    """
    largest = np.abs(weights).max(axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        exact = np.log2(np.where(largest > 0, largest, np.float32(1)).astype(np.float64)).astype(np.float32)
        e = np.where(largest > 0, _whole_numbers(np.floor(exact)) + 125, 0).astype(np.uint8)
        values = power_of_two(e) * E2M1_DOUBLED.astype(np.float32)
        q = np.abs(values[..., None, :] - weights[..., None]).argmin(axis=-1).astype(np.uint8)
    return np.concatenate([e, _to_4_bits(q)], axis=-1)


PACKERS = {name: fmt.pack for name, fmt in FORMATS.items() if fmt.pack} | {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "MXFP4": _mxfp4,
}  # fmt: skip
