"""Which units of a fixed set are in memory, and which leave first: those used least, lately. Reads nothing.

Every use adds 1 to a unit's heat, which halves every `half_life` steps (tokens): a short half-life is LRU, an endless
one LFU, and what lies between is LRFU (Lee et al., 2001). A sweep over everything leaves what was hot before in place.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HALF_LIFE = 128.0  # tokens; of trained text 32 is a point better, of favourites alone 128 two: benchmarks/routing.py
_RESCALE_AT = 1e100
_DUE = 1e200  # more than any heat


class Ledger:
    """Unit u takes sizes[u] of `capacity` bytes while it is in memory; pinned ones do not leave."""

    def __init__(self, sizes: NDArray[np.int64], capacity: int, half_life: float = HALF_LIFE) -> None:
        n_units = len(sizes)
        self.sizes = sizes
        self.capacity = capacity
        self.resident_bytes = 0
        self._is_resident = np.zeros(n_units, np.bool_)
        self._heat = np.zeros(n_units, np.float64)  # times _weight
        self._leaves = np.full(n_units, np.inf)  # heat of those that may leave, else infinity: the lowest goes first
        self._is_due = np.zeros(n_units, np.bool_)
        self._pins = np.zeros(n_units, np.int32)
        self._weight = 1.0
        self._growth = 2.0 ** (1.0 / half_life)

    def has(self, unit: int) -> bool:
        return bool(self._is_resident[unit])

    def advance(self, n_steps: int = 1) -> None:
        """Time passes: heat gathered before counts less."""
        self._weight *= self._growth**n_steps
        if self._weight > _RESCALE_AT:
            self._heat /= self._weight
            self._weight = 1.0
            self._update_all()

    def use(self, unit: int, n: float = 1.0) -> None:
        self._heat[unit] += n * self._weight
        self._update(unit)

    def add(self, unit: int) -> None:
        """It has come into memory, where there was room."""
        assert not self._is_resident[unit]
        self._is_resident[unit] = True
        self.resident_bytes += int(self.sizes[unit])
        self._update(unit)

    def forget(self, unit: int) -> None:
        """It has left memory, by us or not."""
        assert self._is_resident[unit]
        self._is_resident[unit] = False
        self.resident_bytes -= int(self.sizes[unit])
        self._update(unit)

    def pin(self, unit: int) -> None:
        self._pins[unit] += 1
        self._update(unit)

    def unpin(self, unit: int) -> None:
        self._pins[unit] -= 1
        assert self._pins[unit] >= 0
        self._update(unit)

    def sweep(self, first: int | None) -> None:
        """From `first` on every unit is due, and leaves only after all that are not; None: no unit is."""
        if first is None and not self._is_due.any():
            return
        self._is_due[:] = False
        if first is not None:
            self._is_due[first:] = True
        self._update_all()

    def pass_by(self, unit: int) -> None:
        """A unit that was due is not any more."""
        self._is_due[unit] = False
        self._update(unit)

    def _update_all(self) -> None:
        is_free = self._is_resident & (self._pins == 0)
        self._leaves[:] = np.where(is_free, self._heat + _DUE * self._is_due, np.inf)

    def _update(self, unit: int) -> None:
        if self._is_resident[unit] and not self._pins[unit]:
            self._leaves[unit] = self._heat[unit] + _DUE * self._is_due[unit]
        else:
            self._leaves[unit] = np.inf

    def make_room(self, n_bytes: int) -> list[int] | None:
        """Forget units until `n_bytes` more fit, and name them; None, and nothing forgotten, where pins forbid it."""
        found: list[int] = []
        while self.resident_bytes + n_bytes > self.capacity:
            unit = int(np.argmin(self._leaves))
            if not np.isfinite(self._leaves[unit]):
                for other in found:
                    self.add(other)
                return None
            self.forget(unit)
            found.append(unit)
        return found

    @property
    def heat(self) -> NDArray[np.float64]:
        """float64 [n_units]: uses, halved every half-life since; what `warm` takes."""
        return self._heat / self._weight

    def warm(self, heat: NDArray[np.float64]) -> None:
        """Begin with the heat of an earlier run."""
        self._heat[:] = heat * self._weight
        self._update_all()

    def recall(self, heat: NDArray[np.float64], n_steps: int) -> None:
        """As if the uses that left this heat had been here, in the last n_steps."""
        self.advance(n_steps)
        self._heat += heat * self._weight
        self._update_all()

    def hottest(self) -> int | None:
        """The hottest unit that is not in memory, if any has heat."""
        outside = np.where(self._is_resident, 0.0, self._heat)
        unit = int(np.argmax(outside))
        return unit if outside[unit] > 0 else None
