"""What computes: weights, KV pool and scratch buffers of one model. Knows timelines, not sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from m2lite import machine
from m2lite.drafting.options import DraftOptions
from m2lite.engine.context import Allocation
from m2lite.engine.thread import Stopped, compute_thread
from m2lite.model.cache import PAGE
from m2lite.model.config import Config
from m2lite.sampling.draw import Sampling, draw
from m2lite.settings import ModelOptions
from m2lite.storage.gguf_reader import GGUFFile

if TYPE_CHECKING:  # these import Numba
    from m2lite.drafting.drafter import Drafter
    from m2lite.model.buffers import Buffers
    from m2lite.model.cache import KVPool, Timeline
    from m2lite.model.mtp import Mtp
    from m2lite.model.observer import Observer
    from m2lite.model.residency import Residency
    from m2lite.model.stream import Stream
    from m2lite.model.weights import Matrix, Weights

Stop = Callable[[], bool]
_MOST_COMPILE, _COMPILE_BYTES = 4, 1 << 30  # processes that compile at once; what each may need
# Of a call that lets others go on: enough rows for each of M2's experts to get several, and pieces of two thousand
# million multiply-adds at M2's widths, a hundredth of a second on few cores, so that the others' turn comes soon.
_ASIDE_ROWS, _ASIDE_PIECES = 512, (64, 128, 2e9)


def ask(stop: Stop | None) -> None:
    """Raises Stopped if `stop` says so."""
    if stop is not None and stop():
        raise Stopped


class ModelRunner:
    """What the compute thread works with: weights, KV pool and scratch buffers. Touch it in jobs only."""

    def __init__(
        self,
        gguf: GGUFFile,
        config: Config,
        options: ModelOptions,
        sizes: Allocation,
        drafting: DraftOptions,
        on_compile: Callable[[int, int], None] | None = None,
    ) -> None:
        """Weights, KV pool and buffers of these sizes; weights that do not fit come and go.

        Prediction modules do not come and go: beside such weights they are used only if they are asked for by name,
        since the memory that they take is missed more.
        """
        from m2lite.engine.tuned import Tuning, load_tuning
        from m2lite.kernels import amx
        from m2lite.simd import jit, tuning

        amx.allow(options["amx"])
        tuned = load_tuning() if options["tuning"] else Tuning(warning="switched off")
        tuning.use(tuned.values)
        self.layer = jit.start(options["threads"] or tuning.n_threads(machine.n_usable_cores()))
        self.n_threads = jit.n_threads()

        from m2lite.drafting.drafter import Drafter
        from m2lite.drafting.kept import kept_path
        from m2lite.model.buffers import Buffers
        from m2lite.model.cache import KVPool
        from m2lite.model.forward import forward, head, multiply
        from m2lite.model.mtp import bind_mtp
        from m2lite.model.weights import bind_weights

        self._jit, self._forward, self._head, self._multiply = jit, forward, head, multiply
        self.drafting = drafting
        self.n_expert_reads = 0  # experts that the last call went through, of all layers
        self._rerouting: Sequence[Observer] = ()
        self.pool: KVPool = KVPool(config, sizes.n_pool, options["kv"], drafting.n_modules)
        self.buffers: Buffers = Buffers(config, sizes.n_rows, n_positions=sizes.n_positions)
        self.residency = self._stream_weights(gguf, config, options)
        self._compile(gguf, options, on_compile)
        address = None if self.residency is None else self.residency.address
        self.weights: Weights = bind_weights(gguf, config, address=address)
        self.mtp: Mtp | None = None if drafting.sidecar is None else bind_mtp(drafting.sidecar, self.weights)
        self.drafter: Drafter = Drafter(
            self.weights, self.pool, self.buffers, drafting.mode, drafting.n_tokens, self.mtp, drafting.n_modules
        )
        for n in sorted({min(sizes.n_rows, sizes.n_positions, PAGE), 1}):
            self._load_kernels(n)
        draw(np.zeros(config.n_vocab, np.float32), Sampling(seed=0))
        if self.stream is not None:
            self.stream.ledger.warm(np.zeros(len(self.stream.ledger.sizes)))  # those tokens were nobody's
        if options["heat"] and drafting.mode == "auto":
            self.drafter.remember(kept_path(self.weights, self.mtp, self.n_threads, options["load"]))
        self.experts: npt.NDArray[np.unsignedinteger] | None = None  # as `evaluate_rows` noted them
        self._aside: Buffers | None = None
        self.fit()
        self.warnings = [*jit.warnings(), *([tuned.warning] if options["tuning"] and tuned.warning else [])]
        self.is_tuned = bool(tuned.date or tuned.warning)  # or must not be

    def _compile(self, gguf: GGUFFile, options: ModelOptions, on_compile: Callable[[int, int], None] | None) -> None:
        """What the model needs, or load it from the cache; see `Engine.open`."""
        from m2lite.kernels import fast

        if self.buffers.kernels is not fast:
            return
        from m2lite.kernels.ahead import Needs, prepare
        from m2lite.simd.tuning import VALUES

        sidecar = self.drafting.sidecar
        tensors = [*gguf.tensors.values(), *(() if sidecar is None else sidecar.tensors.values())]
        formats = sorted({tensor.format.name for tensor in tensors if len(tensor.shape) > 1})
        embedding = gguf.tensors.get("token_embd.weight")
        if embedding is not None:  # else `bind_weights` says so
            has = sidecar is not None, self.stream is not None
            first_cache = VALUES["first_cache"]
            needs = Needs(formats, embedding.format.name, self.pool.kv, *has, options["amx"], first_cache)
            n_processes = min(_MOST_COMPILE, machine.n_usable_cores(), machine.free_memory_bytes() // _COMPILE_BYTES)
            prepare(needs, n_processes, compute_thread().check, on_compile)

    def _stream_weights(self, gguf: GGUFFile, config: Config, options: ModelOptions) -> Residency | None:
        """What lets weights come and go, if they do not fit or that is asked for."""
        from m2lite.model.cache import KVPool
        from m2lite.model.residency import Residency, choose_budget
        from m2lite.model.routing import Routing

        drafting, memory = self.drafting, [self.pool.memory, *self.buffers.memory]
        n_beside = 0 if drafting.sidecar is None else drafting.sidecar.size_bytes
        budget = choose_budget(gguf, options["load"], options["ram"], memory, n_beside)
        if budget is None:
            return None
        if drafting.sidecar is not None and drafting.mode == "auto":
            drafting.drop_modules("the model does not fit into memory; --draft mtp uses them")
            self.pool = KVPool(config, self.pool.n_positions, options["kv"])
            memory[0], budget = self.pool.memory, replace(budget, beside=0)
        if options["heat"]:
            self.pool.routing = Routing(self.pool)
            memory.append(self.pool.routing.ids)
        residency = Residency(gguf, config, options["load"], budget, memory)
        self.buffers.stream = residency.stream
        return residency

    @property
    def stream(self) -> Stream | None:
        """What brings the weights of a model that is larger than its memory."""
        return self.buffers.stream

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
        self.drafter.load_module_kernels(timeline, n_rows)
        timeline.release()

    def evaluate(
        self,
        timeline: Timeline,
        start: int,
        tokens: Sequence[int],
        outputs: str = "last",
        stop: Stop | None = None,
        observers: Sequence[Observer] = (),
    ) -> Any:
        """float32 [1 or T, vocab] = logits after tokens[T] at positions start..., valid until the next call.

        Between layers `stop` is asked, and Stopped raised if it says so; the timeline is then as before. `observers`
        see what is computed with, and may let rows at the end go.
        """

        if timeline.length > start:
            timeline.rewind(start)
        assert timeline.length == start, (timeline.length, start)
        return self._compute([(timeline, tokens)], outputs, stop, observers)

    def evaluate_rows(
        self,
        parts: Sequence[tuple[Timeline, Sequence[int]]],
        outputs: Sequence[int],
        stop: Stop | None = None,
        leave: Observer | None = None,
        is_aside: bool = False,
        has_experts: bool = False,
    ) -> Any:
        """float32 [sum(outputs), vocab] = logits after each part's last tokens, so many as `outputs` says.

        The tokens stand behind the part's timeline. As `evaluate`, and counts what it goes through in `n_expert_reads`.
        With `leave`, which may let rows of a single part go, there may be fewer. One call that `is_aside` has
        buffers of its own (see `make_room_aside`): `stop` may make other calls. With `has_experts`, those of all rows
        are in `experts` [n_layers, n_rows, n_used] until the next call, ascending; else it is None.
        """
        buffers = self.buffers if not is_aside else self._aside
        assert buffers is not None
        from m2lite.model.observer import ChosenExperts

        observers, chosen = [leave] if leave is not None else [], None
        if has_experts:
            chosen = ChosenExperts(self.pool.config, sum(len(ids) for _, ids in parts))
            observers.append(chosen)
        logits = self._compute(parts, outputs if leave is None else "all", stop, observers, buffers)
        self.experts = None if chosen is None else chosen.ids  # only now: calls that others made meanwhile had theirs
        if is_aside:
            n = sum(len(ids) for _, ids in parts)
            self.buffers.array("x")[:n] = buffers.array("x")[:n]  # where prediction modules find the trunk's states
        return logits

    def make_room_aside(self) -> None:
        """Buffers for calls between whose layers others are made, if the model is in memory. On the compute thread."""
        if self._aside is None and self.stream is None:
            from m2lite.model.buffers import Buffers, Pieces

            n_rows, n_positions = min(self.buffers.n_rows, _ASIDE_ROWS), self.buffers.n_positions
            pieces = Pieces(*_ASIDE_PIECES)
            self._aside = Buffers(self.weights.config, n_rows, n_positions=n_positions, pieces=pieces)

    @property
    def n_rows_aside(self) -> int:
        """Of a call that is aside; 0 where there is no room for one."""
        return 0 if self._aside is None else self._aside.n_rows

    def _compute(
        self,
        parts: Sequence[tuple[Timeline, Sequence[int]]],
        outputs: str | Sequence[int],
        stop: Stop | None,
        observers: Sequence[Observer] = (),
        buffers: Buffers | None = None,
    ) -> Any:
        buffers = buffers or self.buffers

        def check() -> None:
            compute_thread().check()
            ask(stop)

        self.check_files()
        if self._jit.n_threads() != self.n_threads:  # another model was opened with another number
            self._jit.start(self.n_threads)
        from m2lite.model.observer import ExpertReads

        rows, routing, reads = self.pool.rows(parts), self.pool.routing, ExpertReads()
        noted = [] if routing is None else [routing.observe(rows)]
        observers = [*self._rerouting, *observers, *noted, reads]
        try:
            logits = self._forward(self.weights, self.pool, buffers, rows, outputs, check, observers)
        finally:
            self.check_files()  # of one that was cut meanwhile, zeros were seen
        self.n_expert_reads = reads.n
        return logits

    # For measurements

    def row_logits(self, first: int, n: int) -> Any:
        """float32 [n, vocab] = logits after rows first, first + 1, ... of the last call, valid until the next call."""
        x = self.buffers.x + 4 * self.weights.config.n_embd * first
        return self._head(self.weights, self.buffers, x, self.weights.output_norm, n)

    def product(self, matrix: Matrix, n: int) -> Callable[[], None]:
        """A call that multiplies n rows of ones with the matrix (of stacked ones, the first) and drops what comes."""
        self.buffers.array("x")[:] = 1
        out = np.empty(n * matrix.n_out, np.float32)
        return lambda: self._multiply(self.buffers, int(out.ctypes.data), matrix, self.buffers.x, n)

    def use_tiles(self) -> None:
        """Of the parameters in force, from now on; prediction modules keep theirs."""
        from m2lite.model.weights import use_tiles

        compute_thread().run(partial(use_tiles, self.weights))

    def weights_reader(self, n_bytes: int) -> Callable[[], None] | None:
        """A call that multiplies a row with so many bytes of expert weights, in memory of its own; None where the first
        layer has fewer."""
        stack = self.weights.layers[0].ffn_up_exps
        n_out = -(-n_bytes // stack.row_bytes)
        if n_out > stack.n_out * self.weights.config.n_experts:
            return None
        matrix = replace(stack, n_out=n_out)  # experts lie behind each other
        x, out = np.ones(matrix.n_in, np.float32), np.empty(n_out, np.float32)
        return lambda: self._multiply(self.buffers, int(out.ctypes.data), matrix, int(x.ctypes.data), 1)

    @property
    def kernels(self) -> Any:
        """The kernels that calls are made of; others of the same names, timed ones say, may take their place."""
        return self.buffers.kernels

    @kernels.setter
    def kernels(self, kernels: Any) -> None:
        self.buffers.kernels = kernels

    def reroute(self, *observers: Observer) -> None:
        """They choose experts from now on, those of prediction modules too."""
        self._rerouting = observers
        if self.drafter.modules is not None:
            self.drafter.modules.observers = observers
