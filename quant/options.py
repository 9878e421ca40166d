"""What a job was asked for, and what comes of it: the common part of convert and quantize. Reads no model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

# Parallel regions are far apart here: their threads must not spin meanwhile on the cores that read and write (29 s
# instead of 18 to 26). Set before the threading layer is loaded, or it is too late.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from m2lite.errors import UsageError
from m2lite.quant.encode import encode_rows
from m2lite.quant.header import Key, Slot, build_header, choose_alignment, string, tensor_bytes, uint32
from m2lite.quant.imatrix import Importance, read_imatrix
from m2lite.quant.job import FileJob, Output, Progress, journal_path, run_job
from m2lite.quant.recipes import Candidate as Wanted
from m2lite.quant.recipes import Choice, Recipe, choose_formats, find_recipe
from m2lite.quant.stream import Bytes
from m2lite.storage.part_file import part_path
from m2lite.storage.sidecar import model_files, sidecar_path
from m2lite.system.outputs import Places

F32 = npt.NDArray[np.float32]
Overrides = Sequence[tuple[re.Pattern[str], str]]

CHUNK_WEIGHTS = 1 << 20  # weights at a time: 4 MB of float32, so that the encoders work within the cache


class Asked(TypedDict, total=False):
    """What convert and quantize may be asked for beside the type; see Options."""

    mtp: bool
    init_mtp: int
    name: str | None
    alignment: int | None
    overrides: Overrides
    target_bytes: int | None
    split_max_bytes: int | None
    imatrix: str | Path | None
    allow_partial_imatrix: bool


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything that shapes the bytes of the output, but the input itself."""

    recipe: Recipe
    mtp: bool = True
    init_mtp: int = 0  # prediction modules to make of the last layer
    name: str | None = None
    alignment: int | None = None
    overrides: Overrides = ()
    target_bytes: int | None = None
    split_max_bytes: int | None = None
    imatrix: Path | None = None
    importance: Importance | None = None  # what `imatrix` holds
    allow_partial_imatrix: bool = False  # tensors that it does not cover are encoded as without one
    allow_requantize: bool = False

    def words(self, tool: str) -> dict[str, Any]:
        """For the journal: plain values that compare."""
        return {
            "command": tool,
            "type": self.recipe.name,
            "mtp": self.mtp,
            "init_mtp": self.init_mtp,
            "name": self.name,
            "alignment": self.alignment,
            "tensor_type": [f"{pattern.pattern}={kind}" for pattern, kind in self.overrides],
            "target_bytes": self.target_bytes,
            "split_max_bytes": self.split_max_bytes,
            "imatrix": self.importance.digest if self.importance else None,
        }


@dataclass(frozen=True)
class Conversion:
    """What was written; of a split `path` is the first part, and `size_bytes` counts all."""

    path: Path
    size_bytes: int
    n_tensors: int
    mtp_path: Path | None
    mtp_size_bytes: int
    n_mtp_modules: int
    paths: tuple[Path, ...] = ()  # every file
    resumed_bytes: int = 0  # that an interrupted run had done
    warnings: tuple[str, ...] = ()  # what is in doubt about the input, in sentences


@dataclass(frozen=True)
class JobPlan:
    """A job and what it is about, before a byte is written."""

    job: FileJob
    options: Options
    tensors: tuple[Wanted, ...]  # of all files
    choices: dict[str, Choice]
    result: Conversion

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.result.warnings


def carry_out(
    opened: AbstractContextManager[JobPlan],
    *,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> Conversion:
    """Do what was planned, or what an interrupted run left of it; see job.run_job. `warn` is told before it begins."""
    with opened as plan:
        if warn is not None:
            for warning in plan.warnings:
                warn(warning)
        resumed = run_job(
            plan.job, overwrite=overwrite, restart=restart, verify=verify, threads=threads, progress=progress
        )
    return replace(plan.result, resumed_bytes=resumed)


def resolve_options(
    out: Path, type_name: str, asked: Asked, inputs: Sequence[Path], *, allow_requantize: bool = False
) -> Options:
    """What can be refused without reading the inputs is refused here."""
    recipe = find_recipe(type_name)
    path = asked.get("imatrix")
    check_output(out, [*inputs, *(model_files(Path(path)) if path else ())])
    return Options(
        recipe=recipe,
        mtp=asked.get("mtp", True),
        init_mtp=asked.get("init_mtp", 0),
        name=asked.get("name"),
        alignment=asked.get("alignment"),
        overrides=tuple(asked.get("overrides", ())),
        target_bytes=asked.get("target_bytes"),
        split_max_bytes=asked.get("split_max_bytes"),
        imatrix=Path(path) if path else None,
        importance=load_importance(path),
        allow_partial_imatrix=asked.get("allow_partial_imatrix", False),
        allow_requantize=allow_requantize,
    )


def check_output(out: Path, inputs: Sequence[Path]) -> None:
    """UsageError unless `out`, and every file that its job writes beside it, may be written."""
    beside = [part_path(out), journal_path(out), sidecar_path(out), part_path(sidecar_path(out))]
    Places().reads(*inputs).approve("The output", out, beside, kind="replaced")
    if out.suffix != ".gguf":
        raise UsageError(f"The output {out.name!r} does not end in .gguf.", "Name it so: programs go by that.")


def check_taken(out: Path) -> None:
    """UsageError for an output that exists, unless a journal says that its job goes on."""
    if os.path.lexists(out) and not journal_path(out).exists():
        raise UsageError(f"The output {out} exists already.", "Choose another name, or give --overwrite.")


def load_importance(path: str | Path | None) -> Importance | None:
    return None if path is None else read_imatrix(path)


def importance_keys(options: Options) -> list[Key]:
    """What llama-quantize notes of an importance matrix; never a directory, which would change the bytes."""
    importance = options.importance
    if importance is None or options.imatrix is None:
        return []
    return [
        string("quantize.imatrix.file", options.imatrix.name),
        *(string("quantize.imatrix.dataset", Path(dataset).name) for dataset in importance.datasets[:1]),
        uint32("quantize.imatrix.entries_count", len(importance.entries)),
        uint32("quantize.imatrix.chunks_count", importance.n_chunks),
    ]


def choose_all(
    options: Options, tensors: Sequence[Wanted], architecture: str, main_keys: Sequence[Key]
) -> tuple[dict[str, Choice], int | None]:
    """The format of every tensor, and the main file's alignment where a target size needs to know it.

    The target is the whole file's, its header included.
    """
    if options.importance is not None:
        options.importance.check(tensors)
    has_importance = options.importance is not None
    alignment, target = options.alignment, options.target_bytes
    choices = choose_formats(options.recipe, tensors, options.overrides, has_importance)
    if target is not None:
        main = [tensor for tensor in tensors if not tensor.mtp]
        table = [(tensor.name, tensor.shape, choices[tensor.name].block_format) for tensor in main]
        alignment = alignment or choose_alignment(
            [tensor_bytes(block_format, shape) for _, shape, block_format in table]
        )
        header = build_header(architecture, main_keys, table, alignment, hashed=True)
        start = header.slots[0].offset
        choices = choose_formats(options.recipe, tensors, options.overrides, has_importance, target, alignment, start)
    assert all(choice.block_format.is_writable for choice in choices.values())
    return choices, alignment


def check_coverage(options: Options, tensors: Sequence[Wanted], choices: dict[str, Choice]) -> list[str]:
    """Warnings on what an importance matrix and the model do not share; too little is refused unless allowed.

    Neither llama-imatrix nor `m2lite imatrix` looks at the embedding, the head and the prediction modules.
    """
    if options.importance is None:
        return []
    entries, path = options.importance.entries, options.imatrix
    used = [
        t.name
        for t in tensors
        if t.role in ("attention", "experts") and not t.mtp and choices[t.name].block_format.search
    ]
    missing = [name for name in used if name not in entries]
    warnings = []
    if missing:
        what = f"{path} covers {len(used) - len(missing)} of {len(used)} tensors that are to be quantized with it;"
        what += f" missing are {_some(missing)}"
        if not options.allow_partial_imatrix:
            raise UsageError(
                f"{what}.",
                "Make a whole one with `m2lite imatrix`, or allow this one with --allow-partial-imatrix: those tensors"
                " are then quantized as without one.",
            )
        warnings.append(f"{what}: these are quantized as without an importance matrix.")
    foreign = sorted(entries.keys() - {t.name for t in tensors})
    if foreign:
        warnings.append(f"{path} speaks of tensors that the model does not have: {_some(foreign)}. Is it this model's?")
    return warnings


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 6:,} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


def encode_slot(slot: Slot, rows: F32, importance: Importance | None, matrix: int) -> Bytes:
    """Rows of one matrix of a tensor in its slot's format."""
    row = None
    if importance is not None and slot.block_format.search:
        row = importance.row(slot.name, matrix, slot.shape[-1])
    return encode_rows(slot.block_format, rows, slot.name, row).reshape(-1)


def describe(
    model: Sequence[Output], sidecar: Sequence[Output], n_modules: int, warnings: Sequence[str] = ()
) -> Conversion:
    return Conversion(
        model[0].path,
        sum(output.header.size_bytes for output in model),
        sum(len(output.tensors) for output in model),
        sidecar[0].path if sidecar else None,
        sum(output.header.size_bytes for output in sidecar),
        n_modules,
        tuple(output.path for output in (*model, *sidecar)),
        warnings=tuple(warnings),
    )
