"""Ways to bring a layer's eight experts into memory when none of them is there, on the real disk.

    python benchmarks/cold_reads.py MODEL.gguf [--rounds 5]

A round takes eight random experts of a random layer (24 slices) for every way in turn, with other experts for each, and
drops them from the page cache before. MB/s, medians of the rounds. "mapped" ways end with every page mapped, since it
is then that a kernel can go through it; reads end in memory of our own.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from m2lite.model.config import parse_config
from m2lite.model.stream import slices, stacks_of
from m2lite.storage import syscalls
from m2lite.storage.gguf_reader import open_gguf
from m2lite.storage.reads import DirectReads, File, MappedReads, Range, Reads, piece_bytes

N_EXPERTS = 8
Way = Callable[[File, Sequence[Range]], None]


def touch(file: File, r: Range) -> None:
    """A byte of every page."""
    start, size = syscalls.whole_pages(file.address + r.offset, r.n_bytes)
    memory = (np.ctypeslib.ctypes.c_uint8 * size).from_address(start)
    np.frombuffer(memory, np.uint8)[:: syscalls.PAGE].max()


def announce(file: File, r: Range) -> None:
    start, size = syscalls.whole_pages(file.address + r.offset, r.n_bytes)
    step = piece_bytes(file.fd)
    for at in range(0, size, step):
        syscalls.madvise(start + at, min(step, size - at), syscalls.WILLNEED)


def populate(file: File, r: Range) -> None:
    syscalls.madvise(*syscalls.whole_pages(file.address + r.offset, r.n_bytes), syscalls.POPULATE_READ)


def one_by_one(*steps: Callable[[File, Range], None]) -> Way:
    """Each step for all of the ranges, then the next step."""

    def way(file: File, ranges: Sequence[Range]) -> None:
        for step in steps:
            for r in ranges:
                step(file, r)

    return way


def on_threads(n: int, step: Callable[[File, Range], None]) -> Way:
    def way(file: File, ranges: Sequence[Range]) -> None:
        with ThreadPoolExecutor(n) as pool:
            for _ in pool.map(lambda r: step(file, r), ranges):
                pass

    return way


def through(reads: Reads) -> Way:
    """As the engine does it."""

    def way(_: File, ranges: Sequence[Range]) -> None:
        for job in [reads.submit(r) for r in ranges]:
            job.result()

    return way


def pread(flags: int) -> Callable[[File, Range], None]:
    def step(file: File, r: Range) -> None:
        fd = os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY | flags)
        start, size = syscalls.whole_pages(r.offset, r.n_bytes)
        os.preadv(fd, [mmap.mmap(-1, size)], start)
        os.close(fd)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with open_gguf(args.model) as gguf:
        [file, *_], config, rng = gguf.files(), parse_config(gguf.metadata), random.Random()
        stacks, n = stacks_of(gguf, config), config.n_experts
        layers = [i for i, stack in enumerate(stacks) if all(r.part == 0 for r in stack)]
        mapped, direct = MappedReads([file]), DirectReads([file])
        ways: dict[str, Way] = {
            "mapped: fault, 1 thread": one_by_one(touch),
            "mapped: fault, 8 threads": on_threads(8, touch),
            "mapped: POPULATE_READ, 1 thread": one_by_one(populate),
            "mapped: POPULATE_READ, 8 threads": on_threads(8, populate),
            "mapped: WILLNEED all, then fault": one_by_one(announce, touch),
            "mapped: WILLNEED all, then POPULATE_READ": one_by_one(announce, populate),
            "mapped: WILLNEED and POPULATE_READ, 8 threads (--load mmap)": through(mapped),
            "pread, 1 thread": one_by_one(pread(0)),
            "pread, 8 threads": on_threads(8, pread(0)),
            "O_DIRECT, 1 thread": one_by_one(pread(os.O_DIRECT)),
            "O_DIRECT, 8 threads": on_threads(8, pread(os.O_DIRECT)),
            "O_DIRECT into the mirror, 8 threads (--load direct)": through(direct),
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                first, experts = n * rng.choice(layers), sorted(rng.sample(range(n), N_EXPERTS))
                ranges = [r for e in experts for r in slices(stacks, n, first + e)]
                for r in ranges:
                    mapped.release(r)
                    direct.release(r)
                started = time.perf_counter()
                way(file, ranges)
                speeds[name].append(sum(r.n_bytes for r in ranges) / (time.perf_counter() - started))
        for name, found in speeds.items():
            low, middle, high = (f(found) / 1e6 for f in (min, statistics.median, max))
            print(f"{name:<62}{middle:>7,.0f} MB/s  ({low:,.0f} to {high:,.0f})")
        mapped.close()
        direct.close()


if __name__ == "__main__":
    main()
