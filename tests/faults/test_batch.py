"""A batch's files at every file operation: what counted as done stays, and going on gives the same bytes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from m2lite.batch.lines import line_key
from m2lite.batch.results import Results, manifest_path, merge, read_results, result_line, status
from m2lite.errors import M2liteError
from tests.faults.disk import at_every_call

NAMES = ["a", "b", "c", "d"]
MANIFEST: dict[str, Any] = {"m2lite_batch": 1, "lines": len(NAMES), "model": "m", "shard": "1/1", "seed": 0}
BEFORE = ["c", "b"]  # have a result already, which of b is an error


def result(name: str, is_failed: bool = False) -> dict[str, Any]:
    return result_line(name, None if is_failed else {"text": f"é {name}" * 9}, "wrong" if is_failed else None)


def prepare(folder: Path) -> None:
    results = Results(folder / "out.jsonl", MANIFEST)
    for name in BEFORE:
        results.add(result(name, name == "b"), line_key(name))
    results.close()


def run(folder: Path) -> list[str]:
    """What is left is done, failed lines again, and all is sorted; the names of results that counted as done."""
    done: list[str] = []
    (folder / "done").write_text("")
    results = Results(folder / "out.jsonl", MANIFEST | {"seed": 1}, force=True, retry_failed=True)
    try:
        for name in NAMES:
            if results.ended.get(line_key(name), True):
                results.add(result(name), line_key(name))
                done.append(name)
                (folder / "done").write_text("".join(done))
        results.sort(NAMES)
    finally:
        results.close()
    return done


def lines(folder: Path) -> list[str]:
    return (folder / "out.jsonl").read_text().splitlines()


def test_results_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [json.dumps(result(name), ensure_ascii=False) for name in NAMES]

    def check(folder: Path, is_done: bool, is_dead: bool) -> None:
        ends = {found.custom_id: found.is_failed for found in read_results(folder / "out.jsonl")}
        assert {"c", *(folder / "done").read_text()} <= {name for name, is_failed in ends.items() if not is_failed}
        assert set(lines(folder)) <= {*whole, json.dumps(result("b", True), ensure_ascii=False)} or is_dead
        assert json.loads(manifest_path(folder / "out.jsonl").read_text())["seed"] in (0, 1)
        assert is_dead or not list(folder.glob(".*.tmp"))
        run(folder)
        assert lines(folder) == whole and not list(folder.glob(".*.tmp"))
        assert status(folder / "out.jsonl")["left"] == 0

    assert at_every_call(tmp_path, monkeypatch, prepare, run, check) > 35


def test_a_beginning_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an output that was not there: it never is one that `batch` would then refuse as another's."""

    def begin(folder: Path) -> None:
        prepare(folder)

    def check(folder: Path, is_done: bool, is_dead: bool) -> None:
        results = Results(folder / "out.jsonl", MANIFEST)
        assert len(results.ended) == len(BEFORE) or not is_done
        results.close()
        assert {path.name for path in folder.iterdir()} == {"out.jsonl", "out.jsonl.manifest.json"}

    assert at_every_call(tmp_path, monkeypatch, lambda folder: None, begin, check) > 15


def test_merging_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def join(folder: Path) -> None:
        merge([folder / "out.jsonl"], folder / "all.jsonl", ["b", "c"])

    def check(folder: Path, is_done: bool, is_dead: bool) -> None:
        target = folder / "all.jsonl"
        assert target.exists() or not is_done
        with contextlib.suppress(M2liteError):  # its name is there: it is whole
            join(folder)
        assert [found.custom_id for found in read_results(target)] == ["b", "c"] and not target.with_name(
            "all.jsonl.part"
        ).exists()

    assert at_every_call(tmp_path, monkeypatch, prepare, join, check) > 8
