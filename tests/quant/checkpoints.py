"""The same small random model as checkpoints of every kind that the converter accepts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from m2lite.quant.convert import Conversion
from tests.golden.models import F32, Case, hf_config, hf_weights, write_safetensors, write_texts

SMALL = Case(
    "small", seed=7, n_layers=2, n_embd=64, n_heads=2, n_kv_heads=1, head_dim=32, rotary_dim=16, n_ff=32, n_experts=4,
    n_experts_used=2, n_vocab=300, n_mtp=2,
)  # fmt: skip

QUANTIZED = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}

Stored = dict[str, tuple[str, npt.NDArray[Any]]]


def as_f32(weights: Mapping[str, F32]) -> Stored:
    return {name: ("F32", value) for name, value in weights.items()}


def as_f16(weights: Mapping[str, F32]) -> Stored:
    return {name: ("F16", value.astype(np.float16)) for name, value in weights.items()}


def as_bf16(weights: Mapping[str, F32]) -> Stored:
    return {name: ("BF16", value.astype(ml_dtypes.bfloat16).view(np.uint16)) for name, value in weights.items()}


def quantize_fp8(value: F32, block: int) -> tuple[npt.NDArray[np.uint8], F32]:
    """FP8 codes and the scales that multiply them, per block of `block` x `block`, edges ragged."""
    rows, columns = -(-value.shape[-2] // block), -(-value.shape[-1] // block)
    scale = np.empty((*value.shape[:-2], rows, columns), np.float32)
    codes = np.empty(value.shape, np.uint8)
    for r in range(rows):
        for c in range(columns):
            area = np.s_[..., r * block : (r + 1) * block, c * block : (c + 1) * block]
            peak = np.abs(value[area]).max(axis=(-2, -1))
            scale[..., r, c] = peak / 448
            codes[area] = (value[area] / scale[..., r, c, None, None]).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return codes, scale


def dequantize_fp8(codes: npt.NDArray[np.uint8], scale: F32, block: int) -> F32:
    """The definition, weight by weight."""
    wide = np.repeat(np.repeat(scale, block, axis=-2), block, axis=-1)[..., : codes.shape[-2], : codes.shape[-1]]
    return np.asarray(codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * wide)


def as_fp8(weights: Mapping[str, F32], block: int) -> Stored:
    """As M2 is published: projections and experts in FP8, the rest in BF16, router and bias in F32."""
    stored: Stored = {}
    for name, value in weights.items():
        if "_proj" in name or ".experts." in name:
            codes, scale = quantize_fp8(value, block)
            stored[name] = ("F8_E4M3", codes)
            stored[name + "_scale_inv"] = ("F32", scale)
        elif "gate.weight" in name or "correction_bias" in name:
            stored[name] = ("F32", value)
        else:
            stored.update(as_bf16({name: value}))
    return stored


def fuse_experts(weights: Mapping[str, F32], case: Case) -> dict[str, F32]:
    """transformers-5 names: stacked experts with gate above up, `mlp` for `block_sparse_moe`."""
    fused: dict[str, F32] = {}
    for name, value in weights.items():
        prefix, found, rest = name.partition("block_sparse_moe.experts.")
        if not found:
            fused[name.replace("block_sparse_moe.", "mlp.")] = value
        elif rest == "0.w1.weight":
            experts = [
                [weights[f"{prefix}{found}{e}.{w}.weight"] for w in ("w1", "w3", "w2")] for e in range(case.n_experts)
            ]
            fused[prefix + "mlp.experts.gate_up_proj"] = np.stack([np.concatenate([w1, w3]) for w1, w3, _ in experts])
            fused[prefix + "mlp.experts.down_proj"] = np.stack([w2 for _, _, w2 in experts])
    return fused


def new_config(case: Case) -> dict[str, Any]:
    """config.json in the spelling of transformers 5."""
    config = hf_config(case)
    for key in (
        "attn_type_list",
        "qk_norm_type",
        "scoring_func",
        "use_qk_norm",
        "use_routing_bias",
        "rope_theta",
        "rotary_dim",
    ):
        del config[key]
    factor = case.rotary_dim / case.head_dim
    rope = {"partial_rotary_factor": factor, "rope_theta": 5000000.0, "rope_type": "default"}
    return {**config, "rope_parameters": rope, "rope_scaling": None, "sliding_window": None}


def rename_mtp(weights: Mapping[str, F32], case: Case, layout: str) -> dict[str, F32]:
    """The prediction modules in another layout: "a" behind the trunk's layers, "b" with [hidden, embedding]."""
    renamed: dict[str, F32] = {}
    tables = {
        "a": (("transformer_layer.", ""), ("final_layernorm", "shared_head.norm")),
        "b": (("enorm", "e_norm"), ("hnorm", "h_norm"), ("eh_proj", "linear_projection")),
    }
    for name, value in weights.items():
        if not name.startswith("model.mtp.layers."):
            renamed[name] = value
            continue
        index, rest = name.removeprefix("model.mtp.layers.").split(".", 1)
        if layout == "b" and rest == "eh_proj.weight":
            value = np.concatenate(np.split(value, 2, axis=1)[::-1], axis=1)
        if layout == "b" and rest == "final_layernorm.weight":
            continue
        for old, new in tables[layout]:
            rest = rest.replace(old, new)
        renamed[
            f"model.layers.{case.n_layers + int(index)}.{rest}" if layout == "a" else f"model.mtp_layers.{index}.{rest}"
        ] = value
    return renamed


def write(
    directory: Path, stored: Stored, config: Mapping[str, Any] | None = None, n_shards: int = 1, case: Case = SMALL
) -> Path:
    """A checkpoint directory; with several shards, an index too."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config or hf_config(case)))
    write_texts(directory, case.n_vocab)
    if n_shards == 1:
        write_safetensors(directory / "model.safetensors", stored)
        return directory
    weight_map = {}
    names = list(stored)
    for index in range(n_shards):
        shard = f"model-{index + 1:05}-of-{n_shards:05}.safetensors"
        part = names[index::n_shards]
        write_safetensors(directory / shard, {name: stored[name] for name in part})
        weight_map.update(dict.fromkeys(part, shard))
    write_index(directory, weight_map)
    return directory


def write_index(directory: Path, weight_map: Mapping[str, str]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def small(store: Callable[[Mapping[str, F32]], Stored] = as_f32) -> Stored:
    return store(hf_weights(SMALL))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(done: Conversion) -> tuple[str, str]:
    assert done.mtp_path is not None
    return digest(done.path), digest(done.mtp_path)
