"""Chunks go through three threads in order, and an error of any of them stops all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from m2lite.quant.stream import ANNOUNCE_AHEAD, READ_AHEAD, Bytes, Chunk, make, stream


class Log:
    """What happened, in order, and on which thread."""

    def __init__(self, n: int, fails: str = "") -> None:
        self.n, self.fails = n, fails
        self.seen: list[tuple[str, int]] = []
        self.threads: dict[str, set[str]] = {}
        self.n_open = self.most_open = 0

    def note(self, what: str, number: int) -> None:
        self.seen.append((what, number))
        self.threads.setdefault(what, set()).add(threading.current_thread().name)
        if f"{what} {number}" == self.fails:
            raise ValueError(self.fails)

    def chunks(self) -> Iterator[tuple[str, Chunk]]:
        for number in range(self.n):
            yield f"place {number}", Chunk(number, 1, *self._steps(number))

    def _steps(self, number: int) -> tuple[Callable[[], None], Callable[[], int], Callable[[int], Bytes]]:
        def read() -> int:
            self.n_open += 1
            self.most_open = max(self.most_open, self.n_open)
            self.note("read", number)
            return number

        def encode(value: int) -> Bytes:
            self.note("encode", value)
            return np.array([value], np.uint8)

        return lambda: self.note("announce", number), read, encode

    def write(self, place: str, chunk: Chunk, data: Bytes) -> None:
        assert place == f"place {data[0]}" and chunk.offset == data[0]
        self.note("write", int(data[0]))

    def report(self, place: str, chunk: Chunk) -> None:
        self.n_open -= 1
        self.note("report", chunk.offset)

    def of(self, what: str) -> list[int]:
        return [number for kind, number in self.seen if kind == what]


@pytest.mark.parametrize("n", [0, 1, 2, READ_AHEAD, 100])
def test_every_chunk_passes_every_step_in_order(n: int) -> None:
    log = Log(n)
    stream(log.chunks(), log.write, log.report)
    for what in ("announce", "read", "encode", "write", "report"):
        assert log.of(what) == list(range(n))
    assert log.most_open <= 2 * READ_AHEAD + 2  # memory is bounded
    if n:
        here = {threading.current_thread().name}
        assert log.threads["encode"] == log.threads["report"] == here
        assert len({*log.threads["read"], *log.threads["write"]} | here) == 3
        assert log.seen.index(("announce", min(n, ANNOUNCE_AHEAD) - 1)) < log.seen.index(("read", 0))


@pytest.mark.parametrize("what", ["announce", "read", "encode", "write", "report"])
def test_an_error_is_raised_here_when_all_is_quiet(what: str) -> None:
    log = Log(60, f"{what} 30")
    with pytest.raises(ValueError, match=f"{what} 30"):
        stream(log.chunks(), log.write, log.report)
    assert len(log.of("report")) <= 31
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("m2lite-read", "m2lite-write"))]


def test_one_chunk_alone() -> None:
    (_, chunk), *_ = Log(1).chunks()
    assert make(chunk).tolist() == [0]
