"""How F32, F16 and BF16 are written: encode_X(to, v) stores 16 numbers."""
# mypy: ignore-errors

from __future__ import annotations

from m2lite.simd.jit import kernel
from m2lite.simd.memory import store_f16, store_f32, store_u16
from m2lite.simd.vectors import bits_of, where

encode_f32, encode_f16 = store_f32, store_f16


@kernel
def encode_bf16(to, v):
    """Round to nearest even; a NaN stays one."""
    bits = bits_of(v)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    store_u16(to, where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 64, rounded))
