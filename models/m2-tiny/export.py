"""From a training checkpoint to a Hugging Face folder in M2's original spelling, and the check against transformers.

    python export.py CHECKPOINT.pt DATA_DIR HF_DIR [--check] [--golden FILE.npz]

Weights are rounded to BF16; router gates, routing biases and norms stay F32. The prediction modules use the names
model.mtp.layers.{i}.*, concat [enorm(embedding), hnorm(hidden)], hidden state before the final norm, both inputs zero at position 0.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from m2lite.text.m2_template import SOURCE
from model import SHAPES, Config, Model, Packed
from tokenizer import BOS, END, PAD, UNK, load_tokenizer, render_prompt

GOLDEN_MESSAGES = [{"role": "user", "content": "Tell me a short story about a fox and a lantern."}]
GOLDEN_REPLY = (
    "The user wants a story about a fox and a lantern. I will tell a short one.\n</think>\n\nOne day, a little fox was walking by "
    'the river. There, on the path, lay a lantern. "Who has lost this?" said the fox. At last he met an owl who was crying. '
    '"I have lost my lantern," said the owl. "Here it is!" said the fox. They played together every day and were good friends.'
)


def layer_tensors(prefix: str, state: dict[str, Tensor], source: str, config: Config) -> dict[str, Tensor]:
    """One layer's tensors under their original names."""
    ffn = config.intermediate_size
    out = {
        f"{prefix}input_layernorm.weight": state[f"{source}attn_norm"],
        f"{prefix}post_attention_layernorm.weight": state[f"{source}ffn_norm"],
        f"{prefix}block_sparse_moe.gate.weight": state[f"{source}gate"],
        f"{prefix}block_sparse_moe.e_score_correction_bias": state[f"{source}bias"],
    }
    for ours, theirs in {
        "q_norm": "q_norm",
        "k_norm": "k_norm",
        "wq": "q_proj",
        "wk": "k_proj",
        "wv": "v_proj",
        "wo": "o_proj",
    }.items():
        value = state[f"{source}{ours}"]
        out[f"{prefix}self_attn.{theirs}.weight"] = value.bfloat16() if value.ndim == 2 else value
    for e in range(config.num_local_experts):
        w13, w2 = state[f"{source}w13"][e].bfloat16(), state[f"{source}w2"][e].bfloat16()
        base = f"{prefix}block_sparse_moe.experts.{e}."
        out |= {f"{base}w1.weight": w13[:ffn], f"{base}w3.weight": w13[ffn:], f"{base}w2.weight": w2}
    return out


def tensors(state: dict[str, Tensor], config: Config, n_mtp: int) -> dict[str, Tensor]:
    """Every tensor of the checkpoint."""
    out = {
        "model.embed_tokens.weight": state["embed"].bfloat16(),
        "lm_head.weight": state["head"].bfloat16(),
        "model.norm.weight": state["norm"],
    }
    for i in range(config.num_hidden_layers):
        out |= layer_tensors(f"model.layers.{i}.", state, f"layers.{i}.", config)
    for k in range(n_mtp):
        base = f"model.mtp.layers.{k}."
        out |= {
            f"{base}enorm.weight": state[f"mtp.{k}.enorm"],
            f"{base}hnorm.weight": state[f"mtp.{k}.hnorm"],
            f"{base}eh_proj.weight": state[f"mtp.{k}.eh_proj"].bfloat16(),
            f"{base}final_layernorm.weight": state[f"mtp.{k}.final_norm"],
        }
        out |= layer_tensors(f"{base}transformer_layer.", state, f"mtp.{k}.layer.", config)
    return {n: v.contiguous().clone() for n, v in out.items()}


def hf_config(config: Config, ids: dict[str, int], n_mtp: int) -> dict[str, Any]:
    """config.json with the keys of the published M2."""
    shape = config.to_dict() | {"num_mtp_modules": n_mtp}
    return {
        "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "attention_dropout": 0.0,
        "attn_type_list": [1] * config.num_hidden_layers, "bos_token_id": ids[BOS], "eos_token_id": ids[END],
        "pad_token_id": ids[PAD], "hidden_act": "silu", "initializer_range": 0.02, "mlp_intermediate_size": config.intermediate_size,
        "mtp_transformer_layers": 1, "output_router_logits": False, "qk_norm_type": "per_layer", "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.0, "scoring_func": "sigmoid", "shared_intermediate_size": 0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True, "use_mtp": n_mtp > 0, "use_qk_norm": True, "use_routing_bias": True,
        **shape,
    }  # fmt: skip


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def export(checkpoint: dict[str, Any], data: Path, out: Path) -> None:
    """Write the folder."""
    state, config = checkpoint["model"], SHAPES[checkpoint["shape"]]
    n_mtp = len({n.split(".")[1] for n in state if n.startswith("mtp.")})
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(data)
    ids = {s: tokenizer.token_to_id(s) for s in (BOS, END, PAD, UNK)}
    save_file(tensors(state, config, n_mtp), out / "model.safetensors", {"format": "pt"})
    write_json(out / "config.json", {**hf_config(config, ids, n_mtp), "model_name": f"m2-{checkpoint['shape']}"})
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 40}
    write_json(
        out / "generation_config.json",
        {"bos_token_id": ids[BOS], "eos_token_id": ids[END], "pad_token_id": ids[PAD], **sampling},
    )
    shutil.copy(data / "tokenizer.json", out / "tokenizer.json")
    (out / "chat_template.jinja").write_text(SOURCE)
    added = json.loads((data / "tokenizer.json").read_text())["added_tokens"]
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    write_json(out / "tokenizer_config.json", {
        "added_tokens_decoder": {str(t["id"]): {k: t[k] for k in keys} for t in added},
        "add_prefix_space": False, "bos_token": BOS, "eos_token": END, "unk_token": UNK, "pad_token": PAD,
        "clean_up_tokenization_spaces": False, "model_max_length": config.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })  # fmt: skip


def load_exported(folder: Path) -> Model:
    """An f32 training model with the rounded weights of an exported folder."""
    files = load_file(folder / "model.safetensors")
    shape = json.loads((folder / "config.json").read_text())
    config = Config(**{k: v for k, v in shape.items() if k in Config.__dataclass_fields__})
    model = Model(config, torch.float32, config.num_mtp_modules)
    state = model.state_dict()

    def fill(source: str, prefix: str) -> None:
        for ours, theirs in {
            "attn_norm": "input_layernorm.weight", "ffn_norm": "post_attention_layernorm.weight",
            "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight", "wq": "self_attn.q_proj.weight",
            "wk": "self_attn.k_proj.weight", "wv": "self_attn.v_proj.weight", "wo": "self_attn.o_proj.weight",
            "gate": "block_sparse_moe.gate.weight", "bias": "block_sparse_moe.e_score_correction_bias",
        }.items():  # fmt: skip
            state[source + ours] = files[prefix + theirs].float()
        base = [f"{prefix}block_sparse_moe.experts.{e}." for e in range(config.num_local_experts)]
        state[source + "w13"] = torch.stack(
            [torch.cat([files[b + "w1.weight"], files[b + "w3.weight"]]) for b in base]
        ).float()
        state[source + "w2"] = torch.stack([files[b + "w2.weight"] for b in base]).float()

    state |= {"embed": files["model.embed_tokens.weight"].float(), "head": files["lm_head.weight"].float()}
    state["norm"] = files["model.norm.weight"].float()
    for i in range(config.num_hidden_layers):
        fill(f"layers.{i}.", f"model.layers.{i}.")
    for k in range(config.num_mtp_modules):
        for ours, theirs in {
            "enorm": "enorm",
            "hnorm": "hnorm",
            "eh_proj": "eh_proj",
            "final_norm": "final_layernorm",
        }.items():
            state[f"mtp.{k}.{ours}"] = files[f"model.mtp.layers.{k}.{theirs}.weight"].float()
        fill(f"mtp.{k}.layer.", f"model.mtp.layers.{k}.transformer_layer.")
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def check(folder: Path) -> float:
    """Largest difference of our logits from transformers' on a chat text, both f32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = load_tokenizer(folder).encode(render_prompt(GOLDEN_MESSAGES) + GOLDEN_REPLY, add_special_tokens=False).ids
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        GOLDEN_MESSAGES, add_generation_prompt=True, tokenize=False
    )
    assert text == render_prompt(GOLDEN_MESSAGES), "the template renders another text"
    ours = load_exported(folder)
    a = ours.logits(ours.trunk(Packed([np.array(ids)]))[1], ours.norm)
    b = theirs(torch.tensor([ids])).logits[0]
    return float((a - b).abs().max())


@torch.no_grad()
def golden(folder: Path, path: Path, n: int = 96) -> None:
    """Save tokens [1, n], trunk hidden and logits, and each module's hidden and logits, all f32 from the rounded weights."""
    model = load_exported(folder)
    ids = load_tokenizer(folder).encode(render_prompt(GOLDEN_MESSAGES) + GOLDEN_REPLY, add_special_tokens=False).ids[:n]
    assert len(ids) == n
    packed = Packed([np.array(ids)])
    embedded, g0 = model.trunk(packed)
    out = {"tokens": np.array([ids]), "g0": g0.numpy(), "logits": model.logits(g0, model.norm).numpy()}
    for k, (module, hidden) in enumerate(zip(model.mtp, model.modules_hidden(embedded, g0, packed), strict=True), 1):
        out |= {f"g{k}": hidden.numpy(), f"mtp{k}_logits": model.logits(hidden, module.final_norm).numpy()}  # type: ignore[arg-type]
    np.savez(path, **out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--golden", type=Path)
    args = parser.parse_args()
    export(torch.load(args.checkpoint, weights_only=True), args.data, args.out)
    if args.check:
        print("largest logit difference from transformers:", check(args.out))
    if args.golden:
        golden(args.out, args.golden)


if __name__ == "__main__":
    main()
