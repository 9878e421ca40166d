"""A batch's output: what survives, what is refused, and how outputs are joined."""

from __future__ import annotations

import errno
import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from m2lite import ResourceError, UsageError
from m2lite.batch.lines import Line, line_key
from m2lite.batch.results import InTurn, Results, manifest_path, merge, read_results, result_line, status
from m2lite.storage import durable

MANIFEST: dict[str, Any] = {"m2lite_batch": 1, "lines": 9, "model": "m", "shard": "1/1", "seed": 0}


def add(results: Results, *names: str, error: str | None = None) -> None:
    for name in names:
        body = None if error else {"text": f"é {name}"}
        results.add(result_line(name, body, error), line_key(name))


def ends(path: Path) -> list[tuple[str, bool]]:
    return [(found.custom_id, found.is_failed) for found in read_results(path)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_lines_are_openais(out: Path) -> None:
    results = Results(out, MANIFEST)
    add(results, "a")
    add(results, "b", error="wrong")
    results.close()
    good, bad = map(json.loads, out.read_text().splitlines())
    assert good["custom_id"] == "a" and good["error"] is None and good["response"]["status_code"] == 200
    assert good["response"]["body"] == {"text": "é a"}
    assert bad["response"] is None and bad["error"]["message"] == "wrong" and bad["id"] != good["id"]
    assert json.loads(manifest_path(out).read_text()) == MANIFEST
    assert status(out) | {"last_written": 0} == {
        "output": str(out), "done": 1, "failed": 1, "left": 7, "total": 9, "surplus": 0, "manifest": MANIFEST,
        "last_written": 0,
    }  # fmt: skip


@pytest.mark.parametrize("torn", [b'{"id": "x', b"{", b"\xff" * 100_000])
def test_torn_line_is_dropped(out: Path, torn: bytes) -> None:
    results = Results(out, MANIFEST)
    add(results, "a", "b")
    results.close()
    with out.open("ab") as file:
        file.write(torn)
    assert [name for name, _ in ends(out)] == ["a", "b"]
    results = Results(out, MANIFEST)
    assert len(results.ended) == 2
    add(results, "c")
    results.close()
    assert [name for name, _ in ends(out)] == ["a", "b", "c"]
    assert all(json.loads(line) for line in out.read_text().splitlines())


def test_failed_lines_are_done_again(out: Path) -> None:
    results = Results(out, MANIFEST)
    add(results, "a")
    add(results, "b", "c", error="wrong")
    add(results, "d")
    results.close()
    results = Results(out, MANIFEST)
    assert len(results.ended) == 4
    results.close()
    results = Results(out, MANIFEST, retry_failed=True)
    assert len(results.ended) == 2
    assert [name for name, _ in ends(out)] == ["a", "d"]
    with pytest.raises(UsageError, match="in use"):  # the file that took its place is locked, too
        Results(out, MANIFEST)
    add(results, "b")
    results.close()
    assert ends(out) == [("a", False), ("d", False), ("b", False)]
    assert [path.name for path in out.parent.iterdir() if path.name.endswith(".tmp")] == []


def test_other_settings_are_refused_with_a_list(out: Path) -> None:
    results = Results(out, MANIFEST)
    add(results, "a")
    results.close()
    before = out.read_bytes(), manifest_path(out).read_bytes()
    other = MANIFEST | {"seed": 1, "temperature": 0.5}
    with pytest.raises(UsageError) as error:
        Results(out, other)
    assert "seed: 0 there, 1 now" in str(error.value) and "temperature: None there, 0.5 now" in str(error.value)
    assert "lines" not in error.value.what and (out.read_bytes(), manifest_path(out).read_bytes()) == before
    Results(out, other, force=True).close()
    assert json.loads(manifest_path(out).read_text()) == other
    assert ends(out) == [("a", False)]


def test_two_runs_on_one_output(out: Path) -> None:
    first = Results(out, MANIFEST)
    with pytest.raises(UsageError, match=f"in use by pid {os.getpid()}"):
        Results(out, MANIFEST)
    first.close()
    Results(out, MANIFEST).close()


def test_more_results_than_lines_are_no_negative_number(out: Path) -> None:
    results = Results(out, MANIFEST | {"lines": 2})
    for name in "abcde":
        add(results, name)
    results.close()
    found = status(out)
    assert (found["done"], found["left"], found["surplus"], found["total"]) == (5, 0, 3, 2)


def test_files_of_others_are_left_alone(out: Path, tmp_path: Path) -> None:
    out.write_text("my notes\n")
    with pytest.raises(UsageError, match="no batch wrote it"):
        Results(out, MANIFEST)
    assert out.read_text() == "my notes\n"
    other = tmp_path / "other.jsonl"
    Results(other, MANIFEST).close()
    other.write_text("my notes\n")
    with pytest.raises(UsageError, match="line 1 is no result"):
        Results(other, MANIFEST)
    assert other.read_text() == "my notes\n"
    other.write_text("".join(json.dumps(result_line("a", {}, None)) + "\n" for _ in range(2)))
    with pytest.raises(UsageError, match="two results"):
        Results(other, MANIFEST)
    for path in (tmp_path, tmp_path / "nowhere" / "out.jsonl"):
        with pytest.raises(UsageError, match="directory"):
            Results(path, MANIFEST)


HEAD = '{"m2lite_batch": 1, "model": "m", "shard": "1/1", "lines": '


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[" * 100_000, '{"m2lite_batch": 2}', '{"m2lite_batch": 1}', HEAD + '"9"}', HEAD + "-1}",
     HEAD + "true}", HEAD + "NaN}", HEAD + "9" * 5000 + "}", HEAD + '9, "x": "\\ud800"}', HEAD + '9, "lines": 9}',
     HEAD.replace('"m"', "[]") + "9}", HEAD.replace('"1/1"', "1") + "9}", '{"m2lite_batch": true, "lines": 9}'],
)  # fmt: skip
def test_manifests_that_are_none(out: Path, text: str) -> None:
    Results(out, MANIFEST).close()
    manifest_path(out).write_text(text)
    for read in (functools.partial(Results, out, MANIFEST), functools.partial(status, out)):
        with pytest.raises(UsageError, match="manifest"):
            read()


RESULT = json.dumps(result_line("a", {}, None))


@pytest.mark.parametrize(
    "line",
    ["", "3", "[]", "[" * 100_000, '{"custom_id": "a"}', '{"custom_id": 1, "error": null}', "\xff",
     RESULT.replace('"a"', '"\\ud800"'), RESULT.replace('"a"', '"a", "custom_id": "b"'),
     RESULT.replace('"error": null', '"error": 0'), RESULT.replace("200", "9" * 5000), RESULT.replace("200", "1e999")],
)  # fmt: skip
def test_lines_that_are_no_result(out: Path, tmp_path: Path, line: str) -> None:
    Results(out, MANIFEST).close()
    out.write_text(RESULT.replace('"a"', '"first"') + "\n" + line + "\n", "latin-1")
    before = out.read_bytes()
    for read in (
        functools.partial(Results, out, MANIFEST, retry_failed=True),
        functools.partial(status, out),
        functools.partial(merge, [out], tmp_path / "all.jsonl", ["first"]),
    ):
        with pytest.raises(UsageError, match=r"out\.jsonl: line 2 is no result of a batch \("):
            read()
    assert out.read_bytes() == before and not (tmp_path / "all.jsonl").exists()


def test_an_output_that_cannot_be_read(out: Path) -> None:
    Results(out, MANIFEST).close()
    out.unlink()
    out.mkdir()
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        status(out)


def test_many_differences_are_told_in_part(out: Path) -> None:
    Results(out, MANIFEST | {f"k{n}": "x" * 1000 for n in range(100)}).close()
    with pytest.raises(UsageError) as error:
        Results(out, MANIFEST)
    assert 20 <= len(error.value.details) <= 40 and all(len(line) < 500 for line in error.value.details)


class FullDisk(durable.FileOps):
    """Writes of results fail from the n-th on, having written half."""

    def __init__(self, n: int) -> None:
        self.left = n

    def pwrite(self, fd: int, data: Any, offset: int) -> int:  # type: ignore[override]
        self.left -= 1
        if self.left < 0:
            os.pwrite(fd, bytes(data)[: len(data) // 2], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.pwrite(fd, data, offset)


def test_full_disk(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(out, MANIFEST)
    monkeypatch.setattr(durable, "fsops", FullDisk(2))
    add(results, "a", "b")
    with pytest.raises(ResourceError, match="no room"):
        add(results, "c")
    monkeypatch.undo()
    results.close()
    assert [name for name, _ in ends(out)] == ["a", "b"]
    results = Results(out, MANIFEST)
    add(results, "c")
    results.close()
    assert [name for name, _ in ends(out)] == ["a", "b", "c"]


def test_sorting(out: Path) -> None:
    results = Results(out, MANIFEST)
    add(results, "c", "x", "a")
    add(results, "b", error="wrong")
    before = {line["custom_id"]: line for line in map(json.loads, out.read_text().splitlines())}
    results.sort(["a", "b", "other", "c"])
    assert ends(out) == [("a", False), ("b", True), ("c", False), ("x", False)]
    assert {line["custom_id"]: line for line in map(json.loads, out.read_text().splitlines())} == before
    inode = out.stat().st_ino
    results.sort(["a", "b", "other", "c"])
    assert out.stat().st_ino == inode  # nothing to do
    add(results, "other")
    results.close()
    assert [name for name, _ in ends(out)] == ["a", "b", "c", "x", "other"]


def test_sorting_on_a_full_disk(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(out, MANIFEST)
    add(results, "b", "a")
    before = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(durable, "fsops", FullDisk(1))
        with pytest.raises(ResourceError, match="no room"):
            results.sort(["a", "b"])
    assert out.read_bytes() == before and [path.name for path in out.parent.glob("*.tmp")] == []
    results.sort(["a", "b"])
    results.close()
    assert [name for name, _ in ends(out)] == ["a", "b"]


def test_results_in_turn() -> None:
    written: list[str] = []
    turn = InTurn(lambda result, key: written.append(result["custom_id"]))
    lines = [Line(n, name, None) for n, name in enumerate("abcdef")]
    taken = turn.take(lines)
    for _ in range(4):
        next(taken)
    for name, expected in (("c", ""), ("b", ""), ("a", "abc")):
        turn.add(result_line(name, {}, None), line_key(name))
        assert "".join(written) == expected
    list(taken)
    for name in "fe":
        turn.add(result_line(name, {}, None), line_key(name))
    assert written == ["a", "b", "c"]
    turn.close()
    assert written == ["a", "b", "c", "e", "f"]  # nothing that is done is lost when d never comes


def shards(tmp_path: Path) -> list[Path]:
    paths = []
    for n, (names, failed) in enumerate([(("a", "d"), ("b",)), (("c",), ()), (("b",), ("e",))]):
        path = tmp_path / f"{n}.jsonl"
        results = Results(path, MANIFEST)
        add(results, *names)
        add(results, *failed, error="wrong")
        results.close()
        paths.append(path)
    return paths


def test_merge(tmp_path: Path) -> None:
    paths, target = shards(tmp_path), tmp_path / "all.jsonl"
    assert merge(paths, target, ["e", "d", "c", "b", "a", "f"]) == (5, 1)
    assert ends(target) == [("e", True), ("d", False), ("c", False), ("b", False), ("a", False)]
    with pytest.raises(UsageError, match="exists already"):
        merge(paths, target)
    assert merge([*paths, paths[0]], tmp_path / "again.jsonl") == (5, 1)  # the same result twice is one


def test_merges_that_are_refused(tmp_path: Path) -> None:
    paths, target = shards(tmp_path), tmp_path / "all.jsonl"
    with pytest.raises(UsageError, match="not in the input"):
        merge(paths, target, ["a"])
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(result_line("a", {"text": "another"}, None)) + "\n")
    with pytest.raises(UsageError, match="'a' has two results"):
        merge([*paths, other], target)
    with pytest.raises(UsageError, match="does not exist"):
        merge([tmp_path / "nowhere"], target)
    with pytest.raises(UsageError, match="a file that this command reads"):
        merge([paths[0]], paths[0])
    assert not target.exists()
