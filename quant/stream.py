"""Chunks of weights from source to file: read ahead, encode, write behind. Knows no format and no file.

One thread reads, the caller's thread runs every kernel, one thread writes; all three go through the chunks in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Place = TypeVar("Place")

READ_AHEAD = 3  # chunks that wait to be encoded, and to be written
ANNOUNCE_AHEAD = 16  # chunks that the system is told to fetch


class Chunk(NamedTuple):
    """Bytes [offset, offset + n_bytes) of an encoded tensor, and how they come about."""

    offset: int
    n_bytes: int
    announce: Callable[[], None]  # the source's bytes are wanted soon
    read: Callable[[], Any]  # the source's bytes, in memory
    encode: Callable[[Any], Bytes]  # what was read, as it goes to the file


def make(chunk: Chunk) -> Bytes:
    """A chunk's bytes, here and now."""
    return chunk.encode(chunk.read())


def stream(
    chunks: Iterable[tuple[Place, Chunk]],
    write: Callable[[Place, Chunk, Bytes], None],
    report: Callable[[Place, Chunk], None],
) -> None:
    """Every chunk is made and written, in order; `report` follows on the caller's thread.

    An error of any thread is raised here, when no thread works any more; what came after it was not written, for
    `write` must refuse to go on after its own error.
    """
    reads: deque[tuple[Place, Chunk, Future[Any]]] = deque()
    writes: deque[tuple[Place, Chunk, Future[None]]] = deque()

    with ThreadPoolExecutor(1, "m2lite-read") as reader, ThreadPoolExecutor(1, "m2lite-write") as writer:

        def finish_writes(n_left: int) -> None:
            while len(writes) > n_left:
                place, chunk, future = writes.popleft()
                future.result()
                report(place, chunk)

        def encode(n_left: int) -> None:
            while len(reads) > n_left:
                place, chunk, future = reads.popleft()
                writes.append((place, chunk, writer.submit(write, place, chunk, chunk.encode(future.result()))))
                finish_writes(READ_AHEAD)

        try:
            for place, chunk, ahead in _with_next(chunks, ANNOUNCE_AHEAD):
                reads.append((place, chunk, reader.submit(_fetch, chunk, ahead)))
                encode(READ_AHEAD)
            encode(0)
            finish_writes(0)
        except BaseException:
            for executor in (reader, writer):
                executor.shutdown(wait=True, cancel_futures=True)
            raise


def _fetch(chunk: Chunk, ahead: Iterable[Chunk]) -> Any:
    for later in ahead:
        later.announce()
    return chunk.read()


def _with_next(chunks: Iterable[tuple[Place, Chunk]], n_ahead: int) -> Iterator[tuple[Place, Chunk, list[Chunk]]]:
    """Each chunk, and those that come into view with it: the one `n_ahead` further on; at first all up to there."""
    waiting: deque[tuple[Place, Chunk]] = deque()
    fresh: list[Chunk] = []
    for place, chunk in chunks:
        waiting.append((place, chunk))
        fresh.append(chunk)
        if len(waiting) > n_ahead:
            yield *waiting.popleft(), fresh
            fresh = []
    while waiting:
        yield *waiting.popleft(), fresh
        fresh = []
