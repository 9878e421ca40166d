"""Scratch memory of forward calls, and the sizes in which a layer is computed. Knows no weights and no timeline."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from m2lite.kernels import layer as records
from m2lite.kernels.dot import panel_bytes
from m2lite.model.cache import PAGE
from m2lite.model.config import Config
from m2lite.model.stream import Stream
from m2lite.model.weights import load_kernels
from m2lite.simd import jit

FEW_ROWS = 8  # that go through a layer in one kernel call


class Pieces(NamedTuple):
    """How much one kernel call does, where a layer takes several."""

    n_rows: int  # of the products with the layer's own matrices
    n_pairs: int  # of (row, expert), unless one expert has more
    attend_macs: float  # far into a long context, attention is most of a chunk's work


WHOLE = Pieces(1 << 30, 4096, 25e9)
_OF_ROWS = ("x", "h", "q", "k", "v", "attended", "router_scores", "ids", "expert_weights")  # buffers of a line a row


def on_a_line(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """An array that begins with a cache line: vectors that lie on two take twice as long to write."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(n_bytes + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    array: npt.NDArray[Any] = raw[offset : offset + n_bytes].view(dtype)
    return array.reshape(shape)


class Buffers:
    """Scratch memory for up to `n_rows` rows per call, in timelines of up to `n_positions` (the model's limit).

    Every shape is written behind its name.
    """

    def __init__(
        self, config: Config, n_rows: int, kernels: ModuleType | None = None, n_positions: int | None = None,
        pieces: Pieces = WHOLE,
    ) -> None:  # fmt: skip
        """`pieces`: in which calls of more than FEW_ROWS rows are computed, between two looks up."""
        c = config
        self.config, self.n_rows, self.n_threads = config, n_rows, jit.n_threads()
        self.n_positions = c.n_ctx_train if n_positions is None else (n_positions + PAGE - 1) // PAGE * PAGE
        self.kernels = kernels or load_kernels()
        self.stream: Stream | None = None  # set where the model is larger than its memory
        self.n_scores = (c.n_experts + 15) // 16 * 16
        n_all, f32, i32 = n_rows * c.n_experts_used, np.float32, np.int32
        self.n_pairs = n_pairs = min(n_all, max(n_rows, pieces.n_pairs, FEW_ROWS * c.n_experts_used))
        self.pieces = pieces
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        self.x = self._new("x", (n_rows, c.n_embd), f32)
        self.h = self._new("h", (n_rows, c.n_embd), f32)
        self.q = self._new("q", (n_rows, c.n_q), f32)
        self.k = self._new("k", (n_rows, c.n_kv), f32)
        self.v = self._new("v", (n_rows, c.n_kv), f32)
        self.attended = self._new("attended", (n_rows, c.n_q), f32)
        self.attention_bytes = self.kernels.attend_scratch_bytes(c.n_heads, c.n_kv_heads, c.head_dim, self.n_positions)
        self.attention_scratch = self._new("attention_scratch", (self.n_threads, self.attention_bytes), np.uint8)
        self.router_scores = self._new("router_scores", (n_rows, self.n_scores), f32)
        self._arrays["router_scores"][:] = 0  # the padding is computed with, though never used
        self.ids = self._new("ids", (n_rows, c.n_experts_used), i32)
        self.expert_weights = self._new("expert_weights", (n_rows, c.n_experts_used), f32)
        self.counts = self._new("counts", (c.n_experts,), i32)
        self.active = self._new("active", (c.n_experts,), i32)
        self.places = self._new("places", (c.n_experts,), i32)  # of the active experts, where they are streamed
        self.starts = self._new("starts", (c.n_experts + 1,), i32)
        self.pair_rows = self._new("pair_rows", (n_all,), i32)
        self.pair_slots = self._new("pair_slots", (n_rows, c.n_experts_used), i32)
        self.pair_order = self._new("pair_order", (n_pairs,), i32)
        self._arrays["pair_order"][:] = np.arange(n_pairs)
        self.expert_h = self._new("expert_h", (n_pairs, c.n_ff), f32)
        self.expert_out = self._new("expert_out", (n_pairs, c.n_embd), f32)
        self.expert_sums = self._new("expert_sums", (n_rows, c.n_embd), f32)
        self.tile_bytes = 2 * n_rows * 64  # a tile of gate and one of up, per thread
        self.tiles = self._new("tiles", (self.n_threads, self.tile_bytes), np.uint8)
        widest = max(2 * c.n_embd, c.n_q)  # 2 n_embd: what a prediction module joins
        self.panel_int8, self.panel_float32 = self._panels("panel", n_rows, widest)
        width = max(c.n_embd, c.n_ff)
        self.pair_panel_int8, self.pair_panel_float32 = self._panels("pair panel", n_pairs, width)
        self.logits = on_a_line((1, c.n_vocab), f32)
        self.record = self._record()
        firsts = range(0, n_rows, min(pieces.n_rows, n_rows))
        self.rows_records = [(first, self._from_row(first)) for first in firsts]  # of each piece's first row

    def _from_row(self, first: int) -> npt.NDArray[np.void]:
        """The record for rows from `first` on."""
        record = self.record.copy()
        for name in _OF_ROWS:
            record[name] += first * self._arrays[name].strides[0]
        return record

    def _record(self) -> npt.NDArray[np.void]:
        """records.SCRATCH [1]: sizes and addresses as kernels read them."""
        c = self.config
        values = vars(self) | {
            "n_embd": c.n_embd, "n_ff": c.n_ff, "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads,
            "head_dim": c.head_dim, "rotary_dim": c.rotary_dim, "n_experts": c.n_experts, "n_used": c.n_experts_used,
            "eps": c.rms_eps, "attention_scale": c.head_dim**-0.5,
        }  # fmt: skip
        record = np.empty(1, records.SCRATCH)
        record[0] = tuple(values[name] for name in records.SCRATCH.names or ())
        return record

    def _panels(self, name: str, n_rows: int, n: int) -> list[int]:
        """Room for n_rows rows of n activations, as int8 and as float32; their addresses."""
        return [self._new(f"{name} {k}", (panel_bytes(k, n_rows, n),), np.uint8) for k in ("int8", "float32")]

    def _new(self, name: str, shape: tuple[int, ...], dtype: Any) -> int:
        """An array of our own; its address."""
        self._arrays[name] = on_a_line(shape, dtype)
        return int(self._arrays[name].ctypes.data)

    @property
    def memory(self) -> list[npt.NDArray[Any]]:
        """All of them."""
        return list(self._arrays.values())

    def array(self, name: str) -> npt.NDArray[Any]:
        """One of the buffers as an array, for tests and measurements."""
        return self._arrays[name]
