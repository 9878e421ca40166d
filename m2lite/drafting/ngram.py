"""Prompt lookup: what followed the last tokens of a sequence where they stood before. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m2lite.kernels.ngram import CAPACITY, HEADER, LENGTH, MASK, N, guess, push_all

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
        self._ids = memoryview(np.zeros(_MOST, np.int32))  # type: ignore[arg-type]  # tokens that come or go
        self._foreseen = memoryview(np.zeros(_MOST, np.int32))  # type: ignore[arg-type]
        self._ids_at, self._foreseen_at = (np.asarray(a).ctypes.data for a in (self._ids, self._foreseen))

    def __len__(self) -> int:
        return int(self._header[N // 4])

    @property
    def length(self) -> int:
        """Tokens of the match, 0 for none."""
        return int(self._header[LENGTH // 4])

    def follow(self, ids: Sequence[int]) -> None:
        """Make `ids` the sequence: what is new is pushed, and what is no continuation is begun again."""
        assert len(ids) <= self._capacity
        new, n = np.array(ids, np.int32), len(self)
        if len(new) < n or not np.array_equal(new[:n], self._block[HEADER : HEADER + n]):
            self._block[HEADER + 2 * self._capacity :] = 0
            self._block[: CAPACITY // 4] = n = 0
        push_all(self._address, int(new.ctypes.data) + 4 * n, len(new) - n, 0)

    def push(self, new: Sequence[int]) -> list[int]:
        """For each token that a match foresaw, the length of that match, negative if it foresaw another.

        Matches beside which one as good foresaw another have no say. Of more than _MOST tokens nothing is said.
        """
        if len(new) > _MOST:
            many = np.array(new, np.int32)
            push_all(self._address, int(many.ctypes.data), len(many), 0)
            return []
        for i, token in enumerate(new):  # one or two, as nearly always: in a third of the time of a slice
            self._ids[i] = token
        n = push_all(self._address, self._ids_at, len(new), self._foreseen_at)
        return [self._foreseen[i] for i in range(n)] if n else []

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the match; none from where on one as good was followed by others."""
        n = guess(self._address, self._ids_at, min(most, _MOST))
        return self._ids[:n].tolist()


def load_kernels() -> None:
    """Compile, or load from the cache, what a lookup needs."""
    lookup = PromptLookup(2)
    lookup.follow([0])
    lookup.push([0])
    lookup.guess(1)
