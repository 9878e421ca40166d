"""Prompt lookup against a search through the whole sequence."""

from __future__ import annotations

import random

import numpy as np
import pytest

from m2lite.drafting.ngram import PromptLookup
from m2lite.kernels.ngram import GRAM, MOST_LENGTH


def longest_match(ids: list[int]) -> int:
    """Tokens of the longest earlier match of the sequence's end; 0 below GRAM."""
    n, best = len(ids), 0
    for place in range(GRAM, n):
        length = 0
        while length < min(place, MOST_LENGTH) and ids[place - 1 - length] == ids[n - 1 - length]:
            length += 1
        best = max(best, length)
    return best if best >= GRAM else 0


@pytest.mark.parametrize("n_tokens", [2, 3, 8, 200_000])
def test_matches_are_true_and_long(n_tokens: int) -> None:
    dice = random.Random(n_tokens)
    ids: list[int] = []
    lookup, n_foreseen = PromptLookup(600), 0
    while len(ids) < 600:
        if len(ids) > 20 and dice.random() < 0.1:  # quotes of what was
            at = dice.randrange(len(ids) - 10)
            new = ids[at : at + 8]
        else:
            new = [dice.randrange(n_tokens)]
        for token in new[: 600 - len(ids)]:
            guess, length = lookup.guess(1), lookup.length
            found = lookup.push([token])
            assert list(found) == ([] if not guess else [length] if guess == [token] else [-length])
            n_foreseen += bool(guess) and guess == [token]
            ids.append(token)
            expected = longest_match(ids)
            assert bool(lookup.length) == bool(expected)
            n, guess = min(lookup.length, MOST_LENGTH), lookup.guess(40)
            if guess:
                followed = [ids[p] for p in range(n, len(ids)) if ids[p - n : p] == ids[-n:]]
                assert guess[0] in followed
    assert n_foreseen > 20


def test_a_guess_is_what_followed_and_repeats_at_the_end() -> None:
    lookup = PromptLookup(100)
    lookup.follow([9, 1, 2, 3, 4, 5, 1, 2, 3])
    assert lookup.length == 3 and lookup.guess(4) == [4, 5, 1, 2]
    assert list(lookup.push([4])) == [3] and lookup.length == 4 and lookup.guess(9) == [5, 1, 2, 3, 4, 5, 1, 2, 3]
    assert list(lookup.push([7])) == [-4] and lookup.length == 0 and lookup.guess(3) == []
    assert list(lookup.push([7])) == []


def test_the_longest_of_several_places_is_taken() -> None:
    lookup = PromptLookup(100)
    long = list(range(20, 29))
    lookup.follow([*long, 7, 0, *long[-4:], 8, 0, *long[-3:], 9, *long])
    assert lookup.length == 9 and lookup.guess(1) == [7]


def test_places_that_match_as_well_must_agree() -> None:
    """Three records: where their values differed, nothing is guessed; of what they share, all of it."""
    record = [1, 2, 3, 4, 0, 5, 6, 7, 8, 0, 9]
    records = [[v if v else 100 * n + i for i, v in enumerate(record)] for n in range(1, 4)]
    lookup = PromptLookup(100)
    lookup.follow([9, *records[0], *records[1], 1, 2, 3])
    assert lookup.guess(7) == [4] and lookup.length == 4  # 9 1 2 3
    assert list(lookup.push([4])) == [4] and lookup.guess(7) == []
    assert list(lookup.push([304])) == []  # nothing was foreseen
    lookup.follow([9, *records[0], *records[1], 1, 2, 3, 4, 304, 5, 6, 7])
    assert lookup.guess(7) == [8]
    once = PromptLookup(100)
    once.follow([*records[0], 1, 2, 3])  # one place only: its value, too
    assert once.guess(7) == [4, 104, 5, 6, 7, 8, 109]


def test_a_short_match_has_no_say_beside_a_long_one() -> None:
    lookup = PromptLookup(100)
    lookup.follow([*range(10, 22), 50, 51, *[19, 20, 21], 60, 61, *range(10, 22)])
    assert lookup.length == 12 and lookup.guess(2) == [50, 51]


def test_sequences_that_are_cut_and_go_on() -> None:
    dice, lookup = random.Random(4), PromptLookup(500)
    ids = [dice.randrange(4) for _ in range(100)]
    for _ in range(30):
        ids = ids[: dice.randrange(1, len(ids))] + [dice.randrange(4) for _ in range(dice.randrange(60))]
        lookup.follow(ids)
        again = PromptLookup(500)
        again.follow(ids)
        assert lookup.n == len(ids) and lookup.guess(10) == again.guess(10)
        assert bool(lookup.length) == bool(longest_match(ids))


def test_a_full_sequence_stays_as_it_is() -> None:
    lookup = PromptLookup(3)
    lookup.follow([1, 2, 3])
    assert list(lookup.push([4])) == [] and lookup.n == 3


def test_long_sequences_with_a_match_everywhere() -> None:
    """A step looks at MOST_PLACES: whoever looked through the sequence at each of a million tokens would not end."""
    ids = np.random.default_rng(1).integers(0, 2, 1_000_000).tolist()
    lookup = PromptLookup(len(ids) + 7)
    lookup.follow(ids)
    assert lookup.n == len(ids) and lookup.length >= GRAM
    guess = lookup.guess(1)
    assert list(lookup.push(guess)) in ([], [lookup.length - 1], [MOST_LENGTH])


def test_tokens_at_once_are_as_tokens_one_by_one() -> None:
    dice, one, eight, many = random.Random(5), PromptLookup(400), PromptLookup(400), PromptLookup(400)
    ids = [dice.randrange(3) for _ in range(400)]
    foreseen = [n for token in ids for n in one.push([token])]
    assert [n for i in range(0, 400, 8) for n in eight.push(ids[i : i + 8])] == foreseen
    assert sum(n > 0 for n in foreseen) > 20 and sum(n < 0 for n in foreseen) > 20
    assert many.push(ids) == [] and many.guess(9) == one.guess(9) and many.length == one.length
