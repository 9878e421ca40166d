"""Matrix products over tiles of 16 weight rows. Sees addresses and strides; formats come in as tile addresses."""

from __future__ import annotations

from m2lite.kernels.jit import kernel
from m2lite.kernels.simd import call_tile
from m2lite.kernels.split import Split

AHEAD = 2  # tiles: of short rows (`ffn_down_exps`) one tile is read before the next has come


@kernel
def tile_at(tile, i, w, stride, n_out, n_blocks, x, n_x, out, out_stride, ahead):
    """Tile i of a matrix of n_out rows: the last one moves back to end at n_out; fewer than 16 rows go one by one.

    ahead: the address of the tile that comes AHEAD tiles later.
    """
    if n_out >= 16:
        r = min(i * 16, n_out - 16)
        call_tile(tile, w + r * stride, stride, 16, n_blocks, x, n_x, out + 4 * r, out_stride, ahead)
    else:
        for r in range(n_out):
            call_tile(tile, w + r * stride, 0, 1, n_blocks, x, n_x, out + 4 * r, out_stride, ahead)


@kernel
def matmul_part(part, n_parts, thread, out, out_stride, tile, w, stride, n_out, n_blocks, x, n_x):
    """out[n_x, n_out] = x[n_x, K] @ w[n_out, K].T; K = 32 n_blocks, x is an activation panel (see dot.py)."""
    n_tiles = (n_out + 15) // 16
    for i in range(part * n_tiles // n_parts, (part + 1) * n_tiles // n_parts):
        ahead = w + min(i + AHEAD, n_tiles - 1) * 16 * stride
        tile_at(tile, i, w, stride, n_out, n_blocks, x, n_x, out, out_stride, ahead)


matmul = Split(matmul_part, in_chunks=True)
