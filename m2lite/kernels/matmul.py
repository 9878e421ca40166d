"""Matrix products over tiles of 16 weight rows. Sees addresses and strides; formats come in as tile addresses."""

from __future__ import annotations

from collections.abc import Iterable

from llvmlite import ir

from m2lite.simd import emit, tuning
from m2lite.simd.far import far
from m2lite.simd.jit import inner, kernel
from m2lite.simd.kinds import Address, int64, void
from m2lite.simd.split import Split
from m2lite.simd.vectors import operation


@operation(int64())
def tiles_ahead(builder: ir.IRBuilder) -> ir.Value:
    """How far ahead weights are asked for: a tile of short rows (`ffn_down_exps`) is read before the next has come."""
    return tuning.load(builder, "tiles_ahead")


@operation(int64())
def rows_at_once(builder: ir.IRBuilder) -> ir.Value:
    """Rows of activations that meet a part of a matrix: they must stay in the second cache."""
    return tuning.load(builder, "rows_at_once")


@operation(void(*[int64] * 10))
def call_tile(
    builder: ir.IRBuilder, function: ir.Value, w: ir.Value, stride: ir.Value, n_store: ir.Value, n_blocks: ir.Value,
    x: ir.Value, n_x: ir.Value, out: ir.Value, out_stride: ir.Value, ahead: ir.Value,
) -> None:  # fmt: skip
    """Call the tile kernel at address `function` (see dot.py for the arguments): formats are data, not branches."""
    emit.call_address(builder, function, [w, stride, n_store, n_blocks, x, n_x, out, out_stride, ahead])


@kernel
def coming(w: Address, next_w: Address, tile_bytes: int, tile: int, end_tile: int) -> Address:
    """The address of what comes a few tiles later: what is read next, at next_w, is asked for before end_tile.

    next_w is 0 where nothing follows.
    """
    at = tile + tiles_ahead()
    if at < end_tile or next_w == 0:
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


@inner
def tiles_of(
    first: int, end: int, next_w: Address, out: Address, tile: int, w: Address, stride: int, n_out: int, x: Address,
    x_stride: int, n_x: int, n_blocks: int, out_stride: int,
) -> None:  # fmt: skip
    """Tiles `first` to `end` - 1 of a matrix for all rows; next_w: see `coming`."""
    most = int(rows_at_once())
    for t in range(0, n_x, most):
        rows, n, at = x + t * x_stride, min(most, n_x - t), out + t * out_stride
        then = next_w if t + most >= n_x else w + 16 * stride * first
        for i in range(first, end):
            ahead = coming(w, then, 16 * stride, i, end)
            tile_at(tile, i, w, stride, n_out, n_blocks, rows, n, at, out_stride, ahead)


@far()
def matmul_part(
    part: int, n_parts: int, thread: int, after: int, out: Address, out_stride: int, tile: int, w: Address, stride: int,
    n_out: int, n_blocks: int, x: Address, x_stride: int, n_x: int,
) -> None:  # fmt: skip
    """out[n_x, n_out] = x[n_x, K] @ w[n_out, K].T; K = 32 n_blocks, x is an activation panel (see dot.py).

    x_stride: bytes that a row takes of the panel.
    """
    n_tiles = (n_out + 15) // 16
    first, end = part * n_tiles // n_parts, (part + 1) * n_tiles // n_parts
    next_w = w + 16 * stride * (after * n_tiles // n_parts) if after < n_parts else Address(0)
    tiles_of(first, end, next_w, out, tile, w, stride, n_out, x, x_stride, n_x, n_blocks, out_stride)


@kernel
def tile_in(matrices: Iterable[tuple[Address, int, Address, int, int, Address, int]], i: int) -> Address:
    """The address of tile i, counted through all the matrices."""
    for _, _, w, stride, n_out, _, _ in matrices:
        n_tiles = (n_out + 15) // 16
        if i < n_tiles:
            return w + 16 * stride * i
        i -= n_tiles
    return Address(0)


@far()
def matmul_three_part(
    part: int, n_parts: int, thread: int, after: int, n_blocks: int, n_x: int,
    a_out: Address, a_tile: int, a_w: Address, a_stride: int, a_n_out: int, a_x: Address, a_x_stride: int,
    b_out: Address, b_tile: int, b_w: Address, b_stride: int, b_n_out: int, b_x: Address, b_x_stride: int,
    c_out: Address, c_tile: int, c_w: Address, c_stride: int, c_n_out: int, c_x: Address, c_x_stride: int,
) -> None:  # fmt: skip
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
