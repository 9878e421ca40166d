"""Writes user data so that a crash, a full disk or a power cut loses nothing that was finished. Knows no format.

A name appears only when the file behind it is complete and on disk. Every call that changes the disk goes through
`fsops`, which tests replace by one that fails or dies at call n.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from m2lite.errors import M2liteError, ResourceError, UsageError

StrPath = str | os.PathLike[str]
Buffer = bytes | bytearray | memoryview

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_MAX_WRITE_BYTES = 1 << 30  # Linux writes at most 2 GiB at once, macOS refuses more


class FileOps:
    """The system calls that change the disk."""

    open = staticmethod(os.open)
    write = staticmethod(os.write)
    pwrite = staticmethod(os.pwrite)
    truncate = staticmethod(os.ftruncate)
    fsync = staticmethod(os.fsync)
    close = staticmethod(os.close)
    replace = staticmethod(os.replace)
    unlink = staticmethod(os.unlink)

    @staticmethod
    def allocate(fd: int, n_bytes: int) -> None:
        """Reserve the blocks, where the system can; else only set the length."""
        try:
            os.posix_fallocate(fd, 0, n_bytes)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
                raise
            os.ftruncate(fd, n_bytes)


fsops = FileOps()


def free_bytes(directory: StrPath) -> int:
    """Bytes that this user may still write there."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def atomic_write(path: StrPath, data: Buffer, mode: int = 0o600) -> None:
    """`path` holds all of `data`, or what it held before."""
    path = Path(path)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    with _disk_errors(path, len(data)):
        fd = fsops.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with _closing(fd):
                _write_all(fd, data)
                fsops.fsync(fd)
            fsops.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                fsops.unlink(temporary)
            raise
        _sync_directory(path.parent)


def append_line(path: StrPath, line: str | bytes) -> None:
    """`line` and a newline are the end of the file, on disk; or the file is as it was.

    A last line that an earlier crash tore off gets its newline first, so that no two lines are ever glued together.
    """
    path = Path(path)
    data = line.encode() if isinstance(line, str) else line
    if b"\n" in data:
        raise ValueError("a line holds a newline")
    with _disk_errors(path, len(data) + 1):
        is_new = not path.exists()
        with _closing(fsops.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)) as fd:
            size = os.fstat(fd).st_size
            torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            try:
                _write_all(fd, b"\n" * torn + data + b"\n")
                fsops.fsync(fd)
            except BaseException:
                with contextlib.suppress(OSError):
                    fsops.truncate(fd, size)
                raise
        if is_new:
            _sync_directory(path.parent)


class PartFile:
    """A large file, written by offset under the name PATH.part, that gets its own name when it is complete.

    The space is reserved first. Leaving a `with` block early, or `close`, keeps the part (its owner is gone, so the
    next `PartFile` of that name starts it anew); `discard` removes it. It is locked against a second writer. A file of
    the final name is an error, or with `replaces` stays whole until `finish` puts the new one in its place.
    """

    def __init__(self, path: StrPath, n_bytes: int, *, replaces: bool = False) -> None:
        self.path = Path(path)
        self.part_path = self.path.with_name(self.path.name + ".part")
        self.n_bytes = n_bytes
        self._is_named = False
        if not replaces and os.path.lexists(self.path):
            raise UsageError(f"{self.path}: exists already.", "Choose another name, or remove it first.")
        with _disk_errors(self.path, n_bytes):
            self._fd: int | None = self._open_locked()
            try:
                fsops.truncate(self._fd, 0)
                free = free_bytes(self.path.parent)
                if free < n_bytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if n_bytes:
                    fsops.allocate(self._fd, n_bytes)
            except BaseException:
                with contextlib.suppress(M2liteError):
                    self.discard()
                raise

    def write(self, offset: int, data: Buffer) -> None:
        """Bytes `offset` and on; within `n_bytes`."""
        if offset < 0 or offset + len(memoryview(data).cast("B")) > self.n_bytes:
            raise ValueError(f"writing past the {self.n_bytes} bytes of {self.path}")
        with _disk_errors(self.path, self.n_bytes):
            _write_all(self._open_fd(), data, offset)

    def sync(self) -> None:
        """What was written so far is on disk."""
        with _disk_errors(self.path, self.n_bytes):
            fsops.fsync(self._open_fd())

    def finish(self, magic: Buffer = b"") -> None:
        """All is on disk and has its name. `magic` goes to offset 0 last, when everything else is safe."""
        self.sync()
        if magic:
            self.write(0, magic)
            self.sync()
        with _disk_errors(self.path, self.n_bytes):
            fsops.replace(self.part_path, self.path)
            self._is_named = True
            _sync_directory(self.path.parent)
        self.close()

    def close(self) -> None:
        """Idempotent; what is not finished stays as PATH.part."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with _disk_errors(self.path, self.n_bytes):
                fsops.close(fd)

    def discard(self) -> None:
        """Remove the part; nothing once it is closed or has its name."""
        try:
            if self._fd is not None and not self._is_named:
                with _disk_errors(self.path, self.n_bytes):
                    fsops.unlink(self.part_path)  # before the lock goes, lest it be another's by then
        finally:
            self.close()

    def _open_locked(self) -> int:
        while True:
            fd = fsops.open(self.part_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno == errno.EWOULDBLOCK:
                    os.close(fd)
                    raise UsageError(
                        f"{self.part_path}: another process is writing this file.", "Wait until it is done."
                    ) from None
            # The former owner may have given the file its final name between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), self.part_path.stat()):
                    return fd
            os.close(fd)

    def _open_fd(self) -> int:
        if self._fd is None:
            raise ValueError(f"{self.part_path} is closed")
        return self._fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write_all(fd: int, data: Buffer, offset: int | None = None) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        chunk = rest[:_MAX_WRITE_BYTES]
        n_bytes = fsops.write(fd, chunk) if offset is None else fsops.pwrite(fd, chunk, offset)
        rest = rest[n_bytes:]
        if offset is not None:
            offset += n_bytes


def _sync_directory(directory: Path) -> None:
    """A new name survives a power cut only when its directory is on disk too."""
    with _closing(fsops.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        try:
            fsops.fsync(fd)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:  # some file systems cannot sync a directory
                raise


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    """Close errors count: on some file systems they are the first to tell that a write was lost."""
    try:
        yield fd
    except BaseException:
        with contextlib.suppress(OSError):
            fsops.close(fd)
        raise
    fsops.close(fd)


@contextlib.contextmanager
def _disk_errors(path: Path, n_bytes: int) -> Iterator[None]:
    """OSError -> an error that names the file, and the space where that is what lacks."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise M2liteError(
                f"{path}: cannot be written: {error.strerror}.", "Check the directory and disk."
            ) from error
        try:
            free = f"{free_bytes(path.parent)} are free"
        except OSError:
            free = "the free space is unknown"
        raise ResourceError(
            f"{path}: no room: {n_bytes} bytes are needed, {free} ({error.strerror}).", "Free some space and try again."
        ) from error
