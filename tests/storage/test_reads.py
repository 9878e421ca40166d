"""Ranges come into memory whole and leave it, through the mapping and past the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from m2lite.errors import BadModelError
from m2lite.storage import reads as reads_module
from m2lite.storage import syscalls
from m2lite.storage.reads import DirectReads, File, MappedReads, Range, Reads, piece_bytes

pytestmark = pytest.mark.skipif(not syscalls.AVAILABLE, reason="residency is controlled on Linux only")
N_BYTES = 24 * 1024**2 + 5000
KINDS = {"mmap": MappedReads, "direct": DirectReads}


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(0).bytes(N_BYTES)


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Iterator[File]:
    """A file on disk, none of it in the page cache."""
    path = tmp_path / "file"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    data = mmap.mmap(fd, N_BYTES, prot=mmap.PROT_READ)
    if resident_pages(int(np.frombuffer(data, np.uint8).ctypes.data), N_BYTES) > N_BYTES // syscalls.PAGE // 2:
        pytest.skip("this file system has no pages to let go: its files are in memory, as in tmpfs")
    yield File(path, fd, int(np.frombuffer(data, np.uint8).ctypes.data), N_BYTES)
    os.close(fd)


@pytest.fixture(params=KINDS)
def reads(request: pytest.FixtureRequest, file: File) -> Iterator[Reads]:
    opened: Reads = KINDS[request.param]([file])
    yield opened
    opened.close()


def resident_pages(address: int, n_bytes: int) -> int:
    start, size = syscalls.whole_pages(address, n_bytes)
    return syscalls.mincore(start, size)


def test_ranges_are_there_after_reading(reads: Reads, content: bytes) -> None:
    ranges = [Range(0, 4096, 8192), Range(0, 100, 5000), Range(0, 5_000_001, 9_000_000), Range(0, N_BYTES - 777, 777)]
    for r, job in [(r, reads.submit(r)) for r in ranges]:
        assert job.result() > 0
        assert ctypes.string_at(reads.address(r.part, r.offset), r.n_bytes) == content[r.offset : r.offset + r.n_bytes]
        assert not isinstance(reads, MappedReads) or reads.missing_bytes(r) == 0


def test_released_memory_is_given_back(reads: Reads) -> None:
    kept, gone = Range(0, 1_000_000, 3_000_000), Range(0, 4_000_000, 6_000_000)
    reads.read(kept)
    reads.read(gone)
    start, size = syscalls.inner_pages(reads.address(0, gone.offset), gone.n_bytes)
    assert resident_pages(start, size) == size // syscalls.PAGE
    reads.release(gone)
    if isinstance(reads, MappedReads):
        assert reads.missing_bytes(gone) >= gone.n_bytes - 2 * syscalls.PAGE  # the page cache has let go, too
        assert reads.missing_bytes(kept) == 0
    else:
        data = (ctypes.c_uint8 * size).from_address(start)
        assert not any(np.frombuffer(data, np.uint8))  # new pages
    again = reads.submit(gone, [kept]).result()
    assert again >= gone.n_bytes - 2 * syscalls.PAGE


def test_what_is_in_memory_is_not_read_again(file: File) -> None:
    reads, r = MappedReads([file]), Range(0, 123_456, 3_000_000)
    assert reads.read(r) >= r.n_bytes
    assert reads.read(r) == 0
    reads.close()


def test_a_range_is_read_after_its_release(reads: Reads, content: bytes) -> None:
    """However the threads are scheduled: a release that came later would leave zeros behind."""
    a, b = Range(0, 0, 4 << 20), Range(0, 8 << 20, 4 << 20)
    reads.read(a)
    for _ in range(20):
        leaving = reads.submit(b, [a])
        coming = reads.submit(a, [b], leaving)
        coming.result()
        assert ctypes.string_at(reads.address(0, a.offset), a.n_bytes) == content[: a.n_bytes]


def test_owners_and_others_see_the_same(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "tells_residency", lambda fd: False)
    reads, r = MappedReads([file]), Range(0, 1_000_000, 3_000_000)
    assert reads.missing_bytes(r) == r.n_bytes
    assert reads.read(r) == r.n_bytes
    assert reads.missing_bytes(r) == 0
    reads.release(r)
    assert reads.missing_bytes(r) == r.n_bytes
    reads.close()


def test_a_file_that_was_cut(reads: Reads, file: File) -> None:
    os.ftruncate(file.fd, 1_000_000)
    with pytest.raises(BadModelError):
        reads.submit(Range(0, 2_000_000, 100_000)).result()


def test_no_direct_access(file: File, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """File systems without O_DIRECT are read through the page cache."""
    real = os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    reads, r = DirectReads([file]), Range(0, 12_345, 1_000_000)
    reads.read(r)
    assert ctypes.string_at(reads.address(0, r.offset), r.n_bytes) == content[r.offset : r.offset + r.n_bytes]
    assert resident_pages(file.address + r.offset, r.n_bytes) < 10  # and do not stay there
    reads.close()


def test_disk_error_is_told(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    reads = DirectReads([file])
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(BadModelError, match="cannot be read at byte 8,192: Input/output error"):
        reads.read(Range(0, 8192, 4096))
    reads.close()
    mapped = MappedReads([file])
    monkeypatch.setattr(syscalls, "madvise", lambda *_: 14)
    with pytest.raises(BadModelError, match="cannot be read"):
        mapped.read(Range(0, 8192, 4096))
    mapped.close()


def queue_of(path: Path) -> Path:
    device = path.stat().st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    return folder / "queue" if (folder / "queue").is_dir() else folder.parent / "queue"


def test_whole_ranges_with_a_small_read_ahead(file: File) -> None:
    """One WILLNEED is cut at the disk's read-ahead; the announcement of a slice must not be."""
    setting = queue_of(file.path) / "read_ahead_kb"
    if not os.access(setting, os.W_OK):
        pytest.skip("needs the right to change the disk's read-ahead")
    before = setting.read_text()
    r = Range(0, 1_000_000, 2_654_208)
    try:
        setting.write_text("128")
        assert piece_bytes(file.fd) == 128 * 1024
        reads = MappedReads([file])
        start, size = syscalls.whole_pages(reads.address(0, r.offset), r.n_bytes)
        for at in range(0, size, piece_bytes(file.fd)):  # the announcement alone
            syscalls.madvise(start + at, min(piece_bytes(file.fd), size - at), syscalls.WILLNEED)
        announced = resident_pages(start, size)  # counts pages that are on their way
        assert announced == size // syscalls.PAGE
        reads.close()
    finally:
        setting.write_text(before)


def test_the_disk_does_not_say(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads_module.os, "major", lambda _: 4095)
    assert piece_bytes(file.fd) == 128 * 1024


def test_locking_within_the_limit_only() -> None:
    """In a process whose limit is one page; root passes limits by, so it gives that right up first."""
    code = (
        "import mmap, os, resource, numpy as np\n"
        "from m2lite.storage import syscalls\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "memory = np.frombuffer(mmap.mmap(-1, 1 << 20), np.uint8)\n"
        "print(syscalls.lock_on_fault(memory.ctypes.data, 4096), syscalls.lock_on_fault(memory.ctypes.data, 1 << 20))\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.stdout.split() == ["True", "False"], done.stderr
