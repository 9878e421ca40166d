"""How fast a batch will be: a few steps of answers to nonsense. Knows a model, no lines."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from m2lite.decode.batch import Batch
from m2lite.decode.conversation import Options
from m2lite.decode.sampling import Sampling
from m2lite.decode.writer import Wish

if TYPE_CHECKING:  # this imports Numba
    from m2lite.decode.session import Model


class Speeds(NamedTuple):
    """Tokens a second, of all answers together; and of a token that is drawn, experts in a layer and bytes read."""

    reading: float
    drawing: float
    experts: float
    read_bytes: float  # from disk, of a model that is streamed


def measure_speeds(model: Model, at_once: int, n_prompt: int = 64, n_tokens: int = 16, seed: int = 0) -> Speeds:
    """Of `at_once` prompts of random ids, none of which begins as another, and of answers of `n_tokens`.

    Drawing is timed from the step in which the last answer has begun to the last token.
    """
    n_prompt = min(n_prompt, model.ctx - n_tokens)
    ids = np.random.default_rng(seed).integers(0, model.config.n_vocab, (at_once, n_prompt)).tolist()
    options: Options = {"sampling": Sampling(0, seed=0), "max_tokens": n_tokens}
    wishes = [Wish(str(i), row, i, options, ends=False) for i, row in enumerate(ids)]
    batch, times, stream = Batch(model, at_once), list[tuple[float, int, int, int]](), model.engine.stream
    began = time.perf_counter()

    def after_step() -> None:
        counts = batch.counts
        n_bytes = 0 if stream is None else stream.traffic.read_bytes
        times.append((time.perf_counter() - began, counts.n_drawn, counts.n_expert_reads, n_bytes))

    for _ in batch.run(wishes, after_step):
        pass
    first = next(each for each in times if each[1] >= at_once)
    last = next(each for each in times if each[1] >= times[-1][1])
    seconds, n_drawn, n_experts, n_bytes = (b - a for a, b in zip(first, last, strict=True))
    experts = n_experts / n_drawn / model.config.n_layers
    return Speeds(at_once * n_prompt / first[0], n_drawn / seconds, experts, n_bytes / n_drawn)
