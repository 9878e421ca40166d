"""What both programs are asked, and what the disk delivered."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from beyond_ram import BeyondBench, disk_reads, summary
from runs import Work

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BeyondBench:
    model = tmp_path / "slice.gguf"
    model.write_bytes(b"GGUF" * 1000)
    program = tmp_path / "llama-bench"
    program.write_text("#!/bin/sh\necho 'version: 1 (abc)'\n")
    program.chmod(0o755)
    work = Work(model, (), (64,), (64,), 2, 1, llama_args=("-fa", "1"))
    args = argparse.Namespace(program=program, label="x", start=None, limit=None, output=tmp_path / "out.jsonl")
    return BeyondBench("beyond_ram", args, work)


def test_the_same_work_for_both(bench: BeyondBench) -> None:
    ours, _ = bench.side("ours", bench.work)
    llama, _ = bench.side("llama", bench.work)
    assert ours[1:4] == ["-m", "m2lite", "bench"] and "--rotating" in ours
    assert llama[-4:] == ["--repack", "0", "-lm", "mmap"]
    for argv in (ours, llama):
        assert argv[argv.index("-n") + 1] == "64" and argv[argv.index("-d") + 1] == "64"


def test_a_start_is_a_whole_process(bench: BeyondBench) -> None:
    bench.args.start = Path("/x/llama-completion")
    ours, _ = bench.side("ours", bench.work)
    llama, _ = bench.side("llama", bench.work)
    assert "generate" in ours and llama[0] == "/x/llama-completion"
    assert all(argv[argv.index("-n") + 1] == "32" for argv in (ours, llama))


def test_disk_reads_only_grow(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    device = path.stat().st_dev
    if not Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").exists():
        pytest.skip("the file's disk does not say what it read")
    with disk_reads(path) as found:
        pass
    assert len(found) >= 2 and [n for _, n in found] == sorted(n for _, n in found)


def test_summary() -> None:
    def row(ours: float, llama: float) -> dict[str, object]:
        def made(speed: float) -> dict[str, object]:
            test = {"kind": "decode", "n": 64, "depth": 64, "samples": [speed], "tokens_per_s": speed}
            return {"tests": [test | {"disk_bytes_per_token": 2e9 / speed}]}

        return {"runs": {"ours": made(ours), "llama": made(llama)}}

    text = summary([row(6, 1), row(8, 2), row(9, 3)])
    assert "ratio 4.000" in text and "the disk delivered" in text
