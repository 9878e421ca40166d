"""Prompt lookup against a search through the whole row."""

from __future__ import annotations

import random

import numpy as np
import pytest

from m2lite.decode.lookup import Lookup
from m2lite.kernels.lookup import GRAM, MOST_LENGTH, copy_floats


def longest_match(row: list[int]) -> int:
    """Tokens of the longest earlier match of the row's end; 0 below GRAM."""
    n, best = len(row), 0
    for place in range(GRAM, n):
        length = 0
        while length < min(place, MOST_LENGTH) and row[place - 1 - length] == row[n - 1 - length]:
            length += 1
        best = max(best, length)
    return best if best >= GRAM else 0


@pytest.mark.parametrize("n_tokens", [2, 3, 8, 200_000])
def test_matches_are_true_and_long(n_tokens: int) -> None:
    dice = random.Random(n_tokens)
    row: list[int] = []
    lookup, told = Lookup(600), 0
    while len(row) < 600:
        if len(row) > 20 and dice.random() < 0.1:  # quotes of what was
            at = dice.randrange(len(row) - 10)
            new = row[at : at + 8]
        else:
            new = [dice.randrange(n_tokens)]
        for token in new[: 600 - len(row)]:
            guess, length = lookup.guess(1), lookup.length
            found = lookup.push([token])
            assert found == ([] if not guess else [length] if guess == [token] else [-length])
            told += bool(guess) and guess == [token]
            row.append(token)
            expected = longest_match(row)
            assert bool(lookup.length) == bool(expected)
            n, guess = min(lookup.length, MOST_LENGTH), lookup.guess(40)
            if guess:
                followed = [row[p] for p in range(n, len(row)) if row[p - n : p] == row[-n:]]
                assert guess[0] in followed
    assert told > 20


def test_a_guess_is_what_followed_and_repeats_at_the_end() -> None:
    lookup = Lookup(100)
    lookup.follow([9, 1, 2, 3, 4, 5, 1, 2, 3])
    assert lookup.length == 3 and lookup.guess(4) == [4, 5, 1, 2]
    assert lookup.push([4]) == [3] and lookup.length == 4 and lookup.guess(9) == [5, 1, 2, 3, 4, 5, 1, 2, 3]
    assert lookup.push([7]) == [-4] and lookup.length == 0 and lookup.guess(3) == []
    assert lookup.push([7]) == []


def test_the_longest_of_several_places_is_taken() -> None:
    lookup = Lookup(100)
    long = list(range(20, 29))
    lookup.follow([*long, 7, 0, *long[-4:], 8, 0, *long[-3:], 9, *long])
    assert lookup.length == 9 and lookup.guess(1) == [7]


def test_places_that_match_as_well_must_agree() -> None:
    """Three records: where their values differed, nothing is guessed; of what they share, all of it."""
    record = [1, 2, 3, 4, 0, 5, 6, 7, 8, 0, 9]
    rows = [[v if v else 100 * n + i for i, v in enumerate(record)] for n in range(1, 4)]
    lookup = Lookup(100)
    lookup.follow([9, *rows[0], *rows[1], 1, 2, 3])
    assert lookup.guess(7) == [4] and lookup.length == 4  # 9 1 2 3
    assert lookup.push([4]) == [4] and lookup.guess(7) == []
    assert lookup.push([304]) == []  # nothing was told
    lookup.follow([9, *rows[0], *rows[1], 1, 2, 3, 4, 304, 5, 6, 7])
    assert lookup.guess(7) == [8]
    once = Lookup(100)
    once.follow([*rows[0], 1, 2, 3])  # one place only: its value, too
    assert once.guess(7) == [4, 104, 5, 6, 7, 8, 109]


def test_a_short_match_has_no_say_beside_a_long_one() -> None:
    lookup = Lookup(100)
    lookup.follow([*range(10, 22), 50, 51, *[19, 20, 21], 60, 61, *range(10, 22)])
    assert lookup.length == 12 and lookup.guess(2) == [50, 51]


def test_rows_that_are_cut_and_go_on() -> None:
    dice, lookup = random.Random(4), Lookup(500)
    row = [dice.randrange(4) for _ in range(100)]
    for _ in range(30):
        row = row[: dice.randrange(1, len(row))] + [dice.randrange(4) for _ in range(dice.randrange(60))]
        lookup.follow(row)
        again = Lookup(500)
        again.follow(row)
        assert len(lookup) == len(row) and lookup.guess(10) == again.guess(10)
        assert bool(lookup.length) == bool(longest_match(row))


def test_a_full_row_stays_as_it_is() -> None:
    lookup = Lookup(3)
    lookup.follow([1, 2, 3])
    assert lookup.push([4]) == [] and len(lookup) == 3


def test_long_rows_with_a_match_everywhere() -> None:
    """A step looks at MOST_PLACES: whoever looked through the row at each of a million tokens would not end."""
    row = np.random.default_rng(1).integers(0, 2, 1_000_000).tolist()
    lookup = Lookup(len(row) + 7)
    lookup.follow(row)
    assert len(lookup) == len(row) and lookup.length >= GRAM
    told = lookup.guess(1)
    assert lookup.push(told) in ([], [lookup.length - 1], [MOST_LENGTH])


def test_tokens_pass_by_as_if_they_were_pushed() -> None:
    dice = random.Random(5)
    pushed, passed, at_once = Lookup(400), Lookup(400), Lookup(400)
    states, kept = np.arange(16, dtype=np.float32), np.zeros((400, 16), np.float32)
    row, told = [dice.randrange(3) for _ in range(400)], list[int]()
    for i, token in enumerate(row):
        states += 1
        found = pushed.push([token])
        is_match = passed.pass_by(token, kept[i:].ctypes.data, states.ctypes.data, 16)
        assert passed.told == (found[0] if found else 0) and passed.length == pushed.length
        assert bool(is_match) == bool(found or pushed.length)
        assert kept[i].tolist() == states.tolist() and not kept[i + 1 :].any()
        told += found
    assert sum(n > 0 for n in told) > 20 and sum(n < 0 for n in told) > 20
    assert [n for i in range(0, 400, 8) for n in at_once.push(row[i : i + 8])] == told


def test_floats_are_copied() -> None:
    source, target = np.arange(96, dtype=np.float32), np.zeros(96, np.float32)
    copy_floats(target[16:].ctypes.data, source.ctypes.data, 64)
    assert target[16:80].tolist() == source[:64].tolist() and not target[80:].any() and not target[:16].any()
