"""The system's calls on ranges of memory that Python has no names for. Knows addresses, not what they hold.

On systems other than Linux they are not called: `AVAILABLE` says so, and files are then mapped and nothing more.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

AVAILABLE = sys.platform == "linux"
PAGE = mmap.PAGESIZE
MAP_NORESERVE = 0x4000

RANDOM, WILLNEED, DONTNEED = 1, 3, 4
HUGEPAGE, NOHUGEPAGE = 14, 15
POPULATE_READ, POPULATE_WRITE = 22, 23  # Linux 5.14

_MLOCK_ONFAULT = 1
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS, _IOPRIO_IDLE = 1, 3 << 13


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    address, size = ctypes.c_void_p, ctypes.c_size_t
    libc.madvise.argtypes = (address, size, ctypes.c_int)
    libc.mincore.argtypes = (address, size, address)
    return libc


def whole_pages(start: int, n_bytes: int) -> tuple[int, int]:
    """(start, size) of all pages that the range touches; for addresses as for places in a file."""
    first = start // PAGE * PAGE
    return first, -(-(start + n_bytes) // PAGE) * PAGE - first


def inner_pages(start: int, n_bytes: int) -> tuple[int, int]:
    """(start, size) of the pages that lie in the range whole; the size may be 0."""
    first = -(-start // PAGE) * PAGE
    return first, max(0, (start + n_bytes) // PAGE * PAGE - first)


def madvise(address: int, n_bytes: int, advice: int) -> int:
    """0, or the error number; the address must begin a page."""
    if _libc().madvise(address, n_bytes, advice) == 0:
        return 0
    return ctypes.get_errno() or -1


def mincore(address: int, n_bytes: int) -> int:
    """How many of the range's whole pages are in memory, whoever read them.

    For a file that the caller neither owns nor may write, Linux says that all of them are: see `tells_residency`.
    """
    pages = np.empty(n_bytes // PAGE, np.uint8)
    if _libc().mincore(address, n_bytes, pages.ctypes.data):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(np.count_nonzero(pages & 1))


def resident_bytes(memory: NDArray[Any]) -> int:
    """How much of memory of our own was touched."""
    start, size = whole_pages(memory.ctypes.data, memory.nbytes)
    return PAGE * mincore(start, size) if size else 0


def tells_residency(fd: int) -> bool:
    """Whether mincore tells this caller the truth about the file."""
    owner = os.fstat(fd).st_uid
    return os.geteuid() in (0, owner) or os.access(f"/proc/self/fd/{fd}", os.W_OK)


def lock_on_fault(address: int, n_bytes: int) -> bool:
    """Keep the range's pages in memory from their first use on; False where the limit forbids it."""
    libc = _libc()
    if not hasattr(libc, "mlock2"):
        return False
    libc.mlock2.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
    return int(libc.mlock2(address, n_bytes, _MLOCK_ONFAULT)) == 0


def idle_io() -> None:
    """Let this thread's reads wait for everybody else's, where the disk's scheduler knows the difference."""
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        _libc().syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE)
