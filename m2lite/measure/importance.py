"""Sums of squares of what every matrix is multiplied with, over a text: an observer of the model. Knows no file.

In llama-imatrix's convention: per column of the matrix sum(x**2), for stacked matrices per expert over the tokens that
were routed to it, and how many rows went in. Matrices of layers only: the head is left out, as there. The sums are
float64 and in token order, so the same for any number of threads and rows a call. Memory: 8 bytes per distinct input
column and expert, 585 MB for MiniMax-M2.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from m2lite.engine.thread import Stopped, compute_thread
from m2lite.errors import M2liteError
from m2lite.measure.chunks import cut_chunks, feed_chunk
from m2lite.model.observer import Observer
from m2lite.model.weights import Matrix, load_kernels
from m2lite.simd import jit

if TYPE_CHECKING:
    from m2lite.api import Model
    from m2lite.engine.runner import Stop

F32_MAX = float(np.finfo(np.float32).max)
MAX_NAMED = 16  # experts per line of the report

F64 = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]  # chunks done, chunks in all


@dataclass(frozen=True)
class Collected:
    """tensor name -> (sums float64 [n, width], counts int64 [n]), n = experts of a stack, else 1."""

    sums: Mapping[str, tuple[F64, Counts]]
    n_ctx: int
    n_chunks: int  # whole ones; the sums hold what was read of the next when it was stopped
    n_chunks_asked: int

    @property
    def unreached(self) -> dict[str, tuple[int, ...]]:
        """Layer -> experts that no token of the text was routed to, for the layers that have such."""
        found = {layer: tuple(np.flatnonzero(counts == 0).tolist()) for layer, counts in self._routed()}
        return {layer: experts for layer, experts in found.items() if experts}

    @property
    def n_experts(self) -> int:
        """Of all layers."""
        return sum(len(counts) for _, counts in self._routed())

    def _routed(self) -> list[tuple[str, Counts]]:
        end = ".ffn_gate_exps.weight"
        return [(name.removesuffix(end), counts) for name, (_, counts) in self.sums.items() if name.endswith(end)]


class SquareSums(Observer):
    """Adds up squares. Matrices that read the same input (q, k, v; gate, up) share one sum."""

    def __init__(self, model: Model) -> None:
        gguf = model.gguf
        self.sums: dict[str, tuple[F64, Counts]] = {}
        # Rows of a fused q, k, v are one tensor: k and v lie where no tensor begins, and are left out here.
        self._names = {gguf.address(name): name for name in gguf.tensors if name.startswith("blk.")}
        self._n_experts, self._kernels = model.config.n_experts, load_kernels()
        self._one_group, self._all = np.zeros(1, np.int32), np.arange(model.n_rows, dtype=np.int32)

    def dense(self, matrices: tuple[Matrix, ...], x: int, n_in: int, n: int) -> None:
        starts = np.array([0, n], np.int32)
        self._add(matrices, 1, _at(x, np.float32, (n, n_in)), self._all, starts, self._one_group)

    def experts(
        self, stacks: tuple[Matrix, ...], x: int, n_in: int, rows: int, active: int, starts: int, n_groups: int
    ) -> None:
        pairs = _at(starts, np.int32, (n_groups + 1,))
        index = _at(rows + 4 * int(pairs[0]), np.int32, (int(pairs[-1] - pairs[0]),))
        inputs = _at(x, np.float32, (int(index.max()) + 1, n_in))
        self._add(stacks, self._n_experts, inputs, index, pairs - pairs[0], _at(active, np.int32, (n_groups,)))

    def _add(self, matrices: tuple[Matrix, ...], n_slices: int, x: Any, rows: Any, starts: Any, active: Any) -> None:
        names = [self._names[m.address] for m in matrices if m.address in self._names]
        if not names:
            return
        n_in = x.shape[1]
        if names[0] not in self.sums:
            both = np.zeros((n_slices, n_in)), np.zeros(n_slices, np.int64)
            self.sums.update(dict.fromkeys(names, both))
        sums, counts = self.sums[names[0]]
        self._kernels.add_squares(jit.n_parts(int(starts[-1]) * n_in), sums, x, rows, starts, active)
        counts[active] += np.diff(starts)
        largest = sums[active].max(axis=1)  # NaN if there is one
        bad = active[~(largest <= F32_MAX)]
        if len(bad):
            where = f" of expert {bad[0]}" if n_slices > 1 else ""
            raise M2liteError(
                f"{names[0]}: the squares of its inputs{where} do not add up to a finite number.",
                "Use a model file of higher precision, or find the part of the text that does it with fewer chunks.",
            )


def _at(address: int, dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The memory at `address` as an array, without a copy."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * n_bytes).from_address(address), dtype).reshape(shape)


def collect_importance(
    model: Model,
    text: str | Sequence[int],
    n_ctx: int = 512,
    *,
    n_chunks: int | None = None,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Collected:
    """Run a text (or its tokens) through the model in chunks of `n_ctx` and add up the squares of all inputs.

    When `stop` says so, it ends early with what was added up until then.
    """
    chunks = cut_chunks(model, text, n_ctx, n_chunks)
    squares, n_done = SquareSums(model), 0
    for chunk in chunks:
        try:
            compute_thread().run(partial(feed_chunk, [model], chunk, stop=stop, observers=[squares]))
        except Stopped:
            break
        n_done += 1
        if progress is not None:
            progress(n_done, len(chunks))
    return Collected(squares.sums, n_ctx, n_done, len(chunks))


def format_importance(found: Collected) -> str:
    """What was read, and which experts it never reached."""
    of = "" if found.n_chunks == found.n_chunks_asked else f" of {found.n_chunks_asked:,}"
    lines = [f"{len(found.sums)} tensors, {found.n_chunks:,}{of} chunks of {found.n_ctx:,} tokens"]
    unreached = found.unreached
    n = sum(map(len, unreached.values()))
    lines.append(f"experts that no token reached: {n:,} of {found.n_experts:,} ({n / max(1, found.n_experts):.2%})")
    for layer, experts in unreached.items():
        more = f" and {len(experts) - MAX_NAMED} more" if len(experts) > MAX_NAMED else ""
        lines.append(f"  {layer}: {', '.join(map(str, experts[:MAX_NAMED]))}{more}")
    return "\n".join(lines)
