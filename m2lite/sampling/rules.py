"""Logits processors: what an answer's draws keep to beside the filters of sampling. Knows no session.

Each is given every token that the answer goes on with, so drafts change nothing: the draws that verify them kept to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from m2lite.sampling.draw import Logits, Sampling, exp_below_0, ranked


class LogitsProcessor(Protocol):
    """Of one answer; used by jobs of the compute thread."""

    def apply(self, logits: Logits) -> Logits:
        """The logits [V] to draw the next token from; those given stay as they are."""
        ...

    def push(self, token: int) -> None:
        """The answer goes on with this token."""
        ...


class Penalties:
    """logits[i] -= presence + frequency * count[i] for each id of the answer so far (OpenAI's formula)."""

    def __init__(self, sampling: Sampling) -> None:
        self._presence, self._frequency = sampling.presence_penalty, sampling.frequency_penalty
        self._counts = dict[int, int]()

    def apply(self, logits: Logits) -> Logits:
        if not self._counts:
            return logits
        ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
        counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
        changed = logits.copy()
        changed[ids] -= np.float32(self._presence) + np.float32(self._frequency) * counts
        return changed

    def push(self, token: int) -> None:
        self._counts[token] = self._counts.get(token, 0) + 1


@dataclass(frozen=True)
class Logprob:
    """Of a token, by the model alone (temperature 1, no filters, no rules), and of the likeliest at its place."""

    token: int
    logprob: float
    likeliest: Sequence[tuple[int, float]]  # (id, logprob), falling


def logprob_of(logits: Logits, token: int, n_likeliest: int) -> Logprob:
    """Of `token` by logits [V], and of the n_likeliest."""
    wide = logits.astype(np.float64)
    top = float(wide.max())
    normaliser = top + math.log(float(np.cumsum(exp_below_0(wide - top))[-1]))
    ids = ranked(logits, n_likeliest).tolist() if n_likeliest else []
    return Logprob(token, float(wide[token]) - normaliser, [(i, float(wide[i]) - normaliser) for i in ids])


class Logprobs:
    """Notes the logarithm of each token's probability. The first of an answer's rules: it sees the model's logits."""

    def __init__(self, n_likeliest: int) -> None:
        self.found: list[Logprob | None] = []  # by token of the answer; None: nobody drew it here
        self._n = n_likeliest
        self._logits: Logits | None = None

    def apply(self, logits: Logits) -> Logits:
        self._logits = logits.copy()  # those given are valid until the next step
        return logits

    def push(self, token: int) -> None:
        logits, self._logits = self._logits, None
        if logits is None:
            self.found.append(None)
            return
        self.found.append(logprob_of(logits, token, self._n))
