"""Model (opened once, shared) and Session (one timeline): prefill, decode, statistics. Knows token ids, not chats.

Every kernel call is a job on the compute thread. A session's truth is `tokens`, the ids of its row, and how many of
them lie in the KV cache; each job first rewinds the timeline to that count, so a job that was interrupted or abandoned
leaves nothing behind.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from m2lite import machine
from m2lite.decode.compute import Job, Stopped, compute_thread
from m2lite.decode.constrain import Masks
from m2lite.decode.context import check_ctx, chunk_rows, default_ctx, kv_bytes_per_position, pool_positions
from m2lite.decode.drafts import Drafter, Drafting, n_common, open_drafting
from m2lite.decode.engine import Engine, Stop, ask
from m2lite.decode.generation import Generation
from m2lite.decode.locate import locate_model
from m2lite.decode.rules import Penalties, Rule
from m2lite.decode.sampling import Sampling
from m2lite.decode.stats import Stats
from m2lite.decode.warm import Warmer
from m2lite.errors import ContextError, M2liteError, UsageError
from m2lite.model.cache import PAGE, check_kv
from m2lite.model.config import Config, parse_config
from m2lite.model.residency import check_load
from m2lite.storage.gguf_reader import GGUFFile, open_gguf
from m2lite.storage.heat import heat_path, load_heat, save_heat
from m2lite.storage.identity import trunk_identity
from m2lite.storage.prefault import Prefault
from m2lite.text.template import Template, load_template
from m2lite.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:  # these import Numba
    from m2lite.model.cache import Timeline
    from m2lite.model.stream import Stream
    from m2lite.model.weights import Weights

MAX_LOGITS_ROWS = 256  # of one whose logits are all wanted

Progress = Callable[[int, int], None]  # rows evaluated, rows in all


class Model:
    """An opened model: read-only and shared by its sessions, which share one KV pool of `ctx` positions."""

    def __init__(
        self, gguf: GGUFFile, config: Config, tokenizer: Tokenizer, template: Template, engine: Engine
    ) -> None:
        self.gguf = gguf
        self.config = config
        self.tokenizer = tokenizer
        self.template = template
        self.engine = engine
        self.masks = Masks(tokenizer)
        self.ctx = 0
        self.n_rows = 0
        self.load_s = 0.0
        self._prefault: Prefault | None = None
        self._warmer: Warmer | None = None
        self._heat_path: Path | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        threads: int | None = None,
        ctx: int | None = None,
        kv: str = "f16",
        template: str = "file",
        load: str = "auto",
        ram: int | None = None,
        heat: bool = True,
        draft: str = "auto",
        draft_tokens: int | None = None,
        mtp: str | os.PathLike[str] | None = None,
        sequences: int = 1,
        pool: int | None = None,
        on_compile: Callable[[], None] | None = None,
    ) -> Self:
        """Open a GGUF file, a directory with one, or (None) the bundled model.

        `ctx` is the number of KV positions of a session, by default what `default_ctx` says; `kv` is their type, f16 or
        q8_0. All sessions share `pool` positions, by default as many as `sequences` of them need and a quarter of free
        memory holds.
        `ram` is the memory, in bytes, that this process and the file's pages may take, by default what is free. Weights
        of a larger model come and go: with `load` "mmap" in the page cache, else past it in memory of the process;
        "direct" does so with a model that fits, too.
        `draft` says where drafts come from: "mtp" from the prediction modules in the file `mtp`, by default the one
        beside the model, "ngram" from earlier places of the row, "auto" from what pays, "off"; the tokens are the same.
        `draft_tokens` bounds the drafts of one step.
        With `heat` it is kept in the cache directory which of such a model's experts are used, for the next start.
        `template` "builtin" uses MiniMax-M2's own instead of the file's. `on_compile` is called once if kernels have
        to be compiled, which takes most of a minute on the first run on a machine.
        """
        started = time.perf_counter()
        gguf = open_gguf(locate_model(path))
        drafting = Drafting()
        job: Job[Engine] | None = None
        try:
            config = parse_config(gguf.metadata)
            check_kv(config, kv)
            drafting = open_drafting(gguf, draft, draft_tokens, mtp)
            kv_bytes = kv_bytes_per_position(config, kv, drafting.n_modules)
            n_positions = default_ctx(config, kv_bytes) if ctx is None else check_ctx(config, ctx, kv_bytes)
            n_pool = pool_positions(n_positions, kv_bytes, sequences, pool)
            n_threads = threads or machine.n_usable_cores()
            n_rows = min(chunk_rows(config), n_pool)
            check_load(load, ram)

            def build() -> Engine:
                from m2lite.kernels import jit

                if on_compile is not None:
                    jit.on_compile(on_compile)
                return Engine(gguf, config, n_threads, n_positions, n_rows, kv, load, ram, drafting, n_pool)

            job = compute_thread().submit(build)  # imports Numba while this thread builds the tokenizer
            tokenizer = load_tokenizer(gguf)
            chat_template = load_template(gguf, builtin=template == "builtin")
            engine = job.result()
            engine.check_files()
        except BaseException as error:
            try:
                if isinstance(error, Exception):  # a file that was cut meanwhile is the cause of whatever else is wrong
                    gguf.check_unchanged()
            finally:
                _close_behind(job, drafting, gguf)
            raise
        model = cls(gguf, config, tokenizer, chat_template, engine)
        model.ctx, model.n_rows = n_positions, n_rows
        if engine.stream is None and gguf.size_bytes + model.kv_bytes <= machine.free_memory_bytes():
            model._prefault = gguf.prefault()
            engine.gate.settling = model._prefault.is_running
        elif engine.stream is not None and heat:
            model._remember(engine.stream)
        model.load_s = time.perf_counter() - started
        return model

    @property
    def path(self) -> Path:
        return self.gguf.path

    @property
    def weights(self) -> Weights:
        return self.engine.weights

    @property
    def n_threads(self) -> int:
        return self.engine.n_threads

    @property
    def kv(self) -> str:
        """The type of the KV cache, which is part of what decides the tokens."""
        return self.engine.pool.kv

    @property
    def kv_bytes(self) -> int:
        """The KV cache when it is full."""
        return self.engine.pool.n_positions * self.kv_bytes_per_position

    @property
    def kv_bytes_per_position(self) -> int:
        """K and V of all layers, those of the prediction modules that are used included."""
        return kv_bytes_per_position(self.config, self.kv, self.engine.drafting.n_modules)

    def session(self, draft: str | None = None, draft_tokens: int | None = None) -> Session:
        """A new session; how it drafts may differ from how the model was opened, as far as modules are at hand."""
        return Session(self, draft, draft_tokens)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32 [T, vocab]: row t holds the logits of the token after tokens[t]."""
        out = np.empty((len(tokens), self.config.n_vocab), np.float32)
        with self.session() as session:
            session.check_room(len(tokens))
            step = min(self.n_rows, MAX_LOGITS_ROWS)
            for start in range(0, len(tokens), step):
                session.evaluate(tokens[start : start + step], into=out[start : start + step])
        return out

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of raw text, with the beginning-of-text id only if the file asks for it."""
        ids = self.tokenizer.encode(text)
        bos_id = self.tokenizer.bos_id
        return [bos_id, *ids] if self.tokenizer.add_bos and bos_id is not None else ids

    def wait_mapped(self, stop: Stop | None = None) -> None:
        """Until the pages of a model that fits into memory are mapped, or `stop` says so; the mapping goes on."""
        if self._prefault is not None:
            self._prefault.wait(stop)

    def _remember(self, stream: Stream) -> None:
        """Begin with what earlier runs used most, and keep what this one uses."""
        self._heat_path = heat_path(trunk_identity(self.gguf))
        heat = load_heat(self._heat_path, self.config.n_layers, self.config.n_experts)
        if heat is not None:
            compute_thread().run(partial(stream.ledger.warm, heat.reshape(-1)))
            self._warmer = Warmer(stream)

    def save_heat(self) -> None:
        """Keep which experts were used, where that is wanted; `close` does it, too."""
        stream = self.engine.stream
        if self._heat_path is not None and stream is not None and stream.traffic.wanted_bytes:
            save_heat(self._heat_path, stream.ledger.heat.reshape(self.config.n_layers, -1))

    def close(self) -> None:
        """Unmap the file. Sessions of this model must not be used any more."""
        if self._prefault is not None:
            self._prefault.stop()
        if self._warmer is not None:
            self._warmer.stop()
        self.save_heat()
        abandoned = compute_thread().busy  # a call or compilation that nobody waits for any more
        job = compute_thread().submit(self._close)
        if not abandoned:
            job.result()

    def _close(self) -> None:
        self.engine.close()
        self.engine.drafting.close()
        self.gguf.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_behind(job: Job[Engine] | None, *files: Drafting | GGUFFile) -> None:
    """Close them once no kernel of the job can touch them any more; nobody waits for that."""
    if job is not None:
        job.abandoned = True
    for file in files:
        if job is None:
            file.close()
        else:
            compute_thread().submit(file.close)


class Session:
    """One row of tokens that grows: what is asked, what is answered, and how much of it the KV cache holds."""

    def __init__(self, model: Model, draft: str | None = None, draft_tokens: int | None = None) -> None:
        self.model = model
        self.tokens: list[int] = []
        self.n_cached = 0
        self.stats = Stats()
        self.finish_reason: str | None = None  # "stop", "length" or "interrupted"
        self._timeline: Timeline = compute_thread().run(model.engine.pool.timeline)
        self._drafter: Drafter | None = model.engine.drafter(self._timeline, draft, draft_tokens)
        self._release = weakref.finalize(self, _release, self._timeline)
        self._release.atexit = False

    @property
    def n_free(self) -> int:
        """Positions that are left in the context."""
        return max(0, self.model.ctx - len(self.tokens))

    def check_room(self, n_tokens: int, n_kept: int = 0) -> None:
        """Raises ContextError unless `n_tokens` more fit behind the first `n_kept`."""
        limit, n_free = self.model.ctx, max(0, self.model.ctx - n_kept)
        if n_tokens > n_free:
            most = self.model.config.n_ctx_train
            larger = f", or use a larger context (the model allows {most:,})" if limit < most else ""
            raise ContextError(
                f"The prompt needs {n_tokens:,} tokens; {n_free:,} are free of {limit:,}.",
                f"Shorten it{larger}.",
                needed=n_tokens,
                free=n_free,
                limit=limit,
            )

    def set_tokens(self, tokens: Sequence[int]) -> int:
        """Make `tokens` the row and return how many of them the cache already holds (their common prefix)."""
        self.check_room(len(tokens))
        self.n_cached = min(self.n_cached, n_common(self.tokens, tokens))
        self.tokens = list(tokens)
        return self.n_cached

    def rewind(self, length: int) -> None:
        """Forget everything from position `length` on."""
        self.tokens = self.tokens[:length]
        self.n_cached = min(self.n_cached, len(self.tokens))

    def evaluate(self, tokens: Sequence[int], into: npt.NDArray[np.float32]) -> None:
        """Append `tokens` (one chunk) and copy their logits [T, vocab] to `into`."""
        assert self.n_cached == len(self.tokens)
        engine, start, chunk = self.model.engine, self.n_cached, list(tokens)

        def call() -> None:
            into[:] = engine.evaluate(self._timeline, start, chunk, outputs="all")

        compute_thread().run(call)
        self.tokens += chunk
        self.n_cached += len(chunk)

    def generate(
        self,
        prompt: str | Sequence[int] = "",
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stream: int = 0,
        stop: Stop | None = None,
        progress: Progress | None = None,
        ignore_stop: bool = False,
        script: Sequence[int] | None = None,
        rules: Sequence[Rule] = (),
        settled: Sequence[int] = (),
    ) -> Iterator[int]:
        """Append `prompt` and yield the ids of the answer, without the id that ends it.

        `stop` is asked between layers, on the compute thread; `progress` hears of the prompt's chunks; with
        `ignore_stop` only `max_tokens` and the context end the answer. `script`, for measurements, is said instead of
        what is drawn. `rules`, which nobody else uses, change logits before each draw; first they hear of `settled`,
        ids at the end of the row that belong to this answer already. Afterwards `finish_reason` and `stats` describe
        the answer. Leaving the loop early is fine: the session keeps what was yielded.
        """
        if isinstance(prompt, str):
            new = self.model.tokenizer.encode(prompt) if self.tokens else self.model.encode_prompt(prompt)
        else:
            new = list(prompt)
        if not self.tokens and not new:
            raise UsageError("The prompt is empty.", "Give at least one token.")
        self.check_room(len(new), len(self.tokens))
        self.tokens += new
        self.finish_reason = "interrupted"  # until it is known better
        self.n_cached = min(self.n_cached, len(self.tokens) - 1)  # the last row's logits are needed
        self.stats = Stats(n_prompt=len(self.tokens), n_reused=self.n_cached)
        stop_ids = frozenset() if ignore_stop else self.model.tokenizer.stop_ids
        n_most = self.model.ctx + 1  # the last drawn token needs no position of its own
        if max_tokens is not None:
            n_most = min(n_most, len(self.tokens) + max_tokens)
        whole = None
        if script is not None:
            whole = [*self.tokens, *script]
            n_most = min(n_most, len(whole))
        sampling = sampling or Sampling()
        if sampling.presence_penalty or sampling.frequency_penalty:
            rules = [*rules, Penalties(sampling)]
        for rule in rules:
            for token in settled:
                rule.settle(token)
        generation = Generation(
            self.model.engine, self._timeline, self._drafter, sampling, stream, stop, stop_ids, n_most, rules, whole
        )
        return self._generate(partial(self._step, generation, progress), stop_ids, n_most)

    def _generate(self, step: Callable[[], list[int | None]], stop_ids: frozenset[int], n_most: int) -> Iterator[int]:
        stats, weights = self.stats, self.model.engine.stream
        traffic = None if weights is None else replace(weights.traffic)
        faults = machine.major_faults()
        while True:
            started = time.perf_counter()
            drawn = step()
            elapsed = time.perf_counter() - started
            if weights is not None and traffic is not None:
                stats.traffic = weights.traffic.since(traffic)
            stats.major_faults = machine.major_faults() - faults
            if stats.first_token_s is None:
                stats.prompt_s = elapsed
            else:
                stats.decode_s += elapsed
                stats.plain_s = self.model.engine.gate.plain_s
            for token in drawn:
                if token is None:
                    return
                if stats.first_token_s is None:
                    stats.first_token_s = elapsed
                self.n_cached = len(self.tokens)
                self.tokens.append(token)
                if token in stop_ids:
                    self.finish_reason = "stop"
                    return
                stats.n_generated += 1
                done = len(self.tokens) >= n_most
                if done:
                    self.finish_reason = "length"
                yield token
                if done:
                    return

    def _step(self, generation: Generation, progress: Progress | None) -> list[int | None]:
        """Evaluate what the cache lacks, in chunks, and draw the next ids: None behind them when stopped.

        The first id of an answer alone, whose time is told; later as many as one job has time for.
        """
        n_at_first, n_total, drawn = self.n_cached, len(self.tokens), list[int]()
        compute = compute_thread()
        try:
            if self.stats.first_token_s is not None:
                ask(generation.stop)
                compute.run(partial(generation.decode, n_total - 1, self.tokens[-1], drawn), generation.stop)
                return list(drawn)
            compute.run(self._begin, generation.stop)
            while self.n_cached < n_total:
                ask(generation.stop)
                start, end = self.n_cached, min(self.n_cached + self.model.n_rows, n_total)
                chunk = self.tokens[start:end]
                if end < n_total:
                    compute.run(partial(generation.read, start, chunk), generation.stop)
                else:
                    drawn = compute.run(partial(generation.first, start, chunk), generation.stop)
                self.n_cached = end
                if progress is not None and n_total - n_at_first > 1:
                    progress(end - n_at_first, n_total - n_at_first)
        except Stopped:
            return [*drawn, None]
        except M2liteError:
            if not drawn:  # else it comes again when those are used up
                raise
        return list(drawn)

    def _begin(self) -> None:
        """An answer to the row is about to be computed."""
        self.model.engine.fit()
        if self._drafter is not None:
            self._drafter.follow(self.tokens)
            self.stats.drafted = self._drafter.drafted

    def fill_pages(self, read: Callable[[int, memoryview], bool], n_pages: int, stop: Stop | None = None) -> int:
        """Pages of the row that the cache lacks, up to page n_pages, as far as `read(index, into)` has them.

        Returns how many positions the cache then holds.
        """
        first = self.n_cached // PAGE

        def call() -> int:
            timeline = self._timeline
            timeline.rewind(min(timeline.length, self.n_cached))
            for index in range(first, n_pages):
                if (stop is not None and stop()) or not timeline.fill(index, partial(read, index)):
                    break
            return timeline.length

        if n_pages * PAGE > self.n_cached:
            try:
                self.n_cached = max(self.n_cached, compute_thread().run(call, stop))
            except Stopped:
                pass
        return self.n_cached

    def whole_pages(self, indices: Sequence[int]) -> Iterator[tuple[int, memoryview]]:
        """(index, bytes) of pages that lie in the cache, valid until the session computes again."""
        timeline, pool = self._timeline, self.model.engine.pool
        for index in indices:
            assert (index + 1) * PAGE <= min(self.n_cached, timeline.length)
            yield index, pool.page_view(timeline.pages[index])

    def close(self) -> None:
        """Give the KV pages back."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _release(timeline: Timeline) -> None:
    compute_thread().submit(timeline.release)
