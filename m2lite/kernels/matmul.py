"""Matrix products over tiles of 16 weight rows. Sees addresses and strides; formats come in as tile addresses."""

from __future__ import annotations

import numpy as np

from m2lite.kernels.dots import GROUP
from m2lite.kernels.far import far
from m2lite.kernels.jit import inner, kernel
from m2lite.kernels.simd import call_tile
from m2lite.kernels.split import Split

AT_ONCE = 2 * GROUP  # rows of activations that meet a part of a matrix: they must stay in the second cache
AHEAD = 2  # tiles: of short rows (`ffn_down_exps`) one tile is read before the next has come


@kernel
def coming(w, next_w, tile_bytes, tile, end_tile):
    """The address of what comes AHEAD tiles later: what is read next, at next_w, is asked for before end_tile.

    next_w is 0 where nothing follows.
    """
    at = tile + AHEAD
    if at < end_tile or next_w == 0:
        return w + min(at, end_tile - 1) * tile_bytes
    return next_w + (at - end_tile) * tile_bytes


@inner
def tile_at(tile, i, w, stride, n_out, n_blocks, x, n_x, out, out_stride, ahead):
    """Tile i of a matrix of n_out rows: the last one moves back to end at n_out; fewer than 16 rows go one by one.

    ahead: as `coming` says.
    """
    if n_out >= 16:
        r = min(i * 16, n_out - 16)
        call_tile(tile, w + r * stride, stride, 16, n_blocks, x, n_x, out + 4 * r, out_stride, ahead)
    else:
        for r in range(n_out):
            call_tile(tile, w + r * stride, 0, 1, n_blocks, x, n_x, out + 4 * r, out_stride, ahead)


@inner
def tiles_of(first, end, next_w, out, tile, w, stride, n_out, x, x_stride, n_x, n_blocks, out_stride):
    """Tiles `first` to `end` - 1 of a matrix for all rows; next_w: see `coming`."""
    for t in range(0, n_x, AT_ONCE):
        rows, n, at = x + t * x_stride, min(AT_ONCE, n_x - t), out + t * out_stride
        then = next_w if t + AT_ONCE >= n_x else w + 16 * stride * first
        for i in range(first, end):
            ahead = coming(w, then, 16 * stride, i, end)
            tile_at(tile, i, w, stride, n_out, n_blocks, rows, n, at, out_stride, ahead)


@far()
def matmul_part(part, n_parts, thread, after, out, out_stride, tile, w, stride, n_out, n_blocks, x, x_stride, n_x):
    """out[n_x, n_out] = x[n_x, K] @ w[n_out, K].T; K = 32 n_blocks, x is an activation panel (see dot.py).

    x_stride: bytes that a row takes of the panel.
    """
    n_tiles = (n_out + 15) // 16
    first, end = part * n_tiles // n_parts, (part + 1) * n_tiles // n_parts
    next_w = w + 16 * stride * (after * n_tiles // n_parts) if after < n_parts else 0
    tiles_of(first, end, next_w, out, tile, w, stride, n_out, x, x_stride, n_x, n_blocks, out_stride)


@kernel
def tile_in(matrices, i):
    """The address of tile i, counted through all the matrices."""
    for _, _, w, stride, n_out, _, _ in matrices:
        n_tiles = (n_out + 15) // 16
        if i < n_tiles:
            return w + 16 * stride * i
        i -= n_tiles
    return np.int64(0)


@far()
def matmul_three_part(
    part, n_parts, thread, after, n_blocks, n_x, a_out, a_tile, a_w, a_stride, a_n_out, a_x, a_x_stride,
    b_out, b_tile, b_w, b_stride, b_n_out, b_x, b_x_stride, c_out, c_tile, c_w, c_stride, c_n_out, c_x, c_x_stride,
):  # fmt: skip
    """As matmul, for three matrices of the same width and number of rows: each out is [n_x, n_out]."""
    matrices = (
        (a_out, a_tile, a_w, a_stride, a_n_out, a_x, a_x_stride),
        (b_out, b_tile, b_w, b_stride, b_n_out, b_x, b_x_stride),
        (c_out, c_tile, c_w, c_stride, c_n_out, c_x, c_x_stride),
    )
    total = (a_n_out + 15) // 16 + (b_n_out + 15) // 16 + (c_n_out + 15) // 16
    first, end = part * total // n_parts, (part + 1) * total // n_parts
    begin = 0
    for out, tile, w, stride, n_out, x, x_stride in matrices:
        behind = begin + (n_out + 15) // 16
        if first < behind and end > begin:
            i = behind if end > behind else after * total // n_parts
            args = out, tile, w, stride, n_out, x, x_stride, n_x, n_blocks, 4 * n_out
            tiles_of(max(first - begin, 0), min(end, behind) - begin, tile_in(matrices, i), *args)
        begin = behind


matmul = Split(matmul_part, in_chunks=True)
matmul_three = Split(matmul_three_part, in_chunks=True)
