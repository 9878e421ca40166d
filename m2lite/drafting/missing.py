"""Experts that a streamed model would have to read for drafts. Knows layers and experts, no token.

A draft that is verified and right saves a call of its own, in which its experts would have been read, too; of one that
is wrong they were read in vain. So a draft costs, beside what it computes, its chance to be wrong times the reading of
what it lacks. Layer by layer it is seen what that is, and a row is cut off from where on

    (chance that it is wrong) x (time to read what it still lacks)  >  (chance that it is right) x (time it saves)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from m2lite.drafting.cost import CallCost, Estimate
from m2lite.model.observer import Observer
from m2lite.model.stream import Stream


class MissingExperts(Observer):
    """What reading takes here, and the drafts of the call under way."""

    def __init__(self, stream: Stream, n_layers: int, cost: CallCost) -> None:
        self._stream, self._n_layers, self._cost = stream, n_layers, cost
        self._lacking = Estimate(0.0)  # bytes that a draft's row lacks in a layer
        self._second = Estimate(1e9)  # bytes that are read in a second of waiting
        self._before = replace(stream.traffic)
        self._chances: Sequence[float] = ()  # that each draft is right if those before it are
        self._may_cut = False
        self.n_cut = 0  # rows, of all calls

    def begin(self) -> None:
        """A call begins."""
        self._before, self._may_cut = replace(self._stream.traffic), False

    def expect(self, chances: Sequence[float]) -> None:
        """It is of one sequence, and its drafts are right with these chances."""
        self._chances, self._may_cut = chances, len(chances) > 0

    def is_asked(self) -> bool:
        """Whether rows of it may be cut off; said once."""
        may_cut, self._may_cut = self._may_cut, False
        return may_cut

    def end(self, n_rows: int, n_drafts: int) -> float:
        """It had so many rows to its end; the seconds for which it waited."""
        done = self._stream.traffic.since(self._before)
        if done.read_bytes and done.stall_s > 0:
            self._second.add(done.read_bytes / done.stall_s)
        if not n_drafts:
            self._lacking.add(done.read_bytes / n_rows / self._n_layers)
        return done.stall_s

    @property
    def cost(self) -> float:
        """Of reading what a draft lacks, in calls of one row."""
        return self._lacking.value * self._n_layers / self._second.value / self._cost.level if self._cost.level else 0.0

    def chosen(self, layer: int, start: int, ids: npt.NDArray[np.int32]) -> int:
        """How many rows go on of a sequence's last token and its drafts."""
        n, wanted, right = len(ids), set(ids[0].tolist()), 1.0
        if not self._cost.level:
            return n
        row_s, n_layers = self._cost.level * self._cost.call(1), self._n_layers - layer
        for row in range(1, n):
            right *= self._chances[row - 1] if row <= len(self._chances) else 0.0
            own = [e for e in ids[row].tolist() if e not in wanted]
            lacking = len(self._stream.absent(layer, own)) * self._stream.expert_bytes(layer)
            self._lacking.add(lacking)
            n_bytes = lacking + self._lacking.value * (n_layers - 1)
            if (1 - right) * n_bytes / self._second.value > right * row_s * n_layers / self._n_layers:
                self.n_cut += n - row
                return row
            wanted.update(own)
        return n
