"""Prompt lookup: where the last tokens of a row stood before, and what followed them there. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

GRAM = 3  # tokens that must be the same; the longer the match, the likelier what followed it follows again
MOST_LENGTH = 32  # to which a match is told apart from a longer one
_MOST_PLACES = 8  # that are compared, the latest first
_WIDTH = 32  # bits of a token in a key


class Lookup:
    """A row that grows, and the longest earlier match of its end.

    `place` is the index of the token behind the match and `length` how many tokens match, 0 for none. Both follow the
    row at a microsecond a token: a match that goes on is kept, and only a broken one is looked for again.
    """

    def __init__(self) -> None:
        self.row: list[int] = []
        self.place = self.length = 0
        self._key = 0
        self._last: dict[int, int] = {}  # the last GRAM tokens as a number -> the index behind their latest place
        self._before: list[int] = []  # for each index: the one behind an earlier place of the same GRAM tokens, or 0

    def follow(self, tokens: Sequence[int]) -> None:
        """Make `tokens` the row: what is new is pushed, and a row that is no continuation is begun again."""
        n = len(self.row)
        if len(tokens) < n or tokens[:n] != self.row:
            self.__init__()  # type: ignore[misc]
            n = 0
        for token in tokens[n:]:
            self.push(token)

    def push(self, token: int) -> None:
        row, place = self.row, self.place
        self._key = key = (self._key << _WIDTH | token) & _MASK
        goes_on = self.length and row[place] == token
        row.append(token)
        n = len(row)
        before = self._last.get(key, 0) if n >= GRAM else 0
        self._last[key] = n
        self._before.append(before)
        if goes_on:
            self.place += 1
            self.length += 1
        elif before:
            self._find(before)
        else:
            self.length = 0

    def _find(self, place: int) -> None:
        """The longest match among the latest places."""
        row, self.length = self.row, 0
        n = len(row)
        for _ in range(_MOST_PLACES):
            length = GRAM
            most = min(place, MOST_LENGTH)
            while length < most and row[place - 1 - length] == row[n - 1 - length]:
                length += 1
            if length > self.length:
                self.place, self.length = place, length
            place = self._before[place - 1]
            if not place:
                return

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the match; one that reaches the end of the row repeats itself."""
        row, place = self.row, self.place
        found = row[place : place + most]
        while found and len(found) < most:
            found += row[place:][: most - len(found)]
        return found


_MASK = (1 << _WIDTH * GRAM) - 1


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
