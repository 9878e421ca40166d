"""An opened model: a file's weights, tokenizer and template, and the loop that answers requests. Knows no chats."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self, Unpack

import numpy as np
import numpy.typing as npt

from m2lite import machine
from m2lite.drafting.options import DraftOptions, open_drafting
from m2lite.engine.context import check_room, choose_sizes, kv_bytes_per_position
from m2lite.engine.handle import Handle
from m2lite.engine.kv_disk import KVDisk
from m2lite.engine.locate import locate_model
from m2lite.engine.loop import Loop
from m2lite.engine.request import Request
from m2lite.engine.runner import ModelRunner, Stop
from m2lite.engine.session import Session
from m2lite.engine.thread import Job, compute_thread, is_forked
from m2lite.engine.warmer import Warmer
from m2lite.errors import UsageError
from m2lite.model.cache import check_kv
from m2lite.model.config import parse_config
from m2lite.model.residency import check_load
from m2lite.sampling.json_schema import Masks
from m2lite.settings import ModelOptions, with_defaults
from m2lite.storage.gguf_reader import GGUFFile, open_gguf
from m2lite.storage.heat import heat_path, load_heat, save_heat
from m2lite.storage.identity import trunk_identity
from m2lite.text.template import Template, load_template
from m2lite.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:  # these import Numba
    from m2lite.engine.idle_tuning import IdleTuning
    from m2lite.model.cache import Timeline
    from m2lite.model.stream import Stream
    from m2lite.model.weights import Weights

_TUNED_BYTES = 128 << 20  # of weights that experiments read: more than caches hold
MAX_LOGITS_ROWS = 256  # of one whose logits are all wanted


class Engine:
    """An opened model: read-only, and shared by its sessions and requests, which share one KV pool.

    `m2lite.Model` is this and what knows of messages.
    """

    def __init__(
        self, gguf: GGUFFile, tokenizer: Tokenizer, template: Template, runner: ModelRunner, n_positions: int,
        began: float, heat: bool,
    ) -> None:  # fmt: skip
        """Use `open`, which began at `began` on the clock `time.perf_counter`."""
        self.gguf, self.config, self.runner = gguf, runner.weights.config, runner
        self.tokenizer, self.template, self.masks = tokenizer, template, Masks(tokenizer)
        self.ctx = n_positions
        self.loop = Loop(runner, tokenizer, self.masks, n_positions)
        stream = runner.stream
        is_mapped_ahead = stream is None and gguf.size_bytes + self.kv_bytes <= machine.free_memory_bytes()
        self._idle_tuning: IdleTuning | None = None
        self._prefault = gguf.prefault() if is_mapped_ahead else None
        if self._prefault is not None:
            runner.drafter.mapping = self._prefault.is_running
        self._heat_path = heat_path(trunk_identity(gguf)) if heat and stream is not None else None
        self._warmer = None if self._heat_path is None or stream is None else self._warm(self._heat_path, stream)
        if self._warmer is not None:
            self.loop.prefix_cache.loaded = self._recall
        self.load_s = time.perf_counter() - began

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        sequences: int = 1,
        pool: int | None = None,
        on_compile: Callable[[int, int], None] | None = None,
        **options: Unpack[ModelOptions],
    ) -> Self:
        """Open a GGUF file, a directory with one, or (None) the bundled model.

        `ctx` is the number of KV positions of a session, by default what `default_ctx` says; `kv` is their type, f16 or
        q8_0. All sessions share `pool` positions, by default as many as `sequences` of them need and a quarter of free
        memory holds. `threads` is the number of threads, by default one per core.
        `ram` is the memory, in bytes, that this process and the file's pages may take, by default what is free. Weights
        of a larger model come and go: with `load` "mmap" in the page cache, else past it in memory of the process;
        "direct" does so with a model that fits, too.
        `draft` says where drafts come from: "mtp" from the prediction modules in the file `mtp`, by default the one
        beside the model, "ngram" from earlier places of the sequence, "auto" from what pays, "off"; the tokens are the
        same. `draft_tokens` bounds the drafts of one step.
        With `heat` it is kept in the cache directory which of such a model's experts are used, and which drafts pay,
        for the next start.
        With `amx` the processor's matrix instructions are used, where it has them, and with `tuning` what `m2lite tune`
        found for this machine; the bits are the same.
        `template` "builtin" uses MiniMax-M2's own instead of the file's. On the first run on a machine kernels are
        compiled: `on_compile` is called with how many of how many are ready, if that takes longer than a second.

        Raises UsageError, BadModelError or ResourceError, and TypeError for an option that does not exist.
        """
        began, options = time.perf_counter(), with_defaults(options)
        gguf = open_gguf(locate_model(path))
        drafting = DraftOptions()
        job: Job[ModelRunner] | None = None
        try:
            config = parse_config(gguf.metadata)
            check_kv(config, options["kv"])
            check_load(options["load"], options["ram"])
            drafting = open_drafting(gguf, options["draft"], options["draft_tokens"], options["mtp"])
            sizes = choose_sizes(config, options, drafting.n_modules, sequences, pool)

            def build() -> ModelRunner:
                return ModelRunner(gguf, config, options, sizes, drafting, on_compile)

            job = compute_thread().submit(build)  # imports Numba while this thread builds the tokenizer
            tokenizer = load_tokenizer(gguf)
            template = load_template(gguf, builtin=options["template"] == "builtin")
            runner = job.result()
            runner.check_files()
        except BaseException as error:
            try:
                if isinstance(error, Exception):  # a file that was cut meanwhile is the cause of whatever else is wrong
                    gguf.check_unchanged()
            finally:
                _close_behind(job, drafting, gguf)
            raise
        return cls(gguf, tokenizer, template, runner, sizes.n_positions, began, options["heat"])

    @property
    def path(self) -> Path:
        return self.gguf.path

    @property
    def weights(self) -> Weights:
        return self.runner.weights

    @property
    def n_threads(self) -> int:
        return self.runner.n_threads

    @property
    def kv(self) -> str:
        """The type of the KV cache, which is part of what decides the tokens."""
        return self.runner.pool.kv

    @property
    def kv_bytes(self) -> int:
        """The KV cache when it is full."""
        return self.runner.pool.n_positions * self.kv_bytes_per_position

    @property
    def kv_bytes_per_position(self) -> int:
        """K and V of all layers, those of the prediction modules that are used included."""
        return kv_bytes_per_position(self.config, self.kv, self.runner.drafting.n_modules)

    @property
    def n_rows(self) -> int:
        """Of a call, at most: prompts are read in chunks of so many tokens."""
        return self.loop.n_rows

    @n_rows.setter
    def n_rows(self, n: int) -> None:
        self.loop.n_rows = n

    def submit(self, request: Request) -> Handle:
        """Ask for an answer. Raises UsageError or ContextError for a request that can never be answered."""
        return self.loop.submit(request)

    def session(self, draft: str | None = None, draft_tokens: int | None = None) -> Session:
        """A new session; how it drafts may differ from how the model was opened, as far as modules are at hand."""
        return Session(self, draft, draft_tokens)

    def logits(self, tokens: Sequence[int], start: int = 0) -> npt.NDArray[np.float32]:
        """float32 [T - start, vocab]: row t holds the logits of the token after tokens[start + t].

        Those before `start` may come from the prefix cache.
        """
        check_room(len(tokens), 0, self.ctx, self.config)
        return compute_thread().run(partial(self._logits, list(tokens), start))

    def _logits(self, tokens: list[int], start: int) -> npt.NDArray[np.float32]:
        self.loop.check_open()  # here: nobody closes it meanwhile
        if not 0 <= start < len(tokens):
            raise UsageError(f"Logits of {len(tokens):,} tokens from {start:,} on cannot be had.", "Change the range.")
        out = np.empty((len(tokens) - start, self.config.n_vocab), np.float32)
        timeline = self.loop.prefix_cache.fork(tokens, start)[0]
        try:
            while (at := timeline.length) < len(tokens):
                end = min(at + min(self.n_rows, MAX_LOGITS_ROWS), start if at < start else len(tokens))
                rows = self.runner.evaluate(timeline, at, tokens[at:end], "last" if at < start else "all")
                if at >= start:
                    out[at - start : end - start] = rows
        finally:
            timeline.release()
        return out

    def use_disk(self, budget_bytes: int | None = None) -> None:
        """Prompts that were computed once and saved are read from the cache directory; see `Loop.save`.

        `budget_bytes`: of all models' pages there, by default 16 GiB or a tenth of what is free.
        """
        self.loop.prefix_cache.disk = KVDisk(self.gguf, self.runner, budget_bytes)

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of raw text, with the beginning-of-text id only if the file asks for it."""
        ids = self.tokenizer.encode(text)
        bos_id = self.tokenizer.bos_id
        return [bos_id, *ids] if self.tokenizer.add_bos and bos_id is not None else ids

    def tune_when_idle(self) -> None:
        """Find in the first idle moment what makes decoding faster here, unless that is known or small weights tell
        nothing. No token depends on it."""
        if self.runner.is_tuned or self.runner.stream is not None or self._idle_tuning is not None:
            return
        from m2lite.engine.idle_tuning import IdleTuning

        reader = self.runner.weights_reader(_TUNED_BYTES)
        if reader is not None:
            self._idle_tuning = IdleTuning(reader, _TUNED_BYTES, self._is_idle)

    def _is_idle(self) -> bool:
        is_mapped = self._prefault is None or not self._prefault.is_running()
        return is_mapped and self.loop.scheduler.is_idle and not compute_thread().busy

    def wait_mapped(self, stop: Stop | None = None) -> None:
        """Until the pages of a model that fits into memory are mapped, or `stop` says so; the mapping goes on."""
        if self._prefault is not None:
            self._prefault.wait(stop)

    def _warm(self, path: Path, stream: Stream) -> Warmer:
        """Begin with what earlier runs used most, if they kept it."""
        heat, warmer = load_heat(path, self.config.n_layers, self.config.n_experts), Warmer(stream)
        if heat is not None:
            compute_thread().run(partial(stream.ledger.warm, heat.reshape(-1)))
            warmer.wake()
        return warmer

    def _recall(self, timeline: Timeline) -> None:
        """A sequence begins with pages from the disk: what their tokens chose is as hot as if they were computed here.

        Only then: in a process that has computed, its heat knows more of what comes than a beginning that many share.
        """
        routing, stream = self.runner.pool.routing, self.runner.stream
        assert routing is not None and stream is not None and self._warmer is not None
        heat, n_known = routing.recall(timeline)
        if n_known:
            stream.ledger.recall(heat, n_known)
            self._warmer.wake()

    def save_heat(self) -> None:
        """Keep which experts were used, where that is wanted; `close` does it, too."""
        stream = self.runner.stream
        if self._heat_path is not None and stream is not None and stream.traffic.wanted_bytes:
            save_heat(self._heat_path, stream.ledger.heat.reshape(self.config.n_layers, -1))

    def close(self) -> None:
        """Unmap the file; whatever is under way ends. Done again, or in a forked process, nothing happens."""
        if self.loop.is_closed or is_forked():
            return
        if self._prefault is not None:
            self._prefault.stop()
        if self._idle_tuning is not None:
            self._idle_tuning.stop()
        if self._warmer is not None:
            self._warmer.stop()
        self.save_heat()
        abandoned = compute_thread().busy  # a call or compilation that nobody waits for any more
        job = compute_thread().submit(self._close)
        if not abandoned:
            job.result()

    def _close(self) -> None:
        self.loop.close()
        self.runner.drafter.save()
        self.runner.close()
        self.runner.drafting.close()
        self.gguf.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_behind(job: Job[ModelRunner] | None, *files: DraftOptions | GGUFFile) -> None:
    """Close them once no kernel of the job can touch them any more; nobody waits for that."""
    if job is not None:
        job.abandoned = True
    for file in files:
        if job is None:
            file.close()
        else:
            compute_thread().submit(file.close)
