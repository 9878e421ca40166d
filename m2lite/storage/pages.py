"""Pages of numbers on disk by key, within a budget: what was computed once need not be computed again. Knows no model.

A page that is lost, damaged or of another length is as good as none: whoever asks computes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import struct
from collections.abc import Callable
from pathlib import Path

import xxhash

from m2lite.storage import durable
from m2lite.storage.durable import advise

_HEADER = struct.Struct("<8s16s8x")  # magic, xxh3_128 of the page
_MAGIC = b"m2litekv"
_SUFFIX = ".page"
_GROWING = ".tmp"


class PageStore:
    """Files of one directory, each a page of `page_bytes`; those that were not used for longest go first."""

    def __init__(self, directory: Path, page_bytes: int, budget_bytes: int) -> None:
        self.directory, self.page_bytes, self.budget_bytes = directory, page_bytes, budget_bytes

    def path(self, key: str) -> Path:
        return self.directory / (key + _SUFFIX)

    def has(self, key: str) -> bool:
        return self.path(key).exists()

    def read(self, key: str, into: memoryview) -> bool:
        """Fill `into` with the page; False, and anything in `into`, where it is not there as it was written."""
        assert len(into) == self.page_bytes
        try:
            fd = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            header = bytearray(_HEADER.size)
            n_read = os.preadv(fd, [header, into], 0)
            while 0 < n_read < _HEADER.size + self.page_bytes:
                more = os.preadv(fd, [into[n_read - _HEADER.size :]], n_read)
                if not more:
                    return False
                n_read += more
            magic, digest = _HEADER.unpack(header)
            is_whole = n_read == _HEADER.size + self.page_bytes and magic == _MAGIC
            if not is_whole or xxhash.xxh3_128_digest(into) != digest:
                return False
            with contextlib.suppress(OSError):
                os.utime(fd)  # used now
            advise(fd, 0, 0, "DONTNEED")
            return True
        except OSError:
            return False
        finally:
            os.close(fd)

    def write(self, key: str, page: memoryview) -> bool:
        """Keep the page; False where the disk does not take it, which costs time later and nothing else.

        Not forced to the disk: what a crash spoils has another hash.
        """
        assert len(page) == self.page_bytes
        temporary = self.directory / f".{secrets.token_hex(8)}{_GROWING}"
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = durable.fsops.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with contextlib.suppress(OSError):  # not every file system has locks
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it has its name: see `trim`
                rest = memoryview(_HEADER.pack(_MAGIC, xxhash.xxh3_128_digest(page)))
                for part in (rest, page):
                    while part:
                        part = part[durable.fsops.write(fd, part) :]
                durable.fsops.replace(temporary, self.path(key))
            finally:
                durable.fsops.close(fd)
        except OSError:
            with contextlib.suppress(OSError):
                durable.fsops.unlink(temporary)
            return False
        return True

    def trim(self, keeps: Callable[[str], bool] = lambda key: False) -> int:
        """Delete what is over the budget, the longest unused first, in all directories beside this; bytes deleted.

        `keeps` says of a key whether it stays. What a process left that died while it wrote goes, too.
        """
        for path in self.directory.parent.glob(f"*/.*{_GROWING}"):
            _remove_unlocked(path)
        found = []
        for path in self.directory.parent.glob(f"*/*{_SUFFIX}"):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        over, n_deleted = sum(size for _, size, _ in found) - self.budget_bytes, 0
        for _, size, path in sorted(found):
            if n_deleted >= over:
                break
            if not keeps(path.stem):
                with contextlib.suppress(OSError):
                    durable.fsops.unlink(path)
                    n_deleted += size
        return n_deleted


def _remove_unlocked(path: Path) -> None:
    """A page that nobody writes any more."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            durable.fsops.unlink(path)
        finally:
            os.close(fd)
