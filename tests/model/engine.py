"""A bound model with its pool and buffers, for tests that drive `forward` itself."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import numpy.typing as npt

from m2lite.model.buffers import WHOLE, Buffers, Pieces
from m2lite.model.cache import KVPool, Timeline
from m2lite.model.config import parse_config
from m2lite.model.forward import forward
from m2lite.model.observer import Observer
from m2lite.model.weights import bind_weights
from m2lite.simd import jit
from m2lite.storage.gguf_reader import open_gguf

F32 = npt.NDArray[np.float32]


class Engine:
    """Everything that `forward` needs for one file."""

    def __init__(
        self,
        path: Path,
        n_positions: int = 8192,
        n_rows: int = 128,
        kernels: ModuleType | None = None,
        generic: bool = False,
        n_extra_layers: int = 0,
        kv: str = "f16",
        pieces: Pieces = WHOLE,
    ) -> None:
        jit.start(2)
        self.gguf = open_gguf(path)
        self.config = parse_config(self.gguf.metadata)
        kind = "m2lite.model.weights.activation_kind"
        with mock.patch(kind, lambda name: "float32") if generic else nullcontext():  # no rounding to int8
            self.weights = bind_weights(self.gguf, self.config, kernels)
        self.pool = KVPool(self.config, n_positions, kv, n_extra_layers)
        self.buffers = Buffers(self.config, n_rows, kernels, n_positions, pieces)

    def run(self, timeline: Timeline, tokens: Sequence[int], outputs: str = "all") -> F32:
        """Append tokens in one call; logits of all of them (or of the last), copied."""
        return self.run_rows([(timeline, tokens)], outputs)

    def run_rows(
        self,
        parts: Sequence[tuple[Timeline, Sequence[int]]],
        outputs: str = "all",
        observer: Observer | None = None,
    ) -> F32:
        rows = self.pool.rows([(t, np.asarray(ids)) for t, ids in parts])
        return forward(
            self.weights, self.pool, self.buffers, rows, outputs, observers=[] if observer is None else [observer]
        ).copy()

    def logits(self, tokens: Sequence[int], first_position: int = 0, observer: Observer | None = None) -> F32:
        """Logits of a fresh timeline; its pages are given back."""
        timeline = self.pool.timeline(first_position)
        try:
            return self.run_rows([(timeline, tokens)], observer=observer)
        finally:
            timeline.release()


def states_before(engine: Engine, address: int, n: int) -> F32:
    """float32 [n + 1, n_embd]: zeros, which stand before position 0, and the n states at that address."""
    n_embd = engine.config.n_embd
    states = np.zeros((n + 1, n_embd), np.float32)
    ctypes.memmove(states.ctypes.data + 4 * n_embd, address, 4 * n_embd * n)
    return states
