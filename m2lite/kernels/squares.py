"""Sums of squares per column for importance matrices. Sees arrays; knows no tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from m2lite.simd.far import far
from m2lite.simd.kinds import Address
from m2lite.simd.memory import read_f32, read_f64, read_i32, write_f64
from m2lite.simd.split import Split

D = np.float64


@far()
def add_squares_part(
    part: int, n_parts: int, sums: Address, x: Address, n: int, rows: Address, starts: Address, active: Address,
    n_active: int,
) -> None:  # fmt: skip
    """Columns part * n // n_parts to (part + 1) * n // n_parts of what add_squares does."""
    first, last = part * n // n_parts, (part + 1) * n // n_parts
    for g in range(n_active):
        total = sums + 8 * n * read_i32(active + 4 * g)
        for p in range(read_i32(starts + 4 * g), read_i32(starts + 4 * g + 4)):
            row = x + 4 * n * read_i32(rows + 4 * p)
            for j in range(first, last):
                value = D(read_f32(row + 4 * j))
                write_f64(total + 8 * j, read_f64(total + 8 * j) + value * value)


_add_squares = Split(add_squares_part)


def add_squares(n_parts: int, sums: npt.NDArray[np.float64], x: Any, rows: Any, starts: Any, active: Any) -> None:
    """sums[active[g], j] += x[rows[p], j]**2 for p from starts[g] to starts[g + 1], in the order of p.

    sums is float64 [n_experts, n], x float32 [n_rows, n], the rest int32. A square is exact in float64, so neither
    threads (each does some of the columns) nor where the rows are cut into calls change a bit.
    """
    for array, kind in ((sums, np.float64), (x, np.float32), (rows, np.int32), (starts, np.int32), (active, np.int32)):
        assert array.dtype == kind and array.flags.c_contiguous
    places = [array.ctypes.data for array in (rows, starts, active)]
    _add_squares(n_parts, sums.ctypes.data, x.ctypes.data, x.shape[1], *places, len(active))
