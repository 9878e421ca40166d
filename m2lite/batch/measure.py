"""How fast a batch will be: a few steps of answers to nonsense. Knows a model, no lines."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from m2lite.engine.batch import Batch
from m2lite.engine.request import Request
from m2lite.engine.thread import Stopped
from m2lite.sampling.draw import Sampling

if TYPE_CHECKING:  # this imports Numba
    from m2lite.api import Model


class Speeds(NamedTuple):
    """Tokens a second, of all answers together; and of a token that is drawn, experts in a layer and bytes read."""

    reading: float
    drawing: float
    experts: float
    read_bytes: float  # from disk, of a model that is streamed


def measure_speeds(model: Model, at_once: int, n_prompt: int = 64, n_tokens: int = 16, seed: int = 0) -> Speeds:
    """Of `at_once` prompts of random ids, none of which begins as another, and of `n_tokens` steps of their answers.

    Drawing is timed from the first step in which all of them draw, by whose end all is read. Where there is no room for
    so many, from the step by which as many tokens are drawn.
    """
    n_steps = n_tokens + 2 + 2 * at_once * n_prompt // model.n_rows  # the first go on until the last prompt is read
    n_prompt = min(n_prompt, max(1, model.ctx - n_steps))
    ids = np.random.default_rng(seed).integers(0, model.config.n_vocab, (at_once, n_prompt)).tolist()
    n_most = min(n_steps, model.ctx - n_prompt)
    asked = Request(prompt=[0], sampling=Sampling(0, seed=0), max_tokens=n_most, ignore_stop=True, keep="nothing")
    requests = [replace(asked, prompt=row, rng_stream=i) for i, row in enumerate(ids)]
    n_together, stream = 0, model.runner.stream
    batch = Batch(model, at_once, lambda: n_together >= n_tokens)
    times = [(0.0, 0, 0, 0)]
    began = time.perf_counter()

    def after_step() -> None:
        nonlocal n_together
        counts = batch.counts
        n_bytes = 0 if stream is None else stream.traffic.read_bytes
        times.append((time.perf_counter() - began, counts.n_drawn, counts.n_expert_reads, n_bytes))
        n_together += _draws_all(times, len(times) - 1, at_once)

    with suppress(Stopped):
        for _ in batch.run(requests, after_step):
            pass
    together = [i for i in range(1, len(times)) if _draws_all(times, i, at_once)]
    if len(together) > 1:
        first, last = times[together[0]], times[together[-1]]
    else:
        first = next(each for each in times if each[1] >= at_once)
        last = next(each for each in times if each[1] >= times[-1][1])
    seconds, n_drawn, n_experts, n_bytes = (b - a for a, b in zip(first, last, strict=True))
    experts = n_experts / n_drawn / model.config.n_layers
    return Speeds(at_once * n_prompt / first[0], n_drawn / seconds, experts, n_bytes / n_drawn)


def _draws_all(times: list[tuple[float, int, int, int]], i: int, at_once: int) -> bool:
    return times[i][1] - times[i - 1][1] >= at_once
