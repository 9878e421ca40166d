"""Paths that a person typed, and the directories that the system keeps for a person. Opens no file."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Literal

from m2lite.errors import UsageError


def named_path(text: str | os.PathLike[str]) -> Path:
    """The path that the text names, `~` and `~user` resolved; UsageError if it cannot be the name of a file."""
    try:
        path = Path(text).expanduser()
        if b"\0" in os.fsencode(path):
            raise UsageError(f"{str(text)!r} is no path: it holds a zero byte.", "Correct it.")
    except RuntimeError:
        raise UsageError(f"{text}: there is no such home directory.", "Write the path without ~.") from None
    except UnicodeEncodeError:
        raise UsageError(f"{str(text)!r} is no path: it holds half of a character.", "Correct it.") from None
    return path


def user_dir(kind: Literal["cache", "config", "data", "state"]) -> Path:
    """Where the system keeps a person's files of that kind. Without a home it is a place where no file can be."""
    import platformdirs

    try:
        path = Path(getattr(platformdirs, f"user_{kind}_dir")("m2lite", appauthor=False))
    except RuntimeError:
        path = Path()
    return path if path.is_absolute() else Path(os.devnull) / "no-home" / "m2lite"


def machine_cache_dir() -> Path:
    """Where is kept what follows from the machine: compiled kernels, and what was measured."""
    return Path(os.environ.get("M2LITE_CACHE_DIR") or user_dir("cache"))


def make_private(path: Path) -> bool:
    """Whether nobody but the user can write in the directory; it is made where it is missing, as all above it are.

    One that others may only read is closed to them. OSError where it cannot be made.
    """
    missing = list[Path]()
    while not os.path.lexists(path):
        missing.append(path)
        path = path.parent
    for each in reversed(missing):
        with suppress(FileExistsError):  # another process was first
            each.mkdir(mode=0o700)
        path = each
    if not is_private(path):
        return False
    if path.lstat().st_mode & 0o077:
        with suppress(OSError):  # on a disk that is read-only
            path.chmod(0o700)
    return True


def is_private(path: Path) -> bool:
    """Whether it is the user's directory, in which nobody else can write. OSError where there is nothing."""
    info = path.lstat()
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022


_KINDS = (
    (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"), (stat.S_ISLNK, "a link"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


def kind_of_file(mode: int) -> str:
    """What `st_mode` says that a place holds, with its article."""
    return next((name for test, name in _KINDS if test(mode)), "a regular file")
