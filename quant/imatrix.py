"""Importance matrices in llama.cpp's GGUF form: read, checked, written. Knows sums of squares, not what uses them.

Two float32 tensors per weight tensor: `<name>.in_sum2` [n, width] = sum over rows of x**2 per input column, and
`<name>.counts` [n] = rows that went in, with n the number of experts of a stacked tensor, else 1.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from m2lite.errors import BadModelError, UsageError
from m2lite.formats.table import FORMATS
from m2lite.quant.header import DEFAULT_ALIGNMENT, MAGIC, Key, pack_key, pack_start, pack_tensor, string, uint32
from m2lite.storage.durable import Buffer, write_output
from m2lite.storage.gguf_reader import GGUFFile, open_gguf
from m2lite.system.inputs import check_regular

F32 = npt.NDArray[np.float32]

SUMS, COUNTS = ".in_sum2", ".counts"
KEY_DATASETS, KEY_CHUNKS, KEY_CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_AGAIN = "Make the importance matrix again, with `m2lite imatrix` or llama-imatrix."


class Quantizable(Protocol):
    """A tensor that is to be quantized: its GGUF name and row-major shape [experts,] out, in."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, eq=False)
class Importance:
    """tensor name -> (sums [n, width], counts [n]), and what they were made from."""

    entries: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]
    datasets: tuple[str, ...] = ()
    n_chunks: int = 0
    chunk_size: int = 0
    path: str = "the importance matrix"
    file: GGUFFile | None = None  # where the numbers lie, open

    def row(self, tensor_name: str, matrix: int, width: int) -> F32 | None:
        """float32 [width]: mean of x**2 per column of one expert's matrix (0 where there is no stack), all above zero.

        None for a tensor that is not here; ones for an expert that no token reached, as in llama.cpp.
        """
        entry = self.entries.get(tensor_name)
        if entry is None:
            return None
        sums, counts = entry
        if len(counts) > 1:
            part, count = sums.reshape(len(counts), -1)[matrix], counts[matrix]
        else:  # one count for all matrices: files that were converted from the .dat format
            part, count = sums.reshape(-1, width)[matrix], counts[0]
        assert len(part) == width, (tensor_name, sums.shape, width)
        part = part.astype(np.float32)
        if self.file is not None:
            self.file.check_unchanged()  # else other numbers than `digest` tells were used
        if not count or not part.any():
            return np.ones(width, np.float32)
        mean = np.asarray(part / np.float32(count), np.float32)
        # A column that was always zero may be rounded at will, but must not take part with nothing at all.
        smallest = max(float(mean.mean(dtype=np.float64)) * 1e-6, float(np.finfo(np.float32).tiny))
        return np.where(mean > 0, mean, np.float32(smallest))

    def check(self, tensors: Iterable[Quantizable]) -> None:
        """Raises UsageError unless every tensor that is here has the size of the model's, and at least one is here."""
        found = False
        for tensor in tensors:
            entry = self.entries.get(tensor.name)
            if entry is None:
                continue
            found = True
            n_matrices, width = int(np.prod(tensor.shape[:-2])), tensor.shape[-1]
            sums, counts = entry
            if sums.size != n_matrices * width or len(counts) not in (1, n_matrices):
                raise UsageError(
                    f"{self.path}: {tensor.name} has {sums.size:,} sums and {len(counts)} counts there, the model's "
                    f"tensor needs {n_matrices} x {width:,} and {n_matrices}.",
                    "Use an importance matrix of this model.",
                )
        if not found:
            raise UsageError(
                f"{self.path}: none of its {len(self.entries)} tensors is in the model.",
                "Use an importance matrix of this model.",
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, sums and counts: the same for the same content, whatever the file."""
        found = hashlib.sha256()
        for name, data in self._tensors():
            found.update(f"{name} {data.shape}\n".encode())
            found.update(data.data)
        return found.hexdigest()

    def _tensors(self) -> Iterator[tuple[str, F32]]:
        """As they lie in a file: by name, sums before counts."""
        for name in sorted(self.entries):
            sums, counts = self.entries[name]
            yield name + SUMS, _as_floats(sums.reshape(len(counts), -1))
            yield name + COUNTS, _as_floats(counts.reshape(-1, 1))


def _as_floats(values: npt.NDArray[Any]) -> F32:
    with np.errstate(over="ignore"):  # infinity: refused where it is written
        return np.ascontiguousarray(values, "<f4")


def read_imatrix(path: str | Path) -> Importance:
    """The importance matrix in a GGUF file, its numbers checked; they stay in the file, which is open with them."""
    _refuse_legacy(Path(path))
    gguf = open_gguf(path)
    try:
        if gguf.metadata.get("general.type") != "imatrix":
            kind = gguf.metadata.get("general.type", gguf.metadata.get("general.architecture", "unknown"))
            raise BadModelError(f"{path}: no importance matrix but a GGUF file of type {kind!r}.", _AGAIN)
        names = [name.removesuffix(SUMS) for name in gguf.tensors if name.endswith(SUMS)]
        lone = {name.removesuffix(COUNTS) for name in gguf.tensors if name.endswith(COUNTS)} ^ set(names)
        if lone:
            raise BadModelError(f"{path}: {min(lone)} has sums or counts, expected both.", _AGAIN)
        if not names:
            raise BadModelError(f"{path}: holds no sums.", _AGAIN)
        datasets = tuple(gguf.array(KEY_DATASETS, str)) if KEY_DATASETS in gguf.metadata else ()
        numbers = [gguf.metadata.get(key) for key in (KEY_CHUNKS, KEY_CHUNK_SIZE)]
        n_chunks, chunk_size = (n if isinstance(n, int) else 0 for n in numbers)
        entries = {name: _read_entry(gguf, name) for name in names}
        gguf.check_unchanged()
    except BaseException:
        gguf.close()
        raise
    return Importance(entries, datasets, n_chunks, chunk_size, str(path), gguf)


def _read_entry(gguf: GGUFFile, name: str) -> tuple[F32, F32]:
    sums, counts = (_read_floats(gguf, name + end) for end in (SUMS, COUNTS))
    if sums.size % counts.size:
        raise BadModelError(
            f"{gguf.path}: {name} has {sums.size:,} sums for {counts.size} counts, not as many for each.", _AGAIN
        )
    if (counts % 1).any():  # what is divided by less than one may be infinite
        first = int((counts % 1 > 0).argmax())
        raise BadModelError(f"{gguf.path}: {name} counts {counts[first]} rows at {first}, no whole number.", _AGAIN)
    return sums.reshape(counts.size, -1), counts


def _read_floats(gguf: GGUFFile, name: str) -> F32:
    info = gguf.tensors[name]
    if info.format.name != "F32":
        raise BadModelError(f"{gguf.path}: {name} is {info.format.name}, expected F32.", _AGAIN)
    data = gguf.view(name)
    values = np.frombuffer(data, "<f4")
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        first = int(bad.argmax())
        raise BadModelError(
            f"{gguf.path}: {name} holds {values[first]} at {first:,}, expected finite numbers from zero up.", _AGAIN
        )
    return values


def _refuse_legacy(path: Path) -> None:
    """The .dat format has no name of its own: it begins with the number of entries and the first one's name."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            start = file.read(8 + 128)
    except OSError:
        return  # open_gguf says it better
    if start.startswith(MAGIC) or len(start) < 12:
        return
    n_entries, n_name = struct.unpack_from("<ii", start)
    name = start[8 : 8 + max(0, n_name)]
    if 0 < n_entries < 1 << 20 and 0 < n_name <= 128 and name.isascii() and name.decode().isprintable():
        raise BadModelError(
            f"{path}: an importance matrix in the legacy .dat format ({n_entries} entries), which is not supported.",
            "Turn it into GGUF with `llama-imatrix -m MODEL --in-file OLD.dat -o NEW.gguf`.",
        )


def write_imatrix(path: str | Path, importance: Importance, *, overwrite: bool = False) -> int:
    """Write the file that llama-quantize and `read_imatrix` read; its size in bytes. The same content, the same bytes.

    The name appears when the file is complete. float64 sums become float32, one tensor at a time.
    """
    header, offsets, size_bytes = _build_header(importance)
    write_output(path, _chunks(importance, header, offsets, size_bytes), size_bytes, replaces=overwrite)
    return size_bytes


def _chunks(importance: Importance, header: bytes, offsets: list[int], size_bytes: int) -> Iterator[Buffer]:
    """All bytes of the file in their order."""
    yield header
    at = len(header)
    for (name, data), offset in zip(importance._tensors(), offsets, strict=True):
        if not np.isfinite(data).all():
            raise UsageError(f"{name} holds numbers that are not finite in float32.", "Use another text.")
        yield bytes(offset - at)
        yield data.reshape(-1).view(np.uint8).data
        at = offset + data.nbytes
    yield bytes(size_bytes - at)


def _build_header(importance: Importance) -> tuple[bytes, list[int], int]:
    """Header bytes, the offset of every tensor, the size of the file."""
    keys = [
        string("general.type", "imatrix"),
        Key(KEY_DATASETS, importance.datasets, "STRING"),
        uint32(KEY_CHUNKS, importance.n_chunks),
        uint32(KEY_CHUNK_SIZE, importance.chunk_size),
    ]
    rows, offsets, end = [], [], 0
    for name in sorted(importance.entries):
        sums, counts = importance.entries[name]
        for tensor, width in ((name + SUMS, sums.size // len(counts)), (name + COUNTS, 1)):
            shape = (len(counts), width) if len(counts) > 1 else (width,)  # ggml drops a last dimension of one
            rows.append(pack_tensor(tensor, shape, FORMATS["F32"], end))
            offsets.append(end)
            end += 4 * width * len(counts)
            end += -end % DEFAULT_ALIGNMENT  # the last one too: ggml reads whole units
    header = pack_start(len(rows), len(keys)) + b"".join(map(pack_key, keys)) + b"".join(rows)
    header += bytes(-len(header) % DEFAULT_ALIGNMENT)
    return header, [len(header) + offset for offset in offsets], len(header) + end
