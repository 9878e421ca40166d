"""Sums of squares per column for importance matrices. Sees arrays; knows no tensor."""

from __future__ import annotations

import numpy as np

from m2lite.kernels.jit import kernel
from m2lite.kernels.split import Split

D = np.float64


@kernel
def add_squares_part(part, n_parts, sums, x, rows, starts, active):
    """sums[active[g], j] += x[rows[p], j]**2 for p from starts[g] to starts[g + 1], in the order of p.

    sums is float64 [n_experts, n], x float32 [n_rows, n], the rest int32. A square is exact in float64, so neither
    threads (each does some of the columns) nor where the rows are cut into calls change a bit.
    """
    n = x.shape[1]
    first, last = part * n // n_parts, (part + 1) * n // n_parts
    for g in range(len(active)):
        total = sums[active[g]]
        for p in range(starts[g], starts[g + 1]):
            row = x[rows[p]]
            for j in range(first, last):
                total[j] += D(row[j]) * D(row[j])


add_squares = Split(add_squares_part)
