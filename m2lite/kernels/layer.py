"""What a layer does between two moments at which its caller looks up: each step is one call of a kernel.

The steps are written once, as calls of the other kernels. fast.py has them compiled into one function each: a call from
Python costs microseconds, and between calls nothing streams. `interpreted` gives the same steps call by call, on NumPy
twins or with timers. Sees records of addresses and sizes (LAYER, PLACES, SCRATCH); knows no file and no text.

team: (threads to use, multiply-adds below which one is enough), from jit.team().
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from m2lite.kernels.attention import attend
from m2lite.kernels.elementwise import add_rows, norm_rope, pack, pack_groups, rms_norm
from m2lite.kernels.jit import parts_of, specialise
from m2lite.kernels.matmul import matmul
from m2lite.kernels.pages import append_kv
from m2lite.kernels.router import combine, experts_down, experts_up, group_pairs, route


def _record(*names: str, **others: Any) -> np.dtype[Any]:
    """A record of int64 fields, and of others."""
    return np.dtype([(name, "i8") for name in names] + list(others.items()))


MATRIX = _record("address", "n_out", "n_blocks", "row_bytes", "slice_bytes", "tile", "is_int8", "panel_row_bytes")
LAYER = _record(
    "attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm", "exp_probs_b",
    attn_q=MATRIX, attn_k=MATRIX, attn_v=MATRIX, attn_output=MATRIX, ffn_gate_inp=MATRIX,
    ffn_gate_exps=MATRIX, ffn_up_exps=MATRIX, ffn_down_exps=MATRIX,
)  # fmt: skip
MODULE = _record("enorm", "hnorm", eh_proj=MATRIX)
PLACES = _record(
    "angles", "positions", "indices", "slots", "pages", "tables", "is_q8", "page_function", "kv_head_bytes"
)  # fmt: skip
SCRATCH = _record(
    # sizes of the model
    "n_embd", "n_ff", "n_heads", "n_kv_heads", "head_dim", "rotary_dim", "n_experts", "n_scores", "n_used",
    # addresses of buffers; Buffers (model/forward.py) has their shapes
    "x", "h", "q", "k", "v", "attended", "router_scores", "ids", "expert_weights", "counts", "active", "starts",
    "pair_rows", "pair_slots", "pair_order", "expert_h", "expert_out", "expert_sums", "tiles", "tile_bytes",
    "panel_int8", "panel_float32", "pair_panel_int8", "pair_panel_float32", "attention_scratch", "attention_bytes",
    eps="f4", attention_scale="f4",
)  # fmt: skip


def pack_dense(team, s, x, n_in, n, int8, float32):
    """Activation panels of x[n, n_in] in each kind that is asked for."""
    n_parts = parts_of(team, 4 * n * n_in)
    if int8:
        pack(n_parts, s.panel_int8, x, 4 * n_in, n, n_in // 32, 1)
    if float32:
        pack(n_parts, s.panel_float32, x, 4 * n_in, n, n_in // 32, 0)


def pack_pairs(team, s, x, n_in, rows, starts, n_active, n_pairs, int8, float32):
    """The same of x[rows[p]] for every (row, expert) pair p."""
    n_parts = parts_of(team, 4 * n_pairs * n_in)
    if int8:
        pack_groups(n_parts, s.pair_panel_int8, x, 4 * n_in, rows, starts, n_active, n_in // 32, 1)
    if float32:
        pack_groups(n_parts, s.pair_panel_float32, x, 4 * n_in, rows, starts, n_active, n_in // 32, 0)


def pair_panel(s, m):
    """The panel of pairs that a stacked matrix reads."""
    return s.pair_panel_int8 if m.is_int8 else s.pair_panel_float32


def multiply(team, s, out, out_stride, m, n):
    """out[n, n_out] = packed rows @ m.T; out_stride in bytes."""
    panel = s.panel_int8 if m.is_int8 else s.panel_float32
    n_parts = parts_of(team, n * m.n_out * m.n_blocks * 32)
    matmul(n_parts, out, out_stride, m.tile, m.address, m.row_bytes, m.n_out, m.n_blocks, panel, n)


def product(team, s, out, out_stride, x, m, n):
    """out[n, n_out] = x[n, n_in] @ m.T; out_stride in bytes."""
    pack_dense(team, s, x, m.n_blocks * 32, n, m.is_int8 > 0, m.is_int8 == 0)
    multiply(team, s, out, out_stride, m, n)


def product_of_record(team, matrix, scratch, out, out_stride, x, n):
    """out[n, n_out] = x[n, n_in] @ matrix.T, for a matrix that belongs to no layer; out_stride in bytes."""
    product(team, scratch[0], out, out_stride, x, matrix[0], n)


def join(team, module, scratch, joined, previous, n):
    """x = [rms_norm(h, enorm), rms_norm(previous, hnorm)] @ eh_proj: what a prediction module's layer works on.

    joined: room for float32 [n, 2 n_embd].
    """
    m, s = module[0], scratch[0]
    width = 4 * s.n_embd
    for t in range(n):
        row = joined + 2 * width * t
        rms_norm(row, s.h + width * t, m.enorm, 1, s.n_embd, s.eps)
        rms_norm(row + width, previous + width * t, m.hnorm, 1, s.n_embd, s.eps)
    product(team, s, s.x, width, joined, m.eh_proj, n)


def project(team, layer, scratch, places, n, layer_offset):
    """h = rms_norm(x); q = rope(norm(h Wq)); k = rope(norm(h Wk)) and v = h Wv go into the pages."""
    la, s, p = layer[0], scratch[0], places[0]
    q, k, v = la.attn_q, la.attn_k, la.attn_v
    rms_norm(s.h, s.x, la.attn_norm, n, s.n_embd, s.eps)
    n_int8 = q.is_int8 + k.is_int8 + v.is_int8
    pack_dense(team, s, s.h, s.n_embd, n, n_int8 > 0, n_int8 < 3)
    multiply(team, s, s.q, 4 * q.n_out, q, n)
    multiply(team, s, s.k, 4 * k.n_out, k, n)
    multiply(team, s, s.v, 4 * v.n_out, v, n)
    norm_rope(s.q, la.attn_q_norm, p.angles, p.positions, n, s.n_heads, s.head_dim, s.rotary_dim, s.eps)
    norm_rope(s.k, la.attn_k_norm, p.angles, p.positions, n, s.n_kv_heads, s.head_dim, s.rotary_dim, s.eps)
    append_kv(s.k, s.v, p.pages, layer_offset, p.slots, n, s.n_kv_heads, s.head_dim, p.is_q8)


def attend_rows(team, scratch, places, first, n, macs, layer_offset):
    """attended = softmax(q K / sqrt(head_dim)) V for rows first to first + n, each up to its own position."""
    s, p = scratch[0], places[0]
    at = 4 * s.n_heads * s.head_dim * first
    attend(
        parts_of(team, macs), s.attended + at, s.q + at, p.tables + 8 * first, p.indices + 4 * first, n, s.n_heads,
        s.n_kv_heads, s.head_dim, layer_offset, s.attention_scale, p.page_function, p.kv_head_bytes,
        s.attention_scratch, s.attention_bytes,
    )  # fmt: skip


def choose(team, layer, scratch, n):
    """x += attended Wo; h = rms_norm(x); experts chosen by h ffn_gate_inp, and the pairs sorted by expert.

    Returns (number of experts chosen, rows with a score that is NaN or infinite).
    """
    la, s = layer[0], scratch[0]
    out, router = la.attn_output, la.ffn_gate_inp
    product(team, s, s.h, 4 * s.n_embd, s.attended, out, n)
    add_rows(s.x, s.h, n, s.n_embd)
    rms_norm(s.h, s.x, la.ffn_norm, n, s.n_embd, s.eps)
    product(team, s, s.router_scores, 4 * s.n_scores, s.h, router, n)
    n_bad = route(s.router_scores, la.exp_probs_b, n, s.n_experts, s.n_scores, s.n_used, s.ids, s.expert_weights)
    n_active = group_pairs(s.ids, n, s.n_experts, s.n_used, s.counts, s.active, s.starts, s.pair_rows, s.pair_slots)
    return n_active, n_bad


def experts(team, layer, scratch, active, starts, n_active, first, n_pairs, place):
    """expert_out[place:] = what n_active experts make of h, for their n_pairs pairs, which begin with pair `first`."""
    la, s = layer[0], scratch[0]
    gate, up, down = la.ffn_gate_exps, la.ffn_up_exps, la.ffn_down_exps
    n_int8 = gate.is_int8 + up.is_int8
    pack_pairs(team, s, s.h, s.n_embd, s.pair_rows, starts, n_active, n_pairs, n_int8 > 0, n_int8 < 2)
    macs = n_pairs * s.n_embd * s.n_ff
    experts_up(
        parts_of(team, 2 * macs), s.expert_h, gate.tile, gate.address, gate.slice_bytes, up.tile, up.address,
        up.slice_bytes, s.n_ff, gate.n_blocks, pair_panel(s, gate), gate.panel_row_bytes, pair_panel(s, up),
        up.panel_row_bytes, active, starts, n_active, s.tiles, s.tile_bytes,
    )  # fmt: skip
    pack_pairs(
        team, s, s.expert_h, s.n_ff, s.pair_order - 4 * first, starts, n_active, n_pairs, down.is_int8 > 0,
        down.is_int8 == 0,
    )  # fmt: skip
    experts_down(
        parts_of(team, macs), s.expert_out + 4 * s.n_embd * place, down.tile, down.address, down.slice_bytes, s.n_embd,
        down.n_blocks, pair_panel(s, down), down.panel_row_bytes, active, starts, n_active,
    )  # fmt: skip


def add_experts(team, scratch, first, n_pairs, n):
    """x += expert_out, which holds pairs first to first + n_pairs, each row's in ascending order of the experts."""
    s = scratch[0]
    combine(
        parts_of(team, n_pairs * s.n_embd), s.x, s.expert_sums, s.expert_out, s.pair_slots, s.expert_weights, n,
        s.n_used, s.n_embd, first, first + n_pairs,
    )  # fmt: skip


def run_experts(team, layer, scratch, active, starts, n_active, first, n_pairs, n):
    """x += what the experts make of h, for n_active of them, whose n_pairs pairs begin with pair `first`."""
    experts(team, layer, scratch, active, starts, n_active, first, n_pairs, 0)
    add_experts(team, scratch, first, n_pairs, n)


def layer(team, layer, scratch, places, n, macs, layer_offset):
    """All of a layer for rows whose pairs fit into the buffers; returns how many have a score that is NaN or infinite.

    macs: of attention, as for attend_rows.
    """
    s = scratch[0]
    project(team, layer, scratch, places, n, layer_offset)
    attend_rows(team, scratch, places, 0, n, macs, layer_offset)
    n_active, n_bad = choose(team, layer, scratch, n)
    run_experts(team, layer, scratch, s.active, s.starts, n_active, 0, n * s.n_used, n)
    return n_bad


_HELPERS = (pack_dense, pack_pairs, pair_panel, multiply, product)  # each may call those before it
_STEPS = (  # likewise
    product_of_record, join, project, attend_rows, choose, experts, add_experts, run_experts, layer,
)  # fmt: skip
_KERNELS = (
    "rms_norm", "norm_rope", "append_kv", "attend", "add_rows", "pack", "pack_groups", "matmul", "route",
    "group_pairs", "experts_up", "experts_down", "combine",
)  # fmt: skip


def steps(kernels: dict[str, Any], made: Any) -> SimpleNamespace:
    """The functions in _STEPS on these kernels instead; `made` wraps every function that is built."""
    names = {"parts_of": made(parts_of)} | {name: kernels[name] for name in _KERNELS}
    for template in _HELPERS + _STEPS:
        name = template.__name__
        names[name] = made(specialise(template, name, **names))
    return SimpleNamespace(**{step.__name__: names[step.__name__] for step in _STEPS})


def interpreted(kernels: Any) -> SimpleNamespace:
    """The steps call by call, on a module or object that has the kernels."""
    found = steps({name: getattr(kernels, name) for name in _KERNELS}, lambda f: f)
    return SimpleNamespace(**{name: _on_records(step) for name, step in vars(found).items()})


def _on_records(step: Any) -> Any:
    """Kernels that run in Python want records with attributes."""

    def call(team: tuple[int, int], *args: Any) -> Any:
        return step(team, *(a.view(np.recarray) if isinstance(a, np.ndarray) else a for a in args))

    return call
