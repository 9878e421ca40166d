"""Matrix products over tiles of 16 weight rows. Sees addresses and strides; formats come in as tile addresses."""

from __future__ import annotations

from numba.core import types

from m2lite.kernels import tuning
from m2lite.kernels.far import far
from m2lite.kernels.jit import inner, kernel
from m2lite.kernels.simd import call_tile, operation
from m2lite.kernels.split import Split


@operation(types.int64())
def tiles_ahead(builder):
    """How far ahead weights are asked for: a tile of short rows (`ffn_down_exps`) is read before the next has come."""
    return tuning.load(builder, "tiles_ahead")


@operation(types.int64())
def rows_at_once(builder):
    """Rows of activations that meet a part of a matrix: they must stay in the second cache."""
    return tuning.load(builder, "rows_at_once")


@kernel
def coming(w, next_w, tile_bytes, tile, end_tile):
    """The address of what comes a few tiles later: the matrix at next_w is asked for before the one at w has ended.

    next_w is w where none follows.
    """
    at = tile + tiles_ahead()
    if at < end_tile or next_w == w:
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


@far()
def matmul_part(part, n_parts, thread, out, out_stride, tile, w, stride, n_out, n_blocks, x, x_stride, n_x):
    """out[n_x, n_out] = x[n_x, K] @ w[n_out, K].T; K = 32 n_blocks, x is an activation panel (see dot.py).

    x_stride: bytes that a row takes of the panel.
    """
    n_tiles = (n_out + 15) // 16
    most = rows_at_once()
    for t in range(0, n_x, most):
        rows, n, at = x + t * x_stride, min(most, n_x - t), out + t * out_stride
        for i in range(part * n_tiles // n_parts, (part + 1) * n_tiles // n_parts):
            ahead = coming(w, w, 16 * stride, i, n_tiles)
            tile_at(tile, i, w, stride, n_out, n_blocks, rows, n, at, out_stride, ahead)


matmul = Split(matmul_part, in_chunks=True)
