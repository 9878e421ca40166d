"""Bytes of a format, or FP8 with the scales of its blocks -> float32 rows, on all threads. Knows no tensor, no file."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated, misc"

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

from m2lite.formats.table import FORMATS, piece
from m2lite.simd.far import far
from m2lite.simd.jit import kernel, n_parts, n_threads, specialise
from m2lite.simd.kinds import Address, F32x16, f32x16, int64
from m2lite.simd.memory import (
    load_f32,
    load_first_u8,
    load_u8,
    read_f32,
    read_i32,
    scratch,
    store_f32,
    store_i32,
    write_f32,
    write_i32,
)
from m2lite.simd.split import Split
from m2lite.simd.vectors import bits_of, from_bits, from_half_bits, operation, splat, where

F32 = npt.NDArray[np.float32]

FP8 = "F8_E4M3"
LANES = 16
INFINITY_BITS = 0x7F800000
NAN_BITS = 0x7FC00000
E4M3_NAN = 0x7F
HALF_TO_E4M3 = np.float32(256.0)  # an f16's exponent is biased by 15, an E4M3's by 7


@kernel
def from_e4m3(code):
    """The values of float8_e4m3fn, exactly: as f16 bits they are 2**8 too small; 0x7F and 0xFF are NaN."""
    size = code & 0x7F
    value = from_half_bits((size << 7) | ((code & 0x80) << 8)) * HALF_TO_E4M3
    return where(size == E4M3_NAN, from_bits(size * 0 + NAN_BITS), value)


@kernel
def larger_bits(a, v):
    """The larger of a and |v| as bits: infinity and NaN are above all numbers."""
    bits = bits_of(v) & 0x7FFFFFFF
    return where(bits > a, bits, a)


@kernel
def write_flag(flag, worst):
    """flag = 1 if no lane of `worst` is infinity or NaN."""
    area = scratch(1)
    store_i32(area, where(worst < INFINITY_BITS, worst * 0, worst * 0 + 1))
    bad = np.int32(0)
    for lane in range(LANES):
        bad |= read_i32(area + 4 * lane)
    write_i32(flag, np.int32(1) - bad)


# Names that `specialise` fills in: the templates below see them as globals.
unpack: Callable[[Address, Address], None]
n_weights: int
n_bytes: int


def _part(part, n_parts, raw, n_blocks, out, flags):
    """out = the weights of all blocks at raw; flags[part] = 1 if those of the part are finite."""
    worst = bits_of(splat(np.float32(0.0)))
    for i in range(part * n_blocks // n_parts, (part + 1) * n_blocks // n_parts):
        at = out + 4 * n_weights * i
        unpack(raw + n_bytes * i, at)
        for j in range(0, 4 * n_weights, 64):
            worst = larger_bits(worst, load_f32(at + j))
    write_flag(flags + 4 * part, worst)


def _unpack_floats(w, out):
    store_f32(out, load(w))


load: Callable[[Address], F32x16]


@cache
def _decoder(name: str) -> tuple[Split, int, int]:
    """The kernel of a format, and the weights and bytes of what it takes as a block: 16 numbers of floats."""
    fmt = FORMATS[name]
    n = LANES if fmt.is_float else fmt.n_weights
    if fmt.is_float:
        read = piece(fmt.unpacker)
        load = operation(f32x16(int64))(lambda builder, w: read(builder, w, 0))
        unpack = kernel(specialise(_unpack_floats, f"unpack_{name}", load=load))
    else:
        unpack = piece(fmt.unpacker).compiled_for(name)
    names = {"unpack": unpack, "n_weights": n, "n_bytes": fmt.row_bytes(n)}
    return Split(far()(specialise(_part, f"decode_{name}", **names))), n, fmt.row_bytes(n)


@far()
def _scaled_part(part, n_parts, raw, scale, n_scales, block_rows, block_columns, first_row, n_rows, width, out, flags):
    """out[r, c] = e4m3(raw[r, c]) * scale[(first_row + r) // block_rows, c // block_columns]."""
    worst = bits_of(splat(np.float32(0.0)))
    rest = scratch(1)
    for r in range(part * n_rows // n_parts, (part + 1) * n_rows // n_parts):
        row_scales = scale + 4 * n_scales * ((first_row + r) // block_rows)
        for block in range(n_scales):
            factor = read_f32(row_scales + 4 * block)
            begin, end = block * block_columns, min(width, (block + 1) * block_columns)
            whole = begin + (end - begin) // LANES * LANES
            for c in range(begin, whole, LANES):
                v = from_e4m3(load_u8(raw + r * width + c)) * factor
                worst = larger_bits(worst, v)
                store_f32(out + 4 * (r * width + c), v)
            if whole < end:
                v = from_e4m3(load_first_u8(raw + r * width + whole, end - whole)) * factor
                worst = larger_bits(worst, v)
                store_f32(rest, v)
                for c in range(end - whole):
                    write_f32(out + 4 * (r * width + whole + c), read_f32(rest + 4 * c))
    write_flag(flags + 4 * part, worst)


_scaled = Split(_scaled_part)


def decode_rows(
    raw: npt.NDArray[np.uint8],
    dtype: str,
    n_rows: int,
    width: int,
    scale: F32 | None = None,
    block: tuple[int, int] = (128, 128),
    first_row: int = 0,
    out: F32 | None = None,
) -> tuple[F32, bool]:
    """float32[n_rows, width] of the rows that begin at row `first_row` of a matrix, and whether all are finite.

    dtype: a format's name, or FP8; scale: float32[block rows, block columns] of the whole matrix, for that one.
    """
    n = n_rows * width
    assert raw.dtype == np.uint8 and raw.flags.c_contiguous
    assert raw.size == (n if dtype == FP8 else n_rows * FORMATS[dtype].row_bytes(width))
    if out is None:
        out = np.empty((n_rows, width), np.float32)
    assert out.shape == (n_rows, width) and out.dtype == np.float32 and out.flags.c_contiguous
    flags = np.ones(n_threads(), np.int32)
    if dtype != FP8:
        decode, n_weights, _ = _decoder(dtype)
        decode(n_parts(4 * n), raw.ctypes.data, n // n_weights, out.ctypes.data, flags.ctypes.data)
        tail_finite = _decode_tail(raw, dtype, out.reshape(-1))
        return out, tail_finite and bool(flags.all())
    scale = np.ones((1, 1), np.float32) if scale is None else np.ascontiguousarray(scale, np.float32)
    block_rows, block_columns = block if scale.size > 1 else (max(1, first_row + n_rows), max(1, width))
    assert scale.shape[1] == max(1, -(-width // block_columns)) and first_row + n_rows <= scale.shape[0] * block_rows
    _scaled(
        n_parts(4 * n), raw.ctypes.data, scale.ctypes.data, scale.shape[1], block_rows, block_columns, first_row,
        n_rows, width, out.ctypes.data, flags.ctypes.data,
    )  # fmt: skip
    return out, bool(flags.all())


def _decode_tail(raw: npt.NDArray[np.uint8], dtype: str, out: F32) -> bool:
    """The last floats that fill no vector, through one that is filled with zeros."""
    decode, n_weights, n_bytes = _decoder(dtype)
    n_left = out.size % n_weights
    if n_left == 0:
        return True
    padded = np.zeros(n_bytes, np.uint8)
    tail = raw.reshape(-1)[raw.size // n_bytes * n_bytes :]
    padded[: tail.size] = tail
    values, flags = np.empty(n_weights, np.float32), np.ones(1, np.int32)
    decode.part(0, 1, padded.ctypes.data, 1, values.ctypes.data, flags.ctypes.data)
    out[-n_left:] = values[:n_left]
    return bool(flags[0])
