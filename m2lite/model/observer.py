"""Who looks at what a call of the model computes with: importance, routing, profiles. Changes nothing.

`forward` takes one as an argument; without one nothing is copied.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from m2lite.model.weights import Matrix


class Observer:
    """Sees what a call computes with, and changes nothing; what is not overridden is not looked at.

    x, rows, active and starts are addresses; x is float32, as it was before it is packed.
    """

    def dense(self, matrices: tuple[Matrix, ...], x: int, n_in: int, n: int) -> None:
        """x [n, n_in] was multiplied with each of the matrices."""

    def chosen(self, layer: int, ids: npt.NDArray[np.int32]) -> None:
        """ids [n, n_used]: the experts of a layer's rows; a view."""

    def experts(
        self, stacks: tuple[Matrix, ...], x: int, n_in: int, rows: int, active: int, starts: int, n_groups: int
    ) -> None:
        """So was x[rows[p]] with expert active[g] of each stack, for the pairs p from starts[g] to starts[g + 1]."""
