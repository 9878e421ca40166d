"""Prompt lookup: what followed the last tokens of a sequence where they stood before. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m2lite.kernels.ngram import CAPACITY, HEADER, LENGTH, MASK, N, guess, push_all, push_one

_MOST = 64  # tokens of a guess, or of a push whose matches are told


class PromptLookup:
    """A sequence of up to `capacity` tokens that grows, and the longest earlier match of its end.

    A match that goes on is kept, and only a broken one is looked for again: a microsecond a token.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        size = 1 << (2 * capacity).bit_length()
        self._block = np.zeros(HEADER + 2 * capacity + size, np.int32)  # memory is touched as the sequence grows
        self._block[[CAPACITY // 4, MASK // 4]] = capacity, size - 1
        self._address = int(self._block.ctypes.data)
        self._header = memoryview(self._block[:HEADER])  # type: ignore[arg-type]  # reads a number in 50 ns
        self._some = np.zeros(_MOST, np.int32)  # tokens that come or go
        self._foreseen = np.zeros(_MOST, np.int32)
        self._some_at, self._foreseen_at = int(self._some.ctypes.data), int(self._foreseen.ctypes.data)
        self.n = 0  # tokens of the sequence
        self.length = 0  # of the match; 0 for none

    def _refresh(self) -> None:
        self.n, self.length = int(self._header[N // 4]), int(self._header[LENGTH // 4])

    def follow(self, ids: Sequence[int]) -> None:
        """Make `ids` the sequence: what is new is pushed, and what is no continuation is begun again."""
        assert len(ids) <= self._capacity
        new, n = np.array(ids, np.int32), self.n
        if len(new) < n or not np.array_equal(new[:n], self._block[HEADER : HEADER + n]):
            self._block[HEADER + 2 * self._capacity :] = 0
            self._block[: CAPACITY // 4] = n = 0
        push_all(self._address, int(new.ctypes.data) + 4 * n, len(new) - n, 0)
        self._refresh()

    def push(self, new: Sequence[int]) -> Sequence[int]:
        """For each token that a match foresaw, the length of that match, negative if it foresaw another.

        Matches beside which one as good foresaw another have no say. Of more than _MOST tokens nothing is said.
        """
        if len(new) == 1 and self.n < self._capacity:  # as nearly always
            self.n += 1
            found = push_one(self._address, new[0])
            self.length = found & 0xFFFFFFFF
            return (found >> 32,) if found >> 32 else ()
        if len(new) > _MOST:
            many = np.array(new, np.int32)
            push_all(self._address, int(many.ctypes.data), len(many), 0)
            n = 0
        else:
            self._some[: len(new)] = new
            n = push_all(self._address, self._some_at, len(new), self._foreseen_at)
        self._refresh()
        lengths: list[int] = self._foreseen[:n].tolist()
        return lengths

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the match; none from where on one as good was followed by others."""
        n = guess(self._address, self._some_at, min(most, _MOST))
        found: list[int] = self._some[:n].tolist()
        return found


def load_kernels() -> None:
    """Compile, or load from the cache, what a lookup needs."""
    lookup = PromptLookup(2)
    lookup.follow([0])
    lookup.push([0])
    lookup.push([0, 0])
    lookup.guess(1)
