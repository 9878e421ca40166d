"""Units come and leave in any order, and what is there is what the file says; slots are used again."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from m2lite.storage import syscalls
from m2lite.storage.gguf_reader import File
from m2lite.storage.reads import DirectReads, MappedReads, Range, Reads
from m2lite.storage.units import MappedUnits, SlotUnits, Units

pytestmark = pytest.mark.skipif(not syscalls.AVAILABLE, reason="residency is controlled on Linux only")
PAGE = syscalls.PAGE
# Sizes of the two ranges of a unit, kind by kind: whole pages, and not.
KINDS = {
    "whole pages": [(24 * PAGE, 8 * PAGE), (40 * PAGE, 8 * PAGE)],
    "odd": [(9 * 1024, 5000), (18 * 1024 + 64, 700)],
}
N_OF_A_KIND = 12


class Made:
    """A file of units of two kinds, and what reads them."""

    def __init__(self, path: Path, name: str, load: str, start: int) -> None:
        sizes = [kind for kind in KINDS[name] for _ in range(N_OF_A_KIND)]
        self.ranges: list[list[Range]] = []
        at = start
        for pair in sizes:
            self.ranges.append([Range(0, at, pair[0]), Range(0, at + pair[0], pair[1])])
            at += sum(pair)
        self.content = np.random.default_rng(0).bytes(at)
        path.write_bytes(self.content)
        self.fd = os.open(path, os.O_RDONLY)
        os.fsync(self.fd)
        self.mapping = np.memmap(path, np.uint8, mode="r")
        address = int(self.mapping.ctypes.data)
        file = File(path, self.fd, address, at)
        self.reads: Reads
        self.units: Units
        if load == "mmap":
            mapped = MappedReads([file])
            self.reads, self.units = mapped, MappedUnits(mapped, self.ranges.__getitem__)
        else:
            direct = DirectReads([file])
            self.reads, self.units = direct, SlotUnits(direct, self.ranges.__getitem__, len(sizes))

    def bytes_of(self, unit: int) -> list[bytes]:
        if isinstance(self.units, SlotUnits):
            at = [
                self.units.base(unit, i) + self.units.place(unit, unit % N_OF_A_KIND) * r.n_bytes
                for i, r in enumerate(self.ranges[unit])
            ]
        else:
            at = [self.reads.address(0, r.offset) for r in self.ranges[unit]]
        return [ctypes.string_at(a, r.n_bytes) for a, r in zip(at, self.ranges[unit], strict=True)]

    def expected(self, unit: int) -> list[bytes]:
        return [self.content[r.offset : r.offset + r.n_bytes] for r in self.ranges[unit]]


@pytest.fixture(params=["mmap", "direct"])
def load(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[("whole pages", 0), ("whole pages", 2 * PAGE), ("whole pages", 160), ("odd", 0), ("odd", 96)])
def made(request: pytest.FixtureRequest, load: str, tmp_path: Path) -> Iterator[Made]:
    name, start = request.param
    made = Made(tmp_path / "file", name, load, start)
    yield made
    made.reads.close()
    os.close(made.fd)


def test_any_order(made: Made) -> None:
    """Six units at a time, whichever leaves for whichever."""
    rng, there = np.random.default_rng(1), list[int]()
    for _ in range(150):
        unit = int(rng.integers(2 * N_OF_A_KIND))
        if unit in there:
            continue
        leaving = [there.pop(int(rng.integers(len(there))))] if len(there) == 6 else []
        flight = made.units.fetch(unit, leaving)
        assert sum(job.result() for job in flight) <= sum(r.n_bytes for r in made.ranges[unit])
        there.append(unit)
        for other in there:
            assert made.bytes_of(other) == made.expected(other)
        assert not made.units.is_damaged(unit)


def test_filled_on_the_callers_thread(made: Made) -> None:
    made.units.reserve(3)
    made.units.fill(3)
    assert made.bytes_of(3) == made.expected(3)
    made.units.drop(3)


def test_called_off(made: Made) -> None:
    flights = {unit: made.units.fetch(unit, ()) for unit in range(2 * N_OF_A_KIND)}
    for unit, flight in flights.items():
        if made.units.cancel(flight):
            made.units.drop(unit)
        else:
            assert made.bytes_of(unit) == made.expected(unit)
        assert all(job.done() for job in flight)


def test_slots_are_used_again(tmp_path: Path) -> None:
    made = Made(tmp_path / "file", "whole pages", "direct", 0)
    units = made.units
    assert isinstance(units, SlotUnits)
    for unit in range(3):
        units.fetch(unit, ())
    assert [units.place(unit, unit) for unit in range(3)] == [0, 1, 2]
    units.fetch(7, (1,))
    assert units.place(7, 7) == 1  # with the pages that are there
    units.fetch(N_OF_A_KIND, (7, 0))  # another kind: their memory goes back
    assert units.place(N_OF_A_KIND, 0) == 0
    units.fetch(5, ())
    assert units.place(5, 5) in (0, 1)
    made.reads.close()
    os.close(made.fd)


def test_memory_that_is_given_back(tmp_path: Path) -> None:
    made = Made(tmp_path / "file", "whole pages", "direct", 0)
    units = made.units
    assert isinstance(units, SlotUnits)
    for job in units.fetch(2, ()):
        job.result()
    units.drop(2)
    memory = (ctypes.c_uint8 * (24 * PAGE)).from_address(units.base(2, 0))
    assert not np.frombuffer(memory, np.uint8).any()
    made.reads.close()
    os.close(made.fd)
