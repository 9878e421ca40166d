"""Who compiles what, among processes that fill one directory, and since when. Knows no kernel."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path


class Claims:
    """Of one directory: a byte of one file for each name. Where that file cannot be had, every claim is granted.

    The system takes back what a process holds when it ends, however it ends. Within a process all claims agree.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / ".claims"
        self._file: int | None = None

    def take(self, name: str) -> bool:
        """False where another process has it."""
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(name))
        except (BlockingIOError, PermissionError):
            return self._file is None
        except OSError:
            pass
        return True

    def release(self, name: str) -> None:
        if self._file is not None:
            with suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _place(name))


@cache
def claims_in(directory: Path) -> Claims:
    """The one of this process: a second file descriptor would give up what the first has."""
    return Claims(directory)


def _place(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])


class Clock:
    """How long this process has compiled, or waited for others that do, since `restart`."""

    def __init__(self) -> None:
        self._under_way = set[str]()
        self.restart()

    def restart(self, *asked: tuple[float, Callable[[], None]]) -> None:
        """Each is called once, when so many seconds have gone into compiling and it goes on."""
        self.seconds, self._since, self._asked = 0.0, time.monotonic(), list(asked)

    def begin(self, name: str) -> None:
        self._count()
        self._under_way.add(name)
        while self._asked and self._asked[0][0] <= self.seconds:
            self._asked.pop(0)[1]()

    def end(self, name: str) -> None:
        self._count()
        self._under_way.discard(name)

    def _count(self) -> None:
        now = time.monotonic()
        if self._under_way:
            self.seconds += now - self._since
        self._since = now


CLOCK = Clock()
