"""The layers of MiniMax-M2, as in the paper: rows of tokens in, logits out. Knows no text, no sampling, no file.

    x = token_embd[token]
    for each layer:
        h = rms_norm(x);  q, k, v = h @ Wq, h @ Wk, h @ Wv
        q, k = rope(rms_norm(q)), rope(rms_norm(k))              # the norm goes over all heads together
        x += attend(q, all k and v of the timeline) @ Wo
        h = rms_norm(x);  s = sigmoid(h @ ffn_gate_inp)          # the 8 largest of s + bias, weighted by s
        x += sum over chosen experts e, ascending:  s_e / sum(s) * ((silu(h @ gate_e) * (h @ up_e)) @ down_e)
    logits = rms_norm(x) @ output

Prefill, decode, verification and batch are this one call; a row's result does not depend on the other rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from struct import Struct
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from m2lite.errors import M2liteError
from m2lite.kernels import layer as records
from m2lite.model.buffers import FEW_ROWS, Buffers, on_a_line
from m2lite.model.cache import KVPool, Rows
from m2lite.model.config import Config
from m2lite.model.observer import Observer
from m2lite.model.stream import Stream
from m2lite.model.weights import Layer, Matrix, Vector, Weights
from m2lite.simd import jit

Check = Callable[[], None]
_PLACE_BYTES = {"positions": 4, "indices": 4, "slots": 4, "pages": 8, "tables": 8}  # of a row
_PLACES = Struct(f"{len(records.PLACES.names or ())}q")
_DAMAGED = "The weights may be damaged: download or convert the file again."


def go_on() -> None:
    """The check of callers who do not stop."""


class Leave(Protocol):
    """Says which rows at the end are not worth going on with."""

    def __call__(self, layer: int, ids: npt.NDArray[np.int32]) -> int:
        """How many rows go on, at least 1, of those that have chosen the experts ids [n, n_used] in a layer."""


def forward(
    weights: Weights,
    pool: KVPool,
    buffers: Buffers,
    rows: Rows,
    outputs: str | Sequence[int] = "last",
    check: Check = go_on,
    leave: Leave | None = None,
    observer: Observer | None = None,
) -> npt.NDArray[np.float32]:
    """float32 [n_out, n_vocab]: logits of each part's last row ("last"), of its last outputs[part], or of all ("all").

    The result is a view that the next call overwrites. The timelines grow by the rows. buffers.array("x")[:T] then
    holds the rows' hidden states before the final norm. Raises M2liteError when a layer yields NaN or infinity; the
    timelines are then as before. `check` is called before and within every layer and may raise to stop the call: same
    promise. With `leave`, rows of a single timeline may be left out from a layer on: they have no logits then, and the
    timeline does not grow by them. An `observer` makes few rows slower, and nothing different.
    """
    c, b, n = weights.config, buffers, rows.n
    k = b.kernels
    assert n <= b.n_rows, (n, b.n_rows)
    assert jit.n_threads() <= b.n_threads, "the buffers hold scratch for fewer threads"
    embd = weights.token_embd
    place = Place(pool, rows, k, leave, observer)
    k.embed_rows(weights.unpack_embd, embd.address, embd.row_bytes, embd.n_blocks, place.tokens, n, b.x, 4 * c.n_embd)
    for i, layer in enumerate(weights.layers):
        check()
        if b.stream is not None:
            b.stream.enter(i, n, is_last=i == len(weights.layers) - 1)
        n = run_layer(c, layer, b, place, n, i * pool.layer_bytes, check, b.stream)
        if not n:
            raise M2liteError(f"NaN or infinity in layer {i}.", _DAMAGED)
        if rows.chosen is not None:
            rows.chosen[i, :n] = b.array("ids")[:n]
    if b.stream is not None:
        b.stream.enter(c.n_layers, n, is_last=True)
    logits = _head(weights, b, rows, outputs) if outputs != "all" else head(weights, b, b.x, weights.output_norm, n)
    if observer is not None:
        observer.dense((weights.output,), b.h, c.n_embd, len(logits))
    for timeline, length in rows.lengths:
        timeline.length = length - (rows.n - n)
    return logits


class Place:
    """Addresses of where the rows stand, looked up once per call, and who looks at it."""

    def __init__(
        self,
        pool: KVPool,
        rows: Rows,
        kernels: ModuleType,
        leave: Leave | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.leave, self.observer = leave, observer
        self.n_positions, self.start, self.layer_bytes = rows.n_positions, rows.start, pool.layer_bytes
        self.tokens, *addresses = rows.addresses()
        cache = (pool.kv == "q8_0", kernels.attend_address(pool.kv), pool.layer_bytes // pool.config.n_kv_heads)
        self.angles = pool.angles  # which may grow into another place while a call waits for others
        packed = _PLACES.pack(pool.angles_address, *addresses, *cache)
        self.record = np.frombuffer(bytearray(packed), records.PLACES)  # in half the time of filling a record

    def from_row(self, first: int) -> npt.NDArray[np.void]:
        """The record for rows from `first` on."""
        if not first:
            return self.record
        record = self.record.copy()
        for name, size in _PLACE_BYTES.items():
            record[name] += first * size
        return record


def multiply(b: Buffers, out: int, m: Matrix, x: int, n: int) -> None:
    """out[n, n_out] = x[n, n_in] @ m.T, for a matrix that belongs to no layer."""
    b.kernels.steps.product(jit.team(), m.record, b.record, out, 4 * m.n_out, x, n)


def run_layer(
    c: Config,
    layer: Layer,
    b: Buffers,
    place: Place,
    n: int,
    layer_offset: int,
    check: Check = go_on,
    stream: Stream | None = None,
) -> int:
    """One layer for n rows; how many of them go on, 0 when a router score is NaN or infinite.

    Few rows take one call of a kernel for all of it; more go through the steps below, with a look up between them; so
    does a layer whose experts come from `stream`.
    """
    assert place.n_positions <= b.n_positions, (place.n_positions, b.n_positions)
    macs = n * 2 * c.n_q * place.n_positions
    is_short = n <= FEW_ROWS and macs <= b.pieces.attend_macs
    is_plain = b.rerouting is None and stream is None and place.leave is None and place.observer is None
    if is_short and is_plain:
        is_bad = int(b.kernels.steps.layer(jit.team(), layer.record, b.record, place.record, n, macs, layer_offset))
        if b.n_expert_reads is not None:
            b.n_expert_reads += len(set(b.array("ids")[:n].ravel().tolist()))
        return 0 if is_bad else n
    attention(c, layer, b, place, n, layer_offset, check)
    n_active, n_bad = choose(layer, b, place, n, check)
    index, ids = layer_offset // place.layer_bytes, b.array("ids")
    if b.rerouting is not None:
        ids[:n] = b.rerouting(index, place.start, n)
        n_active = _group_pairs(b, n)
    if place.leave is not None and (n_kept := place.leave(index, ids[:n])) < n:
        n, n_active = n_kept, _group_pairs(b, n_kept)
    if b.n_expert_reads is not None:
        b.n_expert_reads += n_active
    if place.observer is not None:
        place.observer.chosen(index, ids[:n])
    run_experts(c, layer, b, n, n_active, check, stream, place.observer)
    return 0 if n_bad else n


def attention(
    c: Config,
    layer: Layer,
    b: Buffers,
    place: Place,
    n: int,
    layer_offset: int,
    check: Check = go_on,
) -> None:
    """attended = attend(rope(norm(h Wq)), rope(norm(h Wk)), h Wv) with h = rms_norm(x)."""
    steps = b.kernels.steps
    for first, size, scratch in _pieces(b, n, check):
        steps.project(jit.team(), layer.record, scratch, place.from_row(first), size, layer_offset)
    if place.observer is not None:
        place.observer.dense((layer.attn_q, layer.attn_k, layer.attn_v), b.h, c.n_embd, n)
    macs = 2 * c.n_q * place.n_positions
    step = max(1, int(b.pieces.attend_macs / macs))
    for first in range(0, n, step):
        if first:
            check()
        size = min(step, n - first)
        steps.attend_rows(jit.team(), b.record, place.record, first, size, size * macs, layer_offset)


def choose(layer: Layer, b: Buffers, place: Place, n: int, check: Check = go_on) -> tuple[int, int]:
    """x += attended Wo; the experts for h = rms_norm(x), sorted: (their number, rows with a NaN or infinite score)."""
    check()
    n_active = n_bad = 0
    for _, size, scratch in _pieces(b, n, check):
        n_active, n_more = b.kernels.steps.choose(jit.team(), layer.record, scratch, size)
        n_bad += n_more
    if n > b.pieces.n_rows:
        n_active = _group_pairs(b, n)
    if place.observer is not None:
        place.observer.dense((layer.attn_output,), b.attended, layer.attn_output.n_in, n)
        place.observer.dense((layer.ffn_gate_inp,), b.h, layer.ffn_gate_inp.n_in, n)
    return int(n_active), int(n_bad)


def _pieces(b: Buffers, n: int, check: Check) -> Iterator[tuple[int, int, npt.NDArray[np.void]]]:
    """(first row, number of rows, scratch record for them) of n rows, with a look up between them."""
    for first, record in b.rows_records:
        if first >= n:
            return
        if first:
            check()
        yield first, min(b.pieces.n_rows, n - first), record


def _group_pairs(b: Buffers, n: int) -> int:
    """Sort the pairs of n rows by expert, again; the number of experts."""
    sizes = (n, b.config.n_experts, b.config.n_experts_used)
    return int(b.kernels.group_pairs(b.ids, *sizes, b.counts, b.active, b.starts, b.pair_rows, b.pair_slots))


def run_experts(
    c: Config,
    layer: Layer,
    b: Buffers,
    n: int,
    n_active: int,
    check: Check = go_on,
    stream: Stream | None = None,
    observer: Observer | None = None,
) -> None:
    """x += the chosen experts' outputs for h."""
    steps = b.kernels.steps
    if stream is not None:
        counts = np.diff(b.array("starts")[: n_active + 1])
        stream.begin(b.array("active")[:n_active].tolist(), counts.tolist(), n)
    for slab in slabs(b, n_active, n * c.n_experts_used):
        check()
        if stream is None:
            steps.run_experts(jit.team(), layer.record, b.record, *slab, n)
            _show_experts(c, layer, b, slab, observer)
            continue
        for part in _as_they_come(stream, b, slab):
            check()
            steps.experts(jit.team(), layer.record, b.record, *part, part.first - slab.first)
            _show_experts(c, layer, b, part._replace(active=part.active - b.places + b.active), observer)
        steps.add_experts(jit.team(), b.record, slab.first, slab.n_pairs, n)


def _show_experts(c: Config, layer: Layer, b: Buffers, slab: Slab, observer: Observer | None) -> None:
    if observer is not None:
        pairs = slab.active, slab.starts, slab.n_active
        observer.experts((layer.ffn_gate_exps, layer.ffn_up_exps), b.h, c.n_embd, b.pair_rows, *pairs)
        observer.experts((layer.ffn_down_exps,), b.expert_h, c.n_ff, b.pair_order - 4 * slab.first, *pairs)


class Slab(NamedTuple):
    """Experts whose pairs go through the buffers together: addresses of their ids and of where their pairs start."""

    active: int
    starts: int
    n_active: int
    first: int  # pair
    n_pairs: int


def slabs(b: Buffers, n_active: int, n_pairs: int) -> Iterator[Slab]:
    """The chosen experts, ascending, in slabs: one where all their pairs go together, as in decode."""
    most = b.pieces.n_pairs
    if n_pairs <= most:
        yield Slab(b.active, b.starts, n_active, 0, n_pairs)
        return
    starts, i = b.array("starts")[: n_active + 1].tolist(), 0
    while i < n_active:
        end = max(i + 1, bisect_right(starts, starts[i] + most) - 1)
        yield Slab(b.active + 4 * i, b.starts + 4 * i, end - i, starts[i], starts[end] - starts[i])
        i = end


def _as_they_come(stream: Stream, b: Buffers, slab: Slab) -> Iterator[Slab]:
    """The slab in parts whose experts are in memory, in the order in which they are, with their places as ids."""
    starts, places, at = b.array("starts"), b.array("places"), (slab.active - b.active) // 4
    for run in stream.arrive(at, at + slab.n_active):
        first, end = run
        places[first:end] = stream.places(run)
        pair = int(starts[first])
        yield Slab(b.places + 4 * first, b.starts + 4 * first, end - first, pair, int(starts[end]) - pair)


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
