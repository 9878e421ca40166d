"""File operations that fail or die at call n, and a job that is tried at every one of them. Knows no job."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from m2lite.errors import M2liteError, ResourceError
from m2lite.storage import durable

CHANGES = [name for name in vars(durable.FileOps) if not name.startswith("_")]


class Dead(BaseException):
    """The process ended here: nothing that follows reaches the disk."""


class Faults(durable.FileOps):
    """The real calls (but syncs, which only cost time here), of which number `fails_at` fails with `code`.

    Without a code the process ends there, by raising Dead; nothing happens afterwards.
    Writes take `most` bytes at once. `names` are the calls that were made.
    """

    def __init__(self, fails_at: int = 0, code: int | None = None, most: int = 350) -> None:
        self.n_calls = 0
        self.names: list[str] = []
        self.open_fds: set[int] = set()
        self._fails_at, self._code, self._most = fails_at, code, most
        for name in CHANGES:
            setattr(self, name, self._counted(name, getattr(durable.FileOps, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            self.n_calls += 1
            self.names.append(name)
            if self._fails_at and self.n_calls >= self._fails_at and self._code is None:
                raise Dead
            if self.n_calls == self._fails_at:
                assert self._code is not None
                raise OSError(self._code, os.strerror(self._code))
            if name == "close":
                self.open_fds.discard(arguments[0])
            if name in ("fsync", "fdatasync"):
                return None
            if name in ("write", "pwrite"):  # the system may write less than it is asked to
                arguments = (arguments[0], arguments[1][: self._most], *arguments[2:])
            result = call(*arguments)
            if name == "open":
                self.open_fds.add(result)
            return result

        return wrapped

    def end_process(self) -> None:
        """What the system does for a process that ended: its descriptors and locks are gone."""
        for fd in self.open_fds:
            with contextlib.suppress(OSError):
                os.close(fd)


@contextlib.contextmanager
def faults(
    monkeypatch: pytest.MonkeyPatch, fails_at: int = 0, code: int | None = None, most: int = 350
) -> Iterator[Faults]:
    found = Faults(fails_at, code, most=most)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "fsops", found)
        try:
            yield found
        finally:
            found.end_process()


Job = Callable[[Path], object]
Check = Callable[[Path, bool, bool], None]


def at_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare: Job, job: Job, check: Check, most: int = 350
) -> int:
    """`job(folder)` with a fault at call 1, 2, ... until it meets none; how many calls it makes.

    Before each, `prepare` fills a new folder; after each, `check(folder, is_done, is_dead)` looks at what is left, with
    a disk that works again. A fault that the job does not survive is an error with the system's reason.
    """
    n_calls = 0
    for code in (errno.ENOSPC, errno.EIO, None):
        for number in itertools.count(1):
            folder = tmp_path / f"{code}-{number}"
            folder.mkdir()
            with faults(monkeypatch):  # without waiting for the disk
                prepare(folder)
            is_done = False
            with faults(monkeypatch, number, code, most) as disk:
                try:
                    job(folder)
                    is_done = True
                except Dead:
                    assert code is None
                except M2liteError as error:
                    assert code is not None and isinstance(error, ResourceError) == (code == errno.ENOSPC)
                    assert os.strerror(code) in str(error)
            with faults(monkeypatch):
                check(folder, is_done, code is None and not is_done)
            if disk.n_calls < number:
                assert is_done
                n_calls = disk.n_calls
                break
    return n_calls
