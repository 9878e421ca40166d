"""The job `quantize`: a GGUF as a GGUF of other types. Planned here, carried out by job.py."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Unpack

from m2lite.errors import BadModelError, UsageError
from m2lite.quant import options as options_module
from m2lite.quant.decode import decode_rows
from m2lite.quant.header import Key, Slot, raw, string, uint32
from m2lite.quant.imatrix import Importance
from m2lite.quant.job import FileJob, Output, Progress, journal_path
from m2lite.quant.journal import SourceChanged, SourceFile
from m2lite.quant.names import role_of
from m2lite.quant.options import (
    Asked,
    Conversion,
    JobPlan,
    Options,
    carry_out,
    check_coverage,
    choose_all,
    describe,
    encode_slot,
    importance_keys,
    resolve_options,
)
from m2lite.quant.recipes import Choice
from m2lite.quant.split import Planned, plan_files
from m2lite.quant.stream import Bytes, Chunk
from m2lite.storage.gguf_header import KEY_ALIGNMENT, KEY_HEADER_HASH, KEY_TENSOR_HASHES
from m2lite.storage.gguf_reader import GGUFFile, TensorInfo, open_gguf
from m2lite.storage.sidecar import model_files, sidecar_path

COPY_BYTES = 4 << 20  # of a tensor that stays as it is, at a time
KEY_ARCHITECTURE = "general.architecture"
# What the output's own header says anew.
_OWN_KEYS = (
    KEY_ARCHITECTURE, KEY_ALIGNMENT, KEY_TENSOR_HASHES, KEY_HEADER_HASH, "split.no", "split.count",
    "split.tensors.count",
)  # fmt: skip


class Stored(NamedTuple):
    """A tensor of the input, as recipes see it."""

    name: str
    shape: tuple[int, ...]
    role: str
    mtp: bool
    info: TensorInfo


def quantize(
    gguf_in: str | Path,
    out_path: str | Path,
    type_name: str,
    *,
    allow_requantize: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
    **asked: Unpack[Asked],
) -> Conversion:
    """Write a GGUF, whole or split, in other types; prediction modules in mtp-<its name> go along.

    Everything else is as with `convert`, whose files of the same type hold the same bytes. Metadata is kept, tensors
    that have their type already are copied. Quantized ones are not quantized again without `allow_requantize`.
    """
    plan = plan_quantize(gguf_in, out_path, type_name, allow_requantize=allow_requantize, **asked)
    return carry_out(plan, overwrite=overwrite, restart=restart, verify=verify, threads=threads, progress=progress)


@contextmanager
def plan_quantize(
    gguf_in: str | Path, out_path: str | Path, type_name: str, *, allow_requantize: bool = False, **asked: Unpack[Asked]
) -> Iterator[JobPlan]:
    """What `quantize` would do. Nothing is written; the input is open within the `with` block."""
    out = Path(out_path)
    options = resolve_options(out, type_name, asked, model_files(Path(gguf_in)), allow_requantize=allow_requantize)
    with ExitStack() as stack:
        files = [stack.enter_context(open_gguf(gguf_in))]
        beside = sidecar_path(Path(gguf_in))
        if options.mtp and beside.exists():
            files.append(stack.enter_context(open_gguf(beside)))
        yield _plan(files, out, options)


def _plan(files: Sequence[GGUFFile], out: Path, options: Options) -> JobPlan:
    """The model, and the modules beside it if there is a second file."""
    tables = [_stored_tensors(gguf) for gguf in files]
    architecture, keys = _architecture(files[0]), _kept_keys(files[0], options, options.name)
    everything = [tensor for table in tables for tensor in table]
    choices, alignment = choose_all(options, everything, architecture, keys)
    _check_requantize(files, everything, choices, options)
    warnings = check_coverage(options, everything, choices)

    def place(gguf: GGUFFile, table: Sequence[Stored]) -> list[Planned]:
        return [
            Planned(t.name, t.shape, choices[t.name].block_format, StoredTensor(gguf, t.info, options.importance))
            for t in table
        ]

    tensors = place(files[0], tables[0])
    model = plan_files(out, architecture, keys, tensors, alignment, options.split_max_bytes)
    sidecar: tuple[Output, ...] = ()
    if len(files) > 1:
        keys = _kept_keys(files[1], options, f"{options.name} MTP" if options.name else None)
        tensors = place(files[1], tables[1])
        sidecar = plan_files(sidecar_path(out), _architecture(files[1]), keys, tensors, options.alignment)
    source = StoredFiles(tuple(files))
    job = FileJob((*sidecar, *model), source, journal_path(out), model[0].path, options.words("quantize"))
    result = describe(model, sidecar, _n_modules(files[-1]), warnings)
    return JobPlan(job, options, tuple(everything), choices, result)


def _architecture(gguf: GGUFFile) -> str:
    found = gguf.metadata.get(KEY_ARCHITECTURE)
    if not isinstance(found, str):
        raise BadModelError(f"{gguf.path}: key '{KEY_ARCHITECTURE}' is {found!r}.", "Convert the model again.")
    return found


def _n_modules(gguf: GGUFFile) -> int:
    found = gguf.metadata.get(f"{_architecture(gguf)}.nextn_predict_layers", 0)
    return found if isinstance(found, int) else 0


def _stored_tensors(gguf: GGUFFile) -> list[Stored]:
    """All tensors in the order of the file; those behind the trunk's layers belong to prediction modules."""
    n_blocks = gguf.metadata.get(f"{_architecture(gguf)}.block_count", 0)
    first_module = (n_blocks if isinstance(n_blocks, int) else 0) - _n_modules(gguf)

    def is_module(name: str) -> bool:
        return name.startswith("blk.") and _n_modules(gguf) > 0 and int(name.split(".")[1]) >= first_module

    # The role first: it refuses a name that is no block's.
    return [
        Stored(info.name, info.shape, role_of(info.name), is_module(info.name), info) for info in gguf.tensors.values()
    ]


def _kept_keys(gguf: GGUFFile, options: Options, name: str | None) -> list[Key]:
    """Every key of the input as it is, but those that speak of this output."""
    new = {key.name: key for key in importance_keys(options)}
    new["general.file_type"] = uint32("general.file_type", options.recipe.file_type)
    new["general.quantization_version"] = uint32("general.quantization_version", 2)
    if name is not None:
        new["general.name"] = string("general.name", name)
    keys = [
        new.pop(key) if key in new else raw(key, gguf.raw_value(key)) for key in gguf.metadata if key not in _OWN_KEYS
    ]
    return [*keys, *new.values()]


def _check_requantize(
    files: Sequence[GGUFFile], tensors: Sequence[Stored], choices: dict[str, Choice], options: Options
) -> None:
    again = [t for t in tensors if not t.info.format.is_float and t.info.format != choices[t.name].block_format]
    if again and not options.allow_requantize:
        first = again[0]
        raise UsageError(
            f"{files[0].path.name}: {len(again)} tensors are quantized already, the first is {first.name!r} in "
            f"{first.info.format.name}, which would become {choices[first.name].block_format.name}.",
            "Start from an F32, F16 or BF16 file, or allow it with --allow-requantize: quality is lost twice.",
        )


@dataclass(frozen=True)
class StoredFiles:
    """The inputs of the job."""

    files: tuple[GGUFFile, ...]

    def identify(self) -> list[SourceFile]:
        return [
            SourceFile(
                path.name,
                gguf.sizes[part],
                gguf.mtimes_ns[part],
                hashlib.sha256(gguf.read(part, 0, gguf.headers[part].n_bytes).data).hexdigest(),
            )
            for gguf in self.files
            for part, path in enumerate(gguf.parts)
        ]

    def check_unchanged(self) -> None:
        for gguf in self.files:
            try:
                gguf.check_unchanged()
            except BadModelError as error:
                raise SourceChanged(error.what, error.todo) from None

    def paths(self) -> list[Path]:
        return [path for gguf in self.files for path in gguf.parts]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the output, made of rows of a GGUF, or of its very bytes."""

    gguf: GGUFFile
    info: TensorInfo
    importance: Importance | None

    def chunks(self, slot: Slot) -> Iterator[Chunk]:
        if self.info.format == slot.block_format:
            for first in range(0, slot.n_bytes, COPY_BYTES):
                n_bytes = min(COPY_BYTES, slot.n_bytes - first)
                yield self._chunk(first, n_bytes, first, n_bytes, lambda data: data)
            return
        width = slot.shape[-1]
        height = slot.shape[-2] if len(slot.shape) > 1 else 1
        row_bytes, source_row_bytes = slot.block_format.row_bytes(width), self.info.format.row_bytes(width)
        step = max(1, options_module.CHUNK_WEIGHTS // width)
        for matrix in range(slot.n_bytes // (height * row_bytes)):
            for first in range(0, height, step):
                count, row = min(step, height - first), matrix * height + first
                encode = partial(self._encode, slot, matrix, first)
                yield self._chunk(
                    row * row_bytes, count * row_bytes, row * source_row_bytes, count * source_row_bytes, encode
                )

    def _chunk(
        self, offset: int, n_bytes: int, first: int, n_source_bytes: int, encode: Callable[[Bytes], Bytes]
    ) -> Chunk:
        place = (self.info.part, self.info.offset + first, n_source_bytes)
        return Chunk(
            offset, n_bytes, partial(self.gguf.advise, *place, "WILLNEED"), partial(self._read, *place), encode
        )

    def _read(self, part: int, offset: int, n_bytes: int) -> Bytes:
        data = self.gguf.read(part, offset, n_bytes)
        self.gguf.advise(part, offset, n_bytes, "DONTNEED")
        return data

    def _encode(self, slot: Slot, matrix: int, first_row: int, data: Bytes) -> Bytes:
        width = slot.shape[-1]
        n_rows = len(data) // self.info.format.row_bytes(width)
        rows, is_finite = decode_rows(data, self.info.format.name, n_rows, width)
        if not is_finite:
            raise BadModelError(
                f"Tensor {slot.name!r} holds NaN or infinity within rows {first_row} to {first_row + n_rows - 1} of "
                f"matrix {matrix}.",
                "The file is damaged: `m2lite verify` may know more.",
            )
        return encode_slot(slot, rows, self.importance, matrix)
