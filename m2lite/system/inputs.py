"""Text that a command reads: from a file, a pipe or a device, packed or not, each time the same. Knows no format.

A file is read where it lies, and what is read again must be what was read first. Whatever else can be read only once,
and what is packed, goes to a temporary file.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import xxhash

from m2lite.errors import M2liteError, ResourceError, UsageError
from m2lite.system.paths import kind_of_file, named_path
from m2lite.system.streams import stdin_bytes

STDIN = "-"
BLOCK_BYTES = 1 << 20
_FREE_BYTES = 1 << 30  # what is unpacked may always have
_MOST_RATIO = 200  # and beyond that so many times what is packed: JSON lines reach 50


def check_regular(path: Path) -> None:
    """UsageError for what is there and is no file: to open a FIFO waits for whoever writes it."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return  # whoever opens it says what is wrong
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} is {kind_of_file(mode)}, not a file.", "Name a file: it is read more than once.")


def read_input(source: str | os.PathLike[str], most_bytes: int) -> bytes:
    """All bytes of a file, FIFO or device, unpacked; "-" is stdin.

    OSError where it cannot be read, UsageError for more than `most_bytes` and for what cannot be unpacked.
    """
    with _opened(source) as file:
        chunks, n_bytes = list[bytes](), 0
        for chunk in _unpacked(file, os.fspath(source)):
            chunks.append(chunk)
            n_bytes += len(chunk)
            if n_bytes > most_bytes:
                raise UsageError(f"{source} cannot be read: it has more than {most_bytes:,} bytes.", "Split it.")
    return b"".join(chunks)


class TextInput:
    """A text of any length that can be read again and again, and is each time what it was the first time."""

    def __init__(self, source: str) -> None:
        """UsageError for what cannot be read. Of a pipe, all of it is taken now."""
        self.name = source
        self._hashes: list[int] | None = None  # of the blocks, once all were read
        self.n_bytes = 0
        try:
            with _opened(source) as file:
                status = None if source == STDIN else os.fstat(file.fileno())
                if status is not None and _is_endless(file, status):
                    raise UsageError(f"{source} is a device, which never ends.", "Name a file, or - for stdin.")
                if status is not None and stat.S_ISREG(status.st_mode) and not _kind(file):
                    self._fd = os.dup(file.fileno())
                else:
                    self._fd = _spooled(file, source)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"{source} cannot be read: {reason}.", "Name a file, or - for stdin.") from None
        self.close = weakref.finalize(self, os.close, self._fd)

    @property
    def n_grown(self) -> int:
        """Bytes that were added behind those that were read."""
        return max(0, os.fstat(self._fd).st_size - self.n_bytes)

    def lines(self, most_bytes: int) -> Iterator[bytes]:
        """Each with its newline; of one that is longer than `most_bytes` more than that comes, and then anything."""
        rest = b""
        for block in self._blocks():
            *whole, rest = (rest + block).split(b"\n")
            for line in whole:
                yield line + b"\n"
            if len(rest) > most_bytes:
                yield rest
        if rest:
            yield rest

    def _blocks(self) -> Iterator[bytes]:
        """What was read the first time, or an error before a byte that differs."""
        known, found, at = self._hashes, list[int](), 0
        try:
            while block := self._read(at, BLOCK_BYTES if known is None else min(BLOCK_BYTES, self.n_bytes - at)):
                found.append(xxhash.xxh3_64_intdigest(block))
                if known is not None and found[-1] != known[len(found) - 1]:
                    break
                at += len(block)
                yield block
                if len(block) < BLOCK_BYTES:
                    break  # the end, whatever is written behind it meanwhile
        except OSError as error:
            raise UsageError(f"{self.name} cannot be read: {error.strerror}.") from None
        if known is None:
            self._hashes, self.n_bytes = found, at
        elif at < self.n_bytes:
            raise M2liteError(
                f"{self.name} has changed since it was checked: what stands from byte {at:,} on is not what was there.",
                "Run it again with the file as it is now.",
            )

    def _read(self, at: int, n_bytes: int) -> bytes:
        chunks = list[bytes]()
        while n_bytes and (chunk := os.pread(self._fd, n_bytes, at)):
            chunks.append(chunk)
            at, n_bytes = at + len(chunk), n_bytes - len(chunk)
        return b"".join(chunks)


def _opened(source: str | os.PathLike[str]) -> io.BufferedReader:
    """For reading from its beginning; a directory is an OSError. To close it leaves stdin open."""
    if os.fspath(source) != STDIN:
        return named_path(source).open("rb")
    return io.BufferedReader(_Counted(stdin_bytes()))


def _is_endless(file: io.BufferedReader, status: os.stat_result) -> bool:
    """A device that gives bytes, and is nobody's terminal: /dev/zero, or a whole disk."""
    is_device = stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)
    return is_device and not os.isatty(file.fileno()) and bool(file.peek(1))


def _spooled(file: io.BufferedReader, name: str) -> int:
    """All of it, in a temporary file that has no name: its descriptor."""
    with tempfile.TemporaryFile(prefix="m2lite-", buffering=0) as into:
        for chunk in _unpacked(file, name):
            rest = memoryview(chunk)
            while rest:
                try:
                    rest = rest[into.write(rest) :]
                except OSError as error:
                    what = f"{name} does not fit into {tempfile.gettempdir()}, where it is kept: {error.strerror}."
                    raise ResourceError(what, "Free some space there, or set TMPDIR.") from None
        return os.dup(into.fileno())


class _Counted(io.RawIOBase):
    """Counts what goes through it, and has no place to go back to."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.n_bytes = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        data = self._file.read(len(into))
        into[: len(data)] = data
        self.n_bytes += len(data)
        return len(data)


def _open_zstd(file: IO[bytes]) -> IO[bytes]:
    from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # of Python 3.14

    return zstd.ZstdFile(file)  # type: ignore[no-any-return, unused-ignore]


def _open_gzip(file: IO[bytes]) -> IO[bytes]:
    return gzip.GzipFile(fileobj=file, mode="rb")  # type: ignore[return-value]  # IO but for details


# What packed files begin with, which no text does; by what, and who unpacks it.
_PACKED: tuple[tuple[bytes, str, Callable[[IO[bytes]], IO[bytes]] | None], ...] = (
    (rb"\x1f\x8b", "gzip", _open_gzip),
    (rb"\x28\xb5\x2f\xfd", "zstd", _open_zstd if sys.version_info >= (3, 14) else None),
    (rb"\xfd7zXZ\0", "xz", None),
    (rb"BZh[1-9]1AY&SY", "bzip2", None),
    (rb"PK\x03\x04", "zip", None),
)


def _kind(file: io.BufferedReader) -> str:
    """By what the file is packed; "" for none."""
    start = file.peek(10)
    return next((name for pattern, name, _ in _PACKED if re.match(pattern, start)), "")


def _unpacked(file: io.BufferedReader, name: str) -> Iterator[bytes]:
    """The bytes of the file, which may be packed, in pieces."""
    kind = _kind(file)
    if not kind:
        while chunk := file.read(BLOCK_BYTES):
            yield chunk
        return
    unpack = next(each for _, by, each in _PACKED if by == kind)
    if unpack is None:
        raise UsageError(f"{name} is packed with {kind}, which is not read here.", "Unpack it, or use gzip.")
    packed, n_bytes = _Counted(file), 0
    try:
        with unpack(io.BufferedReader(packed)) as plain:
            while chunk := plain.read(BLOCK_BYTES):
                n_bytes += len(chunk)
                if n_bytes > _FREE_BYTES + _MOST_RATIO * packed.n_bytes:
                    what = f"{name} unpacks to more than {n_bytes:,} bytes, from {packed.n_bytes:,}."
                    raise UsageError(what, "Unpack it yourself if that is meant.")
                yield chunk
    except UsageError:
        raise
    except Exception as error:  # zlib, zstd and gzip have one each, for the same
        raise UsageError(f"{name} is packed with {kind} and damaged: {error}.", "Pack or fetch it again.") from None
