"""What an interrupted job has done: OUT.gguf.journal, JSON lines. Knows tensors by name, and no bytes of theirs.

Line 1 says which job it is; each line that follows is a tensor that is on disk in the .part file, and its hash.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from m2lite import __version__
from m2lite.errors import BadModelError, UsageError
from m2lite.storage.line_log import LineLog
from m2lite.system.json_text import JsonError, parse_object

FORMAT = 1
_BEGINS = b'{"files": ['  # the first line's keys are sorted
MOST_LINE_BYTES, MOST_LINE_ITEMS = 16 << 20, 1 << 18  # the first line lists every input
TOOL = f"m2lite {__version__}"


class SourceChanged(BadModelError):
    """An input was written to while it was read: nothing that was made of it counts."""


class SourceFile(NamedTuple):
    """One input file, as far as it can be told apart without reading all of it."""

    name: str
    size: int
    mtime_ns: int
    sha_of_header: str


class WrittenTensor(NamedTuple):
    """A tensor that is on disk."""

    tensor: str
    offset: int
    n_bytes: int
    xxh64: int


class Ticket(NamedTuple):
    """Which job it is. Two jobs of one ticket write the same bytes."""

    plan_sha: str  # of the headers of all output files
    sources: tuple[SourceFile, ...]
    total_bytes: int
    options: Mapping[str, Any]  # in words, to say what differs
    files: tuple[str, ...]  # the names of the outputs

    def line(self) -> str:
        return json.dumps(
            {
                "v": FORMAT,
                "tool": TOOL,
                "plan_sha": self.plan_sha,
                "src": [source._asdict() for source in self.sources],
                "total_bytes": self.total_bytes,
                "opts": dict(self.options),
                "files": list(self.files),
            },
            sort_keys=True,
        )


def hash_plan(headers: Sequence[bytes], options: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, TOOL, options], sort_keys=True).encode())
    for header in headers:
        digest.update(hashlib.sha256(header).digest())
    return digest.hexdigest()


class Journal:
    """The open journal of one job. While it is open, no other process works on the same output."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_ours(path)
        self._log = LineLog(path)
        self.entries: dict[str, WrittenTensor] = {}

    def files_before(self) -> list[str]:
        """The outputs that the journal's own job writes; plain names only."""
        names = self._head().get("files")
        names = names if isinstance(names, list) else []
        return [name for name in names if isinstance(name, str) and name.endswith(".gguf") and "/" not in name]

    @property
    def is_blank(self) -> bool:
        """Nothing in it is worth keeping."""
        return len(self._log.lines) < 2

    def resume(self, ticket: Ticket) -> bool:
        """Whether the journal is this job's; then `entries` says what is done. Another's is an error."""
        if self.is_blank:
            return False
        if self._log.lines[0] != ticket.line().encode():
            raise UsageError(
                f"{self.path} is of a job that was not finished, and {self._difference(ticket)}.",
                "Run that command again to finish it, or add --restart to begin anew.",
            )
        for line in self._log.lines[1:]:
            entry = _parse_entry(line)
            if entry is not None:  # of two lines the later one counts: the tensor was written again
                self.entries[entry.tensor] = entry
        return True

    def begin(self, ticket: Ticket) -> None:
        """A journal of this job, in which nothing is done."""
        self._log.cut(0)
        self.entries = {}
        self._log.append([ticket.line()])

    def add(self, entries: Sequence[WrittenTensor]) -> None:
        """These tensors are on disk; from now on that is known."""
        lines = [
            json.dumps({"tensor": e.tensor, "off": e.offset, "nbytes": e.n_bytes, "xxh64": f"{e.xxh64:016x}"})
            for e in entries
        ]
        self._log.append(lines)
        self.entries.update((entry.tensor, entry) for entry in entries)

    def remove(self) -> None:
        self._log.remove()

    def close(self) -> None:
        self._log.close()

    def _head(self) -> dict[str, Any]:
        return _parse_line(self._log.lines[0]) if self._log.lines else {}

    def _difference(self, ticket: Ticket) -> str:
        """The first thing that is not as it was then, in words."""
        head, now = self._head(), json.loads(ticket.line())
        if not head:
            return "its first line is damaged"
        if (head.get("v"), head.get("tool")) != (FORMAT, TOOL):
            return f"it was begun by {head.get('tool')}, this is {TOOL}"
        if head.get("src") != now["src"]:
            return _source_difference(head.get("src"), now["src"])
        options = head.get("opts")
        for name, value in now["opts"].items():
            before = options.get(name) if isinstance(options, dict) else None
            if before != value:
                return f"{name} was {json.dumps(before)} then and is {json.dumps(value)} now"
        return "the plan of its output was another"

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _check_ours(path: Path) -> None:
    """What begins as no journal does is somebody else's file, also where --restart would throw a journal away."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_BEGINS))
    except OSError:
        return  # there is none, or LineLog says what is wrong with it
    if not _BEGINS.startswith(start) and start.strip(b"\0"):
        raise UsageError(
            f"{path} is there already and no journal of m2lite.", "Move it away, or choose another name for the output."
        )


def _parse_entry(line: bytes) -> WrittenTensor | None:
    """A line that cannot be read is no tensor: it is done again."""
    found = _parse_line(line)
    entry = found.get("tensor"), found.get("off"), found.get("nbytes"), found.get("xxh64")
    if tuple(map(type, entry)) != (str, int, int, str) or not re.fullmatch("[0-9a-f]{16}", found["xxh64"]):
        return None
    return WrittenTensor(found["tensor"], found["off"], found["nbytes"], int(found["xxh64"], 16))


def _parse_line(line: bytes) -> dict[str, Any]:
    """An object, or {} for whatever is none."""
    try:
        return parse_object(line, most_bytes=MOST_LINE_BYTES, most_items=MOST_LINE_ITEMS)
    except JsonError:
        return {}


def _source_difference(before: Any, now: Sequence[Mapping[str, Any]]) -> str:
    files = [file for file in before if isinstance(file, dict)] if isinstance(before, list) else []
    known = {str(file.get("name")): file for file in files}
    for file in now:
        if known.get(file["name"]) != file:
            what = "has changed since" if file["name"] in known else "was not among its inputs"
            return f"the input {file['name']} {what}"
    return "it had more inputs"
