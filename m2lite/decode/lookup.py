"""Prompt lookup: what followed the last tokens of a row where they stood before. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m2lite.kernels.lookup import CAPACITY, HEADER, LENGTH, MASK, TOLD, N, guess, pass_by, push, push_all

_MOST = 64  # tokens of a guess


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
        self._guessed = np.zeros(_MOST, np.int32)
        self._guessed_at = int(self._guessed.ctypes.data)
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
        push_all(self._address, int(new.ctypes.data) + 4 * n, len(new) - n)

    def push(self, token: int) -> int:
        """The length of the match that told this token, negative if it told another.

        0 if there was none, or one as good that told another.
        """
        return int(push(self._address, token))

    def pass_by(self, token: int, out: int, x: int, n: int) -> bool:
        """`push`, and n float32 are copied from address x to `out`, in one call, whose time would be felt.

        False if there was no match before, and there is none now.
        """
        return pass_by(self._address, token, out, x, n)  # type: ignore[no-any-return]

    @property
    def told(self) -> int:
        """What the last `push` returned."""
        return int(self._header[TOLD // 4])

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the match; none from where on one as good was followed by others."""
        n = guess(self._address, self._guessed_at, min(most, len(self._guessed)))
        found: list[int] = self._guessed[:n].tolist()
        return found


def warm_up() -> None:
    """Compile, or load from the cache, what a lookup needs."""
    lookup = Lookup(2)
    lookup.follow([0])
    lookup.push(0)
    lookup.pass_by(0, 0, 0, 0)
    lookup.guess(1)
