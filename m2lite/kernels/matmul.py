"""Matrix products over tiles of 16 weight rows. Sees addresses and strides; formats come in as tile addresses."""

from __future__ import annotations

from llvmlite import ir

from m2lite.kernels.dots import GROUP
from m2lite.simd import emit
from m2lite.simd.far import far
from m2lite.simd.jit import inner, kernel
from m2lite.simd.kinds import Address, int64, void
from m2lite.simd.split import Split
from m2lite.simd.vectors import operation

AT_ONCE = 4 * GROUP  # rows of activations that meet a part of a matrix: they must stay in the second cache
AHEAD = 2  # tiles: of short rows (`ffn_down_exps`) one tile is read before the next has come


@operation(void(*[int64] * 10))
def call_tile(
    builder: ir.IRBuilder, function: ir.Value, w: ir.Value, stride: ir.Value, n_store: ir.Value, n_blocks: ir.Value,
    x: ir.Value, n_x: ir.Value, out: ir.Value, out_stride: ir.Value, ahead: ir.Value,
) -> None:  # fmt: skip
    """Call the tile kernel at address `function` (see dot.py for the arguments): formats are data, not branches."""
    emit.call_address(builder, function, [w, stride, n_store, n_blocks, x, n_x, out, out_stride, ahead])


@kernel
def coming(w: Address, next_w: Address, tile_bytes: int, tile: int, end_tile: int) -> Address:
    """The address of what comes AHEAD tiles later: the matrix at next_w is asked for before the one at w has ended.

    next_w is w where none follows.
    """
    at = tile + AHEAD
    if at < end_tile or next_w == w:
        return w + min(at, end_tile - 1) * tile_bytes
    return next_w + (at - end_tile) * tile_bytes


@inner
def tile_at(
    tile: int, i: int, w: Address, stride: int, n_out: int, n_blocks: int, x: Address, n_x: int, out: Address,
    out_stride: int, ahead: Address,
) -> None:  # fmt: skip
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
def matmul_part(
    part: int, n_parts: int, thread: int, out: Address, out_stride: int, tile: int, w: Address, stride: int,
    n_out: int, n_blocks: int, x: Address, x_stride: int, n_x: int,
) -> None:  # fmt: skip
    """out[n_x, n_out] = x[n_x, K] @ w[n_out, K].T; K = 32 n_blocks, x is an activation panel (see dot.py).

    x_stride: bytes that a row takes of the panel.
    """
    n_tiles = (n_out + 15) // 16
    for t in range(0, n_x, AT_ONCE):
        rows, n, at = x + t * x_stride, min(AT_ONCE, n_x - t), out + t * out_stride
        for i in range(part * n_tiles // n_parts, (part + 1) * n_tiles // n_parts):
            ahead = coming(w, w, 16 * stride, i, n_tiles)
            tile_at(tile, i, w, stride, n_out, n_blocks, rows, n, at, out_stride, ahead)


matmul = Split(matmul_part, in_chunks=True)
