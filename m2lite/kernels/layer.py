"""What a layer does between two moments at which its caller looks up: each step is one call of a kernel.

The steps are written once, as calls of the other kernels. fast.py has them compiled into one function each: a call from
Python costs microseconds, and between calls nothing streams. `interpreted` gives the same steps call by call, on NumPy
twins or with timers. Sees records of addresses and sizes (LAYER, PLACES, SCRATCH); knows no file and no text.

team: (threads to use, multiply-adds below which one is enough), from jit.team().
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from m2lite.simd.jit import parts_of, specialise
from m2lite.simd.kinds import Address

_INT, _FLOAT = "i8", "f4"


def _record(*names: str, **others: Any) -> np.dtype[Any]:
    """A record of int64 fields, and of others."""
    return np.dtype([(name, _INT) for name in names] + list(others.items()))


MATRIX = _record("address", "n_out", "n_blocks", "row_bytes", "slice_bytes", "tile", "is_int8", "panel_row_bytes")
_MATRICES = (
    "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps",
)  # fmt: skip
LAYER = _record(
    "attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm", "exp_probs_b", **dict.fromkeys(_MATRICES, MATRIX)
)
MODULE = _record("enorm", "hnorm", eh_proj=MATRIX)
PLACES = _record(
    "angles", "positions", "indices", "slots", "pages", "tables", "is_q8", "page_function", "kv_head_bytes"
)  # fmt: skip
SCRATCH = _record(
    # sizes of the model
    "n_embd", "n_ff", "n_heads", "n_kv_heads", "head_dim", "rotary_dim", "n_experts", "n_scores", "n_used",
    # addresses of buffers; Buffers (model/buffers.py) has their shapes
    "x", "h", "q", "k", "v", "attended", "router_scores", "ids", "expert_weights", "counts", "active", "starts",
    "pair_rows", "pair_slots", "pair_order", "expert_h", "expert_out", "expert_sums", "tiles", "tile_bytes",
    "panel_int8", "panel_float32", "pair_panel_int8", "pair_panel_float32", "attention_scratch", "attention_bytes",
    eps=_FLOAT, attention_scale=_FLOAT,
)  # fmt: skip

# Kernels and steps that the templates below call: `steps` binds them. Declared alone, they have no value of their own.
parts: Callable[[tuple[int, int], int], int]
rms_norm: Callable[..., None]
norm_rope: Callable[..., None]
append_kv: Callable[..., None]
attend: Callable[..., None]
add_rows: Callable[..., None]
pack: Callable[..., None]
pack_groups: Callable[..., None]
matmul: Callable[..., None]
matmul_three: Callable[..., None]
route: Callable[..., int]
group_pairs: Callable[..., int]
experts_up: Callable[..., None]
experts_down: Callable[..., None]
combine: Callable[..., None]
pack_dense: Callable[..., None]
pack_pairs: Callable[..., None]
pair_panel: Callable[[Any, Any], Any]
panel: Callable[[Any, Any], Any]
multiply: Callable[..., None]
product: Callable[..., None]
project: Callable[..., None]
attend_rows: Callable[..., None]
choose: Callable[..., tuple[int, int]]
experts: Callable[..., None]
add_experts: Callable[..., None]
run_experts: Callable[..., None]


def _pack_dense(team: tuple[int, int], s: Any, x: Address, n_in: int, n: int, int8: int, float32: int) -> None:
    """Activation panels of x[n, n_in] in each kind that is asked for."""
    n_parts = parts(team, 4 * n * n_in)
    if int8:
        pack(n_parts, s.panel_int8, x, 4 * n_in, n, n_in // 32, 1)
    if float32:
        pack(n_parts, s.panel_float32, x, 4 * n_in, n, n_in // 32, 0)


def _pack_pairs(
    team: tuple[int, int], s: Any, x: Address, n_in: int, rows: Address, starts: Address, n_active: int, n_pairs: int,
    int8: int, float32: int,
) -> None:  # fmt: skip
    """The same of x[rows[p]] for every (row, expert) pair p."""
    n_parts = parts(team, 4 * n_pairs * n_in)
    if int8:
        pack_groups(n_parts, s.pair_panel_int8, x, 4 * n_in, rows, starts, n_active, n_in // 32, 1)
    if float32:
        pack_groups(n_parts, s.pair_panel_float32, x, 4 * n_in, rows, starts, n_active, n_in // 32, 0)


def _pair_panel(s: Any, m: Any) -> Any:
    """The panel of pairs that a stacked matrix reads."""
    return s.pair_panel_int8 if m.is_int8 else s.pair_panel_float32


def _panel(s: Any, m: Any) -> Any:
    """The panel of rows that a matrix reads."""
    return s.panel_int8 if m.is_int8 else s.panel_float32


def _multiply(team: tuple[int, int], s: Any, out: Address, out_stride: int, m: Any, n: int) -> None:
    """out[n, n_out] = packed rows @ m.T; out_stride in bytes."""
    n_parts, x = parts(team, n * m.n_out * m.n_blocks * 32), panel(s, m)
    matmul(n_parts, out, out_stride, m.tile, m.address, m.row_bytes, m.n_out, m.n_blocks, x, m.panel_row_bytes, n)


def _product(team: tuple[int, int], s: Any, out: Address, out_stride: int, x: Address, m: Any, n: int) -> None:
    """out[n, n_out] = x[n, n_in] @ m.T; out_stride in bytes."""
    pack_dense(team, s, x, m.n_blocks * 32, n, m.is_int8 > 0, m.is_int8 == 0)
    multiply(team, s, out, out_stride, m, n)


def _product_of_record(
    team: tuple[int, int], matrix: Any, scratch: Any, out: Address, out_stride: int, x: Address, n: int
) -> None:
    """out[n, n_out] = x[n, n_in] @ matrix.T, for a matrix that belongs to no layer; out_stride in bytes."""
    product(team, scratch[0], out, out_stride, x, matrix[0], n)


def _join(team: tuple[int, int], module: Any, scratch: Any, joined: int, previous: int, n: int) -> None:
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


def _project(team: tuple[int, int], layer: Any, scratch: Any, places: Any, n: int, layer_offset: int) -> None:
    """h = rms_norm(x); q = rope(norm(h Wq)); k = rope(norm(h Wk)) and v = h Wv go into the pages."""
    la, s, p = layer[0], scratch[0], places[0]
    q, k, v = la.attn_q, la.attn_k, la.attn_v
    rms_norm(s.h, s.x, la.attn_norm, n, s.n_embd, s.eps)
    n_int8 = q.is_int8 + k.is_int8 + v.is_int8
    pack_dense(team, s, s.h, s.n_embd, n, n_int8 > 0, n_int8 < 3)
    matmul_three(
        parts(team, n * (q.n_out + k.n_out + v.n_out) * s.n_embd), s.n_embd // 32, n,
        s.q, q.tile, q.address, q.row_bytes, q.n_out, panel(s, q), q.panel_row_bytes,
        s.k, k.tile, k.address, k.row_bytes, k.n_out, panel(s, k), k.panel_row_bytes,
        s.v, v.tile, v.address, v.row_bytes, v.n_out, panel(s, v), v.panel_row_bytes,
    )  # fmt: skip
    norm_rope(s.q, la.attn_q_norm, p.angles, p.positions, n, s.n_heads, s.head_dim, s.rotary_dim, s.eps)
    norm_rope(s.k, la.attn_k_norm, p.angles, p.positions, n, s.n_kv_heads, s.head_dim, s.rotary_dim, s.eps)
    append_kv(s.k, s.v, p.pages, layer_offset, p.slots, n, s.n_kv_heads, s.head_dim, p.is_q8)


def _attend(team: tuple[int, int], scratch: Any, places: Any, first: int, n: int, macs: int, layer_offset: int) -> None:
    """attended = softmax(q K / sqrt(head_dim)) V for rows first to first + n, each up to its own position."""
    s, p = scratch[0], places[0]
    at = 4 * s.n_heads * s.head_dim * first
    attend(
        parts(team, macs), s.attended + at, s.q + at, p.tables + 8 * first, p.indices + 4 * first, n, s.n_heads,
        s.n_kv_heads, s.head_dim, layer_offset, s.attention_scale, p.page_function, p.kv_head_bytes,
        s.attention_scratch, s.attention_bytes,
    )  # fmt: skip


def _choose(team: tuple[int, int], layer: Any, scratch: Any, n: int) -> tuple[int, int]:
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


def _experts(
    team: tuple[int, int], layer: Any, scratch: Any, active: Address, starts: Address, n_active: int, first: int,
    n_pairs: int, place: int,
) -> None:  # fmt: skip
    """expert_out[place:] = what n_active experts make of h, for their n_pairs pairs, which begin with pair `first`."""
    la, s = layer[0], scratch[0]
    gate, up, down = la.ffn_gate_exps, la.ffn_up_exps, la.ffn_down_exps
    n_int8 = gate.is_int8 + up.is_int8
    pack_pairs(team, s, s.h, s.n_embd, s.pair_rows, starts, n_active, n_pairs, n_int8 > 0, n_int8 < 2)
    macs = n_pairs * s.n_embd * s.n_ff
    experts_up(
        parts(team, 2 * macs), s.expert_h, gate.tile, gate.address, gate.slice_bytes, up.tile, up.address,
        up.slice_bytes, s.n_ff, gate.n_blocks, pair_panel(s, gate), gate.panel_row_bytes, pair_panel(s, up),
        up.panel_row_bytes, active, starts, n_active, s.tiles, s.tile_bytes,
    )  # fmt: skip
    pack_pairs(
        team, s, s.expert_h, s.n_ff, s.pair_order - 4 * first, starts, n_active, n_pairs, down.is_int8 > 0,
        down.is_int8 == 0,
    )  # fmt: skip
    experts_down(
        parts(team, macs), s.expert_out + 4 * s.n_embd * place, down.tile, down.address, down.slice_bytes, s.n_embd,
        down.n_blocks, pair_panel(s, down), down.panel_row_bytes, active, starts, n_active,
    )  # fmt: skip


def _add_experts(team: tuple[int, int], scratch: Any, first: int, n_pairs: int, n: int) -> None:
    """x += expert_out, which holds pairs first to first + n_pairs, each row's in ascending order of the experts."""
    s = scratch[0]
    combine(
        parts(team, n_pairs * s.n_embd), s.x, s.expert_sums, s.expert_out, s.pair_slots, s.expert_weights, n, s.n_used,
        s.n_embd, first, first + n_pairs,
    )  # fmt: skip


def _run_experts(
    team: tuple[int, int], layer: Any, scratch: Any, active: Address, starts: Address, n_active: int, first: int,
    n_pairs: int, n: int,
) -> None:  # fmt: skip
    """x += what the experts make of h, for n_active of them, whose n_pairs pairs begin with pair `first`."""
    experts(team, layer, scratch, active, starts, n_active, first, n_pairs, np.int64(0))
    add_experts(team, scratch, first, n_pairs, n)


def _layer(team: tuple[int, int], layer: Any, scratch: Any, places: Any, n: int, macs: int, layer_offset: int) -> int:
    """All of a layer for rows whose pairs fit into the buffers; returns how many have a score that is NaN or infinite.

    macs: of attention, as for attend_rows.
    """
    s = scratch[0]
    project(team, layer, scratch, places, n, layer_offset)
    attend_rows(team, scratch, places, np.int64(0), n, macs, layer_offset)
    n_active, n_bad = choose(team, layer, scratch, n)
    run_experts(team, layer, scratch, s.active, s.starts, n_active, np.int64(0), n * s.n_used, n)
    return n_bad


_HELPERS: dict[str, Callable[..., Any]] = {  # each may call those before it
    "pack_dense": _pack_dense, "pack_pairs": _pack_pairs, "pair_panel": _pair_panel, "panel": _panel,
    "multiply": _multiply, "product": _product,
}  # fmt: skip
_STEPS: dict[str, Callable[..., Any]] = {  # each may call those before it
    "project": _project, "attend_rows": _attend, "choose": _choose, "experts": _experts, "add_experts": _add_experts,
    "run_experts": _run_experts, "layer": _layer, "join": _join, "product": _product_of_record,
}  # fmt: skip
_KERNELS = (
    "rms_norm", "norm_rope", "append_kv", "attend", "add_rows", "pack", "pack_groups", "matmul", "matmul_three",
    "route", "group_pairs", "experts_up", "experts_down", "combine",
)  # fmt: skip


def steps(kernels: dict[str, Any], made: Any) -> SimpleNamespace:
    """What _STEPS names, on these kernels; `made` wraps every function that is built."""
    names = {"parts": made(parts_of)} | {name: kernels[name] for name in _KERNELS}
    for name, template in _HELPERS.items():
        names[name] = made(specialise(template, f"{name}_of_step", **names))
    found: dict[str, Any] = {}
    for name, template in _STEPS.items():
        found[name] = made(specialise(template, name, **names, **found))
    return SimpleNamespace(**found)


def interpreted(kernels: Any) -> SimpleNamespace:
    """The steps call by call, on a module or object that has the kernels."""
    found = steps({name: getattr(kernels, name) for name in _KERNELS}, lambda f: f)
    plain = {name: _on_plain_records(step) for name, step in vars(found).items()}
    return SimpleNamespace(**plain)


def _on_plain_records(step: Any) -> Any:
    def call(team: tuple[int, int], *args: Any) -> Any:
        return step(team, *(_plain(a.dtype, a.tobytes()) if isinstance(a, np.ndarray) else a for a in args))

    return call


@lru_cache(maxsize=4096)
def _plain(kind: np.dtype[Any], content: bytes) -> list[SimpleNamespace]:
    """Records as Python objects: kernels that run in Python want plain integers as addresses."""
    return [_namespace(record) for record in np.frombuffer(content, kind)]


def _namespace(record: Any) -> SimpleNamespace:
    fields = {name: record[name] for name in record.dtype.names}
    plain = (_namespace(v) if v.dtype.names else v if v.dtype == np.float32 else int(v) for v in fields.values())
    return SimpleNamespace(**dict(zip(fields, plain, strict=True)))
