"""Tiles of 16 blocks, on all threads: which kernel encodes which format. Sees addresses; encode.py checks and calls.

A tile is the same columns of 16 rows. Without importance every block is a row of its own, so that 16 blocks in
sequence make a tile; with one, the 16 rows of a tile share the importance of their columns. The last tile is moved
back to end with the last row: rows that are encoded twice get the same bytes twice.
"""
# mypy: ignore-errors

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numba import types

from m2lite.kernels.far import far
from m2lite.kernels.jit import address_of, kernel, n_parts, specialise
from m2lite.kernels.simd import load_f32, scratch, splat, store_f16, tree_sum, write_f32
from m2lite.kernels.split import Split
from m2lite.quant import search_affine as affine
from m2lite.quant import search_plain as plain
from m2lite.quant import search_signed as signed
from m2lite.quant.lanes import call_encoder, store_u16, transpose
from m2lite.quant.search_plain import bf16_bits

F = np.float32
LANES = 16

MOST_WEIGHTS = 256  # of a block


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


class Encoder(NamedTuple):
    """How 16 blocks are encoded: formats are data, so one driver serves all."""

    tile: Any
    n_weights: int
    n_bytes: int
    work: int = 4  # operations a weight: only to decide on a parallel region

    def run(self, x: int, importance: int, sigma: int, out: int, n_rows: int, n_columns: int) -> None:
        """Encode n_rows x n_columns blocks; all but the last two are addresses."""
        work = n_rows * n_columns * self.n_weights * self.work
        tile = _address(self.tile)
        _encode_tiles(n_parts(work), tile, self.n_weights, self.n_bytes, x, importance, sigma, out, n_rows, n_columns)


@functools.cache
def _address(tile: Any) -> int:
    return address_of(tile.py_func, _SIGNATURE)


PLAIN = {
    "Q4_0": Encoder(plain.encode_q4_0, 32, 18),
    "Q4_1": Encoder(plain.encode_q4_1, 32, 20),
    "Q5_0": Encoder(plain.encode_q5_0, 32, 22),
    "Q5_1": Encoder(plain.encode_q5_1, 32, 24),
    "Q8_0": Encoder(plain.encode_q8_0, 32, 34),
    "MXFP4": Encoder(plain.encode_mxfp4, 32, 17, 40),
}

# Formats that are searched; those that PLAIN has too only with an importance.
WEIGHTED = {
    "Q4_0": Encoder(signed.encode_q4_0, 32, 18, 300),
    "Q5_0": Encoder(signed.encode_q5_0, 32, 22, 300),
    "Q4_1": Encoder(affine.encode_q4_1, 32, 20, 300),
    "Q5_1": Encoder(affine.encode_q5_1, 32, 24, 300),
    "Q4_K": Encoder(affine.encode_q4_k, 256, 144, 500),
    "Q5_K": Encoder(affine.encode_q5_k, 256, 176, 500),
    "Q6_K": Encoder(signed.encode_q6_k, 256, 210, 400),
    "IQ4_NL": Encoder(signed.encode_iq4_nl, 32, 18, 500),
    "IQ4_XS": Encoder(signed.encode_iq4_xs, 256, 136, 600),
}


# --- element by element -------------------------------------------------------------------------------------------


@kernel
def store_half(to, v):
    store_f16(to, v)


@kernel
def store_bf16(to, v):
    store_u16(to, bf16_bits(v))


store = None  # `specialise` fills it in


def _elements(part, n_parts, x, out, n):
    """out[i] = x[i] in two bytes, for the first n // 16 * 16 elements."""
    n_vectors = n // LANES
    for i in range(part * n_vectors // n_parts, (part + 1) * n_vectors // n_parts):
        store(out + 32 * i, load_f32(x + 64 * i))


def _element_encoder(name: str, store: Any) -> Split:
    return Split(far()(specialise(_elements, f"encode_{name}", store=store)))


ELEMENTS = {"F16": _element_encoder("f16", store_half), "BF16": _element_encoder("bf16", store_bf16)}


# --- one number per row -------------------------------------------------------------------------------------------


@far()
def _squares_part(part, n_parts, x, sigma, n_rows, width):
    """sigma[row] = mean of x[row]**2: 16 virtual lanes and a fixed tree; width is a multiple of 16."""
    for row in range(part * n_rows // n_parts, (part + 1) * n_rows // n_parts):
        total = splat(F(0.0))
        for i in range(0, 4 * width, 64):
            v = load_f32(x + row * 4 * width + i)
            total = total + v * v
        write_f32(sigma + 4 * row, tree_sum(total) / F(width))


row_squares = Split(_squares_part)
