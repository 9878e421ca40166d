"""Drafted rows of a model that is streamed: which of them to leave out when experts would have to be read for them.

A row that is verified and right saves the computing of a step of its own; its experts would have been read then. One
that is wrong has had them read in vain. So a row is left where

    (chance that it is wrong) x (time to read what it still lacks)  >  (chance that it is right) x (time it saves)

Knows layers and experts, no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from m2lite.decode.gate import Estimate

if TYPE_CHECKING:  # this imports Numba
    from m2lite.model.stream import Stream


class Leaving:
    """What reading and computing take here, and the rows of the step under way."""

    def __init__(self, stream: Stream, n_layers: int) -> None:
        self._stream, self._n_layers = stream, n_layers
        self._lacking = Estimate(0.0)  # bytes that a draft's row lacks in a layer
        self._compute_s = Estimate(0.0)  # of a step of one row
        self._second = Estimate(1e9)  # bytes read in a second of waiting
        self._before = replace(stream.traffic)
        self._chances: Sequence[float] = ()
        self.n_left = 0  # rows, of all steps

    def begin(self, chances: Sequence[float]) -> None:
        """A step begins whose drafts are right with these chances, each if those before it are."""
        self._before = replace(self._stream.traffic)
        self._chances = chances

    def end(self, n_rows: int, seconds: float) -> None:
        """It took so long, with the rows that were not left."""
        done = self._stream.traffic.since(self._before)
        if n_rows == 1:
            self._compute_s.add(max(0.0, seconds - done.stall_s))
        if done.read_bytes and done.stall_s > 0:
            self._second.add(done.read_bytes / done.stall_s)

    def __call__(self, layer: int, ids: npt.NDArray[np.int32]) -> int:
        """How many rows go on (see model/forward.py: Leave)."""
        n, wanted, right = len(ids), set(ids[0].tolist()), 1.0
        for row in range(1, n):
            right *= self._chances[row - 1] if row <= len(self._chances) else 0.0
            own = [e for e in ids[row].tolist() if e not in wanted]
            lacking = len(self._stream.absent(layer, own)) * self._stream.expert_bytes(layer)
            self._lacking.add(lacking)
            n_bytes = lacking + self._lacking.value * (self._n_layers - layer - 1)
            left_share = (self._n_layers - layer) / self._n_layers
            if (1 - right) * n_bytes / self._second.value > right * self._compute_s.value * left_share:
                self.n_left += n - row
                return row
            wanted.update(own)
        return n
