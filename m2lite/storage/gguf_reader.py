"""Open GGUF files, whole or split: checked, locked, mapped read-only. Knows bytes and types, not what they mean."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import stat
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from m2lite.errors import BadModelError, ResourceError
from m2lite.storage.durable import advise
from m2lite.storage.gguf_header import (
    KEY_ALIGNMENT,
    KEY_HEADER_HASH,
    GGUFArray,
    Header,
    Item,
    TensorInfo,
    Value,
    check_magic,
    parse_header,
)
from m2lite.storage.guard import Guard
from m2lite.storage.prefault import Prefault
from m2lite.storage.reads import File
from m2lite.storage.syscalls import DONTNEED, madvise

__all__ = ["GGUFArray", "GGUFFile", "TensorInfo", "open_gguf"]

_KEY_SPLIT_NO = "split.no"
_KEY_SPLIT_COUNT = "split.count"
_KEY_SPLIT_TENSORS = "split.tensors.count"
SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL | re.ASCII)
_ALL_PARTS = "Put all parts of one download into one directory and open the first."


class _Part:
    """One mapped file. The mapping and its shared lock end with the last view of it."""

    def __init__(self, path: Path, index: int) -> None:
        self.path = path
        self.fd = _open_file(path)
        self._close_fd = weakref.finalize(self, os.close, self.fd)
        try:
            self.state = self._state()
            if not self.state[2]:
                check_magic(b"", 0, str(path))  # an empty file cannot be mapped
            self.data = _map(self.fd, self.state[2], path)
            self.bytes: NDArray[np.uint8] = np.frombuffer(self.data, np.uint8)
            self.guard = Guard(int(self.bytes.ctypes.data), self.state[2])
            weakref.finalize(self.data, self.guard.release)
            try:
                self.header = parse_header(self.data, str(path), index)
            finally:
                self.check_unchanged()  # what was read of a file that was cut meanwhile says nothing
        except BaseException:
            self._close_fd()
            raise

    def _state(self) -> tuple[int, int, int, int]:
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def check_unchanged(self) -> None:
        """The open file, not its name: a file renamed into its place leaves ours whole."""
        state = self._state()
        if state != self.state:
            raise BadModelError(
                f"{self.path}: model file changed on disk ({self.state[2]} bytes when opened, {state[2]} now).",
                "Start again with the file as it is now.",
            )
        if self.guard.n_faults:
            raise BadModelError(f"{self.path}: a part of it cannot be read any more.", "Check the disk.")

    def close(self) -> None:
        self._close_fd()
        del self.bytes
        try:
            self.data.close()
        except BufferError:  # views are alive; the last one unmaps
            self.guard.leave()
        else:
            self.guard.release()


def _open_file(path: Path) -> int:
    """A descriptor with a shared lock on a regular file; never blocks."""
    try:
        mode = path.stat().st_mode  # before open: opening a FIFO waits for its writer
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "a FIFO" if stat.S_ISFIFO(mode) else "no regular file"
            raise BadModelError(f"{path}: not a GGUF file but {kind}.", "Name the .gguf file itself.")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadModelError(f"{path}: cannot be opened: {reason}.", "Check the path.") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            os.close(fd)
            raise BadModelError(f"{path}: another process is writing this file.", "Wait until it is done.") from None
        # Some file systems have no locks; reading goes on without one.
    return fd


def _map(fd: int, n_bytes: int, path: Path) -> mmap.mmap:
    try:
        return mmap.mmap(fd, n_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"{path}: its {n_bytes} bytes cannot be mapped: {error}.", "Check `ulimit -v` and the file system."
        ) from None


class GGUFFile:
    """An open GGUF file, whole or split: its metadata, its tensor table, and read-only views of its mapping.

    `close` is safe while views are alive: the mapping then ends with the last view and this object. An address holds
    only as long as the file is open or a view is kept.
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = list(parts)
        self.path = parts[0].path
        self.parts: tuple[Path, ...] = tuple(part.path for part in parts)
        self.metadata: Mapping[str, Value] = MappingProxyType(parts[0].header.metadata)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: tensor for part in parts for name, tensor in part.header.tensors.items()}
        )
        self.headers: tuple[Header, ...] = tuple(part.header for part in parts)
        self.sizes: tuple[int, ...] = tuple(part.state[2] for part in parts)
        self.mtimes_ns: tuple[int, ...] = tuple(part.state[3] for part in parts)
        self.size_bytes = sum(self.sizes)

    def array(self, key: str, kind: type[Item], type_name: str | None = None) -> list[Item]:
        """The items of the array `key`, which must be of this kind: see `GGUFArray.items`."""
        value = self.metadata.get(key)
        if isinstance(value, GGUFArray):
            return value.items(kind, type_name)
        found = "is missing" if value is None else f"is a single {type(value).__name__}"
        raise BadModelError(
            f"{self.path}: key '{key}' {found}, expected an array of {type_name or kind.__name__}.",
            "Convert the model again.",
        )

    def view(self, name: str) -> NDArray[np.uint8]:
        """uint8[n_bytes] = the tensor's bytes in the mapping, read-only."""
        tensor = self.tensors[name]
        return self._open_parts()[tensor.part].bytes[tensor.offset : tensor.offset + tensor.n_bytes]

    def raw_value(self, key: str) -> bytes:
        """A key's type and value as they are in the first file."""
        start, end = self.headers[0].spans[key]
        return bytes(self._open_parts()[0].data[start:end])

    def read(self, part: int, offset: int, n_bytes: int) -> NDArray[np.uint8]:
        """Bytes of one file, read instead of mapped: an error of the disk is an error here, not a signal."""
        into = np.empty(n_bytes, np.uint8)
        rest, file = into.data, self._open_parts()[part]
        while rest:
            try:
                done = os.preadv(file.fd, [rest], offset)
            except OSError as error:
                what = f"{file.path}: cannot be read at byte {offset}: {error.strerror}."
                raise BadModelError(what, "Check the disk.") from error
            if not done:
                raise BadModelError(f"{file.path}: ends at byte {offset}, {len(rest)} bytes early.", _ALL_PARTS)
            offset, rest = offset + done, rest[done:]
        return into

    def advise(self, part: int, offset: int, n_bytes: int, what: str) -> None:
        """What comes or is done with, for the page cache: see `durable.advise`."""
        advise(self._open_parts()[part].fd, offset, n_bytes, what)

    def address(self, name: str) -> int:
        """Where the tensor's first byte is mapped."""
        tensor = self.tensors[name]
        return int(self._open_parts()[tensor.part].bytes.ctypes.data) + tensor.offset

    def files(self) -> list[File]:
        """The parts, for whoever reads ranges of them."""
        return [File(p.path, p.fd, int(p.bytes.ctypes.data), p.state[2]) for p in self._open_parts()]

    def drop_cache(self) -> None:
        """The page cache forgets the file: for measurements of a cold start."""
        for part in self._open_parts():
            madvise(int(part.bytes.ctypes.data), part.state[2], DONTNEED)
            advise(part.fd, 0, 0, "DONTNEED")

    def prefault(self) -> Prefault:
        """Begin to map every page; to be stopped before `close`."""
        return Prefault([part.bytes for part in self._open_parts()])

    def check_unchanged(self) -> None:
        """Raises if a file was written to or cut since it was opened, or could not be read where it is mapped.

        To be asked when something was made of the mapping: zeros stand where the file is no more.
        """
        for part in self._open_parts():
            part.check_unchanged()

    def close(self) -> None:
        while self._parts:
            self._parts.pop().close()

    def _open_parts(self) -> list[_Part]:
        if not self._parts:
            raise ValueError(f"{self.path} is closed")
        return self._parts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if any(part.guard.n_faults for part in self._parts):  # zeros were read: what was made of them is nothing
                self.check_unchanged()
        finally:
            self.close()


def _split_number(part: _Part, key: str) -> int:
    value = part.header.metadata.get(key)
    if type(value) is not int:
        found = "is missing" if value is None else f"is {value!r}"
        raise BadModelError(f"{part.path}: key '{key}' {found}, expected a whole number.", _ALL_PARTS)
    return value


def _other_parts(first: _Part) -> list[Path]:
    """The paths of parts 2, 3, ... of a split; all are there."""
    if _KEY_SPLIT_COUNT not in first.header.metadata or (count := _split_number(first, _KEY_SPLIT_COUNT)) == 1:
        return []
    number = _split_number(first, _KEY_SPLIT_NO) + 1
    name = SPLIT_NAME.fullmatch(first.path.name)
    if not 1 <= number <= count <= 99_999:
        raise BadModelError(f"{first.path}: claims to be part {number} of {count}.", _ALL_PARTS)
    if number != 1:
        todo = f"Open {name['stem']}-00001-of-{count:05}.gguf." if name else "Open the first part."
        raise BadModelError(f"{first.path}: is part {number} of {count}, not the first.", todo)
    if not name or int(name["number"]) != 1 or int(name["count"]) != count:
        raise BadModelError(
            f"{first.path}: is part 1 of {count}, but its name does not end in -00001-of-{count:05}.gguf, so the other "
            "parts cannot be found.",
            "Give the parts their names back.",
        )
    others = [first.path.with_name(f"{name['stem']}-{i:05}-of-{count:05}.gguf") for i in range(2, count + 1)]
    missing = [i for i, path in enumerate(others, start=2) if not path.exists()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise BadModelError(
            f"{first.path}: part {missing[0]} of {count} is missing: {others[missing[0] - 2].name}{more}.", _ALL_PARTS
        )
    return others


def _check_part(first: _Part, part: _Part, index: int) -> None:
    """`part` is the part of that index, and says nothing else than the first does."""
    number = _split_number(part, _KEY_SPLIT_NO)
    if number != index:
        raise BadModelError(f"{part.path}: claims to be part {number + 1}, expected part {index + 1}.", _ALL_PARTS)
    for key, value in part.header.metadata.items():
        expected = first.header.metadata.get(key, value)
        if key in (_KEY_SPLIT_NO, KEY_ALIGNMENT, KEY_HEADER_HASH) or isinstance(value, GGUFArray):
            continue
        if expected != value:
            raise BadModelError(
                f"{part.path}: the parts do not agree: key '{key}' is {value!r} here and {expected!r} in the first.",
                _ALL_PARTS,
            )


def _check_tensors(parts: Sequence[_Part]) -> None:
    """No tensor is in two parts, and there are as many as the first part says."""
    owner: dict[str, _Part] = {}
    for part in parts:
        for name in part.header.tensors:
            if name in owner:
                raise BadModelError(f"{part.path}: tensor '{name}' is also in {owner[name].path.name}.", _ALL_PARTS)
            owner[name] = part
    if len(parts) == 1 and _KEY_SPLIT_COUNT not in parts[0].header.metadata:
        return
    expected = _split_number(parts[0], _KEY_SPLIT_TENSORS)
    if expected != len(owner):
        raise BadModelError(
            f"{parts[0].path}: key '{_KEY_SPLIT_TENSORS}' promises {expected} tensors, the {len(parts)} parts hold "
            f"{len(owner)}.",
            _ALL_PARTS,
        )


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """The model at `path`: a file, or the first file of a split, whose others lie beside it."""
    first = _Part(Path(path), 0)
    parts = [first]
    try:
        for index, other in enumerate(_other_parts(first), start=1):
            parts.append(_Part(other, index))
            _check_part(first, parts[-1], index)
        _check_tensors(parts)
    except BaseException:
        for part in parts:
            part.close()
        raise
    return GGUFFile(parts)
