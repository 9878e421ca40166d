"""File operations that fail or die at call n, and a job in memory to try them on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2lite.quant.header import Slot, string
from m2lite.quant.job import Job, journal_path
from m2lite.quant.journal import SourceChanged, SourceFile
from m2lite.quant.split import Planned, plan_files
from m2lite.quant.stream import Bytes, Chunk
from m2lite.storage import durable
from m2lite.storage.blocks import FORMATS

CHANGES = [name for name in vars(durable.FileOps) if not name.startswith("_")]


class Dead(BaseException):
    """The process ended here: nothing that follows reaches the disk."""


class Faults(durable.FileOps):
    """The real calls (but syncs, which only cost time here), of which number `fails_at` fails with `code`.

    Without a code the process ends there, by raising Dead, or with `exits` in earnest; nothing happens afterwards.
    """

    def __init__(self, fails_at: int = 0, code: int | None = None, exits: bool = False) -> None:
        self.n_calls = 0
        self.open_fds: set[int] = set()
        self._fails_at, self._code, self._exits = fails_at, code, exits
        for name in CHANGES:
            setattr(self, name, self._counted(name, getattr(durable.FileOps, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            self.n_calls += 1
            if self._fails_at and self.n_calls >= self._fails_at and self._code is None:
                if self._exits:
                    os._exit(77)
                raise Dead
            if self.n_calls == self._fails_at:
                assert self._code is not None
                raise OSError(self._code, os.strerror(self._code))
            if name == "close":
                self.open_fds.discard(arguments[0])
            if name in ("fsync", "fdatasync"):
                return None
            if name in ("write", "pwrite"):  # the system may write less than it is asked to
                arguments = (arguments[0], arguments[1][:350], *arguments[2:])
            result = call(*arguments)
            if name == "open":
                self.open_fds.add(result)
            return result

        return wrapped

    def end_process(self) -> None:
        """What the system does for a process that ended: its descriptors and locks are gone."""
        for fd in self.open_fds:
            with contextlib.suppress(OSError):
                os.close(fd)


@contextlib.contextmanager
def faults(monkeypatch: pytest.MonkeyPatch, fails_at: int = 0, code: int | None = None) -> Iterator[Faults]:
    found = Faults(fails_at, code)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "fsops", found)
        try:
            yield found
        finally:
            found.end_process()


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


def memory_job(folder: Path, source: MemorySource | None = None, seed: int = 0, parts: bool = True) -> Job:
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
    return Job((*sidecar, *model), source or MemorySource(), journal_path(out), model[0].path, options)


def made(job: Job) -> dict[str, int]:
    """How often each tensor was made."""
    tensor = job.outputs[0].tensors[0]
    assert isinstance(tensor, MemoryTensor)
    return tensor.made
