"""benchmarks/report.py: the table from rows, and that prose survives it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import report
from intervals import median_interval
from runs import append_row

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long

FOLDER = Path(report.__file__).parent
TARGETS = [{"label": "slice*", "kind": "decode", "depth": 0, "ratio": 1.5, "mapped": 0.95}, {"busy": 2.5}]


def test_of(kind: str, n: int, depth: int, speed: float, **more: float) -> dict[str, Any]:
    return {"kind": kind, "n": n, "depth": depth, "tokens_per_s": speed, "samples": [speed], **more}


test_of.__test__ = False  # type: ignore[attr-defined]


def row(number: int, *, label: str = "slice4", tree: str = "t", noisy: bool = False, factor: float = 2.0) -> Any:
    def run(speed: float, argv: list[str], **about: float) -> dict[str, Any]:
        tests = [test_of("prefill", n, 0, 10 * speed) for n in (64, 512)]
        tests += [test_of("decode", 64, d, speed / (1 + d), bytes_per_token=1e9) for d in (0, 4096)]
        return {"argv": argv, "tests": tests, "about": about, "foreign_cores": 0.0}

    ours = run(factor * (20 + number), ["m2lite", "bench", "slice.gguf"],
               read_mapped_bytes_per_s=42e9)  # fmt: skip
    return {
        "identity": {"bench": "side_by_side", "label": label, "tree": tree, "work": {"model": "slice.gguf"}},
        "date": f"2026-11-{10 + number:02}T00:00:00+00:00",
        "versions": {"m2lite": "0.1.0", "commit": "c" * 40, "python": "3.11", "numba": "0.68", "llama.cpp": "b1"},
        "machine": {"processor": "P", "cores": 2, "flags": ["avx2"]},
        "noisy": noisy,
        "runs": {"ours": ours, "llama": run(20 + number, ["llama-bench", "-m", "slice.gguf", "-fa", "1"])},
    }


def busy_row(number: int) -> Any:
    found = row(number, label="busy")
    found["identity"]["bench"] = "busy_core"
    ours, llama = found["runs"]["ours"], found["runs"]["llama"]
    halved = {**ours, "tests": [{**t, "tokens_per_s": t["tokens_per_s"] / 2} for t in ours["tests"]]}
    found["runs"] = {"ours quiet": ours, "ours busy": halved, "llama quiet": llama, "llama busy": llama}
    return found


def test_the_newest_series_of_a_label_counts() -> None:
    rows = [row(0, tree="old"), row(5), row(6), row(9, tree="old", noisy=True), row(1, label="other")]
    found = report.newest_series(rows)
    assert {key: len(series) for key, series in found.items()} == {
        ("side_by_side", "slice4"): 2, ("side_by_side", "other"): 1,
    }  # fmt: skip
    assert found["side_by_side", "slice4"][0]["identity"]["tree"] == "t"


def test_verdicts() -> None:
    found = median_interval([1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0])
    assert [report.verdict(found, target) for target in (1.4, 1.45, 1.75, None)] == ["yes", "open", "no", ""]
    assert report.verdict(median_interval([1.5]), 1.4) == "open"  # one value proves nothing
    assert [report.verdict(found, target, at_most=True) for target in (2.0, 1.8, 1.5)] == ["yes", "open", "no"]


def test_the_first_target_that_fits_counts() -> None:
    assert report.find_target(TARGETS, "ratio", "slice4", ("decode", 0, 64)) == 1.5
    assert report.find_target(TARGETS, "ratio", "slice4", ("decode", 4096, 64)) is None
    assert report.find_target(TARGETS, "ratio", "tiny", ("decode", 0, 64)) is None
    assert report.find_target(TARGETS, "busy", "tiny", ("prefill", 0, 64)) == 2.5


def test_tables() -> None:
    rows = [row(n) for n in range(7)]
    text = report.tables(report.newest_series([*rows, *(busy_row(n) for n in range(7))]), TARGETS)
    lines = text.splitlines()
    [decode] = [line for line in lines if "| decode of 64 | 46.00 |" in line]
    assert decode.endswith("| 23.00 | 2.000 [2.000, 2.000] | 1.5 | yes |  |  |  |  |")
    assert "`m2lite bench slice.gguf`, `llama-bench -m slice.gguf -fa 1`" in text
    [share] = [line for line in lines if "at least 0.95" in line]
    assert share == "| slice4 | decode of 64 | 1.095 [0.952, 1.238] | at least 0.95 | yes |"
    [busy] = [line for line in lines if "| decode of 64 | m2lite |" in line]
    assert "| 46.00 | 23.00 | 2.000 [2.000, 2.000] | at most 2.5 | yes |" in busy
    assert "* slice4: 7 pairs, 2026-11-10 to 2026-11-16; P, 2 cores, avx2; m2lite 0.1.0 (cccccccccc)" in text
    for table in text.split("### ")[1:]:
        widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1


def test_a_third_program() -> None:
    """Its ratio has targets of its own, and its version comes from what it printed."""
    rows = [row(n) for n in range(7)]
    for each in rows:
        ik = each["runs"]["llama"]
        tests = [{**t, "tokens_per_s": 2 * t["tokens_per_s"]} for t in ik["tests"] if not t["depth"]]
        each["runs"]["ik"] = {**ik, "tests": tests, "about": {"build_commit": "abc"}}
    text = report.tables(report.newest_series(rows), [*TARGETS, {"ik": 1.1}])
    [line] = [line for line in text.splitlines() if "| decode of 64 | 46.00 |" in line]
    assert line.endswith("| 23.00 | 2.000 [2.000, 2.000] | 1.5 | yes | 46.00 | 1.000 [1.000, 1.000] | 1.1 | no |")
    [deep] = [line for line in text.splitlines() if "depth 4,096 | 0.01 | 0.01" in line]
    assert deep.endswith("|  |  |  |  |  |  |") and "ik_llama.cpp abc" in text


def test_prose_is_left_alone(tmp_path: Path) -> None:
    results, page = tmp_path / "rows.jsonl", tmp_path / "RESULTS.md"
    for n in range(2):
        append_row(results, row(n))
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    command = [sys.executable, FOLDER / "report.py", results, "--into", page]
    for _ in range(2):
        subprocess.run(command, check=True)
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith(f"{report.END}\nafter\n")
        assert "old" not in text and text.count("| slice4 | decode of 64 |") == 2
    page.write_text("no markers\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "needs the lines" in done.stderr and page.read_text() == "no markers\n"


def test_the_page_has_its_markers() -> None:
    page = FOLDER / "RESULTS.md"
    assert "x" in report.replace_table(page.read_text(), "x", page)
