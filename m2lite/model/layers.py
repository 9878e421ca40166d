"""One layer of MiniMax-M2, as in the paper: rows of hidden states in, the same rows further on out. Knows no token.

    h = rms_norm(x);  q, k, v = h @ Wq, h @ Wk, h @ Wv
    q, k = rope(rms_norm(q)), rope(rms_norm(k))              # the norm goes over all heads together
    x += attend(q, all k and v of the timeline) @ Wo
    h = rms_norm(x);  s = sigmoid(h @ ffn_gate_inp)          # the 8 largest of s + bias, weighted by s
    x += sum over chosen experts e, ascending:  s_e / sum(s) * ((silu(h @ gate_e) * (h @ up_e)) @ down_e)

x, h, q, ... are buffers (buffers.py). A step of the layer is one call of a kernel (kernels/layer.py), or several with a
look up between them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from struct import Struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m2lite.kernels import layer as records
from m2lite.model.buffers import FEW_ROWS, Buffers
from m2lite.model.cache import KVPool, Rows
from m2lite.model.observer import Observer
from m2lite.model.stream import Stream
from m2lite.model.weights import Layer
from m2lite.simd import jit

Check = Callable[[], None]
_PLACE_BYTES = {"positions": 4, "indices": 4, "slots": 4, "pages": 8, "tables": 8}  # of a row
_PLACES = Struct(f"{len(records.PLACES.names or ())}q")


def go_on() -> None:
    """The check of callers who do not stop."""


class ForwardPass:
    """What all layers of one call have in common: where the rows stand, as addresses, and who looks at them."""

    def __init__(
        self, pool: KVPool, rows: Rows, buffers: Buffers, observers: Sequence[Observer] = (), check: Check = go_on,
        stream: Stream | None = None,
    ) -> None:  # fmt: skip
        b = buffers
        assert rows.n <= b.n_rows, (rows.n, b.n_rows)
        assert jit.n_threads() <= b.n_threads, "the buffers hold scratch for fewer threads"
        assert rows.n_positions <= b.n_positions, (rows.n_positions, b.n_positions)
        self.config, self.buffers, self.steps = pool.config, b, b.kernels.steps
        self.observers, self.check, self.stream = observers, check, stream
        self.is_steered = not all(each.is_late for each in observers)
        self.start, self.attend_macs = rows.start, 2 * pool.config.n_q * rows.n_positions  # of a row
        self.layer_bytes = pool.layer_bytes
        self.tokens, *addresses = rows.addresses()
        cache = (pool.kv == "q8_0", b.kernels.attend_address(pool.kv), pool.layer_bytes // pool.config.n_kv_heads)
        self.angles = pool.angles  # which may grow into another place while a call waits for others
        packed = _PLACES.pack(pool.angles_address, *addresses, *cache)
        self.places = np.frombuffer(bytearray(packed), records.PLACES)  # in half the time of filling a record

    def places_from(self, first: int) -> npt.NDArray[np.void]:
        """The record for rows from `first` on."""
        if not first:
            return self.places
        record = self.places.copy()
        for name, size in _PLACE_BYTES.items():
            record[name] += first * size
        return record


def layer(call: ForwardPass, weights: Layer, i: int, n: int) -> int:
    """Layer i for n rows; how many of them go on, 0 when a router score is NaN or infinite."""
    pieces, can_be_one = call.buffers.pieces, call.stream is None and not call.is_steered
    if can_be_one and n <= FEW_ROWS and n * call.attend_macs <= pieces.attend_macs:
        n_bad = _in_one_kernel(call, weights, i, n)
        show_chosen(call, i, n)
        return 0 if n_bad else n
    project(call, weights, i, n)
    attend(call, i, n)
    n_active, n_bad = choose_experts(call, weights, n)
    n = show_chosen(call, i, n)
    if call.is_steered or n > pieces.n_rows:  # what the last kernel sorted is not all, or not it
        n_active = _group_pairs(call.buffers, n)
    run_experts(call, weights, n, n_active)
    return 0 if n_bad else n


def _in_one_kernel(call: ForwardPass, weights: Layer, i: int, n: int) -> int:
    """All steps for few rows; how many of them have a NaN or infinite score."""
    macs, offset = n * call.attend_macs, i * call.layer_bytes
    return int(call.steps.layer(jit.team(), weights.record, call.buffers.record, call.places, n, macs, offset))


def project(call: ForwardPass, weights: Layer, i: int, n: int) -> None:
    """h = rms_norm(x); q = rope(norm(h Wq)); k = rope(norm(h Wk)) and v = h Wv go into the pages."""
    for first, size, scratch in _pieces(call, n):
        places = call.places_from(first)
        call.steps.project(jit.team(), weights.record, scratch, places, size, i * call.layer_bytes)
    for each in call.observers:
        each.dense((weights.attn_q, weights.attn_k, weights.attn_v), call.buffers.h, call.config.n_embd, n)


def attend(call: ForwardPass, i: int, n: int) -> None:
    """attended = softmax(q K / sqrt(head_dim)) V, each row up to its own position."""
    b, macs = call.buffers, call.attend_macs
    step = max(1, int(b.pieces.attend_macs / macs))
    for first in range(0, n, step):
        if first:
            call.check()
        size = min(step, n - first)
        offset = i * call.layer_bytes
        call.steps.attend_rows(jit.team(), b.record, call.places, first, size, size * macs, offset)


def choose_experts(call: ForwardPass, weights: Layer, n: int) -> tuple[int, int]:
    """x += attended Wo; h = rms_norm(x); ids = the experts for h, and the pairs sorted, piece by piece.

    Returns (experts of the last piece, rows with a NaN or infinite score).
    """
    call.check()
    n_active = n_bad = 0
    for _, size, scratch in _pieces(call, n):
        n_active, n_more = call.steps.choose(jit.team(), weights.record, scratch, size)
        n_bad += n_more
    b, output, router = call.buffers, weights.attn_output, weights.ffn_gate_inp
    for each in call.observers:
        each.dense((output,), b.attended, output.n_in, n)
        each.dense((router,), b.h, router.n_in, n)
    return int(n_active), int(n_bad)


def show_chosen(call: ForwardPass, i: int, n: int) -> int:
    """The observers see the experts of n rows, or choose others; how many rows go on."""
    ids = call.buffers.array("ids")
    for each in call.observers:
        n_kept = each.chosen(i, call.start, ids[:n])
        n = n if n_kept is None else n_kept
    return n


def run_experts(call: ForwardPass, weights: Layer, n: int, n_active: int) -> None:
    """x += the n_active chosen experts' outputs for h."""
    b, steps, stream = call.buffers, call.steps, call.stream
    if stream is not None:
        counts = np.diff(b.array("starts")[: n_active + 1])
        stream.begin(b.array("active")[:n_active].tolist(), counts.tolist(), n)
    for slab in slabs(b, n_active, n * call.config.n_experts_used):
        call.check()
        if stream is None:
            steps.run_experts(jit.team(), weights.record, b.record, *slab, n)
            _show_experts(call, weights, slab)
            continue
        for part in _as_they_come(stream, b, slab):
            call.check()
            steps.experts(jit.team(), weights.record, b.record, *part, part.first - slab.first)
            _show_experts(call, weights, part._replace(active=part.active - b.places + b.active))
        steps.add_experts(jit.team(), b.record, slab.first, slab.n_pairs, n)


def _show_experts(call: ForwardPass, weights: Layer, slab: Slab) -> None:
    c, b, pairs = call.config, call.buffers, (slab.active, slab.starts, slab.n_active)
    for each in call.observers:
        each.experts((weights.ffn_gate_exps, weights.ffn_up_exps), b.h, c.n_embd, b.pair_rows, *pairs)
        each.experts((weights.ffn_down_exps,), b.expert_h, c.n_ff, b.pair_order - 4 * slab.first, *pairs)


def _pieces(call: ForwardPass, n: int) -> Iterator[tuple[int, int, npt.NDArray[np.void]]]:
    """(first row, number of rows, scratch record for them) of n rows, with a look up between them."""
    for first, record in call.buffers.rows_records:
        if first >= n:
            return
        if first:
            call.check()
        yield first, min(call.buffers.pieces.n_rows, n - first), record


def _group_pairs(b: Buffers, n: int) -> int:
    """Sort the pairs of n rows by expert; the number of experts."""
    sizes = (n, b.config.n_experts, b.config.n_experts_used)
    return int(b.kernels.group_pairs(b.ids, *sizes, b.counts, b.active, b.starts, b.pair_rows, b.pair_slots))


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
