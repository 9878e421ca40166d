"""Which token comes next: pure functions of (logits, options, stream, position). Knows no model and keeps no state.

The order of the filters is temperature, top-k, top-p, min-p; equal logits rank by token id, the lowest first.

A draw must give the same id on every machine, so nothing here depends on vector width, thread or library version:
ranks are the order of distinct integers, whatever sorts them; weights are float64 from our own `exp_below_0`, which
uses only correctly rounded operations (NumPy's exp differs between instruction sets in the last bit); sums are running
sums in rank order (np.cumsum is sequential, np.sum is not).

The random number of a position is the first output word w of Philox4x64-10 with the key words (seed, stream) and the
counter words (1, position, 0, 0), taken as u = (w >> 11) / 2**53, so 0 <= u < 1.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from m2lite.errors import M2liteError, UsageError
from m2lite.kernels.exp import EXP_FLOOR, LN2_HIGH, LN2_LOW, LOG2_E, TAYLOR

Logits = npt.NDArray[np.float32]


def new_seed() -> int:
    """A seed short enough to be read out and typed again."""
    return secrets.randbits(32)


@dataclass(frozen=True)
class Sampling:
    """How to draw. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch a filter off."""

    temperature: float = 1.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = field(default_factory=new_seed)
    presence_penalty: float = 0.0  # taken from the logit of an id that the answer holds
    frequency_penalty: float = 0.0  # taken for each time that it holds it

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("top_k", self.top_k, 0, 2**31)
        _check_range("seed", self.seed, 0, 2**64 - 1)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise UsageError(f"{name} is {value}.", f"It must lie between {low} and {high}.")


def draw(logits: Logits, sampling: Sampling, stream: int = 0, position: int = 0) -> int:
    """The id drawn from `logits` [V] for `position`; `stream` separates answers that share a seed."""
    if sampling.temperature == 0:
        token = int(np.argmax(logits))  # the first NaN, where there is one
        token = token if math.isfinite(logits[token]) else -1
    else:
        token, _ = _draw(logits, sampling, stream, position)
    return _checked(token, position)


def foresee(logits: Logits, sampling: Sampling, stream: int = 0, position: int = 0) -> tuple[int, float]:
    """(id, share): what `draw` gives for these logits, and its probability among the candidates.

    With the random number that the model's own draw will use: where a draft's logits rank the candidates as the
    model's do, both draw the same. Greedy, the share is that of the largest logit against the second.
    """
    from m2lite.kernels.draw import choose_largest  # late: options are parsed before Numba is needed

    if sampling.temperature == 0:
        token, share = choose_largest(logits)
    else:
        token, share = _draw(logits, sampling, stream, position)
    return _checked(int(token), position), float(share)


def _draw(logits: Logits, sampling: Sampling, stream: int, position: int) -> tuple[int, float]:
    from m2lite.kernels.draw import MAX_TOP_K, draw_sorted, draw_top_k

    n = min(sampling.top_k or logits.size, logits.size)
    among = draw_top_k if n <= MAX_TOP_K else draw_sorted
    options = n, sampling.temperature, sampling.top_p, sampling.min_p
    token, share = among(logits, *options, np.uint64(sampling.seed), np.uint64(stream), np.uint64(position))
    return int(token), float(share)


def _checked(token: int, position: int) -> int:
    if token < 0:
        raise M2liteError(
            f"The model computed logits that are not finite at position {position}.",
            "The weights may be damaged: download or convert the file again.",
        )
    return token


def ranked(logits: Logits, top_k: int) -> npt.NDArray[np.int64]:
    """The `top_k` ids (0: all) by falling logit, then rising id."""
    n = logits.size
    ids = np.arange(n)
    if 0 < top_k < n:
        ids = np.flatnonzero(logits >= np.partition(logits, n - top_k)[n - top_k])  # ties included
    # Distinct integers, ascending = falling logit, then rising id: any sort gives the same order.
    bits = (logits[ids] + np.float32(0)).view(np.uint32)  # + 0 makes -0 and 0 equal
    falling = np.where(bits >> np.uint32(31) != 0, bits, ~bits & np.uint32(0x7FFF_FFFF))
    keys = np.sort(falling.astype(np.uint64) << np.uint64(32) | ids.astype(np.uint64))
    return (keys & np.uint64(0xFFFF_FFFF)).astype(np.int64)[: top_k or n]


def exp_below_0(x: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """e**x for x <= 0 within 2 units in the last place, by one fixed sequence of correctly rounded operations."""
    x = np.maximum(x, EXP_FLOOR)
    n = np.rint(x * LOG2_E)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    y = np.full_like(r, TAYLOR[0])
    for coefficient in TAYLOR[1:]:
        y = y * r + coefficient
    return np.ldexp(y, n.astype(np.int32))
