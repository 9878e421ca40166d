"""A prediction module in lock-step: it follows every answer of a batch, and says what comes behind each. Draws nothing.

Module 0 sees a token and the trunk's state before it. A call of the trunk leaves the states of its rows behind, so the
module is run on the tokens that follow them at once, those of prompts too: nothing of a row has to be kept. A row that
it has not followed from the beginning on (of the row, or of what another had computed) is lost to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from m2lite.decode.sampling import Sampling, foresee

if TYPE_CHECKING:  # these import Numba
    from m2lite.decode.replay import Modules
    from m2lite.model.cache import Timeline

_LOST = -1


@dataclass
class Followed:
    """What the module knows of one row."""

    top: int = 0  # positions that it has seen; _LOST for good
    token: int = -1  # what it expects behind the row; -1: it does not say
    share: float = 0.0  # how sure it is

    def shared(self, n: int) -> Followed:
        """Of a row that begins with n tokens of this one."""
        return Followed(n if self.top >= n else _LOST)

    def cut(self, n: int) -> None:
        """The row has n tokens, and nothing is asked of it any more."""
        self.top, self.token = min(self.top, n), -1


class Settled(NamedTuple):
    """What a call of the trunk computed of a row."""

    followed: Followed
    timeline: Timeline
    at: int  # the first of its rows in the call
    start: int  # the position of that
    ids: Sequence[int]  # the row's tokens from there on, and the one behind them
    draws: tuple[Sampling, int] | None  # with which its next token is drawn, and the stream; None for a prompt


class BatchModule:
    """The first prediction module, and room for the states that it works on."""

    def __init__(self, modules: Modules) -> None:
        self._modules = modules
        buffers = modules.buffers
        self._previous = np.empty((0, buffers.config.n_embd), np.float32)

    def follow(self, n_computed: int, rows: Sequence[Settled]) -> None:
        """A call of the trunk computed n_computed rows, and these are what was settled by it."""
        from m2lite.model.mtp import run_module, trunk_states

        m = self._modules
        parts, sources, ends = [], list[int](), list[tuple[int, Settled]]()
        for row in rows:
            followed, n = row.followed, len(row.ids) - 1
            followed.token = -1
            is_new = followed.top == row.start  # of its first token no state is known: zeros
            is_next = is_new or followed.top == row.start + 1
            if not is_next or len(sources) + n + is_new > m.buffers.n_rows:
                followed.top = _LOST
                continue
            sources += [-1] * is_new + list(range(row.at, row.at + n))
            parts.append((row.timeline, followed.top, list(row.ids[followed.top - row.start :])))
            followed.top = row.start + n + 1
            if row.draws is not None:
                ends.append((len(sources) - 1, row))
        if not parts:
            return
        trunk_states(m.mtp, m.buffers, n_computed)
        self._gather("h" if m.mtp.is_post_norm else "x", sources)
        at = int(self._previous.ctypes.data)
        run_module(m.mtp, 0, m.pool, m.buffers, m.scratch, m.pool.rows_at(parts), at)
        self._ask(ends)

    def _gather(self, name: str, sources: Sequence[int]) -> None:
        if len(sources) > len(self._previous):
            self._previous = np.empty((2 * len(sources), self._previous.shape[1]), np.float32)
        index = np.array(sources)
        np.take(self._modules.buffers.array(name), np.maximum(index, 0), axis=0, out=self._previous[: len(index)])
        self._previous[: len(index)][index < 0] = 0

    def _ask(self, ends: Sequence[tuple[int, Settled]]) -> None:
        """What comes behind the rows that end there."""
        from m2lite.model.forward import head_of

        mtp = self._modules.mtp
        logits = head_of(mtp.trunk, self._modules.buffers, [at for at, _ in ends], mtp.modules[0].norm)
        for own, (_, row) in zip(logits, ends, strict=True):
            assert row.draws is not None
            row.followed.token, row.followed.share = foresee(own, *row.draws, row.followed.top)
