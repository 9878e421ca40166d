"""float32 rows -> bytes of a block format, checked and on all threads. What the bytes mean is in formats/.

Without importance the formats that the gguf package can write get exactly its bytes; the others, and all that take an
importance, are searched. The same input gives the same bytes for any number of threads.

A tile is 16 blocks: the same columns of 16 rows. Without importance every block is a row of its own, so that 16 blocks
in sequence make a tile; with one, the 16 rows of a tile share the importance of their columns. The last tile is moved
back to end with the last row: rows that are encoded twice get the same bytes twice.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated, misc"

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types

from m2lite.errors import BadModelError
from m2lite.formats.table import BlockFormat, piece
from m2lite.simd import emit
from m2lite.simd.far import far
from m2lite.simd.jit import address_of, n_parts, specialise
from m2lite.simd.kinds import Address, F32x16, int64, void
from m2lite.simd.memory import load_f32, scratch, transpose, write_f32
from m2lite.simd.split import Split
from m2lite.simd.vectors import operation, splat, tree_sum

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

LANES = 16
MOST_WEIGHTS = 256  # of a block
PLAIN_WORK, SEARCH_WORK = 4, 400  # operations a weight: only to decide on a parallel region


# --- kernels --------------------------------------------------------------------------------------------------------


@operation(void(*[int64] * 6))
def call_encoder(
    builder: ir.IRBuilder, function: ir.Value, x: ir.Value, importance: ir.Value, sigma: ir.Value, out: ir.Value,
    stride: ir.Value,
) -> None:  # fmt: skip
    """Call the encoder of 16 blocks at address `function`."""
    emit.call_address(builder, function, [x, importance, sigma, out, stride])


@far()
def _part(part, n_parts, tile, n_weights, n_bytes, x, importance, sigma, out, n_rows, n_columns):
    """out[row, column] = the block of x[row, column], float32; n_rows >= 16. importance: float32 of one row, or 0."""
    area = scratch(MOST_WEIGHTS)
    x_row, out_row = n_columns * n_weights * 4, n_columns * n_bytes
    n_tiles = (n_rows + LANES - 1) // LANES * n_columns
    for i in range(part * n_tiles // n_parts, (part + 1) * n_tiles // n_parts):
        row, column = min(i // n_columns * LANES, n_rows - LANES), i % n_columns
        for j in range(0, n_weights, LANES):
            transpose(x + row * x_row + (column * n_weights + j) * 4, x_row, area + 64 * j, 64)
        at = importance + column * n_weights * 4 if importance else 0
        call_encoder(tile, area, at, sigma + 4 * row, out + row * out_row + column * n_bytes, out_row)


_encode_tiles = Split(_part)
_SIGNATURE = types.void(*([types.int64] * 5))

# Names that `specialise` fills in.
store: Callable[[Address, F32x16], None]
item_bytes: int


def _elements(part, n_parts, x, out, n):
    """out[i] = x[i] as the format has it, for the first n // 16 * 16 elements."""
    n_vectors = n // LANES
    for i in range(part * n_vectors // n_parts, (part + 1) * n_vectors // n_parts):
        store(out + LANES * item_bytes * i, load_f32(x + 64 * i))


@far()
def _squares_part(part, n_parts, x, sigma, n_rows, width):
    """sigma[row] = mean of x[row]**2: 16 virtual lanes and a fixed tree; width is a multiple of 16."""
    for row in range(part * n_rows // n_parts, (part + 1) * n_rows // n_parts):
        total = splat(np.float32(0.0))
        for i in range(0, 4 * width, 64):
            v = load_f32(x + row * 4 * width + i)
            total = total + v * v
        write_f32(sigma + 4 * row, tree_sum(total) / np.float32(width))


row_squares = Split(_squares_part)


@cache
def _elements_of(block_format: BlockFormat) -> Split:
    names = {"store": piece(block_format.encoder), "item_bytes": block_format.n_bytes}
    return Split(far()(specialise(_elements, f"encode_{block_format.name}", **names)))


@cache
def _tile_address(place: str) -> int:
    return address_of(piece(place).py_func, _SIGNATURE)


def run_tiles(
    block_format: BlockFormat, x: int, importance: int, sigma: int, out: int, n_rows: int, n_columns: int
) -> None:
    """Encode n_rows x n_columns blocks, at least 16 rows of them; all but the last two are addresses."""
    place = block_format.search if importance else block_format.encoder or block_format.search
    work = PLAIN_WORK if place == block_format.encoder else SEARCH_WORK
    parts, tile = n_parts(n_rows * n_columns * block_format.n_weights * work), _tile_address(place)
    n_weights, n_bytes = block_format.n_weights, block_format.n_bytes
    _encode_tiles(parts, tile, n_weights, n_bytes, x, importance, sigma, out, n_rows, n_columns)


# --- rows -----------------------------------------------------------------------------------------------------------


def encode_rows(
    block_format: BlockFormat, rows: F32, name: str, importance: F32 | None = None, out: Bytes | None = None
) -> Bytes:
    """uint8[n, row bytes] of float32[n, width]; `name` is for the message when a weight is too large for the format.

    importance: float32[width], the mean square of what each column is multiplied with, for formats that use one.
    """
    n_rows, width = rows.shape
    rows = np.ascontiguousarray(rows, np.float32)
    _check_limit(block_format, rows, name, searched=importance is not None and bool(block_format.search))
    row_bytes = block_format.row_bytes(width)
    if out is None:
        out = np.empty((n_rows, row_bytes), np.uint8)
    assert out.shape == (n_rows, row_bytes) and out.dtype == np.uint8 and out.flags.c_contiguous
    assert importance is None or (
        importance.shape == (width,) and bool((importance >= 0).all() and np.isfinite(importance).all())
    )
    if not rows.size:
        return out
    if block_format.is_float:
        _encode_elements(block_format, rows.reshape(-1), out.reshape(-1))
    elif importance is not None and block_format.search:
        _encode_blocks(block_format, rows, scaled_importance(importance), out)
    else:
        blocks = rows.reshape(-1, block_format.n_weights)
        _encode_blocks(block_format, blocks, None, out.reshape(len(blocks), -1))
    return out


def _check_limit(block_format: BlockFormat, rows: F32, name: str, *, searched: bool) -> None:
    limit = block_format.largest
    if searched and block_format.encoder:
        limit /= 2  # the best scale may exceed the plain one
    if limit < math.inf and rows.size and (largest := max(float(rows.max()), -float(rows.min()))) > limit:
        raise BadModelError(
            f"Tensor {name!r} holds {largest:g}, more than the {limit:g} that {block_format.name} can hold.",
            "Convert with --type bf16 or f32.",
        )


def _encode_elements(block_format: BlockFormat, weights: F32, out: Bytes) -> None:
    n = weights.size
    _elements_of(block_format)(n_parts(n), weights.ctypes.data, out.ctypes.data, n)
    tail = n // LANES * LANES
    if tail < n:
        assert block_format.pack is not None
        out[block_format.n_bytes * tail :] = block_format.pack(weights[tail:])


def _encode_blocks(block_format: BlockFormat, rows: F32, weights: F32 | None, out: Bytes) -> None:
    """Encode rows of whole blocks; fewer than a tile's 16 rows are filled up with zeros first."""
    n_rows, width = rows.shape
    if n_rows < LANES:
        full = np.zeros((LANES, width), np.float32)
        full[:n_rows] = rows
        packed = np.empty((LANES, out.shape[1]), np.uint8)
        _encode_blocks(block_format, full, weights, packed)
        out[:] = packed[:n_rows]
        return
    sigma = np.empty(n_rows, np.float32)
    if weights is not None:
        row_squares(n_parts(rows.size), rows.ctypes.data, sigma.ctypes.data, n_rows, width)
    importance = 0 if weights is None else weights.ctypes.data
    n_columns = width // block_format.n_weights
    run_tiles(block_format, rows.ctypes.data, importance, sigma.ctypes.data, out.ctypes.data, n_rows, n_columns)


def scaled_importance(importance: F32) -> F32:
    """Times the power of two that brings its largest value to 0.5 up to 1, so that no product leaves float32; all
    ones for all zeros."""
    largest = float(importance.max(initial=0.0))
    if largest == 0:
        return np.ones_like(importance, np.float32)
    return np.ascontiguousarray(np.ldexp(importance.astype(np.float32), -np.frexp(np.float32(largest))[1]), np.float32)
