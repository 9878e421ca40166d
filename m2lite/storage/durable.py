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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

from m2lite.errors import M2liteError, ResourceError, UsageError

StrPath = str | os.PathLike[str]
Buffer = bytes | bytearray | memoryview

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PART_MARK = b"\0m2l"  # what a part begins with until it is complete: how we know our own
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_BLOCK_BYTES = 4096  # what a new name needs at least
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
    with _disk_errors(path, len(data)):
        _write_aside(path, [data], mode, replaces=True)


def write_output(path: StrPath, chunks: Iterable[Buffer], n_bytes: int, *, replaces: bool) -> None:
    """`path` holds all of the chunks, `n_bytes` in all, or what it held before; UsageError for a name that is taken
    unless it `replaces` what is there. What writers that died left beside it goes."""
    path = Path(path)
    remove_leftovers(path)
    with _disk_errors(path, n_bytes):
        if free_bytes(path.parent) < n_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write_aside(path, chunks, 0o666, replaces)


def _write_aside(path: Path, chunks: Iterable[Buffer], mode: int, replaces: bool) -> None:
    """Under another name, until all is on disk."""
    temporary = _temporary(path)
    fd = fsops.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with _closing(fd):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it has its name: this is no leftover
            for chunk in chunks:
                _write_all(fd, chunk)
            fsops.fsync(fd)
            _give_name(temporary, path, replaces)
    except BaseException:
        with contextlib.suppress(OSError):
            fsops.unlink(temporary)
        raise
    _sync_directory(path.parent)


def _give_name(temporary: Path, path: Path, replaces: bool) -> None:
    if replaces:
        fsops.replace(temporary, path)
        return
    try:
        fsops.link(temporary, path)  # unlike a rename it never takes a name from another file
    except FileExistsError:
        raise UsageError(f"{path}: exists already.", "Choose another name, or remove it first.") from None
    fsops.unlink(temporary)


def _temporary(path: Path) -> Path:
    """A name beside `path` under which its next content grows."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")


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


class LineLog:
    """Whole lines of a file, each durable before `append` returns; locked, so that a file has one writer.

    What a crash left of a last line is dropped. `remove` while the lock is held ends it. `lines` are all of them, or
    none with `keeps_lines` False, for files that are too long for that.
    """

    def __init__(self, path: StrPath, keeps_lines: bool = True) -> None:
        self.path, self._keeps_lines = Path(path), keeps_lines
        self.lines: list[bytes] = []
        with _disk_errors(self.path, _BLOCK_BYTES):
            self._fd: int | None = _open_locked(self.path, 0o600)
            if keeps_lines:
                data = _read_all(self._fd)
                self._size = data.rfind(b"\n") + 1
                self.lines = data[: self._size].split(b"\n")[:-1]
            else:
                self._size = _end_of_lines(self._fd)

    def append(self, lines: Sequence[str]) -> None:
        """All of the lines are on disk; or after an error none counts."""
        fd = _known(self._fd, self.path)
        data = b"".join(line.encode() + b"\n" for line in lines)
        assert data.count(b"\n") == len(lines)
        with _disk_errors(self.path, len(data)):
            fsops.truncate(fd, self._size)  # a line that a crash tore
            try:
                _write_all(fd, data, self._size)
                fsops.fsync(fd)
                if not self._size:
                    _sync_directory(self.path.parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    fsops.truncate(fd, self._size)
                raise
        self._size += len(data)
        if self._keeps_lines:
            self.lines += data.split(b"\n")[:-1]

    def replace(self, lines: Iterable[bytes]) -> None:
        """These lines, each with its newline, are all; until they are on disk, the file is as it was."""
        assert not self._keeps_lines
        fd = _known(self._fd, self.path)
        temporary = _temporary(self.path)
        with _disk_errors(self.path, self._size):
            new = fsops.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)  # before it has the name: nobody comes between
                n_bytes = 0
                for line in lines:
                    _write_all(new, line, n_bytes)
                    n_bytes += len(line)
                fsops.fsync(new)
                fsops.replace(temporary, self.path)
            except BaseException:
                with contextlib.suppress(OSError):
                    fsops.close(new)
                    fsops.unlink(temporary)
                raise
            self._fd, self._size = new, n_bytes
            fsops.close(fd)
            _sync_directory(self.path.parent)

    def clear(self) -> None:
        """No line is left, on disk too."""
        self.cut(0)

    def cut(self, n_lines: int) -> None:
        """The first `n_lines` are left, on disk too."""
        assert self._keeps_lines
        fd, size = _known(self._fd, self.path), sum(len(line) + 1 for line in self.lines[:n_lines])
        with _disk_errors(self.path, 0):
            fsops.truncate(fd, size)
            fsops.fsync(fd)
        self._size = size
        del self.lines[n_lines:]

    def rename(self, path: Path) -> None:
        """The file has another name, which nobody has yet: UsageError for one that is taken."""
        with _disk_errors(path, _BLOCK_BYTES):
            try:
                fsops.link(self.path, path)  # unlike a rename it never takes a name from another file
            except FileExistsError:
                raise UsageError(f"{path}: exists already.", "Choose another name.") from None
            former, self.path = self.path, path
            with contextlib.suppress(OSError):  # it then has two names, and is whole under both
                fsops.unlink(former)
            _sync_directory(path.parent)

    def remove(self) -> None:
        try:
            if self._fd is not None:
                with _disk_errors(self.path, 0):
                    fsops.unlink(self.path)
        finally:
            with contextlib.suppress(M2liteError):  # nobody misses what a file that is gone has lost
                self.close()

    def close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with _disk_errors(self.path, 0):
                fsops.close(fd)


class PartFile:
    """A large file, written by offset under the name PATH.part, that gets its own name when it is complete.

    The space is reserved first, and the part begins with PART_MARK until `complete`. Leaving a `with` block early, or
    `close`, keeps the part: the next `PartFile` of that name starts it anew, or with `resume` takes it as it is if it
    has the right size (`resumed` tells). `discard` removes it. It is locked against a second writer. A file of the
    final name is an error, or with `replaces` stays whole until `publish` puts the new one in its place. So is a part
    that is not known as ours: by its mark, or because `is_ours` or `resume` say that a journal names it.
    """

    def __init__(
        self, path: StrPath, n_bytes: int, *, replaces: bool = False, resume: bool = False, is_ours: bool = False
    ) -> None:
        self.path = Path(path)
        self.part_path = part_path(self.path)
        self.n_bytes = n_bytes
        self._is_named = False
        if not replaces and os.path.lexists(self.path):
            raise UsageError(f"{self.path}: exists already.", "Choose another name, or remove it first.")
        with _disk_errors(self.path, n_bytes):
            self._fd: int | None = _open_locked(self.part_path, 0o666)
            self.resumed = resume and os.fstat(self._fd).st_size == n_bytes
            if not (resume or is_ours or self._is_marked()):
                self.close()
                raise UsageError(
                    f"{self.part_path} is there already and no unfinished output of m2lite.",
                    "Move it away, or choose another name for the output.",
                )
            try:
                if self.resumed:
                    _write_all(self._fd, PART_MARK[:n_bytes], 0)
                else:
                    self._reserve()
            except BaseException:
                with contextlib.suppress(M2liteError):
                    self.discard()
                raise

    def _is_marked(self) -> bool:
        """Whether it begins as our parts do, or holds nothing that anybody could miss."""
        start = os.pread(self._open_fd(), len(PART_MARK), 0)
        return start == PART_MARK[: len(start)]

    def _reserve(self) -> None:
        fd = self._open_fd()
        fsops.truncate(fd, 0)
        _write_all(fd, PART_MARK[: self.n_bytes], 0)
        if free_bytes(self.path.parent) < self.n_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.n_bytes:
            fsops.allocate(fd, self.n_bytes)

    def write(self, offset: int, data: Buffer) -> None:
        """Bytes `offset` and on; within `n_bytes`."""
        if offset < 0 or offset + len(memoryview(data).cast("B")) > self.n_bytes:
            raise ValueError(f"writing past the {self.n_bytes} bytes of {self.path}")
        with _disk_errors(self.path, self.n_bytes):
            _write_all(self._open_fd(), data, offset)

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes that stand there, from the disk if they were synced and released."""
        with _disk_errors(self.path, self.n_bytes):
            while into:
                n_bytes = os.preadv(self._open_fd(), [into], offset)
                if not n_bytes:
                    raise OSError(errno.EIO, "the file has become shorter")
                offset, into = offset + n_bytes, into[n_bytes:]

    def release(self, offset: int, n_bytes: int) -> None:
        """Begin to write these bytes out, and give up the memory of those that are on disk."""
        advise(self._open_fd(), offset, n_bytes, "DONTNEED")

    def sync(self) -> None:
        """What was written so far is on disk."""
        with _disk_errors(self.path, self.n_bytes):
            fsops.fdatasync(self._open_fd())

    def complete(self, magic: Buffer = b"") -> None:
        """All is on disk. `magic` goes to offset 0 last, in place of the mark, when everything else is safe."""
        self._sync_all()
        if magic:
            self.write(0, magic)
            self._sync_all()

    def publish(self) -> None:
        """The complete file has its name."""
        with _disk_errors(self.path, self.n_bytes):
            fsops.replace(self.part_path, self.path)
            self._is_named = True
            _sync_directory(self.path.parent)
        self.close()

    def finish(self, magic: Buffer = b"") -> None:
        """All is on disk and has its name."""
        self.complete(magic)
        self.publish()

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

    def _sync_all(self) -> None:
        with _disk_errors(self.path, self.n_bytes):
            fsops.fsync(self._open_fd())

    def _open_fd(self) -> int:
        return _known(self._fd, self.part_path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def part_path(path: Path) -> Path:
    """Under which name a large file grows."""
    return path.with_name(path.name + ".part")


def advise(fd: int, offset: int, n_bytes: int, what: str) -> None:
    """Tell the page cache what comes ("WILLNEED") or is done with ("DONTNEED"); only speed and memory depend on it."""
    advice = getattr(os, f"POSIX_FADV_{what}", None)
    if advice is not None:
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, offset, n_bytes, advice)


def _open_locked(path: Path, mode: int) -> int:
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


def _known(fd: int | None, path: Path) -> int:
    if fd is None:
        raise ValueError(f"{path} is closed")
    return fd


def _read_all(fd: int) -> bytes:
    chunks: list[bytes] = []
    while chunk := os.pread(fd, 1 << 20, sum(map(len, chunks))):
        chunks.append(chunk)
    return b"".join(chunks)


def _end_of_lines(fd: int) -> int:
    """Where the last whole line ends."""
    end = os.fstat(fd).st_size
    while end:
        start = max(0, end - (1 << 16))
        at = os.pread(fd, end - start, start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


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
        raise ResourceError(*_no_room(path, n_bytes, error)) from error


def _no_room(path: Path, n_bytes: int, error: OSError) -> tuple[str, str]:
    """Which limit it was, by its name: the disk's room, this user's share of it, or the size of a single file."""
    needed = f"{path}: no room: {n_bytes} bytes are needed"
    try:
        free = f"{free_bytes(path.parent)} are free"
    except OSError:
        free = "the free space is unknown"
    if error.errno == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY:
            what = f"{needed}, and a file may have {limit}, the limit on file sizes of this shell ({error.strerror})."
            return what, "Raise it with `ulimit -f unlimited`, or write smaller parts."
        what = f"{needed}, and the file system holds no file of that size ({error.strerror})."
        return what, "Choose another disk, or write smaller parts."
    if error.errno == errno.EDQUOT:
        what = f"{needed}, and this user's quota on that disk is used up; {free} for others ({error.strerror})."
        return what, "Free some of your files there, or ask for a larger quota."
    return f"{needed}, {free} ({error.strerror}).", "Free some space and try again."
