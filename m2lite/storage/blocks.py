"""The block formats of weights, as one table; NumPy here is their definition. Knows bytes and numbers, not tensors.

A new format is one row in `_TABLE` with its two functions. Packing is defined for finite numbers; a number that is not
finite spoils its block (as it does in ggml), so whoever converts checks for it first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class BlockFormat:
    """How `n_weights` consecutive weights of a row lie in `n_bytes` bytes."""

    name: str
    ggml_type: int
    n_weights: int
    n_bytes: int
    unpack: Callable[[Bytes], Floats]  # [..., n_bytes] -> [..., n_weights]
    pack: Callable[[Floats], Bytes]  # [..., n_weights] -> [..., n_bytes]

    def row_bytes(self, n_weights: int) -> int:
        """Bytes of a row of `n_weights` weights, which must be whole blocks."""
        if n_weights % self.n_weights:
            raise ValueError(f"{n_weights} weights are not whole {self.name} blocks of {self.n_weights}")
        return n_weights // self.n_weights * self.n_bytes


def unpack_rows(fmt: BlockFormat, data: Bytes, shape: Sequence[int]) -> Floats:
    """float32[shape] = the weights in `data`, whose last axis is `shape[-1]` weights wide."""
    fmt.row_bytes(shape[-1])
    blocks = np.ascontiguousarray(data).reshape(-1, fmt.n_bytes)
    if len(blocks) * fmt.n_weights != math.prod(shape):
        raise ValueError(f"{data.size} bytes of {fmt.name} do not hold {tuple(shape)} weights")
    return fmt.unpack(blocks).reshape(shape)


def pack_rows(fmt: BlockFormat, weights: Floats) -> Bytes:
    """uint8[..., row_bytes] = the last axis of `weights`, row by row."""
    *rows, n_weights = weights.shape
    row_bytes = fmt.row_bytes(n_weights)
    blocks = np.ascontiguousarray(weights, np.float32).reshape(-1, fmt.n_weights)
    return fmt.pack(blocks).reshape(*rows, row_bytes)


def _bytes_of(values: NDArray[np.generic]) -> Bytes:
    """The bytes of the last axis, in place."""
    return np.ascontiguousarray(values).view(np.uint8)


def _unpack_f32(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f4")


def _pack_f32(weights: Floats) -> Bytes:
    return _bytes_of(weights.astype("<f4"))


def _unpack_f16(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f2").astype(np.float32)


def _pack_f16(weights: Floats) -> Bytes:
    with np.errstate(over="ignore", under="ignore"):
        return _bytes_of(weights.astype("<f2"))


def _unpack_bf16(blocks: Bytes) -> Floats:
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _pack_bf16(weights: Floats) -> Bytes:
    """Round to nearest even; a NaN stays one (its quiet bit is set, lest its cut-off leave an infinity)."""
    bits = np.ascontiguousarray(weights, np.float32).view(np.uint32)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint64(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(64)
    return _bytes_of(np.where(is_nan, quiet, rounded).astype("<u2"))


def _whole_numbers(values: Floats) -> NDArray[np.int32]:
    """Truncated; 0 for what is not finite, which a bare cast would leave to the processor."""
    return np.where(np.isfinite(values), values, np.float32(0)).astype(np.int32)


def _unpack_q4_0(blocks: Bytes) -> Floats:
    """w[j] = d * (low nibble of byte j - 8), w[j + 16] = d * (high nibble of byte j - 8); d is f16."""
    d = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    q = np.concatenate([blocks[..., 2:] & np.uint8(15), blocks[..., 2:] >> np.uint8(4)], axis=-1)
    with np.errstate(all="ignore"):
        return d * (q.view(np.int8) - np.int8(8)).astype(np.float32)


def _pack_q4_0(weights: Floats) -> Bytes:
    """The weight of largest magnitude becomes -8 exactly: d = w / -8 (so d carries a sign)."""
    largest = np.take_along_axis(weights, np.abs(weights).argmax(axis=-1, keepdims=True), axis=-1)
    with np.errstate(all="ignore"):
        d = largest / np.float32(-8)
        inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
        q = _whole_numbers(weights * inverse + np.float32(8.5)).clip(0, 15).astype(np.uint8)
        scale = _bytes_of(d.astype("<f2"))
    return np.concatenate([scale, q[..., :16] | (q[..., 16:] << np.uint8(4))], axis=-1)


def _unpack_q8_0(blocks: Bytes) -> Floats:
    """w[j] = d * q[j]; d is f16, q is int8."""
    d = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    with np.errstate(all="ignore"):
        return d * np.ascontiguousarray(blocks[..., 2:]).view(np.int8).astype(np.float32)


def _pack_q8_0(weights: Floats) -> Bytes:
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


_TABLE = (
    BlockFormat("F32", 0, 1, 4, _unpack_f32, _pack_f32),
    BlockFormat("F16", 1, 1, 2, _unpack_f16, _pack_f16),
    BlockFormat("BF16", 30, 1, 2, _unpack_bf16, _pack_bf16),
    BlockFormat("Q4_0", 2, 32, 18, _unpack_q4_0, _pack_q4_0),
    BlockFormat("Q8_0", 8, 32, 34, _unpack_q8_0, _pack_q8_0),
)
FORMATS: Mapping[str, BlockFormat] = MappingProxyType({fmt.name: fmt for fmt in _TABLE})
BY_TYPE: Mapping[int, BlockFormat] = MappingProxyType({fmt.ggml_type: fmt for fmt in _TABLE})

# Every type that ggml numbers, so that a refusal can name it. 4, 5, 31-33 and 36-38 were taken out of the format.
_NAMES = """
    F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL
    IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 IQ4_NL_4_8
    IQ4_NL_8_8 MXFP4 NVFP4 Q1_0 Q2_0
"""
TYPE_NAMES: Mapping[int, str] = MappingProxyType(dict(enumerate(_NAMES.split())))
