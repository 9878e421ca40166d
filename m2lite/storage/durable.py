"""Writes user data so that a crash, a full disk or a power cut loses nothing that was finished. Knows no format.

A name appears only when the file behind it is complete and on disk. Every call that changes the disk goes through
`fsops`, which tests replace by one that fails or dies at call n.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import resource
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from m2lite.errors import M2liteError, ResourceError, UsageError
from m2lite.system.byte_units import format_bytes

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
    fdatasync = staticmethod(getattr(os, "fdatasync", os.fsync))  # macOS has only the former
    close = staticmethod(os.close)
    replace = staticmethod(os.replace)
    link = staticmethod(os.link)
    unlink = staticmethod(os.unlink)

    @staticmethod
    def allocate(fd: int, n_bytes: int) -> None:
        """Reserve the blocks, where the file system can; else only set the length.

        Not posix_fallocate: where the file system cannot, that writes to every block, for hours at 130 GB.
        """
        while (code := _fallocate(fd, n_bytes)) == errno.EINTR:
            pass
        if code in _UNSUPPORTED:
            os.ftruncate(fd, n_bytes)
        elif code:
            raise OSError(code, os.strerror(code))


def _fallocate(fd: int, n_bytes: int) -> int:
    """Linux's own call, which the os module lacks: 0 or the number of the error."""
    library = ctypes.CDLL(None, use_errno=True)
    reserve = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if reserve is None:
        return errno.ENOSYS
    return ctypes.get_errno() if reserve(fd, 0, ctypes.c_int64(0), ctypes.c_int64(n_bytes)) else 0


fsops = FileOps()


def free_bytes(directory: StrPath) -> int:
    """Bytes that this user may still write there."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def atomic_write(path: StrPath, data: Buffer, mode: int = 0o600) -> None:
    """`path` holds all of `data`, or what it held before."""
    path = Path(path)
    with disk_errors(path, len(data)):
        _write_aside(path, [data], mode, replaces=True)


def write_output(path: StrPath, chunks: Iterable[Buffer], n_bytes: int, *, replaces: bool) -> None:
    """`path` holds all of the chunks, `n_bytes` in all, or what it held before; UsageError for a name that is taken
    unless it `replaces` what is there. What writers that died left beside it goes."""
    path = Path(path)
    remove_leftovers(path)
    with disk_errors(path, n_bytes):
        if free_bytes(path.parent) < n_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write_aside(path, chunks, 0o666, replaces)


def _write_aside(path: Path, chunks: Iterable[Buffer], mode: int, replaces: bool) -> None:
    with written_aside(path, mode, replaces) as fd:
        for chunk in chunks:
            write_all(fd, chunk)
    fsops.close(fd)
    sync_directory(path.parent)


@contextlib.contextmanager
def written_aside(path: Path, mode: int, replaces: bool = True) -> Iterator[int]:
    """A new file under another name, open and locked; it gets its own when all that was written inside is on disk."""
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    fd = fsops.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # before it has the name: it is no leftover, and stays ours
        yield fd
        fsops.fsync(fd)
        _give_name(temporary, path, replaces)
    except BaseException:
        with contextlib.suppress(OSError):
            fsops.close(fd)
        with contextlib.suppress(OSError):
            fsops.unlink(temporary)
        raise


def _give_name(temporary: Path, path: Path, replaces: bool) -> None:
    if replaces:
        fsops.replace(temporary, path)
        return
    try:
        fsops.link(temporary, path)  # unlike a rename it never takes a name from another file
    except FileExistsError:
        raise UsageError(f"{path}: exists already.", "Choose another name, or remove it first.") from None
    fsops.unlink(temporary)


def remove_leftovers(path: Path) -> None:
    """What was to take the place of `path` when a process died: nobody holds its lock any more."""
    ours = re.compile(rf"\.{re.escape(path.name[:200])}\.[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(OSError):
        for found in [each for each in path.parent.iterdir() if ours.fullmatch(each.name)]:
            with (
                contextlib.suppress(OSError),
                _closing(os.open(found, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as fd,
            ):
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    fsops.unlink(found)


def advise(fd: int, offset: int, n_bytes: int, what: str) -> None:
    """Tell the page cache what comes ("WILLNEED") or is done with ("DONTNEED"); only speed and memory depend on it."""
    advice = getattr(os, f"POSIX_FADV_{what}", None)
    if advice is not None:
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, offset, n_bytes, advice)


def open_locked(path: Path, mode: int) -> int:
    """The file that has this name, opened or created, under an exclusive lock."""
    while True:
        fd = fsops.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise UsageError(f"{path} is no regular file.", "Choose another name.")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                owner = _lock_owner(fd)
                os.close(fd)
                raise UsageError(f"{path}: in use by {owner}.", "Wait until it is done.") from None
        # The former owner may have renamed or removed the file between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        os.close(fd)


def _lock_owner(fd: int) -> str:
    """Who holds the lock, as Linux lists it: `1: FLOCK ADVISORY WRITE pid major:minor:inode 0 EOF`."""
    status = os.fstat(fd)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if "->" not in fields and len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == place:
                if int(fields[4]) > 0:  # 0 or -1: a process outside of this container
                    return f"pid {fields[4]}"
    return "another process"


def known(fd: int | None, path: Path) -> int:
    if fd is None:
        raise ValueError(f"{path} is closed")
    return fd


def write_all(fd: int, data: Buffer, offset: int | None = None) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        chunk = rest[:_MAX_WRITE_BYTES]
        n_bytes = fsops.write(fd, chunk) if offset is None else fsops.pwrite(fd, chunk, offset)
        rest = rest[n_bytes:]
        if offset is not None:
            offset += n_bytes


def sync_directory(directory: Path) -> None:
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
def disk_errors(path: Path, n_bytes: int) -> Iterator[None]:
    """OSError -> an error that names the file, and the space where that is what lacks."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise M2liteError(
                f"{path}: cannot be written: {error.strerror}.", "Check the directory and disk."
            ) from error
        raise ResourceError(*_no_room(path, n_bytes, error)) from error


def _no_room(path: Path, n_bytes: int, error: OSError) -> tuple[str, str]:
    """Which limit it was, by its name: the disk's room, this user's share of it, or the size of a single file."""
    needed = f"{path}: no room: {format_bytes(n_bytes)} are needed"
    try:
        free = f"{format_bytes(free_bytes(path.parent))} are free"
    except OSError:
        free = "the free space is unknown"
    if error.errno == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY:
            most = f"a file may have {format_bytes(limit)}, the limit on file sizes of this shell"
            what = f"{needed}, and {most} ({error.strerror})."
            return what, "Raise it with `ulimit -f unlimited`, or write smaller parts."
        what = f"{needed}, and the file system holds no file of that size ({error.strerror})."
        return what, "Choose another disk, or write smaller parts."
    if error.errno == errno.EDQUOT:
        what = f"{needed}, and this user's quota on that disk is used up; {free} for others ({error.strerror})."
        return what, "Free some of your files there, or ask for a larger quota."
    return f"{needed}, {free} ({error.strerror}).", "Free some space and try again."
