"""Which tensors go into which file: one, or the parts of a split. Knows headers and sizes; writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from m2lite.errors import UsageError
from m2lite.formats.table import BlockFormat
from m2lite.quant.header import Key, build_header, choose_alignment, int32, tensor_bytes, uint16
from m2lite.quant.job import Output, TensorSource
from m2lite.system.byte_units import format_bytes

MAX_PARTS = 99_999  # what five digits count


class Planned(NamedTuple):
    """A tensor of the output, its format, and where it comes from."""

    name: str
    shape: tuple[int, ...]
    block_format: BlockFormat
    source: TensorSource

    @property
    def n_bytes(self) -> int:
        return tensor_bytes(self.block_format, self.shape)


def plan_files(
    path: Path,
    architecture: str,
    keys: Sequence[Key],
    tensors: Sequence[Planned],
    alignment: int | None = None,
    max_bytes: int | None = None,
) -> tuple[Output, ...]:
    """The file `path`, or where it would be larger than `max_bytes` its parts, each within that."""
    alignment = alignment or choose_alignment([tensor.n_bytes for tensor in tensors])
    whole = _output(path, architecture, keys, tensors, alignment)
    if max_bytes is None or whole.header.size_bytes <= max_bytes:
        return (whole,)
    groups = _group(architecture, keys, tensors, alignment, max_bytes)
    if len(groups) > MAX_PARTS:
        raise UsageError(f"Parts of {format_bytes(max_bytes)} would be {len(groups):,}.", "Allow larger ones.")
    return tuple(
        _output(
            part_name(path, number, len(groups)),
            architecture if number == 0 else None,
            [*(keys if number == 0 else ()), *_split_keys(number, len(groups), len(tensors))],
            group,
            alignment,
        )
        for number, group in enumerate(groups)
    )


def part_name(path: Path, number: int, count: int) -> Path:
    """OUT-00001-of-00003.gguf, as gguf-split and our reader have it; `number` counts from 0."""
    return path.with_name(f"{path.stem}-{number + 1:05}-of-{count:05}.gguf")


def _split_keys(number: int, count: int, n_tensors: int) -> list[Key]:
    return [uint16("split.no", number), uint16("split.count", count), int32("split.tensors.count", n_tensors)]


def _output(
    path: Path, architecture: str | None, keys: Sequence[Key], tensors: Sequence[Planned], alignment: int
) -> Output:
    table = [(tensor.name, tensor.shape, tensor.block_format) for tensor in tensors]
    header = build_header(architecture, keys, table, alignment, hashed=True)
    return Output(path, header, tuple(tensor.source for tensor in tensors))


def _group(
    architecture: str, keys: Sequence[Key], tensors: Sequence[Planned], alignment: int, max_bytes: int
) -> list[list[Planned]]:
    """Tensors in order, as many to a part as it holds; a tensor is never cut."""
    groups: list[list[Planned]] = [[]]
    split_keys = _split_keys(0, 1, len(tensors))
    header_bytes = len(build_header(architecture, [*keys, *split_keys], [], alignment, hashed=True).data)
    later_bytes = len(build_header(None, split_keys, [], alignment, hashed=True).data)
    body_bytes = 0
    for tensor in tensors:
        entry_bytes = _entry_bytes(tensor)
        padded = tensor.n_bytes + -tensor.n_bytes % alignment
        if groups[-1] and _padded(header_bytes + entry_bytes, alignment) + body_bytes + padded > max_bytes:
            groups.append([])
            header_bytes, body_bytes = later_bytes, 0
        groups[-1].append(tensor)
        header_bytes, body_bytes = header_bytes + entry_bytes, body_bytes + padded
        if (least := _padded(header_bytes, alignment) + body_bytes) > max_bytes:
            raise UsageError(
                f"Tensor {tensor.name!r} alone makes a part of {format_bytes(least)} ({least:,} bytes), more than the"
                f" {format_bytes(max_bytes)} ({max_bytes:,} bytes) that were asked for.",
                "A tensor is never cut: allow larger parts.",
            )
    return groups


def _entry_bytes(tensor: Planned) -> int:
    """What a tensor adds to a header: its hash, and its row of the table."""
    return 8 + (8 + len(tensor.name)) + (4 + 8 * len(tensor.shape)) + (4 + 8)


def _padded(n_bytes: int, alignment: int) -> int:
    return n_bytes + -n_bytes % alignment
