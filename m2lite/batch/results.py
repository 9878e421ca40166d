"""Results of a batch on disk: lines that are appended and synced, and the manifest beside them. Knows no model.

A result is on disk before its line counts as done. What a crash tore off is no result. The manifest says what the
results follow from: a run that goes on with other settings would mix two batches in one file.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from m2lite.batch.lines import Line, line_key
from m2lite.errors import M2liteError, UsageError
from m2lite.storage.durable import atomic_write, remove_leftovers, write_output
from m2lite.storage.line_log import LineLog
from m2lite.system.inputs import check_regular
from m2lite.system.json_text import JsonError, parse_object
from m2lite.system.outputs import STDIO, Places

VERSION = 1
_LONGEST = 256 << 20  # bytes of a result
_MOST_DIFFERENCES = 30  # that are told
_MOST_MANIFEST = 16 << 20  # bytes: a schema of 1 MiB, indented
Manifest = dict[str, Any]


def manifest_path(output: Path) -> Path:
    return output.with_name(output.name + ".manifest.json")


def approve_output(places: Places, output: str) -> None:
    """UsageError unless the results of a batch may be written there."""
    if output == STDIO:
        places.approve_stdout("--output -")
    else:
        beside, todo = [manifest_path(Path(output))], "Name a file, or use -o - for stdout."
        places.approve("--output", output, beside, kind="continued", todo=todo)


class Results:
    """The output of a batch, open for one writer."""

    def __init__(self, output: Path, manifest: Manifest, force: bool = False, retry_failed: bool = False) -> None:
        """Begin the output, or go on with it.

        UsageError for a file of something else, for one that was begun with other settings unless `force`, and for one
        that another process writes. With `retry_failed`, lines that failed are to be done again.
        """
        self.path, self.manifest = output, manifest
        approve_output(Places(), str(output))
        known = read_manifest(output)
        if output.exists() and output.stat().st_size and known is None:
            raise UsageError(f"{output}: exists already, and no batch wrote it.", "Choose another name.")
        self._log = LineLog(output, keeps_lines=False)  # from here on nobody else writes
        try:
            for path in (output, manifest_path(output)):
                remove_leftovers(path)
            self.is_begun = known is not None
            if known is not None and not force:
                _check_same(known, manifest, output)
            if known is None or known != manifest:
                atomic_write(manifest_path(output), json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n")
            self.ended = dict[int, bool]()  # which lines have a result, by their keys, and whether they failed
            for found in read_results(output):
                if found.key in self.ended:
                    what = f"{output}: {found.custom_id!r} has two results."
                    raise UsageError(what, "Was it edited? Choose another name.")
                self.ended[found.key] = found.is_failed
            if retry_failed and any(self.ended.values()):
                self._forget_failed()
        except BaseException:
            self.close()
            raise

    def _forget_failed(self) -> None:
        """The file without its failed lines takes its place; until then it is whole."""
        self._log.replace(found.line for found in read_results(self.path) if not found.is_failed)
        self.ended = {key: False for key, is_failed in self.ended.items() if not is_failed}

    def add(self, line: Mapping[str, Any], key: int) -> None:
        """A result, on disk when this returns."""
        self._log.append([json.dumps(line, ensure_ascii=False)])
        self.ended[key] = line["error"] is not None

    def sort(self, order: Iterable[str]) -> None:
        """Results in the order of these names; any others come last. Until all are on disk, the file is as it was."""
        rank = {line_key(name): n for n, name in enumerate(order)}
        places = [(rank.get(found.key, len(rank)), *found.place) for found in read_results(self.path)]
        in_order = sorted(places)
        if in_order != places:
            with self.path.open("rb") as file:
                self._log.replace(_read_at(file, at, n_bytes) for _, at, n_bytes in in_order)

    def close(self) -> None:
        self._log.close()


class InTurn:
    """Hands results on in the order in which their lines were taken."""

    def __init__(self, write: Callable[[Mapping[str, Any], int], None]) -> None:
        self._write = write
        self._taken = deque[int]()
        self._held = dict[int, Mapping[str, Any]]()

    def take(self, lines: Iterable[Line]) -> Iterator[Line]:
        for line in lines:
            self._taken.append(line.key)
            yield line

    def add(self, result: Mapping[str, Any], key: int) -> None:
        self._held[key] = result
        while self._taken and self._taken[0] in self._held:
            self._hand_on(self._taken.popleft())

    def close(self) -> None:
        """Those that still waited for another."""
        for key in self._taken:
            if key in self._held:
                self._hand_on(key)

    def _hand_on(self, key: int) -> None:
        self._write(self._held.pop(key), key)


def result_line(custom_id: str, body: Mapping[str, Any] | None, error: M2liteError | str | None) -> dict[str, Any]:
    """A line of OpenAI's batch output."""
    name = hashlib.sha256(custom_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    failure = None
    if error is not None:
        code = "invalid_request" if isinstance(error, str | UsageError) else "failed"
        failure = {"code": code, "message": str(error)}
    response = None if body is None else {"status_code": 200, "request_id": f"req_{name}", "body": body}
    return {"id": f"batch_req_{name}", "custom_id": custom_id, "response": response, "error": failure}


def read_manifest(output: Path) -> Manifest | None:
    """None where there is none; UsageError for one that cannot be read."""
    path = manifest_path(output)
    try:
        with path.open("rb") as file:
            found = parse_object(file.read(_MOST_MANIFEST + 1), most_bytes=_MOST_MANIFEST)
    except FileNotFoundError:
        return None
    except (OSError, JsonError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} cannot be read as a manifest: {what}.", "Choose another output.") from None
    if found.get("m2lite_batch") != VERSION:
        raise UsageError(f"{path} is no manifest of version {VERSION}.", "Choose another output.")
    for name, is_sound, what in _MANIFEST_FIELDS:
        if not is_sound(found.get(name)):
            raise UsageError(
                f"{path}: {name} is {str(found.get(name))[:80]!r}, expected {what}.",
                "Was it edited? Choose another output.",
            )
    return found


# Of a manifest's fields, those that anything is done with beyond being compared.
_MANIFEST_FIELDS: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("lines", lambda value: type(value) is int and 0 <= value < 1 << 53, "a number of lines"),
    ("model", lambda value: isinstance(value, str), "a name"),
    ("shard", lambda value: isinstance(value, str), "a text such as '1/1'"),
)


def _check_same(known: Manifest, manifest: Manifest, output: Path) -> None:
    names = [name for name in {**known, **manifest} if known.get(name) != manifest.get(name)]
    differences = [
        f"  {name[:60]}: {_short(known.get(name))} there, {_short(manifest.get(name))} now"
        for name in names[:_MOST_DIFFERENCES]
    ]
    if differences:
        raise UsageError(
            f"{output} was begun with other settings:",
            "Use the same, or another output; --force goes on all the same.",
            details=differences,
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:199]}…"


class Found(NamedTuple):
    """A line of an output."""

    custom_id: str
    is_failed: bool
    offset: int
    line: bytes

    @property
    def key(self) -> int:
        return line_key(self.custom_id)

    @property
    def place(self) -> tuple[int, int]:
        """Where it is, and how long."""
        return self.offset, len(self.line)


def read_results(path: Path) -> Iterator[Found]:
    """All of an output; a torn last line is none. UsageError for what is no result."""
    offset, number = 0, 0
    try:
        with path.open("rb") as file:
            while line := file.readline(_LONGEST + 1):
                number += 1
                if len(line) > _LONGEST:
                    raise UsageError(
                        f"{path}: line {number} has more than {_LONGEST:,} bytes.", "Choose another output."
                    )
                if line.endswith(b"\n"):
                    yield Found(*_parse_result(line), offset, line)
                offset += len(line)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", "Choose another output.") from None
    except JsonError as error:
        raise UsageError(
            f"{path}: line {number} is no result of a batch ({error}).", "Choose another output."
        ) from None


def _parse_result(raw: bytes) -> tuple[str, bool]:
    """(custom_id, whether it failed); JsonError for what no batch wrote."""
    line = parse_object(raw)
    custom_id, error = line.get("custom_id"), line.get("error")
    if not isinstance(custom_id, str) or "error" not in line or not isinstance(error, dict | None):
        raise JsonError("no custom_id, or no error")
    return custom_id, error is not None


def status(output: Path) -> dict[str, Any]:
    """What a batch's output holds, and what lacks."""
    manifest = read_manifest(output)
    if manifest is None:
        raise UsageError(f"{output} is no batch's output: {manifest_path(output)} lacks.", "Name the file behind -o.")
    n = Counter(found.is_failed for found in read_results(output))
    total, n_results = manifest["lines"], n.total()
    changed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(output.stat().st_mtime)) if output.exists() else None
    return {
        "output": str(output), "done": n[False], "failed": n[True], "left": max(0, total - n_results), "total": total,
        "surplus": max(0, n_results - total), "last_written": changed, "manifest": manifest,
    }  # fmt: skip


def merge(outputs: Iterable[Path], target: Path, order: Iterable[str] | None = None) -> tuple[int, int]:
    """All results in one file: (how many, how many of them failed). With `order`, in that of those names.

    Outputs of shards, or of runs over parts of an input. A name that comes twice is an error, unless one of both
    failed, which then does not count, or both are the same.
    """
    places = dict[int, tuple[int, int, int, bool]]()  # name -> file, offset, bytes, whether it failed
    paths = list(outputs)
    Places().reads(*paths).approve("--output", target)
    for index, path in enumerate(paths):
        if not path.exists():
            raise UsageError(f"{path} does not exist.")
        check_regular(path)
        for found in read_results(path):
            known = places.get(found.key)
            if known is None or (known[3] and not found.is_failed):
                places[found.key] = (index, *found.place, found.is_failed)
            elif not found.is_failed and _read(paths, known) != found.line:
                what = f"{found.custom_id!r} has two results: in {paths[known[0]]} and {path}."
                raise UsageError(what, "Leave one out.")
    keys = list(places)
    if order is not None:
        rank = {line_key(name): n for n, name in enumerate(order)}
        unknown = next((key for key in keys if key not in rank), None)
        if unknown is not None:
            name, _ = _parse_result(_read(paths, places[unknown]))
            raise UsageError(f"{name!r} has a result, but is not in the input.", "Leave --input out.")
        keys.sort(key=lambda key: rank[key])
    n_bytes = sum(places[key][2] for key in keys)
    write_output(target, (_read(paths, places[key]) for key in keys), n_bytes, replaces=False)
    return len(keys), sum(places[key][3] for key in keys)


def _read(paths: list[Path], place: tuple[int, int, int, bool]) -> bytes:
    with paths[place[0]].open("rb") as file:
        return _read_at(file, place[1], place[2])


def _read_at(file: IO[bytes], offset: int, n_bytes: int) -> bytes:
    file.seek(offset)
    return file.read(n_bytes)
