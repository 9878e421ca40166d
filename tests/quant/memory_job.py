"""A job in memory to try faults of the disk on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from m2lite.formats.table import FORMATS
from m2lite.quant.header import Slot, string
from m2lite.quant.job import FileJob, journal_path
from m2lite.quant.journal import SourceChanged, SourceFile
from m2lite.quant.split import Planned, plan_files
from m2lite.quant.stream import Bytes, Chunk


@dataclass
class MemorySource:
    """An input that says what it is told to."""

    files: list[SourceFile] = field(default_factory=lambda: [SourceFile("in.safetensors", 100, 1, "ab")])
    has_changed: bool = False
    inputs: list[Path] = field(default_factory=list)

    def identify(self) -> list[SourceFile]:
        return self.files

    def check_unchanged(self) -> None:
        if self.has_changed:
            raise SourceChanged("in.safetensors changed while it was read.")

    def paths(self) -> list[Path]:
        return self.inputs


@dataclass
class MemoryTensor:
    """Random bytes in chunks; `made` counts how often each tensor was begun."""

    name: str
    seed: int
    made: dict[str, int]

    def chunks(self, slot: Slot) -> Iterator[Chunk]:
        self.made[self.name] = self.made.get(self.name, 0) + 1
        data = np.random.default_rng(self.seed).integers(0, 256, slot.n_bytes, np.uint8)
        for offset in range(0, slot.n_bytes, 200):
            piece = data[offset : offset + 200]
            yield Chunk(offset, len(piece), lambda: None, lambda piece=piece: piece, _same)


def _same(data: Bytes) -> Bytes:
    return data


def memory_job(folder: Path, source: MemorySource | None = None, seed: int = 0, parts: bool = True) -> FileJob:
    """A sidecar of one tensor and a model of four, in two or three parts."""
    made: dict[str, int] = {}

    def tensors(names: str, first: int) -> list[Planned]:
        return [
            Planned(f"{name}.weight", (first + i, 20), FORMATS["F32"], MemoryTensor(name, seed + first + i, made))
            for i, name in enumerate(names)
        ]

    out = folder / "x.gguf"
    keys = [string("general.name", "memory")]
    sidecar = plan_files(folder / "mtp-x.gguf", "minimax-m2", keys, tensors("m", 3), 32)
    model = plan_files(out, "minimax-m2", keys, tensors("abcd", 4), 32, 1300 if parts else None)
    options = {"command": "test", "type": "f32", "seed": seed}
    return FileJob((*sidecar, *model), source or MemorySource(), journal_path(out), model[0].path, options)


def made(job: FileJob) -> dict[str, int]:
    """How often each tensor was made."""
    tensor = job.outputs[0].tensors[0]
    assert isinstance(tensor, MemoryTensor)
    return tensor.made
