"""Rows of tokens in, logits out. Knows no text, no sampling, no file.

    x = token_embd[token]
    for each layer:  x = layer(x)        # layers.py
    logits = rms_norm(x) @ output

Prefill, decode, verification and batch are this one call; a row's result does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from m2lite.errors import M2liteError
from m2lite.model.buffers import Buffers, on_a_line
from m2lite.model.cache import KVPool, Rows
from m2lite.model.layers import Check, ForwardPass, go_on, layer
from m2lite.model.observer import Observer
from m2lite.model.weights import Matrix, Vector, Weights
from m2lite.simd import jit

_DAMAGED = "The weights may be damaged: download or convert the file again."


def forward(
    weights: Weights,
    pool: KVPool,
    buffers: Buffers,
    rows: Rows,
    outputs: str | Sequence[int] = "last",
    check: Check = go_on,
    observers: Sequence[Observer] = (),
) -> npt.NDArray[np.float32]:
    """float32 [n_out, n_vocab]: logits of each part's last row ("last"), of its last outputs[part], or of all ("all").

    The result is a view that the next call overwrites. The timelines grow by the rows. buffers.array("x")[:T] then
    holds the rows' hidden states before the final norm. Raises M2liteError when a layer yields NaN or infinity; the
    timelines are then as before. `check` is called before and within every layer and may raise to stop the call: same
    promise. Where an observer lets rows of a single timeline go, they have no logits, and the timeline does not grow by
    them. Observers that are not late make few rows slower.
    """
    c, b, n, stream = weights.config, buffers, rows.n, buffers.stream
    call = ForwardPass(pool, rows, b, observers, check, stream)
    embed(call, weights, n, b.x)
    for i, each in enumerate(weights.layers):
        check()
        if stream is not None:
            stream.enter(i, n, is_last=i == len(weights.layers) - 1)
        n = layer(call, each, i, n)
        if not n:
            raise M2liteError(f"NaN or infinity in layer {i}.", _DAMAGED)
    if stream is not None:
        stream.enter(c.n_layers, n, is_last=True)
    logits = _head(weights, b, rows, outputs) if outputs != "all" else head(weights, b, b.x, weights.output_norm, n)
    for observer in observers:
        observer.dense((weights.output,), b.h, c.n_embd, len(logits))
    for timeline, length in rows.lengths:
        timeline.length = length - (rows.n - n)
    return logits


def embed(call: ForwardPass, weights: Weights, n: int, out: int) -> None:
    """out[n, n_embd] = token_embd[token] of the call's rows."""
    embd, out_stride = weights.token_embd, 4 * weights.config.n_embd
    call.buffers.kernels.embed_rows(
        weights.unpack_embd, embd.address, embd.row_bytes, embd.n_blocks, call.tokens, n, out, out_stride
    )


def multiply(b: Buffers, out: int, m: Matrix, x: int, n: int) -> None:
    """out[n, n_out] = x[n, n_in] @ m.T, for a matrix that belongs to no layer."""
    b.kernels.steps.product(jit.team(), m.record, b.record, out, 4 * m.n_out, x, n)


def _head(weights: Weights, b: Buffers, rows: Rows, outputs: str | Sequence[int]) -> npt.NDArray[np.float32]:
    """rms_norm(x) @ output for each part's last row, or its last outputs[part]."""
    chosen = rows.last
    if not isinstance(outputs, str):
        chosen = [row for last, n in zip(rows.last, outputs, strict=True) for row in range(last - n + 1, last + 1)]
    return head_of(weights, b, chosen, weights.output_norm)


def head_of(weights: Weights, b: Buffers, chosen: Sequence[int], norm: Vector) -> npt.NDArray[np.float32]:
    """As `head`, of these rows of x."""
    if not chosen:
        return b.logits[:0]
    n, source = len(chosen), b.x + 4 * weights.config.n_embd * chosen[0]
    if n > 1:
        b.array("h")[:n] = b.array("x")[chosen]
        source = b.h
    return head(weights, b, source, norm, n)


def head(weights: Weights, b: Buffers, x: int, norm: Vector, n: int) -> npt.NDArray[np.float32]:
    """logits[n, n_vocab] = rms_norm(x) @ output, in a buffer that the next call overwrites."""
    c = weights.config
    if len(b.logits) < n:
        b.logits = on_a_line((n, c.n_vocab), np.float32)
    b.kernels.rms_norm(b.h, x, norm.address, n, c.n_embd, np.float32(c.rms_eps))
    multiply(b, int(b.logits.ctypes.data), weights.output, b.h, n)
    logits = b.logits[:n]
    if not np.isfinite(logits).all():
        raise M2liteError("NaN or infinity in the logits.", _DAMAGED)
    return logits
