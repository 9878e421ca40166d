"""Pages of numbers on disk by key, within a budget: what was computed once need not be computed again. Knows no model.

A page that is lost, damaged or of another length is as good as none: whoever asks computes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from m2lite.storage import durable
from m2lite.storage.durable import advise
from m2lite.system.paths import is_private, make_private

_HEADER = struct.Struct("<8s16s16s")  # magic, xxh3_128 of all that follows, what the writer says of the page
_MAGIC = b"m2litek2"
_NOTED = b"m2litek3"  # the same, then the length of a note, the page, the note
_LENGTH = struct.Struct("<I")
_NO_INFO = bytes(16)
_SUFFIX = ".page"
_GROWING = ".tmp"


class PageStore:
    """Files of one directory, each a page; those that were not used for longest go first."""

    def __init__(self, directory: Path, budget_bytes: int) -> None:
        self.directory, self.budget_bytes = directory, budget_bytes

    def path(self, key: str) -> Path:
        return self.directory / (key + _SUFFIX)

    def has(self, key: str) -> bool:
        return self.path(key).exists()

    def info(self, key: str) -> bytes | None:
        """What the writer of the page said of it; None where there is none."""
        try:
            fd = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            header = os.pread(fd, _HEADER.size, 0)
        except OSError:
            return None
        finally:
            os.close(fd)
        is_header = len(header) == _HEADER.size and header[:8] in (_MAGIC, _NOTED)
        return bytes(_HEADER.unpack(header)[2]) if is_header else None

    def read(self, key: str, into: memoryview) -> tuple[int, bytes, bytes] | None:
        """Fill `into` with the page, which may be shorter: its bytes, what its writer said of it, and its note.

        None, and anything in `into`, where it is not there as it was written.
        """
        try:
            if not is_private(self.directory):
                return None
            fd = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            head, n_note = os.pread(fd, _HEADER.size + _LENGTH.size, 0), 0
            magic, digest, info = _HEADER.unpack_from(head)
            if magic == _NOTED:
                (n_note,) = _LENGTH.unpack_from(head, _HEADER.size)
            n_head = _HEADER.size + _LENGTH.size * (magic == _NOTED)
            n_bytes = os.fstat(fd).st_size - n_head - n_note
            if magic not in (_MAGIC, _NOTED) or not 0 < n_bytes <= len(into) or n_note > len(into):
                return None
            note = bytearray(n_note)
            if not _fill(fd, [into[:n_bytes], memoryview(note)], n_head):
                return None
            if _digest(info, head[_HEADER.size : n_head], into[:n_bytes], bytes(note)) != digest:
                return None
            with contextlib.suppress(OSError):
                os.utime(fd)  # used now
            advise(fd, 0, 0, "DONTNEED")
            return n_bytes, bytes(info), bytes(note)
        except (OSError, struct.error):
            return None
        finally:
            os.close(fd)

    def write(self, key: str, page: memoryview, info: bytes = _NO_INFO, note: bytes = b"") -> bool:
        """Keep the page, 16 bytes on it, and a note; False where the disk does not take it, which costs only time.

        Not forced to the disk: what a crash spoils has another hash.
        """
        temporary = self.directory / f".{secrets.token_hex(8)}{_GROWING}"
        try:
            if not make_private(self.directory):
                return False
            fd = self._begin(temporary)
            try:
                length = _LENGTH.pack(len(note)) if note else b""
                head = _HEADER.pack(_NOTED if note else _MAGIC, _digest(info, length, page, note), info)
                for part in (memoryview(head + length), page, memoryview(note)):
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

    def _begin(self, temporary: Path) -> int:
        """A new file, which `trim` leaves alone, of whichever process, until it is closed."""
        while True:
            fd = durable.fsops.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return fd
            durable.fsops.close(fd)  # it was deleted before it had its lock

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


def _fill(fd: int, parts: Sequence[memoryview], at: int) -> bool:
    """Whether the file's bytes from `at` on fill them."""
    for part in parts:
        while part:
            n = os.preadv(fd, [part], at)
            if not n:
                return False
            part, at = part[n:], at + n
    return True


def _digest(*parts: bytes | memoryview) -> bytes:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _remove_unlocked(path: Path) -> None:
    """A page that nobody writes any more."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            durable.fsops.unlink(path)
        finally:
            os.close(fd)
