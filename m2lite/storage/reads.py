"""Brings ranges of model files into memory before they are computed with, and lets them go. Knows bytes, not experts.

Mapped: WILLNEED starts the reads, POPULATE_READ waits for them and maps the pages; what the page cache holds already
costs microseconds. Direct: O_DIRECT into memory of the caller's, or of our own that mirrors the file's layout, so that
a range has its address whether it is there or not. Both keep up to DEPTH reads under way, on threads of their own.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m2lite.errors import BadModelError, ResourceError
from m2lite.storage import syscalls
from m2lite.storage.durable import advise

DEPTH = 8  # reads under way: of 4, 8 and 16 none was faster than noise, on the disk measured
_SMALLEST_PIECE = 128 * 1024  # of one announcement, where the disk does not say
_N_PROBES = 4  # pages of a range that are asked for where mincore does not tell
_DIRECT_STEP = 4 * 1024**2  # bytes of one O_DIRECT call
_EHWPOISON = 133
_CHECK = "Check the disk."


class Range(NamedTuple):
    """Bytes of one part of a model: a file that may be split."""

    part: int
    offset: int
    n_bytes: int


class File(NamedTuple):
    """An open, mapped part."""

    path: Path
    fd: int
    address: int
    n_bytes: int


def piece_bytes(fd: int) -> int:
    """What Linux reads for one WILLNEED at most: more is cut silently, at the larger of two settings of the disk."""
    device = os.fstat(fd).st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    found = []
    for queue in (folder / "queue", folder.resolve().parent / "queue"):  # a partition's lies with its disk
        for name in ("read_ahead_kb", "max_sectors_kb"):
            try:
                found.append(1024 * int((queue / name).read_text()))
            except (OSError, ValueError):
                continue
    # Of a disk that reads ahead less than it takes at once Linux has been seen to use either.
    return max(_SMALLEST_PIECE, min(found, default=0)) // syscalls.PAGE * syscalls.PAGE


class Reads(ABC):
    """Ranges of the parts of one model, and the threads that read them. Close it before the files."""

    def __init__(self, files: Sequence[File]) -> None:
        self._files = list(files)
        self._pool = ThreadPoolExecutor(DEPTH, thread_name_prefix="m2lite-read")

    @abstractmethod
    def address(self, part: int, offset: int) -> int:
        """Where the byte is, or will be once a range with it was read."""

    @abstractmethod
    def adopt(self, r: Range) -> bool:
        """Whether an earlier run left the whole range where `read` would put it; what else it left of it is let go."""

    @abstractmethod
    def read(self, r: Range) -> int:
        """Wait until the range is in memory; returns how many bytes were not. BadModelError where the disk fails."""

    @abstractmethod
    def release(self, r: Range) -> None:
        """Give the range's memory back, but for pages that it shares with its neighbours."""

    def submit(self, r: Range, release: Sequence[Range] = (), after: Future[int] | None = None) -> Future[int]:
        """`read` on one of the threads, once the memory of others was released, and once an earlier job has ended."""
        return self._pool.submit(self._swap, r, release, after)

    def _swap(self, r: Range, release: Sequence[Range], after: Future[int] | None) -> int:
        for other in release:
            self.release(other)
        if after is not None:
            wait([after])
        return self.read(r)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class MappedReads(Reads):
    """In the page cache, through the mappings that the files have anyway."""

    def __init__(self, files: Sequence[File]) -> None:
        super().__init__(files)
        self._pieces = [piece_bytes(file.fd) for file in files]
        self._probes = [None if syscalls.tells_residency(file.fd) else open_probe(file.fd) for file in files]

    def address(self, part: int, offset: int) -> int:
        return self._files[part].address + offset

    def missing_bytes(self, r: Range) -> int:
        """How much of a range that was read before has left memory since."""
        start, size = syscalls.whole_pages(self.address(r.part, r.offset), r.n_bytes)
        probe = self._probes[r.part]
        if probe is None:
            return min(r.n_bytes, size - syscalls.PAGE * syscalls.mincore(start, size))
        return 0 if _is_cached(probe, r) else r.n_bytes

    def adopt(self, r: Range) -> bool:
        if self.missing_bytes(r) == 0:
            return True
        self.release(r)
        return False

    def read(self, r: Range) -> int:
        missing = self.missing_bytes(r)
        start, size = syscalls.whole_pages(self.address(r.part, r.offset), r.n_bytes)
        if missing:
            step = self._pieces[r.part]
            for at in range(0, size, step):
                syscalls.madvise(start + at, min(step, size - at), syscalls.WILLNEED)
        failure = syscalls.madvise(start, size, syscalls.POPULATE_READ)
        if failure in (errno.EFAULT, errno.EIO, _EHWPOISON):
            file = self._files[r.part]
            what = (
                f"{file.path}: bytes {r.offset:,} to {r.offset + r.n_bytes:,} cannot be read: {os.strerror(failure)}."
            )
            raise BadModelError(what, _CHECK)
        return missing

    def release(self, r: Range) -> None:
        start, size = syscalls.inner_pages(r.offset, r.n_bytes)
        if size:
            syscalls.madvise(self.address(r.part, start), size, syscalls.DONTNEED)  # unmaps: the cache keeps its pages
            advise(self._files[r.part].fd, start, size, "DONTNEED")

    def close(self) -> None:
        super().close()
        for fd in self._probes:
            if fd is not None:
                os.close(fd)
        self._probes.clear()


class DirectReads(Reads):
    """In memory of our own, past the page cache."""

    def __init__(self, files: Sequence[File], is_alone: bool = False) -> None:
        """Alone: nobody here reads through the page cache, which forgets what an earlier run left of the files there.

        All at once, since a piece at a time leaves large folios that lie across two pieces.
        """
        super().__init__(files)
        self._memory: list[mmap.mmap] = []
        self._scratch = threading.local()
        self._fds: list[int] = []
        self._addresses: list[int] = []
        try:
            for file in files:
                self._mirror(file)
        except BaseException:
            self.close()
            raise
        if is_alone:
            for file in files:
                self._pool.submit(advise, file.fd, 0, 0, "DONTNEED")  # takes a second for 20 GB

    def _mirror(self, file: File) -> None:
        """Address space as large as the file, which takes memory where it is read into."""
        memory = reserve_memory(file.n_bytes)
        address = int(np.frombuffer(memory, np.uint8).ctypes.data)
        syscalls.madvise(address, len(memory), syscalls.NOHUGEPAGE)  # 2 MB at a time would fill what is not to be read
        self._memory.append(memory)
        self._addresses.append(address)
        self._fds.append(open_direct(file.fd))

    def address(self, part: int, offset: int) -> int:
        return self._addresses[part] + offset

    def adopt(self, r: Range) -> bool:
        advise(self._files[r.part].fd, r.offset, r.n_bytes, "DONTNEED")  # else it would be in memory twice
        return False

    def read(self, r: Range) -> int:
        start, size = syscalls.whole_pages(r.offset, r.n_bytes)
        self._read(r, start, memoryview(self._memory[r.part])[start : start + size])
        return r.n_bytes

    def submit_into(self, r: Range, address: int) -> Future[int]:
        return self._pool.submit(self.read_into, r, address)

    def read_into(self, r: Range, address: int) -> int:
        """Wait until the range's bytes are at an address of the caller's own; returns how many they are."""
        start, size = syscalls.whole_pages(r.offset, r.n_bytes)
        if (start, size) == (r.offset, r.n_bytes) and address % syscalls.PAGE == 0:
            target = (ctypes.c_uint8 * size).from_address(address)
            self._read(r, start, memoryview(target).cast("B"))
            return r.n_bytes
        scratch = getattr(self._scratch, "memory", None)
        if scratch is None or len(scratch) < size:
            scratch = self._scratch.memory = mmap.mmap(-1, size)
            self._scratch.address = int(np.frombuffer(scratch, np.uint8).ctypes.data)
        self._read(r, start, memoryview(scratch)[:size])
        ctypes.memmove(address, self._scratch.address + r.offset - start, r.n_bytes)
        return r.n_bytes

    def _read(self, r: Range, start: int, into: memoryview) -> None:
        """Whole pages from `start` on; the last may lie behind the end of the file."""
        path, at = self._files[r.part].path, 0
        while at < len(into):
            stop = min(len(into), at + _DIRECT_STEP)
            try:
                done = os.preadv(self._fds[r.part], [into[at:stop]], start + at)
            except OSError as error:
                what = f"{path}: cannot be read at byte {start + at:,}: {error.strerror}."
                raise BadModelError(what, _CHECK) from error
            at += done
            if not done or done % syscalls.PAGE:
                break  # the end of the file
        if not is_direct(self._fds[r.part]):
            advise(self._fds[r.part], start, at, "DONTNEED")  # else it would be in memory twice
        if start + at < r.offset + r.n_bytes:
            raise BadModelError(f"{path}: ends at byte {start + at:,}.", "The file was cut: start again.")

    def release(self, r: Range) -> None:
        start, size = syscalls.inner_pages(r.offset, r.n_bytes)
        if size:
            syscalls.madvise(self.address(r.part, start), size, syscalls.DONTNEED)

    def close(self) -> None:
        super().close()
        while self._fds:
            os.close(self._fds.pop())
        self._memory.clear()  # unmapped with the last view


def reserve_memory(n_bytes: int) -> mmap.mmap:
    """Address space of whole pages that takes memory where it is written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | syscalls.MAP_NORESERVE
    try:
        return mmap.mmap(-1, syscalls.whole_pages(0, n_bytes)[1], flags=flags)
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"No address space for {n_bytes:,} bytes: {error}.",
            "Check `ulimit -v` and /proc/sys/vm/overcommit_memory, or leave out --load direct.",
        ) from None


def is_direct(fd: int) -> bool:
    """Whether reads go past the page cache."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def open_probe(fd: int) -> int:
    """Another descriptor, for reads of which a page that is not there brings itself only, not those behind it."""
    probe = _reopen(fd)
    os.posix_fadvise(probe, 0, 0, os.POSIX_FADV_RANDOM)
    return probe


def _is_cached(probe: int, r: Range) -> bool:
    """Whether some pages of the range, from its first to its last, can be read without waiting.

    The first that cannot is on its way afterwards: whoever asks reads the range then, or releases it.
    """
    byte, last = bytearray(1), r.n_bytes - 1
    for i in range(_N_PROBES):
        try:
            if not os.preadv(probe, [byte], r.offset + last * i // (_N_PROBES - 1), os.RWF_NOWAIT):
                return False
        except BlockingIOError:
            return False
        except OSError as error:  # a file system that cannot tell
            return error.errno in (errno.EOPNOTSUPP, errno.ENOSYS)
    return True


def measure_disk(file: File, ranges: Sequence[Range], seconds: float) -> float:
    """Bytes a second of reading ranges past the page cache, DEPTH at once, for so long at most.

    The ranges' bytes are read to memory of our own and dropped, also where the page cache holds them.
    """
    fd, left, started = open_direct(file.fd), iter(ranges), time.perf_counter()
    lock, n_bytes = threading.Lock(), 0

    def work() -> None:
        nonlocal n_bytes
        buffer = memoryview(mmap.mmap(-1, max(syscalls.whole_pages(r.offset, r.n_bytes)[1] for r in ranges)))
        while time.perf_counter() - started < seconds:
            with lock:
                r = next(left, None)
            if r is None:
                return
            start, size = syscalls.whole_pages(r.offset, r.n_bytes)
            done = os.preadv(fd, [buffer[:size]], start)
            with lock:
                n_bytes += done

    try:
        with ThreadPoolExecutor(DEPTH) as pool:
            for job in [pool.submit(work) for _ in range(DEPTH)]:
                job.result()
    except OSError as error:
        raise BadModelError(f"{file.path}: cannot be read: {error.strerror}.", _CHECK) from error
    finally:
        os.close(fd)
    return n_bytes / (time.perf_counter() - started)


def open_direct(fd: int) -> int:
    """Another descriptor of the open file that reads past the page cache, or through it where that is not to be had."""
    try:
        return _reopen(fd, os.O_DIRECT)
    except OSError:
        return _reopen(fd)


def _reopen(fd: int, flags: int = 0) -> int:
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | flags)
    except FileNotFoundError:
        what = "/proc is not mounted, and a model that is streamed is opened again through it."
        raise ResourceError(what, "Mount it, or give --load mmap.") from None
