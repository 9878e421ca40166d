"""benchmarks/profile_token.py: the lines add up, and the bytes are those of the tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from m2lite import Model
from profile_token import Profiler, format_profile, profile

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long


@pytest.mark.parametrize(("depth", "n_ids"), [(0, 1), (300, 1), (300, 70)])
def test_a_call_is_taken_apart(opened: Callable[[str], Model], depth: int, n_ids: int) -> None:
    model = opened("random")
    weights, before = model.weights, model.runner.kernels
    profiler = Profiler(model, depth)
    assert profiler.timeline.length == depth
    found = profile(profiler, n_ids, 3, n_ids)
    profiler.close()
    assert model.runner.kernels is before
    assert (found["what"], found["depth"], found["passes"]) == ("decode" if n_ids == 1 else "prefill", depth, 3)
    lines = {line["name"]: line for line in found["lines"]}
    assert sum(line["ms"] for line in lines.values()) == pytest.approx(found["ms"], rel=0.5)
    assert lines["matmul output"]["calls"] == 1
    assert lines["matmul output"]["bytes"] == weights.output.slice_bytes
    layer, qkv = weights.layers[0], lines["matmul_three attn_q attn_k attn_v"]
    assert qkv["calls"] == 2
    assert qkv["macs"] == 2 * n_ids * sum(m.n_out * m.n_in for m in (layer.attn_q, layer.attn_k, layer.attn_v))
    down = weights.layers[0].ffn_down_exps
    n_experts = model.config.n_experts_used if n_ids == 1 else model.config.n_experts
    assert lines["experts_down ffn_down_exps"]["bytes"] <= 2 * n_experts * down.slice_bytes
    assert (
        lines["experts_down ffn_down_exps"]["macs"] == 2 * n_ids * model.config.n_experts_used * down.n_out * down.n_in
    )
    assert lines["attend"]["macs"] > 0
    text = format_profile(found)
    assert "between kernels" in text and "experts_up ffn_gate_exps ffn_up_exps" in text and "without the timers" in text
