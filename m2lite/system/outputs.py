"""Where a command may write: to a new name or to a file, and never to what it reads. Knows paths and inodes, no format.

A command first tells `Places` all that it reads, then has each output approved, before any of it is opened: a model
takes minutes to read, and what was overwritten is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from m2lite.errors import UsageError
from m2lite.system.paths import kind_of_file

StrPath = str | os.PathLike[str]
Kind = Literal["new", "replaced", "continued"]
STDIO = "-"
_STDIN = Path("/dev/stdin")
_OTHER = "Choose another name."


class Places:
    """All files of one command: those that it reads, and those that it will write."""

    def __init__(self) -> None:
        self._inputs: dict[tuple[int, int] | Path, Path] = {}
        self._outputs: dict[tuple[int, int] | Path, None] = {}

    def reads(self, *paths: StrPath | None) -> Self:
        """These are inputs: of a directory every file in it, for "-" what stdin reads. One may be missing, or None."""
        for path in paths:
            if path is None:
                continue
            named = _STDIN if os.fspath(path) == STDIO else Path(path)
            with contextlib.suppress(RuntimeError):  # nobody's home
                named = named.expanduser()
            for file in [named, *_files_in(named)]:
                for key in _keys(file):
                    self._inputs.setdefault(key, file)
        return self

    def approve(
        self,
        option: str,
        path: StrPath,
        beside: Sequence[Path] = (),
        *,
        kind: Kind = "new",
        begins: bytes = b"",
        todo: str = _OTHER,
        is_kept: bool = True,
    ) -> None:
        """UsageError unless `path`, and what is written `beside` it, may be written; `option` says whose it is.

        A "new" output must not exist. One that is "replaced" may be a file that begins with `begins`, or a link to
        one: the new file takes the name, what a link points to stays as it is. One that is "continued" may be a file,
        and no link. `todo` says what else to do where the name is no file's. Where it `is_kept`, no other output of
        the command may be one of these files.
        """
        target = Path(path)
        if os.fspath(path) == STDIO:
            raise UsageError(f"{option} - cannot be written to stdout.", "Name a file.")
        _check_directory(option, target)
        for name in (target, *beside):
            self.check_other(option, name)
        status = _status(option, target, follow=False)
        if status is not None:
            _check_taken(option, target, status, kind, begins, todo)
        for name in beside:
            status = _status(option, name, follow=False)
            if status is not None and not stat.S_ISREG(status.st_mode):
                raise UsageError(
                    f"{option} {target} needs the name {name}, which is {kind_of_file(status.st_mode)}.", _OTHER
                )
        if is_kept:
            for name in (target, *beside):
                self._outputs.update(dict.fromkeys(_keys(name)))

    def approve_stdout(self, option: str, fd: int = 1) -> None:
        """UsageError where stdout goes into an input: `>> IN`."""
        try:
            status = os.fstat(fd)
        except OSError:
            return
        known = self._inputs.get((status.st_dev, status.st_ino))
        if known is not None and stat.S_ISREG(status.st_mode):
            raise UsageError(f"{option}: stdout goes to {known}, which this command reads.", _OTHER)

    def check_other(self, option: str, name: Path) -> None:
        """UsageError where the name is an input's, or another output's."""
        for key in _keys(name):
            if key in self._inputs:
                known = self._inputs[key]
                also = "" if known == name else f", as {known}"
                raise UsageError(f"{option} {name} is a file that this command reads{also}.", _OTHER)
            if key in self._outputs:
                raise UsageError(f"{option} {name} is written by this command already.", _OTHER)


def _keys(path: Path) -> list[tuple[int, int] | Path]:
    """What tells a file: its place once links are followed, and its inode, which hard links share."""
    keys: list[tuple[int, int] | Path] = [path]
    with contextlib.suppress(OSError, ValueError):
        keys = [Path(os.path.realpath(path))]
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            keys.append((status.st_dev, status.st_ino))
    return keys


def _files_in(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if path.is_file()]
    except (OSError, ValueError):
        return []


def _status(option: str, path: Path, follow: bool) -> os.stat_result | None:
    """None where there is nothing."""
    try:
        return path.stat() if follow else path.lstat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{option} {path}: {reason}.", _OTHER) from None


def _check_directory(option: str, path: Path) -> None:
    folder = path.parent
    status = _status(option, folder, follow=True)
    if status is None:
        raise UsageError(f"{option} {path}: there is no directory {folder}.", "Make it first.")
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{option} {path}: {folder} is {kind_of_file(status.st_mode)}, not a directory.", _OTHER)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {path}: nothing can be written in {folder}.", "Choose another directory.")


def _check_taken(option: str, path: Path, status: os.stat_result, kind: Kind, begins: bytes, todo: str) -> None:
    """What is there is of the kind that may be there."""
    is_link = stat.S_ISLNK(status.st_mode)
    target = _status(option, path, follow=True) if is_link else status
    if target is None:
        raise UsageError(f"{option} {path} is a link to a file that is not there.", "Remove it, or name the file.")
    if not stat.S_ISREG(target.st_mode):
        raise UsageError(f"{option} {path} is {kind_of_file(target.st_mode)}, not a file.", todo)
    if kind == "new":
        raise UsageError(f"{option} {path}: exists already.", "Choose another name, or remove it first.")
    if kind == "continued" and is_link:
        raise UsageError(f"{option} {path} is a link to {os.path.realpath(path)}.", "Name the file itself.")
    if kind == "continued" and not os.access(path, os.R_OK | os.W_OK):
        raise UsageError(f"{option} {path}: {os.strerror(errno.EACCES)}.", "Check its permissions.")
    if begins and target.st_size and not _begins(path, begins):
        raise UsageError(f"{option} {path}: exists already, and is no file of this kind.", _OTHER)


def _begins(path: Path, begins: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(begins)) == begins
    except OSError:
        return False
