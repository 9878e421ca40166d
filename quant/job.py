"""A planned job, made true on disk: reserve, write, journal, check, publish, or go on where it stopped.

Knows headers, slots and chunks; where the chunks come from is the plan's business (convert.py, quantize.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from m2lite.errors import M2liteError, ResourceError, UsageError
from m2lite.quant.header import MAGIC, BuiltHeader, Slot
from m2lite.quant.journal import Journal, SourceChanged, SourceFile, Ticket, WrittenTensor, hash_plan
from m2lite.quant.stream import Bytes, Chunk, stream
from m2lite.simd import jit
from m2lite.storage.durable import free_bytes
from m2lite.storage.part_file import PartFile, part_path
from m2lite.system.byte_units import format_bytes
from m2lite.system.outputs import Places

# Written between two syncs of file and journal. A crash costs this much and a tensor; M2's experts are 0.7 GB each.
BATCH_BYTES = 1 << 28
CHECK_BYTES = 8 << 20  # read back at a time
JOURNAL_SUFFIX = ".journal"


class Progress(Protocol):
    """Called after every chunk: the tensor, bytes done and in all (all files together); phase is "" or "verify"."""

    def __call__(self, tensor: str, done_bytes: int, total_bytes: int, /, phase: str = "") -> None: ...


class Source(Protocol):
    """The inputs of a job."""

    def identify(self) -> list[SourceFile]:
        """What the journal knows the inputs by."""

    def check_unchanged(self) -> None:
        """Raises SourceChanged if an input was written to since it was opened."""

    def paths(self) -> list[Path]:
        """Every file that is read."""


class TensorSource(Protocol):
    """Where one tensor comes from."""

    def chunks(self, slot: Slot) -> Iterator[Chunk]:
        """The tensor in the slot's format, in order."""


@dataclass(frozen=True)
class Output:
    """One file: its header with every slot, and the source of each slot's tensor."""

    path: Path
    header: BuiltHeader
    tensors: tuple[TensorSource, ...]


@dataclass(frozen=True)
class FileJob:
    """Files that belong together: their names appear when all are complete, that of the `last` after the others."""

    outputs: tuple[Output, ...]
    source: Source
    journal_path: Path
    last: Path
    options: Mapping[str, Any]  # what was asked for, in words

    @property
    def total_bytes(self) -> int:
        return sum(output.header.size_bytes for output in self.outputs)

    def ticket(self) -> Ticket:
        sources = tuple(self.source.identify())
        plan = hash_plan([output.header.data for output in self.outputs], self.options)
        names = tuple(output.path.name for output in self.outputs)
        return Ticket(plan, sources, self.total_bytes, self.options, names)


def journal_path(out: Path) -> Path:
    return out.with_name(out.name + JOURNAL_SUFFIX)


def run_job(
    job: FileJob,
    *,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the files of a job, or what an earlier run of it left undone; returns the bytes that were found done."""
    _check_outputs(job)
    jit.start(threads)
    with Journal(job.journal_path) as journal:
        run = _Run(job, journal, progress)
        try:
            run.prepare(overwrite, restart)
            found_bytes = run.done_bytes
            run.write(run.missing())
            if verify:
                run.check()
            job.source.check_unchanged()
            run.publish()
        except BaseException as error:
            run.abandon(error)
            raise
    return found_bytes


def _check_outputs(job: FileJob) -> None:
    """No file that will be written is an input under another name, nor anything but a file."""
    places = Places().reads(*job.source.paths())
    places.approve("The journal", job.journal_path, kind="continued")
    for output in job.outputs:
        places.approve("The output", output.path, [part_path(output.path)], kind="replaced")


@dataclass
class _File:
    """An output while it is written; no part: it has its name already."""

    output: Output
    part: PartFile | None = None

    def hashes(self, entries: Mapping[str, WrittenTensor]) -> list[int] | None:
        """Of all tensors, or None while one is missing."""
        slots = self.output.header.slots
        found = [entries[slot.name].xxh64 for slot in slots if slot.name in entries]
        return found if len(found) == len(slots) else None

    def is_published(self, entries: Mapping[str, WrittenTensor]) -> bool:
        """The final name holds exactly this: its header with all hashes."""
        hashes, path = self.hashes(entries), self.output.path
        if hashes is None or part_path(path).exists() or not path.is_file():
            return False
        wanted = self.output.header.seal(hashes)
        with path.open("rb") as file:
            return path.stat().st_size == self.output.header.size_bytes and file.read(len(wanted)) == wanted


Place = tuple[_File, Slot]


@dataclass
class _Run:
    """One attempt at a job, under the lock of its journal."""

    job: FileJob
    journal: Journal
    progress: Progress | None
    files: list[_File] = field(default_factory=list)
    done_bytes: int = 0
    is_begun: bool = False  # parts and journal are ours to remove
    writer: _Writer | None = None

    @property
    def total_bytes(self) -> int:
        return sum(slot.n_bytes for output in self.job.outputs for slot in output.header.slots)

    def prepare(self, overwrite: bool, restart: bool) -> None:
        """Every file is reserved and has its header, without magic and hashes; what is done already is known."""
        ticket = self.job.ticket()
        resumes = not restart and self.journal.resume(ticket)
        self.files = [_File(output) for output in self.job.outputs]
        published = [resumes and file.is_published(self.journal.entries) for file in self.files]
        missing = [file for file, done in zip(self.files, published, strict=True) if not done]
        for file in missing:
            _check_target(file.output.path, overwrite)
        if not resumes:
            _check_disk(self.job)
        self.is_begun = True
        if not resumes:
            self._clear()
        for file in missing:
            header, path = file.output.header, file.output.path
            file.part = PartFile(path, header.size_bytes, replaces=os.path.lexists(path), resume=resumes)
            if not file.part.resumed:  # the part is gone: so is what the journal knows of it
                for slot in header.slots:
                    self.journal.entries.pop(slot.name, None)
            file.part.write(len(MAGIC), header.data[len(MAGIC) :])
        if not resumes:
            self.journal.begin(ticket)
        self.done_bytes = sum(entry.n_bytes for entry in self.journal.entries.values())

    def _clear(self) -> None:
        """Remove the parts of the job that the journal was of, which may have had other names."""
        for name in self.journal.files_before():
            path = self.job.journal_path.with_name(name)
            if part_path(path).exists():
                PartFile(path, 0, replaces=True, is_ours=True).discard()

    def missing(self) -> list[Place]:
        entries = self.journal.entries
        return [(file, slot) for file in self.files for slot in file.output.header.slots if slot.name not in entries]

    def write(self, places: Sequence[Place]) -> None:
        """Make these tensors, in order; they are on disk and in the journal."""
        self.writer = _Writer(self.job.source, self.journal, places)
        stream(self._chunks(places), self.writer.write, self._report)
        self.writer.commit()

    def _chunks(self, places: Sequence[Place]) -> Iterator[tuple[Place, Chunk]]:
        for file, slot in places:
            tensor = file.output.tensors[file.output.header.slots.index(slot)]
            for chunk in tensor.chunks(slot):
                yield (file, slot), chunk

    def _report(self, place: Place, chunk: Chunk) -> None:
        self.done_bytes += chunk.n_bytes
        if self.progress is not None:
            self.progress(place[1].name, self.done_bytes, self.total_bytes)

    def check(self) -> None:
        """Read everything back. A tensor that is not what was written is written once more."""
        places = [(file, slot) for file in self.files if file.part for slot in file.output.header.slots]
        wrong = self._find_wrong(places, self.progress)
        if wrong:
            self.write(wrong)
            wrong = self._find_wrong(wrong, None)
        if wrong:
            file, slot = wrong[0]
            raise M2liteError(
                f"{file.output.path}: the disk twice returned other bytes than were written for {slot.name!r}, "
                f"{slot.n_bytes} bytes at {slot.offset}.",
                "Check the disk, and write to another one.",
            )

    def _find_wrong(self, places: Sequence[Place], progress: Progress | None) -> list[Place]:
        wrong = []
        done, total = 0, sum(slot.n_bytes for _, slot in places)
        for file, slot in places:
            assert file.part is not None
            digest = xxhash.xxh64()
            for offset in range(slot.offset, slot.offset + slot.n_bytes, CHECK_BYTES):
                buffer = np.empty(min(CHECK_BYTES, slot.offset + slot.n_bytes - offset), np.uint8)
                file.part.read(offset, buffer.data)
                file.part.release(offset, len(buffer))
                digest.update(buffer.data)
                done += len(buffer)
                if progress is not None:
                    progress(slot.name, done, total, phase="verify")
            if digest.intdigest() != self.journal.entries[slot.name].xxh64:
                wrong.append((file, slot))
        return wrong

    def publish(self) -> None:
        """Hashes, magic, names; the journal goes when nothing is left to do."""
        parts = [(file, file.part) for file in self.files if file.part is not None]
        for file, part in parts:
            hashes = file.hashes(self.journal.entries)
            assert hashes is not None
            part.write(len(MAGIC), file.output.header.seal(hashes)[len(MAGIC) :])
            part.complete(MAGIC)
        for _, part in sorted(parts, key=lambda pair: pair[0].output.path == self.job.last):
            part.publish()
        self.journal.remove()

    def abandon(self, error: BaseException) -> None:
        """Keep what a next run can go on from, and say so; else leave nothing. Raises nothing."""
        parts = [file.part for file in self.files if file.part is not None]
        with contextlib.suppress(M2liteError, OSError):
            if not self.is_begun:
                if self.journal.is_blank:
                    self.journal.remove()
                return
            if self.writer is not None and isinstance(error, KeyboardInterrupt | SystemExit):
                self.writer.commit()
        if self.is_begun and (self.journal.is_blank or isinstance(error, SourceChanged)):
            for part in parts:
                with contextlib.suppress(M2liteError):
                    part.discard()
            with contextlib.suppress(M2liteError):
                self.journal.remove()
        elif self.is_begun:
            _say_kept(error, self.job)
        for part in parts:
            with contextlib.suppress(M2liteError):
                part.close()


def _say_kept(error: BaseException, job: FileJob) -> None:
    words = (
        f"What is done is kept in {job.last.name}.part: run the same command again to go on, or remove the .part "
        f"files and {job.journal_path.name}."
    )
    if isinstance(error, M2liteError):
        error.todo = f"{error.todo} {words}"
    else:
        error.add_note(words)


def _check_target(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise UsageError(f"The output {path} exists already.", "Choose another name, or allow to overwrite it.")


def _check_disk(job: FileJob) -> None:
    directory = job.journal_path.parent
    free = free_bytes(directory)
    if free < job.total_bytes:
        raise ResourceError(
            f"The output takes {format_bytes(job.total_bytes)}, {directory} has {format_bytes(free)} free.",
            "Make room, or choose another disk.",
        )


class _Writer:
    """Puts chunks in their places, and tensors that are complete and on disk into the journal."""

    def __init__(self, source: Source, journal: Journal, places: Sequence[Place]) -> None:
        self._source, self._journal = source, journal
        self._ends = {file.output.path: slot.name for file, slot in places}  # the last tensor of each file
        self._digest = xxhash.xxh64()
        self._n_bytes = 0  # of the tensor at hand
        self._finished: list[tuple[_File, WrittenTensor]] = []
        self._is_broken = False

    def write(self, place: Place, chunk: Chunk, data: Bytes) -> None:
        """On one thread, chunk after chunk. After an error nothing is written any more."""
        if self._is_broken:
            raise ValueError("writing went on after an error")
        try:
            self._write(place, chunk, data)
        except BaseException:
            self._is_broken = True
            raise

    def _write(self, place: Place, chunk: Chunk, data: Bytes) -> None:
        file, slot = place
        assert file.part is not None and data.nbytes == chunk.n_bytes and chunk.offset == self._n_bytes
        view = data.reshape(-1).data
        file.part.write(slot.offset + chunk.offset, view)
        file.part.release(slot.offset + chunk.offset, chunk.n_bytes)  # starts to write it out
        self._digest.update(view)
        self._n_bytes += chunk.n_bytes
        if self._n_bytes < slot.n_bytes:
            return
        self._finished.append((file, WrittenTensor(slot.name, slot.offset, slot.n_bytes, self._digest.intdigest())))
        self._digest, self._n_bytes = xxhash.xxh64(), 0
        if self._ends[file.output.path] == slot.name or sum(e.n_bytes for _, e in self._finished) >= BATCH_BYTES:
            self.commit()

    def commit(self) -> None:
        """The complete tensors are on disk, and then in the journal."""
        if not self._finished or self._is_broken:
            return
        self._source.check_unchanged()
        for part in {id(file): file.part for file, _ in self._finished}.values():
            assert part is not None
            part.sync()
        self._journal.add([entry for _, entry in self._finished])
        for file, entry in self._finished:
            assert file.part is not None
            file.part.release(entry.offset, entry.n_bytes)
        self._finished = []
