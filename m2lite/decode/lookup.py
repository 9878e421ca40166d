"""Prompt lookup: what followed the last tokens of a row where they stood before. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m2lite.kernels.lookup import CAPACITY, HEADER, LENGTH, MASK, TOLD, N, guess, pass_by, push_all

_MOST = 64  # tokens of a guess, or of a push


class Lookup:
    """A row of up to `capacity` tokens that grows, and the longest earlier match of its end.

    A match that goes on is kept, and only a broken one is looked for again: a microsecond a token.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        size = 1 << (2 * capacity).bit_length()
        self._block = np.zeros(HEADER + 2 * capacity + size, np.int32)  # memory is touched as the row grows
        self._block[[CAPACITY // 4, MASK // 4]] = capacity, size - 1
        self._address = int(self._block.ctypes.data)
        self._header = memoryview(self._block[:HEADER])  # type: ignore[arg-type]  # reads a number in 50 ns
        self._some = np.zeros(_MOST, np.int32)  # tokens that come or go
        self._some_at = int(self._some.ctypes.data)
        self._told = np.zeros(_MOST, np.int32)
        self._told_at = int(self._told.ctypes.data)
        self._row = self._block[HEADER : HEADER + capacity]

    def __len__(self) -> int:
        return int(self._header[N // 4])

    @property
    def length(self) -> int:
        """Tokens of the match, 0 for none."""
        return int(self._header[LENGTH // 4])

    def follow(self, tokens: Sequence[int]) -> None:
        """Make `tokens` the row: what is new is pushed, and a row that is no continuation is begun again."""
        assert len(tokens) <= self._capacity
        new, n = np.array(tokens, np.int32), len(self)
        if len(new) < n or not np.array_equal(new[:n], self._row[:n]):
            self._block[HEADER + 2 * self._capacity :] = 0
            self._block[: CAPACITY // 4] = n = 0
        push_all(self._address, int(new.ctypes.data) + 4 * n, len(new) - n, 0)

    def push(self, tokens: Sequence[int]) -> list[int]:
        """For each token that a match told, the length of that match, negative if it told another.

        Matches beside which one as good told another have no say. At most _MOST tokens.
        """
        n = len(tokens)
        self._some[:n] = tokens
        n_told = push_all(self._address, self._some_at, n, self._told_at)
        found: list[int] = self._told[:n_told].tolist()
        return found

    def pass_by(self, token: int, out: int, x: int, n: int) -> bool:
        """`push` of one, and n float32 are copied from address x to `out`: one call, for a second would be felt.

        False if there was no match before, and there is none now.
        """
        return pass_by(self._address, token, out, x, n)  # type: ignore[no-any-return]

    @property
    def told(self) -> int:
        """The length of the match that told the last token, negative if it told another; 0 if none did."""
        return int(self._header[TOLD // 4])

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the match; none from where on one as good was followed by others."""
        n = guess(self._address, self._some_at, min(most, _MOST))
        found: list[int] = self._some[:n].tolist()
        return found


def warm_up() -> None:
    """Compile, or load from the cache, what a lookup needs."""
    lookup = Lookup(2)
    lookup.follow([0])
    lookup.push([0])
    lookup.pass_by(0, 0, 0, 0)
    lookup.guess(1)
