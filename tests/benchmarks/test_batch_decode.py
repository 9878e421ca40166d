"""benchmarks/batch_decode.py: which runs are counted together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from batch_decode import gathered, median


def run(time: str, n: int, speeds: list[float], prompt: int = 512, beside: bool = True) -> dict[str, Any]:
    turns = {str(n): [{"tg": speed} for speed in speeds]}
    results = {"m2lite": turns} | ({"llama.cpp": turns} if beside else {})
    return {"model": "s4.gguf", "prompt": prompt, "tokens": 32, "time": time, "results": results}


def test_runs_of_one_kind_are_counted_together(tmp_path: Path) -> None:
    runs = [
        run("2026-11-27 23:59", 16, [1.0]),
        run("2026-11-28 19:19", 16, [100.0, 120.0]),
        run("2026-11-28 19:30", 16, [2.0], prompt=64),
        run("2026-11-28 19:40", 16, [3.0], beside=False),
        run("2026-11-28 19:51", 16, [90.0]),
        run("2026-11-28 19:51", 32, [140.0]),
    ]
    path = tmp_path / "batch.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in runs))
    found = gathered(path, runs[1], "2026-11-28")
    assert {n: [turn["tg"] for turn in turns] for n, turns in found["llama.cpp"].items()} == {
        16: [100.0, 120.0, 90.0],
        32: [140.0],
    }
    assert median(found["m2lite"][16], "tg") == 100.0
