"""What a job would write: a table per kind of tensor, sizes, disk, memory, time. Reads a few MB and writes nothing."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from m2lite.quant.checkpoint import SCALE_SUFFIX, matrices
from m2lite.quant.convert import BoundTensor
from m2lite.quant.job import TensorSource
from m2lite.quant.options import CHUNK_WEIGHTS, JobPlan
from m2lite.quant.quantize import StoredTensor
from m2lite.quant.recipes import Choice, body_bytes, split_name
from m2lite.quant.stream import READ_AHEAD, Chunk
from m2lite.shown import shown
from m2lite.storage.durable import free_bytes
from m2lite.storage.part_file import part_path
from m2lite.system.byte_units import format_bytes, format_speed

BUDGET_SECONDS = 1.0
MOST_RUNS = 8

# Interpreter, libraries and compiled kernels.
BASE_BYTES = 600 * 10**6


class Item(NamedTuple):
    """A tensor of the output: what it is made of and what it becomes."""

    name: str
    shape: tuple[int, ...]  # row-major
    choice: Choice
    source: str  # type of its source: F8_E4M3, BF16, Q8_0, ...
    source_bytes: int  # scales included
    file: int = 0  # which of the plan's files it goes to

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return body_bytes(self.choice.block_format, self.shape)


@dataclass(frozen=True)
class Row:
    """The tensors of one kind and one shape, in one file."""

    file: int
    kind: str
    shape: tuple[int, ...]
    n_tensors: int
    sources: Mapping[str, int]  # type -> tensors
    source_bytes: int
    types: Mapping[str, int]  # type -> tensors, most first
    fallbacks: Mapping[str, int]  # type that the width cannot hold -> tensors
    n_weights: int
    n_bytes: int


class Target(NamedTuple):
    """An output file; of a split the first part stands for all."""

    path: Path
    size_bytes: int  # with headers and padding
    n_parts: int = 1


@dataclass(frozen=True)
class OutputFile:
    name: str
    n_parts: int
    size_bytes: int
    n_tensors: int
    n_weights: int
    tensor_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.tensor_bytes / max(1, self.n_weights)


@dataclass(frozen=True)
class JobSeconds:
    """Extrapolated from a few MB. Reading and encoding overlap, so the slower one counts; then all is read back."""

    read_seconds: float
    encode_seconds: float
    check_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.read_seconds, self.encode_seconds) + self.check_seconds


@dataclass(frozen=True)
class Plan:
    rows: tuple[Row, ...]
    files: tuple[OutputFile, ...]
    source_bytes: int
    directory: str
    disk_needed_bytes: int
    disk_free_bytes: int
    memory_bytes: int  # at most, at any moment of the job
    estimate: JobSeconds | None
    warnings: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def fits(self) -> bool:
        return self.disk_needed_bytes <= self.disk_free_bytes


def plan_job(planned: JobPlan, budget_seconds: float | None = BUDGET_SECONDS) -> Plan:
    """The plan of a job of convert or quantize, whose input is open; no budget, no estimate of time."""
    items: list[Item] = []
    chunks: dict[str, Iterator[Chunk]] = {}
    targets: list[Target] = []
    outputs = planned.job.outputs
    # The main file is shown first, though its name appears last.
    for own in ([o for o in outputs if not _is_sidecar(o.path)], [o for o in outputs if _is_sidecar(o.path)]):
        for output in own:
            for slot, tensor in zip(output.header.slots, output.tensors, strict=True):
                items.append(Item(slot.name, slot.shape, planned.choices[slot.name], *_origin(tensor), len(targets)))
                chunks[slot.name] = tensor.chunks(slot)
        if own:
            targets.append(Target(own[0].path, sum(output.header.size_bytes for output in own), len(own)))
    return make_plan(
        items,
        targets,
        memory_bytes=_memory_bytes(items) + 4 * sum(len(output.header.data) for output in outputs),
        found_bytes=sum(_reserved_bytes(part_path(output.path)) for output in outputs),
        estimate=None
        if budget_seconds is None
        else estimate_time(items, lambda i: next(chunks[i.name]), budget_seconds),
        warnings=planned.warnings,
    )


def _is_sidecar(path: Path) -> bool:
    return path.name.startswith("mtp-")


def _origin(tensor: TensorSource) -> tuple[str, int]:
    """Type and bytes of what a tensor is made of."""
    if isinstance(tensor, StoredTensor):
        return tensor.info.format.name, tensor.info.n_bytes
    assert isinstance(tensor, BoundTensor)
    known = tensor.checkpoint.tensors
    n_bytes = 0
    for piece in tensor.binding.pieces:
        n_matrices, height, _ = matrices(known[piece.source].shape)
        whole = known[piece.source].n_bytes + (
            known[piece.source + SCALE_SUFFIX].n_bytes if piece.source + SCALE_SUFFIX in known else 0
        )
        n_bytes += whole * piece.n_rows // (n_matrices * height)
    return (known[tensor.binding.pieces[0].source].dtype if tensor.binding.pieces else "zeros"), n_bytes


def _memory_bytes(items: Sequence[Item]) -> int:
    """Chunks that were read, are encoded and wait to be written; each is whole rows, at least one."""
    n_weights = max(max(CHUNK_WEIGHTS, item.shape[-1]) for item in items)
    return BASE_BYTES + (2 * (READ_AHEAD + 1) + 3) * 4 * n_weights


def _reserved_bytes(path: Path) -> int:
    """What an interrupted run has taken of the disk already."""
    return path.stat().st_blocks * 512 if path.exists() else 0


def make_plan(
    items: Sequence[Item],
    targets: Sequence[Target],
    *,
    memory_bytes: int,
    found_bytes: int = 0,
    estimate: JobSeconds | None = None,
    warnings: tuple[str, ...] = (),
) -> Plan:
    """`found_bytes` of the targets are on disk already, from an interrupted run."""
    outputs = []
    for index, (path, size_bytes, n_parts) in enumerate(targets):
        own = [item for item in items if item.file == index]
        n_weights, tensor_bytes = sum(item.n_weights for item in own), sum(item.n_bytes for item in own)
        outputs.append(OutputFile(path.name, n_parts, size_bytes, len(own), n_weights, tensor_bytes))
    directory = targets[0].path.parent
    return Plan(
        tuple(_rows(items)),
        tuple(outputs),
        sum(item.source_bytes for item in items),
        str(directory),
        max(0, sum(target.size_bytes for target in targets) - found_bytes),
        free_bytes(directory),
        memory_bytes,
        estimate,
        warnings,
    )


def _rows(items: Iterable[Item]) -> Iterable[Row]:
    """In order of first appearance, the same for every run."""
    groups: dict[tuple[int, str, tuple[int, ...]], list[Item]] = {}
    for item in items:
        groups.setdefault((item.file, split_name(item.name)[1], item.shape), []).append(item)
    for (file, kind, shape), own in groups.items():
        yield Row(
            file,
            kind,
            shape,
            len(own),
            _count(item.source for item in own),
            sum(item.source_bytes for item in own),
            _count(item.choice.block_format.name for item in own),
            _count(item.choice.wanted for item in own if item.choice.wanted != item.choice.block_format.name),
            sum(item.n_weights for item in own),
            sum(item.n_bytes for item in own),
        )


def _count(names: Iterable[str]) -> dict[str, int]:
    """Most frequent first, then by name."""
    return dict(sorted(Counter(names).items(), key=lambda pair: (-pair[1], pair[0])))


def estimate_time(
    items: Sequence[Item],
    sample: Callable[[Item], Chunk],
    budget_seconds: float = BUDGET_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> JobSeconds:
    """Times one chunk of the largest tensor per pair of types; a first run, in which kernels compile, is not counted.

    The source is read as it is now: what the page cache holds is read faster than the disk could.
    """
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        groups.setdefault((item.source, item.choice.block_format.name), []).append(item)
    read_seconds = encode_seconds = 0.0
    for own in groups.values():
        largest = max(own, key=lambda item: item.n_bytes)  # of equal ones the first
        chunk = sample(largest)
        share = largest.n_bytes / chunk.n_bytes
        start = clock()
        raw = chunk.read()
        read_seconds += (clock() - start) * share * _ratio(own, largest, "source_bytes")
        chunk.encode(raw)
        best = _best_of(chunk, raw, budget_seconds / len(groups), clock)
        encode_seconds += best * share * _ratio(own, largest, "n_weights")
    source_bytes, n_bytes = sum(item.source_bytes for item in items), sum(item.n_bytes for item in items)
    return JobSeconds(read_seconds, encode_seconds, read_seconds * n_bytes / max(1, source_bytes))


def _ratio(own: Sequence[Item], largest: Item, what: str) -> float:
    return float(sum(getattr(item, what) for item in own) / max(1, getattr(largest, what)))


def _best_of(chunk: Chunk, raw: Any, budget_seconds: float, clock: Callable[[], float]) -> float:
    """The fastest of a few runs within the budget, of one at least."""
    best, spent = math.inf, 0.0
    for _ in range(MOST_RUNS):
        start = clock()
        chunk.encode(raw)
        seconds = clock() - start
        best, spent = min(best, seconds), spent + seconds
        if spent + best > budget_seconds:
            break
    return best


def as_dict(plan: Plan) -> dict[str, Any]:
    """For --json."""
    files = [{**asdict(file), "bits_per_weight": round(file.bits_per_weight, 4)} for file in plan.files]
    estimate = None if plan.estimate is None else {**asdict(plan.estimate), "seconds": plan.estimate.seconds}
    return {**asdict(plan), "files": files, "size_bytes": plan.size_bytes, "estimate": estimate}


COLUMNS = ("tensors", "", "shape", "from", "written as", "bits", "size")
RIGHT = {1, 5, 6}  # numbers


def format_plan(plan: Plan) -> str:
    lines: list[str] = []
    for index, file in enumerate(plan.files):
        rows = [row for row in plan.rows if row.file == index]
        parts = f" and {file.n_parts - 1} more parts" if file.n_parts > 1 else ""
        lines += [f"{shown(file.name)}{parts}: {file.n_tensors} tensors, {file.n_weights:,} weights, "
                  f"{file.bits_per_weight:.2f} bits per weight, {format_bytes(file.size_bytes)}"]  # fmt: skip
        lines += _format_table([COLUMNS, *(_cells(row) for row in rows)]) if rows else []
        lines += [f"  {note}" for row in rows for note in _fallback_notes(row)]
        lines.append("")
    room = "" if plan.fits else ": TOO LITTLE"
    lines.append(f"source   {format_bytes(plan.source_bytes)}")
    lines.append(f"disk     {format_bytes(plan.disk_needed_bytes)} needed in {shown(str(plan.directory))}, "
                 f"{format_bytes(plan.disk_free_bytes)} free{room}")  # fmt: skip
    lines.append(f"memory   at most {format_bytes(plan.memory_bytes)}")
    if plan.estimate is not None:
        lines.append(_format_estimate(plan, plan.estimate))
    return "\n".join(lines)


def _format_estimate(plan: Plan, estimate: JobSeconds) -> str:
    def rate(seconds: float) -> str:
        return format_speed(plan.source_bytes / max(seconds, 1e-9))

    return (
        f"time     about {in_time(estimate.seconds)}: reads {rate(estimate.read_seconds)}, encodes"
        f" {rate(estimate.encode_seconds)} of source, {in_time(estimate.check_seconds)} to check;"
        " a disk that reads or writes slower sets the pace"
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.kind,
        f"x {row.n_tensors}",
        str(list(row.shape)).replace(" ", ""),
        _in_words(row.sources),
        _in_words(row.types) + ("*" if row.fallbacks else ""),
        f"{8 * row.n_bytes / row.n_weights:.2f}",
        format_bytes(row.n_bytes),
    )


def _in_words(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def _fallback_notes(row: Row) -> list[str]:
    return [
        f"* {row.kind}: {wanted} was meant for {count} of them, but rows of {row.shape[-1]} are not whole blocks of it"
        for wanted, count in row.fallbacks.items()
    ]


def _format_table(cells: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]
    return [
        "  " + "  ".join(
            cell.rjust(width) if column in RIGHT else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]  # fmt: skip


def in_time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
