"""One safetensors file: its header, checked byte for byte, and ranges by pread. Knows no model and no other file."""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m2lite.errors import BadModelError
from m2lite.quant.journal import SourceChanged, SourceFile
from m2lite.storage.durable import advise
from m2lite.system.json_text import JsonError, parse_object

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_HEADER_ITEMS = 1 << 22  # M2's 96,103 tensors take 800,000
MAX_TENSOR_DIMS = 8

# Every dtype whose size we can check; only those of quant/checkpoint.py's decoders can be converted.
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64,
}  # fmt: skip

# What a failed download leaves under a shard's name, by its first bytes.
IMPOSTORS = (
    (re.compile(rb"\s*version https://git-lfs", re.I), "a Git LFS pointer", "Run `git lfs pull` in that directory."),
    (re.compile(rb"\s*<(!doctype|html|\?xml)", re.I), "a web page", "Download the file again; a login may be needed."),
    (
        re.compile(rb"PK\x03\x04(?!.{4}\{)", re.S),
        "a zip archive, as PyTorch's pickles are",
        "Save it as safetensors, or unpack it.",
    ),
    (re.compile(rb"\x80[\x02-\x05](?!.{6}\{)", re.S), "a pickle, which can run code", "Save it as safetensors."),
    (re.compile(rb"GGUF"), "a GGUF file under another name", "Give it its name back; `m2lite quantize` takes it."),
)


def check_impostor(path: Path, start: bytes, more: str = "") -> None:
    """Says so where a file begins like what a failed download leaves."""
    for pattern, what, todo in IMPOSTORS:
        if pattern.match(start):
            raise BadModelError(f"{path.name} is {what}{more}.", todo)


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a shard; `offset` counts from the start of the file, `shape` is row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class SafetensorsFile:
    """An open safetensors file: a descriptor and the table of its tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = _open_regular(path)
        try:
            self._stat = os.fstat(self._fd)
            self.tensors, self._sha = _parse_header(path, self._fd, self._stat.st_size)
        except BaseException:
            os.close(self._fd)
            raise

    def read(self, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes [offset, offset + n_bytes) of the file, in memory that the caller owns."""
        buffer = np.empty(n_bytes, np.uint8)
        view = buffer.data
        done = 0
        while done < n_bytes:
            try:
                got = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                what = f"{self.path.name} cannot be read at byte {offset + done}: {error.strerror}."
                raise BadModelError(what, "Check the disk, and the file with it.") from error
            if got == 0:
                raise BadModelError(
                    f"{self.path.name} ends at byte {offset + done}, {n_bytes - done} bytes early.",
                    "It changed while it was read: download it again.",
                )
            done += got
        return buffer

    def advise(self, offset: int, n_bytes: int, what: str) -> None:
        """What comes or is done with, for the page cache: see `durable.advise`."""
        advise(self._fd, offset, n_bytes, what)

    def identify(self) -> SourceFile:
        return SourceFile(self.path.name, self._stat.st_size, self._stat.st_mtime_ns, self._sha)

    def check_unchanged(self) -> None:
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise SourceChanged(f"{self.path.name} changed while it was read.", "Convert again when nobody writes it.")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open_regular(path: Path) -> int:
    """A descriptor of a regular file; a FIFO or a device would block or never end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadModelError(f"{path} is not a regular file.", "Give a directory with safetensors files.")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BadModelError(f"The shard {path.name} is missing from {path.parent}.", "Download it.") from None
    except OSError as error:
        raise BadModelError(f"{path} cannot be opened: {error.strerror}.", "Check its permissions.") from None


def _parse_header(path: Path, fd: int, size: int) -> tuple[dict[str, SourceTensor], str]:
    """The tensor table and the header's sha256.

    Strict as the safetensors library is: no hole, no overlap, nothing behind the end.
    """
    start = os.pread(fd, 512, 0)
    check_impostor(path, start, f", not weights ({size} bytes)")
    header_bytes = int.from_bytes(start[:8], "little")
    if size < 10 or header_bytes > MAX_HEADER_BYTES or start[8:9] != b"{":
        raise BadModelError(f"{path.name} is not a safetensors file ({size} bytes).", "Download it again.")
    data_start = 8 + header_bytes
    if data_start > size:
        raise BadModelError(
            f"{path.name} is {data_start - size} bytes short within its header.", "The download may be incomplete."
        )
    text = os.pread(fd, header_bytes, 8)
    try:
        header = parse_object(text, most_bytes=MAX_HEADER_BYTES, most_items=min(MAX_HEADER_ITEMS, len(text) // 2))
    except JsonError as error:
        raise BadModelError(f"The header of {path.name} is damaged: {error}.", "Download it again.") from None
    header.pop("__metadata__", None)
    tensors = {name: _parse_entry(path, name, entry, data_start) for name, entry in header.items()}
    _check_ranges(path, list(tensors.values()), data_start, size)
    return tensors, hashlib.sha256(text).hexdigest()


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> SourceTensor:
    def bad(what: str, todo: str = "Download it again.") -> BadModelError:
        return BadModelError(f"{path.name}: tensor {name!r} has {what}.", todo)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad("not exactly the fields dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise bad(f"the unknown dtype {dtype!r}", "Convert a checkpoint in FP8 (E4M3), BF16, F16 or F32.")
    if not _is_counts(shape) or len(shape) > MAX_TENSOR_DIMS:
        raise bad(f"the shape {shape!r}")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise bad(f"the data_offsets {offsets!r}")
    n_bytes = -(-math.prod(shape) * DTYPE_BITS[dtype] // 8)
    if offsets[1] - offsets[0] != n_bytes:
        raise bad(f"{offsets[1] - offsets[0]} bytes where {dtype} {shape} takes {n_bytes}")
    return SourceTensor(name, dtype, tuple(shape), data_start + offsets[0], n_bytes)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_ranges(path: Path, tensors: list[SourceTensor], data_start: int, size: int) -> None:
    expected = data_start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.n_bytes)):
        if tensor.offset != expected:
            what = "overlaps the tensor before it" if tensor.offset < expected else "leaves a hole before it"
            raise BadModelError(f"{path.name}: tensor {tensor.name!r} {what}.", "Download it again.")
        expected += tensor.n_bytes
    if expected > size:
        raise BadModelError(f"{path.name} is {expected - size} bytes short.", "The download may be incomplete.")
    if expected < size:
        raise BadModelError(f"{path.name} has {size - expected} bytes behind its last tensor.", "Download it again.")
