"""A large file that grows under the name PATH.part and gets its own when it is complete. Knows no format."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Self

from m2lite.errors import M2liteError, UsageError
from m2lite.storage import durable

PART_MARK = b"\0m2l"  # what a part begins with until it is complete: how we know our own


class PartFile:
    """A large file, written by offset under the name PATH.part, that gets its own name when it is complete.

    The space is reserved first, and the part begins with PART_MARK until `complete`. Leaving a `with` block early, or
    `close`, keeps the part: the next `PartFile` of that name starts it anew, or with `resume` takes it as it is if it
    has the right size (`resumed` tells). `discard` removes it. It is locked against a second writer. A file of the
    final name is an error, or with `replaces` stays whole until `publish` puts the new one in its place. So is a part
    that is not known as ours: by its mark, or because `is_ours` or `resume` say that a journal names it.
    """

    def __init__(
        self,
        path: durable.StrPath,
        n_bytes: int,
        *,
        replaces: bool = False,
        resume: bool = False,
        is_ours: bool = False,
    ) -> None:
        self.path = Path(path)
        self.part_path = part_path(self.path)
        self.n_bytes = n_bytes
        self._is_named = False
        if not replaces and os.path.lexists(self.path):
            raise UsageError(f"{self.path}: exists already.", "Choose another name, or remove it first.")
        with durable.disk_errors(self.path, n_bytes):
            self._fd: int | None = durable.open_locked(self.part_path, 0o666)
            self.resumed = resume and os.fstat(self._fd).st_size == n_bytes
            if not (resume or is_ours or self._is_marked()):
                self.close()
                raise UsageError(
                    f"{self.part_path} is there already and no unfinished output of m2lite.",
                    "Move it away, or choose another name for the output.",
                )
            try:
                if self.resumed:
                    durable.write_all(self._fd, PART_MARK[:n_bytes], 0)
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
        durable.fsops.truncate(fd, 0)
        durable.write_all(fd, PART_MARK[: self.n_bytes], 0)
        if durable.free_bytes(self.path.parent) < self.n_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.n_bytes:
            durable.fsops.allocate(fd, self.n_bytes)

    def write(self, offset: int, data: durable.Buffer) -> None:
        """Bytes `offset` and on; within `n_bytes`."""
        if offset < 0 or offset + len(memoryview(data).cast("B")) > self.n_bytes:
            raise ValueError(f"writing past the {self.n_bytes} bytes of {self.path}")
        with durable.disk_errors(self.path, self.n_bytes):
            durable.write_all(self._open_fd(), data, offset)

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes that stand there, from the disk if they were synced and released."""
        with durable.disk_errors(self.path, self.n_bytes):
            while into:
                n_bytes = os.preadv(self._open_fd(), [into], offset)
                if not n_bytes:
                    raise OSError(errno.EIO, "the file has become shorter")
                offset, into = offset + n_bytes, into[n_bytes:]

    def release(self, offset: int, n_bytes: int) -> None:
        """Begin to write these bytes out, and give up the memory of those that are on disk."""
        durable.advise(self._open_fd(), offset, n_bytes, "DONTNEED")

    def sync(self) -> None:
        """What was written so far is on disk."""
        with durable.disk_errors(self.path, self.n_bytes):
            durable.fsops.fdatasync(self._open_fd())

    def complete(self, magic: durable.Buffer = b"") -> None:
        """All is on disk. `magic` goes to offset 0 last, in place of the mark, when everything else is safe."""
        self._sync_all()
        if magic:
            self.write(0, magic)
            self._sync_all()

    def publish(self) -> None:
        with durable.disk_errors(self.path, self.n_bytes):
            durable.fsops.replace(self.part_path, self.path)
            self._is_named = True
            durable.sync_directory(self.path.parent)
        self.close()

    def close(self) -> None:
        """Idempotent; what is not finished stays as PATH.part."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with durable.disk_errors(self.path, self.n_bytes):
                durable.fsops.close(fd)

    def discard(self) -> None:
        """Remove the part; nothing once it is closed or has its name."""
        try:
            if self._fd is not None and not self._is_named:
                with durable.disk_errors(self.path, self.n_bytes):
                    durable.fsops.unlink(self.part_path)  # before the lock goes, lest it be another's by then
        finally:
            self.close()

    def _sync_all(self) -> None:
        with durable.disk_errors(self.path, self.n_bytes):
            durable.fsops.fsync(self._open_fd())

    def _open_fd(self) -> int:
        return durable.known(self._fd, self.part_path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def part_path(path: Path) -> Path:
    return path.with_name(path.name + ".part")
