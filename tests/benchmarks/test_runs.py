"""benchmarks/runs.py, pairs.py and side_by_side.py: what the programs print, what a machine did meanwhile, resuming.

llama_bench.json is what llama-bench of llama.cpp 0c1e570 printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import busy_core
import pairs
import runs
import side_by_side
from runs import (
    RunError,
    Work,
    append_row,
    identity,
    ik_argv,
    llama_argv,
    ours_argv,
    parse_llama,
    parse_ours,
    read_rows,
    series,
)

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long

SAMPLE = Path(__file__).parent / "llama_bench.json"
VERSIONS = {"tree": "t", "python": "3", "numba": "1", "llama.cpp": "b1", "commit": "c"}
COMPUTER = {"processor": "p", "cores": 2}


@pytest.fixture
def work(tmp_path: Path) -> Work:
    model = tmp_path / "slice.gguf"
    model.write_bytes(b"GGUF")
    return Work(model, (512, 64), (), (0, 4096), threads=2, repeats=3, llama_args=("-fa", "1"))


def test_llama_bench_is_read() -> None:
    tests, about = parse_llama(SAMPLE.read_text())
    assert [(t["kind"], t["n"], t["depth"]) for t in tests] == [("prefill", 32, 64), ("decode", 4, 64)]
    assert all(len(t["samples"]) == 2 and min(t["samples"]) <= t["tokens_per_s"] <= max(t["samples"]) for t in tests)
    assert about["build_commit"] == "0c1e570" and about["flash_attn"] == 1 and about["repack"] is True


@pytest.mark.parametrize("text", ["", "error: no such file", "[]", '{"n_prompt": 1}'])
def test_what_is_no_figure_is_refused(text: str) -> None:
    with pytest.raises(RunError):
        parse_llama(text)


def test_a_test_of_both_kinds_is_refused() -> None:
    rows = json.loads(SAMPLE.read_text())
    rows[0]["n_gen"] = 8
    with pytest.raises(RunError, match="together"):
        parse_llama(json.dumps(rows))


def test_our_own_is_read() -> None:
    test = {"kind": "decode", "n": 8, "depth": 0, "tokens_per_s": {"median": 2.0}, "samples": [1.0, 2.0, 9.0]}
    tests, about = parse_ours(json.dumps({"tests": [test], "threads": 2}))
    assert tests[0]["tokens_per_s"] == 2 and about == {"threads": 2}


def test_both_are_asked_the_same(work: Work) -> None:
    ours, llama = ours_argv(work), llama_argv(work, Path("/x/llama-bench"))
    for flag, value in (("-p", "512,64"), ("-n", "0"), ("-d", "0,4096"), ("-r", "3"), ("-t", "2")):
        assert ours[ours.index(flag) + 1] == llama[llama.index(flag) + 1] == value
    assert ours[ours.index("--ctx") + 1] == "4608" and llama[-2:] == ["-fa", "1"]
    assert runs.named(ours)[:3] == ["m2lite", "bench", "slice.gguf"]
    assert runs.named(llama)[:3] == ["llama-bench", "-m", "slice.gguf"]


def test_ik_is_asked_the_same_at_depth_0(work: Work) -> None:
    argv = ik_argv(replace(work, depths=(0,), ik_args=("-rtr", "1")), Path("/x/llama-bench"))
    assert "-d" not in argv and argv[-2:] == ["-rtr", "1"] and argv[argv.index("-p") + 1] == "512,64"
    with pytest.raises(RunError, match="depth 0"):
        ik_argv(work, Path("/x/llama-bench"))
    rows = [{name: value for name, value in row.items() if name != "n_depth"} for row in json.loads(SAMPLE.read_text())]
    assert {test["depth"] for test in parse_llama(json.dumps(rows))[0]} == {0}


def test_a_cut_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert list(read_rows(path)) == []
    append_row(path, {"a": 1})
    append_row(path, {"a": 2})
    path.write_bytes(path.read_bytes()[:-4])
    assert list(read_rows(path)) == [{"a": 1}]
    append_row(path, {"a": "ü"})
    assert list(read_rows(path)) == [{"a": 1}, {"a": "ü"}]
    path.write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(RunError, match="line 2"):
        list(read_rows(path))


def test_a_run_counts_what_others_use() -> None:
    spin = "import time\nend = time.monotonic() + {}\nwhile time.monotonic() < end: pass\nprint('[]')"

    def parse(text: str) -> tuple[list[Any], dict[str, Any]]:
        return json.loads(text), {}

    alone = runs.run([sys.executable, "-c", spin.format(0.2)], parse)
    other = subprocess.Popen([sys.executable, "-c", spin.format(600)], stdout=subprocess.DEVNULL)
    try:
        shared = runs.run([sys.executable, "-c", spin.format(0.5)], parse)
        process = psutil.Process(other.pid)
        used = sum(process.cpu_times()[:2])
        own, with_other = runs._times([])[2], runs._times([process])[2]
    finally:
        other.kill()
        other.wait()
    assert alone["seconds"] >= 0.2 and alone["argv"][0] == Path(sys.executable).name
    assert shared["foreign_cores"] > 0.1 and runs.is_noisy([shared])
    assert with_other >= own + used > own  # what is spared counts as the run's own
    with pytest.raises(RunError, match=r"ended with 3: told why"):
        runs.run([sys.executable, "-c", "import sys; print('told why', file=sys.stderr); sys.exit(3)"], parse)


def collect(args: argparse.Namespace, work: Work) -> list[dict[str, Any]]:
    bench = pairs.Bench(side_by_side.BENCH, args, work)
    return bench.collect(lambda number: side_by_side.make_pair(bench, number))


def fake(argv: list[str], noise: float = 0.0) -> dict[str, Any]:
    speed = 100.0 if "m2lite" in argv else 50.0
    test = {"kind": "prefill", "n": 512, "depth": 0, "tokens_per_s": speed, "samples": [speed]}
    return {"argv": argv, "foreign_cores": noise, "tests": [test], "about": {}}


@pytest.fixture
def arguments(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[argparse.Namespace]:
    """A command line whose runs are not real; `calls` has their order."""
    calls: list[str] = []

    def run(argv: list[str], parse: Any, spared: Any = ()) -> dict[str, Any]:
        calls.append("ours" if "m2lite" in argv else "llama")
        noise = 0.5 if len(calls) in args.disturbed else 0.0
        return fake(argv, noise)

    monkeypatch.setattr(pairs, "run", run)
    monkeypatch.setattr(pairs, "wait_for_quiet", lambda patience: True)
    monkeypatch.setattr(pairs, "describe_versions", lambda path: VERSIONS)
    monkeypatch.setattr(pairs, "describe_machine", lambda: COMPUTER)
    args = argparse.Namespace(
        program=tmp_path / "llama-bench", label="x", output=tmp_path / "rows.jsonl", pairs=3, allow_noise=False,
        patience=0, calls=calls, disturbed=(),
    )  # fmt: skip
    yield args


def test_pairs_alternate_and_are_resumed(arguments: argparse.Namespace, work: Work) -> None:
    args = arguments
    rows = collect(args, work)
    assert [row["order"][0] for row in rows] == ["ours", "llama", "ours"]
    assert len(args.calls) == 2 + 6  # warm-up and three pairs
    args.pairs = 4
    assert len(collect(args, work)) == 4 and len(args.calls) == 8 + 2 + 2
    assert len(collect(args, work)) == 4 and len(args.calls) == 12  # nothing was left to do
    text = side_by_side.summary(collect(args, work))
    assert "ratio 2.000 [2.000, 2.000]" in text


def test_another_label_or_code_is_another_series(
    arguments: argparse.Namespace, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments
    collect(args, work)
    monkeypatch.setattr(pairs, "describe_versions", lambda path: VERSIONS | {"commit": "d"})
    collect(args, work)
    assert len(args.calls) == 8  # a commit that leaves the measured code alone changes nothing
    monkeypatch.setattr(pairs, "describe_versions", lambda path: VERSIONS | {"tree": "u"})
    collect(args, work)
    args.label = "y"
    collect(args, work)
    assert len(args.calls) == 24 and len(list(read_rows(args.output))) == 9


def test_a_disturbed_pair_is_kept_marked_and_made_again(arguments: argparse.Namespace, work: Work) -> None:
    args = arguments
    args.disturbed = (4,)
    assert len(collect(args, work)) == 3
    assert [row["noisy"] for row in read_rows(args.output)] == [True, False, False, False]
    args.disturbed, args.pairs = range(100), 5
    assert len(collect(args, work)) == 3  # gives up
    args.allow_noise = True
    assert len(collect(args, work)) == 14  # all that there are


def test_a_busy_machine_is_refused(arguments: argparse.Namespace, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "wait_for_quiet", lambda patience: False)
    with pytest.raises(RunError, match="busy"):
        collect(arguments, work)
    assert not arguments.output.exists()


def test_identity_survives_the_file(work: Work, tmp_path: Path) -> None:
    wanted = identity("b", "l", work.as_json(), VERSIONS, COMPUTER)
    append_row(tmp_path / "rows.jsonl", {"identity": wanted, "noisy": False})
    assert len(series(read_rows(tmp_path / "rows.jsonl"), wanted)) == 1


def test_lists_of_counts() -> None:
    assert pairs.parse_counts("0,4096,0") == (0, 4096)
    for text in ("", "1,x", "-1"):
        with pytest.raises(argparse.ArgumentTypeError):
            pairs.parse_counts(text)


def test_a_busy_round_turns_and_spares_its_own_loop(
    arguments: argparse.Namespace, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    spared_by: list[int] = []

    def run(argv: list[str], parse: Any, spared: Any = ()) -> dict[str, Any]:
        spared_by.append(sum(process.is_running() for process in spared))
        found = fake(argv)
        found["tests"][0]["tokens_per_s"] /= 1 + len(list(spared))
        return found

    monkeypatch.setattr(pairs, "run", run)
    arguments.pairs = 2
    bench = pairs.Bench(busy_core.BENCH, arguments, work)
    rows = bench.collect(lambda number: busy_core.make_round(bench, number))
    assert spared_by == [0, 0, 0, 1, 0, 1, 1, 0, 1, 0]
    assert [row["order"][0] for row in rows] == ["ours quiet", "ours busy"]
    text = busy_core.summary(rows)
    assert text.count("ratio 2.000") == 2 and "alone    100.00, beside the loop     50.00" in text
