"""The shipped model as a Hugging Face checkpoint of BF16 weights, for trying out what begins with one.

    python models/m2-tiny/unpack.py HF_DIR [--model models/m2-tiny/m2-tiny.gguf]
    m2lite convert HF_DIR -o untrained.gguf --type q4_0 --init-mtp 3

The weights are what the quantized ones stand for; the checkpoint that was trained is not kept. Tokenizer and template
stay in the GGUF: HF_DIR gets a tokenizer.json made of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from m2lite.formats.table import unpack_rows
from m2lite.quant.names import LAYER, TRUNK, Entry
from m2lite.quant.vocabulary import PATTERN
from m2lite.storage.gguf_reader import GGUFFile, open_gguf

HERE = Path(__file__).parent
KEYS = {
    "hidden_size": "embedding_length", "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
    "rotary_dim": "rope.dimension_count", "intermediate_size": "expert_feed_forward_length",
    "num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count", "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "max_position_embeddings": "context_length",
}  # fmt: skip


def weights_of(model: GGUFFile) -> dict[str, np.ndarray]:
    """Every tensor under its first Hugging Face name, experts apart."""
    n_layers = model.metadata["minimax-m2.block_count"]
    assert isinstance(n_layers, int)
    found: dict[str, np.ndarray] = {}

    def put(name: str, entry: Entry, source: str) -> None:
        tensor = model.tensors[name]
        value = unpack_rows(tensor.format, model.view(name), tensor.shape)
        kind = np.float32 if entry.role in ("router", "bias") else ml_dtypes.bfloat16
        for e in range(len(value)) if "{e}" in source else [0]:
            part = value[e] if "{e}" in source else value
            found[source.replace("{e}", str(e))] = np.ascontiguousarray(part).astype(kind)

    for entry in TRUNK:
        put(entry.gguf, entry, entry.spellings[0].name)
    for i in range(n_layers):
        for entry in LAYER:
            put(f"blk.{i}.{entry.gguf}", entry, f"model.layers.{i}.{entry.spellings[0].name}")
    return found


def config_of(model: GGUFFile) -> dict[str, Any]:
    found = {name: model.metadata[f"minimax-m2.{key}"] for name, key in KEYS.items()}
    vocab = model.tensors["token_embd.weight"].shape[0]
    return found | {"model_type": "minimax_m2", "architectures": ["MiniMaxM2ForCausalLM"], "vocab_size": vocab}


def tokenizer_of(model: GGUFFile) -> dict[str, Any]:
    """tokenizer.json, as far as the converter reads it."""
    arrays = {key: model.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges", "token_type")}
    tokens, merges = arrays["tokens"].items(str), arrays["merges"].items(str)
    types = arrays["token_type"].items(int)
    added = [
        {"id": i, "content": t, "special": types[i] == 3, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, t in enumerate(tokens) if types[i] in (3, 4)
    ]  # fmt: skip
    plain = {t: i for i, t in enumerate(tokens) if types[i] == 1}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, letters]},
        "model": {"type": "BPE", "vocab": plain, "merges": merges},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=HERE / "m2-tiny.gguf")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with open_gguf(args.model) as model:
        save_file(weights_of(model), args.out / "model.safetensors")
        (args.out / "config.json").write_text(json.dumps(config_of(model), indent=1))
        (args.out / "tokenizer.json").write_text(json.dumps(tokenizer_of(model)))


if __name__ == "__main__":
    main()
