"""The command with a model that is streamed: what is said of it, and what cannot be done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Run
from m2lite.storage import syscalls

pytestmark = [
    pytest.mark.skipif(not syscalls.AVAILABLE, reason="residency is controlled on Linux only"),
    pytest.mark.slow,
]


def test_what_a_streamed_answer_cost(run_inline: Run, bundled_model: Path) -> None:
    def answer(*options: str) -> dict[str, Any]:
        done = run_inline("generate", bundled_model, "-p", "Hello", "--json", "--seed", "7", "-n", "20", *options)
        assert done.returncode == 0, done.stderr
        assert (" of experts fit into own memory; what every token needs, " in done.stderr) == bool(options)
        return dict(json.loads(done.stdout))

    streamed, mapped = answer("--load", "direct"), answer()
    assert streamed["tokens"] == mapped["tokens"]
    stats = streamed["stats"]
    assert 0 < stats["bytes_read"] < stats["bytes_wanted"]
    assert stats["hit_rate"] == pytest.approx(1 - stats["bytes_read"] / stats["bytes_wanted"])
    assert stats["bytes_read_dense"] > 0 and stats["stall_s"] > 0
    assert "hit_rate" not in mapped["stats"]


def test_heat_is_drawn(run_inline: Run, bundled_model: Path, tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path), "M2LITE_HEAT": "on", "COLUMNS": "80"}
    done = run_inline("inspect", bundled_model, "--heat", env=cache)
    assert done.returncode == 2 and "--load direct" in done.stderr
    answer = run_inline("generate", bundled_model, "-p", "Hello", "-n", "20", "--load", "direct", env=cache)
    assert answer.returncode == 0
    drawn = run_inline("inspect", bundled_model, "--heat", env=cache).stdout.splitlines()
    assert [line[:5] for line in drawn] == [f"{i:>3}  " for i in range(4)]
    assert all(len(line) == 69 for line in drawn) and "@" in "".join(drawn)
    picture = tmp_path / "heat.png"
    assert run_inline("inspect", bundled_model, "--heat", "--png", picture, env=cache).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_budget_that_is_too_small(run_inline: Run, bundled_model: Path) -> None:
    done = run_inline("generate", bundled_model, "-p", "Hello", "--ram", "50m")
    assert done.returncode == 5
    assert "the budget is 50.0 MiB" in done.stderr and "--ram" in done.stderr


def test_bench_of_a_streamed_model(run_inline: Run, bundled_model: Path) -> None:
    """Cold runs read every expert again, warm ones of the same tokens none."""
    arguments = ("bench", bundled_model, "-p", "64", "-n", "8", "-r", "2", "--json", "--load", "direct")
    warm, cold = (json.loads(run_inline(*arguments, *more).stdout) for more in ((), ("--cold", "--rotating")))
    assert not warm["cold"] and cold["cold"] and cold["rotating"]
    assert warm["tests"][0]["hit_rate"] == 1 and warm["tests"][0]["read_bytes_per_token"] == 0
    assert cold["tests"][0]["hit_rate"] < 0.2 and cold["tests"][1]["hit_rate"] < 1
    assert all(test["stall_s_per_token"] > 0 for test in cold["tests"])
    shown = run_inline(*arguments[:-3], "--load", "direct", "--cold").stdout
    assert "% hits; a token read" in shown and "the disk gives" in shown
