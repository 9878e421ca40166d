"""How far two sets of logits are apart. Knows no model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Agreement(NamedTuple):
    """KL(reference || other) per position, in nats, and the share of positions with the same largest logit."""

    mean_kl: float
    max_kl: float
    top1: float


def log_softmax(logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    x = np.asarray(logits, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def entropy(logits: npt.ArrayLike) -> float:
    """Mean entropy of the distributions, in nats."""
    log_p = log_softmax(logits)
    return float(-(np.exp(log_p) * log_p).sum(axis=-1).mean())


def compare(reference: npt.ArrayLike, other: npt.ArrayLike) -> Agreement:
    """`reference` and `other` are [positions, vocabulary]; NaN anywhere gives NaN, which fails every bound."""
    log_p, log_q = log_softmax(reference), log_softmax(other)
    assert log_p.shape == log_q.shape
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    same = log_p.argmax(axis=-1) == log_q.argmax(axis=-1)
    return Agreement(float(kl.mean()), float(kl.max()), float(same.mean()))
