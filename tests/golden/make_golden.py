"""Makes the golden files with torch and transformers: python -m tests.golden.make_golden [CASE ...]. Not run by CI.

For every case of models.py: write the random checkpoint, convert it to F32, Q8_0 and Q4_0, read each file's weights
back with the gguf package (not with our own reader), put them into MiniMaxM2ForCausalLM and store the logits of all
positions. transformers runs in float32 on one sequence; `position_ids` carries the case's positions, the causal mask is
over the tokens alone. Needs the extra `golden`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

from tests.golden.compare import compare, entropy
from tests.golden.golden import DIRECTORY, TYPES, gguf_path, weights_sha256
from tests.golden.models import CASES, F32, Case, hf_config

# Where the last chosen and the first rejected expert score closer than this, rounding may choose: take another seed.
MIN_SCORE_GAP = 1e-4

RENAMED = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.e_score_correction_bias",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
}


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """A transformers state from a GGUF, dequantized by the gguf package."""
    state: dict[str, torch.Tensor] = {}
    halves: dict[str, dict[str, F32]] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape([int(n) for n in reversed(tensor.shape)])
        prefix, name = "", str(tensor.name)
        if name.startswith("blk."):
            _, layer, name = name.split(".", 2)
            prefix = f"model.layers.{layer}."
        if name in ("ffn_gate_exps.weight", "ffn_up_exps.weight"):
            halves.setdefault(prefix + "mlp.experts.gate_up_proj", {})[name] = values
        else:
            state[prefix + RENAMED[name]] = torch.from_numpy(values.copy())
    for name, pair in halves.items():
        joined = np.concatenate([pair["ffn_gate_exps.weight"], pair["ffn_up_exps.weight"]], axis=1)
        state[name] = torch.from_numpy(joined)
    return state


def build_model(case: Case, state: Mapping[str, torch.Tensor]) -> Any:
    settings: dict[str, Any] = {**hf_config(case), "attn_implementation": "eager", "experts_implementation": "eager"}
    config: Any = MiniMaxM2Config(**settings)
    assert config.rope_parameters["partial_rotary_factor"] == case.rotary_dim / case.head_dim
    model: Any = MiniMaxM2ForCausalLM(config)
    model.float().eval()
    model.load_state_dict(dict(state), strict=True)
    return model


def run(case: Case, model: Any) -> tuple[F32, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Logits [tokens, vocabulary], and per layer the router's logits and picks."""
    routed: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out: routed.append((out[0], out[2])))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(case.tokens.astype(np.int64))[None],
            position_ids=torch.from_numpy(case.positions.astype(np.int64))[None],
            use_cache=False,
        )
    for hook in hooks:
        hook.remove()
    return out.logits[0].numpy().astype(np.float32), routed


def check_routing(case: Case, model: Any, routed: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """The smallest gap between a chosen and a rejected expert, and the share of picks that the bias changes."""
    k = case.n_experts_used
    gaps, changed = [], []
    for layer, (router_logits, picks) in zip(model.model.layers, routed, strict=True):
        scores = router_logits.float().sigmoid()
        ranked = (scores + layer.mlp.e_score_correction_bias).sort(dim=-1, descending=True)
        assert (ranked.indices[:, :k].sort().values == picks.sort().values).all()
        gaps.append((ranked.values[:, k - 1] - ranked.values[:, k]).min().item())
        unbiased = scores.topk(k, dim=-1).indices.sort().values
        changed.append((unbiased != picks.sort().values).any(dim=-1).float().mean().item())
    return min(gaps), float(np.mean(changed))


def check_original(case: Case, source: Path, logits: F32) -> None:
    """The checkpoint as transformers itself loads it gives the same logits: our names, halves and shapes are right."""
    model: Any = MiniMaxM2ForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    original, _ = run(case, model.eval())
    assert (original == logits).all(), f"off by {np.abs(original - logits).max()}"


def make(case: Case, directory: Path) -> None:
    stored: dict[str, Any] = {
        "tokens": case.tokens,
        "positions": case.positions,
        "weights_sha256": np.array(weights_sha256(case)),
        "made_with": np.array(f"transformers {transformers.__version__}, torch {torch.__version__}, float32, eager"),
    }
    for type_name in TYPES:
        model = build_model(case, read_state(gguf_path(case.name, type_name, directory)))
        logits, routed = run(case, model)
        gap, changed = check_routing(case, model, routed)
        stored[f"logits_{type_name}"] = logits
        if type_name == "f32":
            check_original(case, directory / f"{case.name}-hf", logits)
        agreement = compare(stored["logits_f32"], logits)
        print(
            f"{case.name} {type_name}: entropy {entropy(logits):.2f} nats, smallest routing gap {gap:.1e}, bias changes"
            f" the picks of {changed:.0%} of tokens, against f32: {agreement}"
        )
        if type_name == "f32":
            assert gap > MIN_SCORE_GAP, "a near-tie in routing: take another seed"
            assert 1.5 < entropy(logits) < 4.5
            assert case.name != "c-bias" or changed > 0.5, "the bias should change the picks"
    np.savez_compressed(DIRECTORY / f"{case.name}.npz", **stored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE")
    names = parser.parse_args().cases
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            make(CASES[name], Path(directory))


if __name__ == "__main__":
    main()
