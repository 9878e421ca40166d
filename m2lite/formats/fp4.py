"""MXFP4 and NVFP4: floats of 4 bits whose scale is a float of 8. NumPy, from bytes to numbers only."""

from __future__ import annotations

import numpy as np

from m2lite.formats.fields import Bytes, Floats, Parts, low_then_high, nibbles

# Twice the values of a 4-bit float (E2M1): the scales below are halved to make up for it.
E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def power_of_two(exponent: Bytes) -> Floats:
    """Half of 2**(e - 127), exact down to its two denormals."""
    e = exponent.astype(np.uint32)
    normal = (e - np.uint32(1)) << np.uint32(23)
    return np.where(e < 2, np.uint32(0x00200000) << (e & np.uint32(1)), normal).view(np.float32)


def parts_mxfp4(blocks: Bytes) -> Parts:
    """w = d value; d is a power of two in one byte, nibbles as in Q4_0."""
    return E2M1_DOUBLED[low_then_high(blocks, 1)], power_of_two(blocks[..., :1]), None


def _ue4m3() -> Floats:
    """[256]: half of an unsigned E4M3 number; the sign bit does not count, 0x7f is 0."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, (code & 7).astype(np.float32)
    normal = np.ldexp(np.float32(1) + mantissa / np.float32(8), exponent - 8)
    values = np.where(exponent == 0, np.ldexp(mantissa, -10), normal).astype(np.float32)
    values[0x7F] = 0
    return values


UE4M3 = _ue4m3()


def unpack_nvfp4(blocks: Bytes) -> Floats:
    """4 x 16 weights: four scales, then 8 bytes for each: low nibbles are weights 0-7, high nibbles 8-15."""
    lead = blocks.shape[:-1]
    codes = nibbles(blocks[..., 4:].reshape(*lead, 4, 8)).reshape(*lead, 4, 16)
    return (UE4M3[blocks[..., :4]][..., None] * E2M1_DOUBLED[codes].astype(np.float32)).reshape(*lead, 64)
