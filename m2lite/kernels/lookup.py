"""Prompt lookup: where the end of a row of tokens stood before. Sees one block of int32, laid out as LAYOUT says.

LAYOUT: HEADER numbers; row [capacity]; before [capacity], for each index the one behind an earlier place of the GRAM
tokens that end there, or 0; table [mask + 1], by hash the index behind the latest place of GRAM tokens, or 0.
"""

from __future__ import annotations

import numpy as np

from m2lite.kernels.jit import kernel
from m2lite.kernels.simd import load_f32, read_i32, store_f32, write_i32

GRAM = 3  # tokens that must be the same; the longer the match, the likelier what followed it follows again
MOST_LENGTH = 32  # to which a match is told apart from a longer one
MOST_PLACES = 16  # that are looked at, the latest first
HEADER = 16
N, PLACE, LENGTH, CAPACITY, MASK = 0, 4, 8, 12, 16  # bytes of the header's numbers: see decode/lookup.py


@kernel
def hash_of_end(row, n, mask):
    """Of the GRAM tokens that end before index n."""
    h = 0
    for i in range(n - GRAM, n):
        h = (h ^ read_i32(row + 4 * i)) * 0x9E3779B1 & 0xFFFFFFFF
        h ^= h >> 15
    return h & mask


@kernel
def match_length(row, place, n):
    """How many tokens before `place` are those before n, up to MOST_LENGTH; 0 if fewer than GRAM are."""
    length, most = 0, min(place, MOST_LENGTH)
    while length < most and read_i32(row + 4 * (place - 1 - length)) == read_i32(row + 4 * (n - 1 - length)):
        length += 1
    return length if length >= GRAM else 0


@kernel
def push(block, token):
    """The row goes on with `token`, and the match follows it. A full row stays as it is.

    Returns the length of the match that told this token, negative if it told another, 0 if there was none.
    """
    n, place, length = read_i32(block + N), read_i32(block + PLACE), read_i32(block + LENGTH)
    capacity, mask = read_i32(block + CAPACITY), read_i32(block + MASK)
    if n >= capacity:
        return 0
    row = block + 4 * HEADER
    before, table = row + 4 * capacity, row + 8 * capacity
    told = 0
    if length > 0:
        told = length if read_i32(row + 4 * place) == token else -length
    write_i32(row + 4 * n, np.int32(token))
    n += 1
    write_i32(block + N, np.int32(n))
    at = 0
    if n >= GRAM:
        bucket = table + 4 * hash_of_end(row, n, mask)
        at = read_i32(bucket)
        write_i32(bucket, np.int32(n))
    write_i32(before + 4 * (n - 1), np.int32(at))
    if told > 0:
        place, length = place + 1, length + 1
    else:
        place = length = 0
        for _ in range(MOST_PLACES):
            if at == 0:
                break
            found = match_length(row, at, n)
            if found > length:
                place, length = at, found
            at = read_i32(before + 4 * (at - 1))
    write_i32(block + PLACE, np.int32(place))
    write_i32(block + LENGTH, np.int32(length))
    return told


@kernel
def push_all(block, tokens, n):
    """`push` of n tokens, int32."""
    for i in range(n):
        push(block, read_i32(tokens + 4 * i))


@kernel
def copy_floats(out, x, n):
    """out[i] = x[i] for n float32, a multiple of 16."""
    for i in range(0, 4 * n, 64):
        store_f32(out + i, load_f32(x + i))
