"""What the compute thread works with: weights, KV pool and scratch buffers. Knows timelines, not sessions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from m2lite.decode.compute import Stopped, compute_thread
from m2lite.decode.drafts import Drafter, Drafting, check_draft
from m2lite.decode.gate import Gate
from m2lite.decode.sampling import Sampling, draw
from m2lite.errors import UsageError
from m2lite.model.cache import PAGE
from m2lite.model.config import Config
from m2lite.storage.gguf_reader import GGUFFile

if TYPE_CHECKING:  # these import Numba
    from m2lite.decode.replay import Modules
    from m2lite.model.cache import KVPool, Timeline
    from m2lite.model.forward import Buffers, Leave
    from m2lite.model.residency import Residency
    from m2lite.model.stream import Stream
    from m2lite.model.weights import Weights

Stop = Callable[[], bool]


def ask(stop: Stop | None) -> None:
    """Raises Stopped if `stop` says so."""
    if stop is not None and stop():
        raise Stopped


class Engine:
    """What the compute thread works with: weights, KV pool and scratch buffers. Touch it in jobs only."""

    def __init__(
        self,
        gguf: GGUFFile,
        config: Config,
        n_threads: int,
        ctx: int,
        n_rows: int,
        kv: str,
        load: str = "auto",
        ram: int | None = None,
        drafting: Drafting | None = None,
        n_pool: int | None = None,
    ) -> None:
        """Weights, KV pool and buffers for `n_rows`; weights that do not fit come and go.

        A row has up to `ctx` positions, all together `n_pool`, by default as many.

        Prediction modules do not come and go: beside such weights they are used only if they are asked for by name,
        since the memory that they take is missed more.
        """
        from m2lite.kernels import jit

        self.layer = jit.start(n_threads)
        self.layer_advice = jit.layer_advice()
        self.n_threads = jit.n_threads()

        from m2lite.decode.lookup import warm_up
        from m2lite.decode.replay import Modules
        from m2lite.model.cache import KVPool
        from m2lite.model.forward import Buffers, forward
        from m2lite.model.mtp import bind_mtp
        from m2lite.model.residency import Residency, choose_budget
        from m2lite.model.weights import bind_weights

        self._jit, self._forward = jit, forward
        self.drafting = drafting = drafting or Drafting()
        n_pool = n_pool or ctx
        self.pool: KVPool = KVPool(config, n_pool, kv, drafting.n_modules)
        self.buffers: Buffers = Buffers(config, n_rows, n_positions=ctx)
        self.residency: Residency | None = None
        address: Callable[[str], int] | None = None
        memory = [self.pool.memory, *self.buffers.memory]
        n_beside = 0 if drafting.sidecar is None else drafting.sidecar.size_bytes
        budget = choose_budget(gguf, load, ram, memory, n_beside)
        if budget is not None and drafting.sidecar is not None and drafting.mode == "auto":
            drafting.leave_modules("the model does not fit into memory; --draft mtp uses them")
            self.pool = KVPool(config, n_pool, kv)
            memory[0], budget = self.pool.memory, replace(budget, beside=0)
        if budget is not None:
            self.residency = Residency(gguf, config, load, budget, memory)
            self.buffers.stream, address = self.residency.stream, self.residency.address
        self.weights: Weights = bind_weights(gguf, config, address=address)
        self.modules: Modules | None = None
        if drafting.sidecar is not None:
            mtp = bind_mtp(drafting.sidecar, self.weights)
            self.modules = Modules(mtp, drafting.n_modules, self.pool, self.buffers)
        self.gate = Gate(drafting.n_modules)
        for n in sorted({min(n_rows, ctx, PAGE), 1}):
            self._load_kernels(n)
        draw(np.zeros(config.n_vocab, np.float32), Sampling(seed=0))
        warm_up()
        if self.stream is not None:
            self.stream.ledger.warm(np.zeros(len(self.stream.ledger.sizes)))  # those tokens were nobody's
        self.fit()

    @property
    def stream(self) -> Stream | None:
        """What brings the weights of a model that is larger than its memory."""
        return self.buffers.stream

    def drafter(self, timeline: Timeline, mode: str | None = None, n_tokens: int | None = None) -> Drafter | None:
        """Of a session with that timeline, by default as the model was opened; None where nothing drafts."""
        mode, n_tokens = mode or self.drafting.mode, n_tokens or self.drafting.n_tokens
        check_draft(mode, n_tokens)
        if mode == "off":
            return None
        if mode == "mtp" and self.modules is None:
            raise UsageError("The model was opened without prediction modules.", "Open it with draft='mtp'.")
        from m2lite.decode.leaving import Leaving
        from m2lite.decode.lookup import Lookup
        from m2lite.decode.replay import Replay

        replay = None if self.modules is None or mode == "ngram" else Replay(self.modules, timeline)
        lookup = None if mode == "mtp" else Lookup(self.buffers.n_positions + 1)
        # What a fixed number of drafts measures is not the gate's: it would know more than it can find out itself.
        gate = self.gate if mode == "auto" else Gate(self.drafting.n_modules)
        leave = None if self.stream is None or mode != "auto" else Leaving(self.stream, self.weights.config.n_layers)
        return Drafter(mode, n_tokens, gate, replay, lookup, leave)

    def fit(self) -> None:
        """Keep weights that come and go within their budget, whatever else has grown."""
        if self.residency is not None:
            self.residency.fit()

    def check_files(self) -> None:
        """BadModelError where a file that is mapped has changed, or cannot be read."""
        self.weights.gguf.check_unchanged()
        if self.drafting.sidecar is not None:
            self.drafting.sidecar.check_unchanged()

    def close(self) -> None:
        """Before the file is closed."""
        if self.residency is not None:
            self.residency.close()

    def _load_kernels(self, n_rows: int) -> None:
        """Compile, or load from the cache, what `n_rows` need: here, where Ctrl-C can end it, and before any clock.

        One layer is enough for that, and reads little of a model that is larger than memory.
        """
        timeline = self.pool.timeline()
        rows = self.pool.rows([(timeline, np.zeros(n_rows, np.int64))])
        one_layer = replace(self.weights, layers=self.weights.layers[:1])
        self._forward(one_layer, self.pool, self.buffers, rows)
        if self.modules is not None:
            from m2lite.decode.replay import Replay

            replay = Replay(self.modules, timeline)
            replay.keep(0, n_rows, 0)
            replay.draft(0, [0] * n_rows, (), Sampling(0.0, seed=0), 0)
        timeline.release()

    def evaluate(
        self,
        timeline: Timeline,
        start: int,
        tokens: Sequence[int],
        outputs: str = "last",
        stop: Stop | None = None,
        leave: Leave | None = None,
    ) -> Any:
        """float32 [1 or T, vocab] = logits after tokens[T] at positions start..., valid until the next call.

        Between layers `stop` is asked, and Stopped raised if it says so; the timeline is then as before. `leave` may
        leave out rows at the end.
        """

        if timeline.length > start:
            timeline.rewind(start)
        assert timeline.length == start, (timeline.length, start)
        return self._compute([(timeline, tokens)], outputs, stop, leave)

    def evaluate_rows(
        self, parts: Sequence[tuple[Timeline, Sequence[int]]], outputs: Sequence[int], stop: Stop | None = None
    ) -> Any:
        """float32 [sum(outputs), vocab] = logits after each part's last tokens, so many as `outputs` says.

        The tokens stand behind the part's timeline. As `evaluate`, and counts what it goes through in `n_expert_reads`.
        """
        self.buffers.n_expert_reads = 0
        return self._compute(parts, outputs, stop, None)

    @property
    def n_expert_reads(self) -> int:
        """Experts that the last `evaluate_rows` went through, of all layers."""
        return self.buffers.n_expert_reads or 0

    def _compute(
        self,
        parts: Sequence[tuple[Timeline, Sequence[int]]],
        outputs: str | Sequence[int],
        stop: Stop | None,
        leave: Leave | None,
    ) -> Any:
        def check() -> None:
            compute_thread().check()
            ask(stop)

        self.check_files()
        if self._jit.n_threads() != self.n_threads:  # another model was opened with another number
            self._jit.start(self.n_threads)
        rows = self.pool.rows(parts)
        try:
            return self._forward(self.weights, self.pool, self.buffers, rows, outputs, check, leave)
        finally:
            self.check_files()  # of one that was cut meanwhile, zeros were seen
