"""Units of a model file, a few ranges each, that come into memory and leave it. Knows no layer and no policy.

Mapped units lie in the page cache, at their place in the mapping. Units in slots lie in memory of our own: a slot holds
one, and the next one that is read into it needs no new page, which spares the processor most of what reading costs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

import numpy as np

from m2lite.storage import syscalls
from m2lite.storage.reads import DirectReads, MappedReads, Range, reserve_memory

RangesOf = Callable[[int], list[Range]]


class MappedUnits:
    """In the page cache. One thread calls, but for `fill`."""

    def __init__(self, reads: MappedReads, ranges: RangesOf) -> None:
        self._reads, self._ranges = reads, ranges
        self._leaving: dict[int, Future[int]] = {}  # units that left last, and the job that releases them

    def fetch(self, unit: int, leaving: Sequence[int]) -> list[Future[int]]:
        """Begin to read a unit into the memory that others leave; the results add up to the bytes that were read."""
        after = self._leaving.pop(unit, None)  # its own memory may still be on its way back
        first, *others = self._ranges(unit)
        released = [r for other in leaving for r in self._ranges(other)]
        flight = [self._reads.submit(first, released, after)]
        self._leaving.update(dict.fromkeys(leaving, flight[0]))
        return flight + [self._reads.submit(r, (), after) for r in others]

    def cancel(self, flight: Sequence[Future[int]]) -> bool:
        """Call off what of a fetch was not begun and wait for the rest; whether something was called off."""
        wait(flight[:1])  # it releases others
        return _cancel(flight[1:])

    def reserve(self, unit: int) -> None:
        """Before `fill`."""
        after = self._leaving.pop(unit, None)
        if after is not None:
            wait([after])

    def fill(self, unit: int) -> int:
        """Read a unit on the caller's thread; returns how many bytes were read."""
        return sum(self._reads.read(r) for r in self._ranges(unit))

    def drop(self, unit: int) -> None:
        """Give a unit's memory back."""
        for r in self._ranges(unit):
            self._reads.release(r)

    def adopt(self, unit: int) -> bool:
        """Whether an earlier run left the unit whole where it belongs; what else it left of it is let go."""
        there = [self._reads.adopt(r) for r in self._ranges(unit)]
        if any(there) and not all(there):
            self.drop(unit)
        return all(there)

    def is_damaged(self, unit: int) -> bool:
        """Whether something of a unit has left memory without our doing."""
        return any(self._reads.missing_bytes(r) for r in self._ranges(unit))

    def place(self, unit: int, index: int) -> int:
        """How many units lie before it from the base of its kind on; `index` is its own among those of the file."""
        return index


class SlotUnits:
    """In slots; units whose ranges have the same sizes share them. Its methods are those of `MappedUnits`."""

    def __init__(self, reads: DirectReads, ranges: RangesOf, n_units: int) -> None:
        self._reads, self._ranges = reads, ranges
        kinds = [tuple(r.n_bytes for r in ranges(unit)) for unit in range(n_units)]
        self._slots = {sizes: _Slots(sizes, kinds.count(sizes)) for sizes in set(kinds)}
        self._kind = [self._slots[sizes] for sizes in kinds]
        self._slot: dict[int, int] = {}

    def base(self, unit: int, index: int) -> int:
        """Where the first slot of a unit's kind has the range of that index."""
        return self._kind[unit].bases[index]

    def fetch(self, unit: int, leaving: Sequence[int]) -> list[Future[int]]:
        self._take(unit, leaving)
        return [self._reads.submit_into(r, address) for r, address in self._targets(unit)]

    def cancel(self, flight: Sequence[Future[int]]) -> bool:
        return _cancel(flight)

    def reserve(self, unit: int) -> None:
        self._take(unit, ())

    def fill(self, unit: int) -> int:
        return sum(self._reads.read_into(r, address) for r, address in self._targets(unit))

    def _take(self, unit: int, leaving: Sequence[int]) -> None:
        """A slot: one that is left with its pages, if it is of the right kind."""
        kind, slot = self._kind[unit], None
        for other in leaving:
            if slot is None and self._kind[other] is kind:
                slot = self._slot.pop(other)
            else:
                self.drop(other)
        self._slot[unit] = kind.take() if slot is None else slot

    def _targets(self, unit: int) -> list[tuple[Range, int]]:
        kind, slot = self._kind[unit], self._slot[unit]
        ranges = self._ranges(unit)
        return [(r, base + slot * r.n_bytes) for r, base in zip(ranges, kind.bases, strict=True)]

    def drop(self, unit: int) -> None:
        self._kind[unit].give(self._slot.pop(unit))

    def adopt(self, unit: int) -> bool:
        return False

    def is_damaged(self, unit: int) -> bool:
        return False  # memory of our own stays

    def place(self, unit: int, index: int) -> int:
        return self._slot[unit]


Units = MappedUnits | SlotUnits


def _cancel(flight: Sequence[Future[int]]) -> bool:
    cancelled = [future.cancel() for future in flight]
    wait([future for future in flight if not future.cancelled()])
    return any(cancelled)


class _Slots:
    """Address space for all units of one kind, side by side, which takes memory as it is written to."""

    def __init__(self, sizes: Sequence[int], n: int) -> None:
        self._sizes = sizes
        self._memory = [reserve_memory(size * n) for size in sizes]
        self.bases = [int(np.frombuffer(m, np.uint8).ctypes.data) for m in self._memory]
        for base, memory in zip(self.bases, self._memory, strict=True):
            syscalls.madvise(base, len(memory), syscalls.HUGEPAGE)
        self._empty: list[int] = []
        self._n_taken = 0  # slots that were ever taken: the first ones

    def take(self) -> int:
        if self._empty:
            return self._empty.pop()
        self._n_taken += 1
        return self._n_taken - 1

    def give(self, slot: int) -> None:
        """Give its memory back, too."""
        for base, size in zip(self.bases, self._sizes, strict=True):
            start, n_bytes = syscalls.inner_pages(base + slot * size, size)
            if n_bytes:
                syscalls.madvise(start, n_bytes, syscalls.DONTNEED)
        self._empty.append(slot)
