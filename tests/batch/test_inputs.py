"""Where a batch's lines come from: pipes, packed files, files that change; and where its results may go."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from m2lite import Sampling
from m2lite.batch import runner
from m2lite.batch.lines import Input
from m2lite.dialogue.chat_request import ChatRequest
from tests.children import PATIENCE_S
from tests.conftest import Run

Models = dict[str, Path]
LINES = b"".join(json.dumps({"custom_id": f"n{n}", "prompt": "a"}).encode() + b"\n" for n in range(3))


def names(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_fifo_is_answered_whole(run_inline: Run, tmp_path: Path, model_files: Models, pack: type[bytes]) -> None:
    fifo, out = tmp_path / "fifo", tmp_path / "out.jsonl"
    for _ in range(2):  # the second time nothing is left
        fifo.unlink(missing_ok=True)
        os.mkfifo(fifo)
        writer = threading.Thread(target=fifo.write_bytes, args=(pack(LINES),))
        writer.start()
        done = run_inline("batch", fifo, "-o", out, "--model", model_files["reply"])
        writer.join()
        assert done.returncode == 0, done.stderr
        assert sorted(names(out)) == ["n0", "n1", "n2"]
    assert "nothing was left to do" in done.stderr


def test_packed_lines_are_the_same_batch(run_inline: Run, tmp_path: Path, model_files: Models) -> None:
    packed, plain, out = tmp_path / "in.jsonl.gz", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    packed.write_bytes(gzip.compress(LINES))
    plain.write_bytes(LINES)
    assert run_inline("batch", packed, "-o", out, "--model", model_files["reply"]).returncode == 0
    done = run_inline("batch", plain, "-o", out, "--model", model_files["reply"])
    assert done.returncode == 0 and "nothing was left to do" in done.stderr, done.stderr
    (tmp_path / "in.txt.gz").write_bytes(gzip.compress(b"a question\n"))
    lines = list(Input(str(tmp_path / "in.txt.gz"), ChatRequest([], Sampling(seed=0))))
    assert lines[0].request is not None and lines[0].request.messages[0]["content"] == "a question"


def changing(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """`change()` after the input was checked, before its lines are answered."""
    real = runner.lines_left

    def lines_left(*arguments: Any) -> Any:
        change()
        return real(*arguments)

    monkeypatch.setattr(runner, "lines_left", lines_left)


def test_lines_that_are_appended_meanwhile_are_told(
    run_inline: Run, tmp_path: Path, model_files: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(LINES)

    def append() -> None:
        with source.open("ab") as file:
            file.write(b'{"prompt": "more"}\nnot even a line')

    changing(monkeypatch, append)
    done = run_inline("batch", source, "-o", out, "--model", model_files["reply"])
    assert done.returncode == 0 and "has grown by 34 bytes since it was checked; they were not read" in done.stderr
    assert sorted(names(out)) == ["n0", "n1", "n2"]
    assert "0 left of 3 lines" in run_inline("batch", "status", out).stdout


def test_lines_that_change_meanwhile_are_an_error(
    run_inline: Run, tmp_path: Path, model_files: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(LINES)
    changing(monkeypatch, lambda: source.write_bytes(LINES.replace(b"n2", b"n9")))
    done = run_inline("batch", source, "-o", out, "--model", model_files["reply"])
    assert done.returncode == 1 and "has changed since it was checked" in done.stderr
    assert names(out) == []


def test_results_of_other_lines_are_no_work_that_is_done(run_inline: Run, tmp_path: Path, model_files: Models) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(LINES)
    arguments = ("batch", source, "-o", out, "--model", model_files["reply"])
    assert run_inline(*arguments).returncode == 0
    source.write_text('{"custom_id": "other", "prompt": "a"}\n')
    done = run_inline(*arguments, "--force")
    assert done.returncode == 0, done.stderr
    assert "3 results in" in done.stderr and "1 of 1 lines are done" in done.stderr
    assert names(out)[3:] == ["other"]
    found = run_inline("batch", "status", out).stdout
    assert "0 left of 1 lines" in found and "3 results more than lines" in found


def test_fewer_answers_than_lines_are_an_error(
    run_inline: Run, tmp_path: Path, model_files: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(LINES)
    monkeypatch.setattr(runner, "lines_left", lambda *_: iter(()))
    done = run_inline("batch", source, "-o", tmp_path / "out.jsonl", "--model", model_files["reply"])
    assert done.returncode == 1 and "had 3 lines when it was checked, and 0 have a result" in done.stderr


def test_stdout_that_is_the_input(command_env: dict[str, str], tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(LINES)
    with source.open("ab") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "m2lite", "batch", str(source), "-o", "-"],
            env=command_env, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
    assert done.returncode == 2 and "stdout goes to" in done.stderr and source.read_bytes() == LINES


def test_merge_takes_its_order_from_a_pipe_and_results_from_files(run_inline: Run, tmp_path: Path) -> None:
    from m2lite.batch.results import result_line

    outs = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for out, each in zip(outs, (["n2", "n0"], ["n1"]), strict=True):
        out.write_text("".join(json.dumps(result_line(name, {}, None)) + "\n" for name in each))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    done = run_inline("batch", "merge", outs[0], fifo, "-o", tmp_path / "all.jsonl")
    assert done.returncode == 2 and "is a FIFO, not a file" in done.stderr
    writer = threading.Thread(target=fifo.write_bytes, args=(LINES,))
    writer.start()
    done = run_inline("batch", "merge", *outs, "-o", tmp_path / "all.jsonl", "--input", fifo)
    writer.join()
    assert done.returncode == 0 and names(tmp_path / "all.jsonl") == ["n0", "n1", "n2"]


def test_lines_that_json_can_carry_and_utf8_cannot(run_inline: Run, tmp_path: Path, model_files: Models) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b'{"custom_id": "a\\ud800", "prompt": "x"}\n{"custom_id": "b", "prompt": "\\udfff"}\n'
        b'{"custom_id": "c", "custom_id": "d", "prompt": "x"}\n{"custom_id": "e", "prompt": "x"}\n'
    )
    arguments = ("batch", source, "-o", out, "--model", model_files["reply"])
    done = run_inline(*arguments)
    assert done.returncode == 2 and "3 of 4 lines cannot be answered" in done.stderr and not out.exists()
    assert "line 1: no JSON (the string 'a\\ud800' holds U+D800" in done.stderr
    assert "line 3: no JSON (the key 'custom_id' is given twice)" in done.stderr
    for _ in range(2):
        done = run_inline(*arguments, "--on-bad-line", "record")
        assert done.returncode == 3 and sorted(names(out)) == ["e", "line-1", "line-2", "line-3"]


def test_names_made_up_for_lines_are_nobody_elses(run_inline: Run, tmp_path: Path, model_files: Models) -> None:
    """A line without a name is called line-N, which another line may have taken."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"custom_id": "line-2", "prompt": "x"}\n{"prompt": "x"}\n')
    for _ in range(2):
        done = run_inline("batch", source, "-o", out, "--model", model_files["reply"], "--on-bad-line", "record")
        assert done.returncode == 3 and sorted(names(out)) == ["line-2", "line-2-again"], done.stderr
