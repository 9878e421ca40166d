"""A plain loop of one or many sequences over an opened model: what the engine does, without limits, rules and pages."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from m2lite import Model, Sampling
from m2lite.drafting.drafter import Ask, Call, Computed, Drafter, SequenceDrafts
from m2lite.engine.thread import Stopped, compute_thread
from m2lite.model.cache import PAGE, Timeline
from m2lite.sampling.draw import draw


def drafter_of(model: Model, mode: str = "auto", n_tokens: int | None = None) -> Drafter:
    """As the engine makes one."""
    engine = model.runner
    mtp, n_modules = engine.mtp, engine.drafting.n_modules

    def make() -> Drafter:
        return Drafter(engine.weights, engine.pool, engine.buffers, mode, n_tokens, mtp, n_modules)

    return compute_thread().run(make)


@dataclass
class Sequence_:
    ids: list[int]
    own: SequenceDrafts | None
    timeline: Timeline
    sampling: Sampling
    rng_stream: int
    n_prompt: int
    n_end: int  # ids of the whole
    script: Sequence[int] | None = None
    stop_ids: frozenset[int] = frozenset()

    @property
    def is_done(self) -> bool:
        return len(self.ids) >= self.n_end or (len(self.ids) > self.n_prompt and self.ids[-1] in self.stop_ids)


@dataclass
class Loop:
    """Sequences that are computed side by side."""

    model: Model
    drafter: Drafter | None
    n_chunk: int = 0  # rows of a prompt in a call; 0: what fits
    stops: Iterator[bool] = field(default_factory=lambda: iter(()))  # calls that are stopped after drafts were proposed
    sequences: list[Sequence_] = field(default_factory=list)
    n_calls: int = 0
    seconds: list[tuple[float, int, int]] = field(default_factory=list)  # of each call: took, rows, tokens drawn

    def add(
        self,
        prompt: Sequence[int],
        n: int,
        sampling: Sampling,
        setting: tuple[str | None, int | None] = (None, None),
        rng_stream: int = 0,
        script: Sequence[int] | None = None,
        ignore_stop: bool = False,
    ) -> Sequence_:
        own = None if self.drafter is None else self.drafter.open(*setting)
        if own is not None:
            own.begin(prompt)
        timeline = self.model.runner.pool.timeline()
        made = Sequence_(list(prompt), own, timeline, sampling, rng_stream, len(prompt), len(prompt) + n, script)
        made.stop_ids = frozenset() if ignore_stop else frozenset(self.model.tokenizer.stop_ids)
        self.sequences.append(made)
        return made

    def run(self) -> None:
        """Until all are done."""
        compute_thread().run(self._run)

    def _run(self) -> None:
        while any(not s.is_done for s in self.sequences):
            self.step()

    def step(self) -> None:
        engine, drafter, step_began = self.model.runner, self.drafter, time.perf_counter()
        active, room = [s for s in self.sequences if not s.is_done], self.model.n_rows
        parts = list[tuple[Sequence_, int, list[int]]]()  # (sequence, start, ids)
        for s in sorted(active, key=lambda s: len(s.ids) - s.timeline.length):
            at = s.timeline.length
            n = min(len(s.ids) - at, room, self.n_chunk or room)
            if n > 0:
                parts.append((s, at, s.ids[at : at + n]))
                room -= n
        asks, places = list[Ask](), list[int]()
        for i, (s, at, _) in enumerate(parts):
            if s.own is not None and at == len(s.ids) - 1 >= s.n_prompt:
                n_most = min(s.n_end - len(s.ids) - 1, -(at + 1) % PAGE)
                asks.append(Ask(s.own, s.timeline, s.ids, max(0, n_most), s.sampling, s.rng_stream))
                places.append(i)
        n_rows = sum(len(ids) for _, _, ids in parts)
        drafts: list[list[int]] = [[] for _ in parts]
        if drafter is not None and asks:
            for i, found in zip(places, drafter.propose(asks, n_rows), strict=True):
                drafts[i] = found
        if next(self.stops, False):
            raise Stopped
        began = time.perf_counter()
        n_draws = [(at + len(ids) == len(s.ids)) + len(d) for (s, at, ids), d in zip(parts, drafts, strict=True)]
        cut_off = None if drafter is None else drafter.cut_off()
        pieces = [(s.timeline, ids + d) for (s, _, ids), d in zip(parts, drafts, strict=True)]
        logits = engine._compute(
            pieces, "all" if cut_off is not None else n_draws, None, [] if cut_off is None else [cut_off]
        )
        if cut_off is not None:
            drafts[0], n_draws[0] = drafts[0][: len(logits) - 1], len(logits)
        computed, row, out, n_drawn = list[Computed](), 0, 0, 0
        for (s, at, ids), d, n in zip(parts, drafts, n_draws, strict=True):
            n_right = 0
            for j in range(n):
                token = draw(logits[out + j], s.sampling, s.rng_stream, len(s.ids))
                token = token if s.script is None else s.script[len(s.ids)]
                s.ids.append(token)
                n_drawn += 1
                if j == len(d) or token != d[j] or s.is_done:
                    n_right += j < len(d) and token == d[j]
                    break
                n_right += 1
            s.timeline.rewind(at + len(ids) + n_right)
            if s.own is not None:
                computed.append(Computed(s.own, s.timeline, row, at, len(ids) + n_right, s.ids, d, n_right))
            row, out = row + len(ids) + len(d), out + n
        seconds = self.took(n_rows + sum(map(len, drafts)), time.perf_counter() - began)
        n_all = n_rows + sum(map(len, drafts))
        is_alone = all(len(ids) == 1 for _, _, ids in parts)
        if drafter is not None:
            drafter.computed(computed, Call(n_all, n_all - n_rows, engine.n_expert_reads, seconds, is_alone))
        self.n_calls += 1
        self.seconds.append((time.perf_counter() - step_began, n_all, n_drawn))

    def took(self, n_rows: int, seconds: float) -> float:
        """What the drafter is told that a call took."""
        return seconds

    def close(self) -> None:
        for s in self.sequences:
            compute_thread().run(s.timeline.release)
