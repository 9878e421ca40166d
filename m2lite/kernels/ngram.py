"""Prompt lookup: where the end of a sequence stood before. Sees one block of int32, laid out as LAYOUT says.

LAYOUT: HEADER numbers; ids [capacity]; before [capacity], for each index the one behind an earlier place of the GRAM
tokens that end there, or 0; table [mask + 1], by hash the index behind the latest place of GRAM tokens, or 0.
"""

from __future__ import annotations

import numpy as np

from m2lite.simd.jit import inner, kernel
from m2lite.simd.kinds import Address, Int
from m2lite.simd.memory import read_i32, write_i32

GRAM = 3  # tokens that must be the same; the longer the match, the likelier what followed it follows again
MOST_LENGTH = 32  # to which a match is told apart from a longer one
MOST_PLACES = 16  # that are looked at, the latest first
AS_GOOD = 8  # tokens of a match from which on another place has a say, however long the longest match is
HEADER = 16
# Bytes of the header's numbers: ids of the sequence; the index behind the match, its length; the same of the next best,
# if any; the lengths of the arrays.
N, PLACE, LENGTH, OTHER, OTHER_LENGTH, CAPACITY, MASK = 0, 4, 8, 12, 16, 20, 24


@inner
def hash_of_end(ids: Address, n: int, mask: int) -> int:
    """Of the GRAM tokens that end before index n."""
    h = 0
    for i in range(n - GRAM, n):
        h = (h ^ read_i32(ids + 4 * i)) * 0x9E3779B1 & 0xFFFFFFFF
        h ^= h >> 15
    return h & mask


@inner
def match_length(ids: Address, place: int, n: int) -> int:
    """How many tokens before `place` are those before n, up to MOST_LENGTH; 0 if fewer than GRAM are."""
    length, most = 0, min(place, MOST_LENGTH)
    while length < most and read_i32(ids + 4 * (place - 1 - length)) == read_i32(ids + 4 * (n - 1 - length)):
        length += 1
    return length if length >= GRAM else 0


@inner
def is_contested(ids: Address, place: int, length: int, other: int, other_length: int) -> bool:
    """Whether another place that matches about as well was followed by another token."""
    differs = other > 0 and read_i32(ids + 4 * other) != read_i32(ids + 4 * place)
    return differs and other_length >= min(length, AS_GOOD)


@inner
def find(ids: Address, before: Address, at: int, n: int, block: Address) -> None:
    """The two longest matches among the latest places, beginning with `at`, go to the header."""
    place = length = other = other_length = 0
    for _ in range(MOST_PLACES):
        if at == 0:
            break
        found = match_length(ids, at, n)
        if found > length:
            place, length, other, other_length = at, found, place, length
        elif found > other_length:
            other, other_length = at, found
        at = read_i32(before + 4 * (at - 1))
    write_i32(block + PLACE, np.int32(place))
    write_i32(block + LENGTH, np.int32(length))
    write_i32(block + OTHER, np.int32(other))
    write_i32(block + OTHER_LENGTH, np.int32(other_length))


@inner
def push(block: Address, token: Int) -> int:
    """The sequence goes on with `token`, and the match follows it. A full one stays as it is.

    Returns the length of the match that foresaw this token, negative if it foresaw another, 0 if there was none, or one
    that is contested.
    """
    n, place, length = read_i32(block + N), read_i32(block + PLACE), read_i32(block + LENGTH)
    other, other_length = read_i32(block + OTHER), read_i32(block + OTHER_LENGTH)
    capacity, mask = read_i32(block + CAPACITY), read_i32(block + MASK)
    if n >= capacity:
        return 0
    ids = block + 4 * HEADER
    before, table = ids + 4 * capacity, ids + 8 * capacity
    foreseen, goes_on = 0, False
    if length > 0:
        goes_on = read_i32(ids + 4 * place) == token
        if not is_contested(ids, place, length, other, other_length):
            foreseen = length if goes_on else -length
    agrees = other > 0 and read_i32(ids + 4 * other) == token
    write_i32(ids + 4 * n, np.int32(token))
    n += 1
    write_i32(block + N, np.int32(n))
    at = 0
    if n >= GRAM:
        bucket = table + 4 * hash_of_end(ids, n, mask)
        at = read_i32(bucket)
        write_i32(bucket, np.int32(n))
    write_i32(before + 4 * (n - 1), np.int32(at))
    if goes_on and agrees:
        write_i32(block + PLACE, np.int32(place + 1))
        write_i32(block + LENGTH, np.int32(length + 1))
        write_i32(block + OTHER, np.int32(other + 1))
        write_i32(block + OTHER_LENGTH, np.int32(other_length + 1))
    else:
        find(ids, before, at, n, block)
        if goes_on and read_i32(block + LENGTH) < length + 1:  # it is further back than those that are looked at
            write_i32(block + PLACE, np.int32(place + 1))
            write_i32(block + LENGTH, np.int32(length + 1))
    return foreseen


@kernel
def guess(block: int, out: int, most: int) -> int:
    """int32 [most]: what followed the match, up to a token that is contested. Returns how many.

    A match that reaches the end of the sequence repeats what follows it.
    """
    block, out = Address(block), Address(out)
    n, place, length = read_i32(block + N), read_i32(block + PLACE), read_i32(block + LENGTH)
    other, other_length = read_i32(block + OTHER), read_i32(block + OTHER_LENGTH)
    ids = block + 4 * HEADER
    if length == 0:
        return 0
    for i in range(most):
        if other > 0 and other + i < n and place + i < n:
            if is_contested(ids, place + i, length + i, other + i, other_length + i):
                return i
            if read_i32(ids + 4 * (other + i)) != read_i32(ids + 4 * (place + i)):
                other = 0  # it has no say any more
        write_i32(out + 4 * i, np.int32(read_i32(ids + 4 * (place + i % (n - place)))))
    return most


@kernel
def push_all(block: int, tokens: int, n: int, out: int) -> int:
    """`push` of n tokens, int32. What it returned goes to int32 `out` where it was not 0, unless `out` is 0.

    Returns how many of them.
    """
    block, tokens, out = Address(block), Address(tokens), Address(out)
    n_foreseen = 0
    for i in range(n):
        foreseen = push(block, np.int64(read_i32(tokens + 4 * i)))
        if foreseen != 0 and out != 0:
            write_i32(out + 4 * n_foreseen, np.int32(foreseen))
            n_foreseen += 1
    return n_foreseen


@kernel
def push_one(block: int, token: int) -> int:
    """`push`; what it returned in the upper 32 bits, and the length of the match that there is now in the lower."""
    block = Address(block)
    foreseen = np.int64(push(block, token))
    found: int = (foreseen << 32) + read_i32(block + LENGTH)  # type: ignore[assignment]  # as Python gets it
    return found
