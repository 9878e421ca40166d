"""The planner's arithmetic, and that it measures a real file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import Run
from m2lite.plan import Costs, trained_hit_rate

M2 = Costs(
    n_layers=62, n_experts=256, n_used=8, expert_bytes=7_962_624, dense_bytes=2_080_000_000, kv_bytes=0,
    macs_per_token=10_400_000_000, expert_memory=16_000_000_000, n_rows=2048, disk=3.5e9, stream=40e9, kernels=200e9,
)  # fmt: skip


def test_sizes_of_m2() -> None:
    assert M2.pool_bytes == pytest.approx(126.4e9, rel=1e-3)
    assert M2.cycle_bytes == pytest.approx(3.949e9, rel=1e-3)
    assert M2.share == pytest.approx(0.1266, rel=1e-2)


@pytest.mark.parametrize(("hit_rate", "tokens_per_s"), [(0, 0.9), (0.5, 1.8), (0.8, 4.4)])
def test_decode_is_bound_by_the_disk(hit_rate: float, tokens_per_s: float) -> None:
    """0.9, 1.8 and 4.4 tokens/s are the disk alone; what is computed one after the other comes on top."""
    seconds, binds = M2.decode(hit_rate)
    assert binds == "disk" and seconds == pytest.approx(1 / tokens_per_s + 0.052, rel=0.02)


def test_decode_in_memory() -> None:
    seconds, binds = M2.decode(1.0)
    assert binds == "memory" and seconds == pytest.approx(6.03e9 / 40e9, rel=0.01)


def test_a_prompt_reads_the_pool_once_a_chunk() -> None:
    seconds, binds = M2.prefill(512, 0.0)
    assert binds == "disk" and seconds == pytest.approx(126.4e9 / 3.5e9, rel=0.01)
    assert M2.prefill(2048, 0.0) == (pytest.approx(1.3 * 2048 * 10.4 / 200, rel=0.01), "kernels")
    assert M2.prefill(4096, 0.0)[0] == pytest.approx(2 * M2.prefill(2048, 0.0)[0])
    few, _ = M2.prefill(4, 0.0)
    assert few < 4 * M2.decode(0.0)[0]  # they share experts


def test_faster_with_more_hits_and_a_faster_disk() -> None:
    hits = [M2.decode(h / 10)[0] for h in range(11)]
    assert hits == sorted(hits, reverse=True)
    fast = replace(M2, disk=7e9)
    assert fast.decode(0.3)[0] < M2.decode(0.3)[0] and fast.prefill(512, 0.0)[0] < M2.prefill(512, 0.0)[0]


def test_favourites_are_never_worse_than_none() -> None:
    shares = [i / 50 for i in range(51)]
    assert all(trained_hit_rate(s) >= s - 1e-9 for s in shares)
    assert [trained_hit_rate(s) for s in shares] == sorted(trained_hit_rate(s) for s in shares)


def test_of_a_file(run_inline: Run, bundled_model: Path) -> None:
    done = run_inline("plan", bundled_model, "--load", "direct", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    costs = plan["costs"]
    assert plan["streamed"] and plan["dense_is"] == "owned" and not plan["disk_is_assumed"]
    assert plan["cycle_bytes"] == 4 * 8 * costs["expert_bytes"] == plan["pool_bytes"] // 8
    assert all(costs[name] > 1e6 for name in ("disk", "stream", "kernels"))
    assert [row["hit_rate"] for row in plan["rows"]] == [0, 0.25, 0.5, 0.75, 0.9, 1]


def test_for_people(run_inline: Run, bundled_model: Path) -> None:
    done = run_inline("plan", bundled_model, "--disk", "3.5g")
    assert "disk 3.50 GB/s (assumed)" in done.stdout and "all of it fits" in done.stdout
    done = run_inline("plan", bundled_model, "--load", "direct", "--ram", "4g")
    assert "budget 4.00 GiB" in done.stdout and "expect hits of" in done.stdout
    for bad in ("fast", "0", "3x", ""):
        assert run_inline("plan", bundled_model, "--disk", bad).returncode == 2
