"""Files of lines that only grow, each line on disk before it counts, and one writer at a time. Knows no format."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from m2lite.errors import M2liteError, UsageError
from m2lite.storage import durable
from m2lite.storage.durable import StrPath, disk_errors, known, open_locked, sync_directory, write_all, written_aside

_BLOCK_BYTES = 4096  # what a new name needs at least


class LineLog:
    """Whole lines of a file, each durable before `append` returns; locked, so that a file has one writer.

    What a crash left of a last line is dropped. `remove` while the lock is held ends it. `lines` are all of them, or
    none with `keeps_lines` False, for files that are too long for that.
    """

    def __init__(self, path: StrPath, keeps_lines: bool = True) -> None:
        self.path, self._keeps_lines = Path(path), keeps_lines
        self.lines: list[bytes] = []
        with disk_errors(self.path, _BLOCK_BYTES):
            self._fd: int | None = open_locked(self.path, 0o600)
            if keeps_lines:
                with os.fdopen(self._fd, "rb", closefd=False) as file:
                    data = file.read()
                self._size = data.rfind(b"\n") + 1
                self.lines = data[: self._size].split(b"\n")[:-1]
            else:
                self._size = _end_of_lines(self._fd)

    def append(self, lines: Sequence[str]) -> None:
        """All of the lines are on disk; or after an error none counts."""
        fd = known(self._fd, self.path)
        data = b"".join(line.encode() + b"\n" for line in lines)
        assert data.count(b"\n") == len(lines)
        with disk_errors(self.path, len(data)):
            durable.fsops.truncate(fd, self._size)  # a line that a crash tore
            try:
                write_all(fd, data, self._size)
                durable.fsops.fsync(fd)
                if not self._size:
                    sync_directory(self.path.parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    durable.fsops.truncate(fd, self._size)
                raise
        self._size += len(data)
        if self._keeps_lines:
            self.lines += data.split(b"\n")[:-1]

    def replace(self, lines: Iterable[bytes]) -> None:
        """These lines, each with its newline, are all; until they are on disk, the file is as it was."""
        assert not self._keeps_lines
        fd = known(self._fd, self.path)
        with disk_errors(self.path, self._size):
            with written_aside(self.path, 0o600) as new:
                n_bytes = 0
                for line in lines:
                    write_all(new, line, n_bytes)
                    n_bytes += len(line)
            self._fd, self._size = new, n_bytes
            durable.fsops.close(fd)
            sync_directory(self.path.parent)

    def cut(self, n_lines: int) -> None:
        """The first `n_lines` are left, on disk too."""
        assert self._keeps_lines
        fd, size = known(self._fd, self.path), sum(len(line) + 1 for line in self.lines[:n_lines])
        with disk_errors(self.path, 0):
            durable.fsops.truncate(fd, size)
            durable.fsops.fsync(fd)
        self._size = size
        del self.lines[n_lines:]

    def rename(self, path: Path) -> None:
        """The file has another name, which nobody has yet: UsageError for one that is taken."""
        with disk_errors(path, _BLOCK_BYTES):
            try:
                durable.fsops.link(self.path, path)  # unlike a rename it never takes a name from another file
            except FileExistsError:
                raise UsageError(f"{path}: exists already.", "Choose another name.") from None
            former, self.path = self.path, path
            with contextlib.suppress(OSError):  # it then has two names, and is whole under both
                durable.fsops.unlink(former)
            sync_directory(path.parent)

    def remove(self) -> None:
        try:
            if self._fd is not None:
                with disk_errors(self.path, 0):
                    durable.fsops.unlink(self.path)
        finally:
            with contextlib.suppress(M2liteError):  # nobody misses what a file that is gone has lost
                self.close()

    def close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with disk_errors(self.path, 0):
                durable.fsops.close(fd)


def _end_of_lines(fd: int) -> int:
    end = os.fstat(fd).st_size
    while end:
        start = max(0, end - (1 << 16))
        at = os.pread(fd, end - start, start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0
