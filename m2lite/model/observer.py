"""Who looks at what a call of the model computes with, or steers it: importance, routing, counts, drafts' cuts.

`forward` takes them as an argument; without any nothing is copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from m2lite.model.config import Config
from m2lite.model.weights import Matrix


class Observer:
    """Sees what a call computes with; what is not overridden is not looked at.

    x, rows, active and starts are addresses; x is float32, as it was before it is packed.
    """

    # It looks at nothing but who was chosen, and changes nothing: few rows may go through a layer in one kernel call.
    is_late = False

    def dense(self, matrices: tuple[Matrix, ...], x: int, n_in: int, n: int) -> None:
        """x [n, n_in] was multiplied with each of the matrices."""

    def chosen(self, layer: int, start: int, ids: npt.NDArray[np.int32]) -> int | None:
        """ids [n, n_used]: the experts of a layer's rows, ascending; the rows stand at `start` and behind. A view.

        Who is not late may write others there, and return how many rows, at least 1, go on; None: all of them.
        """
        return None

    def experts(
        self, stacks: tuple[Matrix, ...], x: int, n_in: int, rows: int, active: int, starts: int, n_groups: int
    ) -> None:
        """So was x[rows[p]] with expert active[g] of each stack, for the pairs p from starts[g] to starts[g + 1]."""


class ExpertReads(Observer):
    """Counts the experts that a call goes through, of all layers."""

    is_late = True
    n = 0

    def chosen(self, layer: int, start: int, ids: npt.NDArray[np.int32]) -> None:
        self.n += int(np.count_nonzero(np.bincount(ids.ravel())))


class ChosenExperts(Observer):
    """Keeps the experts of all rows of a call: ids [n_layers, n_rows, n_used]."""

    is_late = True

    def __init__(self, config: Config, n_rows: int) -> None:
        self.ids: npt.NDArray[Any] = np.zeros((config.n_layers, n_rows, config.n_experts_used), config.expert_dtype)

    def chosen(self, layer: int, start: int, ids: npt.NDArray[np.int32]) -> None:
        self.ids[layer, : len(ids)] = ids
