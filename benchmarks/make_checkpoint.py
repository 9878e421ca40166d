"""Writes a Hugging Face checkpoint with MiniMax-M2's true shapes and random weights, to measure `convert` on.

python benchmarks/make_checkpoint.py -o DIR [--layers 2] [--experts 256] [--vocab 200064] [--shard-gb 2]

As M2 is published: projections and experts in FP8 with scales per 128 x 128, embedding, head and norms in BF16, router
and selection bias in F32, in shards with an index. The defaults take 9.9 GB. Weights are normally distributed; the same
arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m2lite.quant.checkpoint import E4M3, INDEX_NAME
from m2lite.quant.config import ARCHITECTURE, MODEL_TYPE, SourceConfig
from m2lite.quant.vocabulary import PATTERN
from make_slice import N_ADDED, SPECIAL, slice_config, slice_entries, vocabulary_keys

BLOCK = 128
CHUNK_VALUES = 1 << 24
SPREAD = 100.0  # FP8 codes spread like a normal distribution of this width: 448 is its 4.5th sigma
DTYPE_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


class Tensor(NamedTuple):
    """One tensor of the checkpoint and the width of its distribution."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def _quantiles() -> npt.NDArray[np.float32]:
    """65,536 equally likely values of a standard normal distribution: a table lookup is faster than drawing."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)], np.float32)


QUANTILES = _quantiles()


def _nearest_codes() -> npt.NDArray[np.uint8]:
    """The FP8 code nearest to each quantile times SPREAD."""
    finite = np.flatnonzero(np.isfinite(E4M3) & ~(np.signbit(E4M3) & (E4M3 == 0)))
    order = finite[np.argsort(E4M3[finite])]
    values = E4M3[order]
    return order[np.searchsorted((values[1:] + values[:-1]) / 2, QUANTILES * SPREAD)].astype(np.uint8)


CODES = _nearest_codes()


def list_tensors(config: SourceConfig) -> Iterator[Tensor]:
    """Every tensor under its original name, in the order of the layers."""
    dims = config.dims()
    for name, entry in slice_entries(config.n_layers):
        shape = tuple(dims[word] for word in entry.shape)
        prefix = f"model.layers.{name.split('.')[1]}." if name.startswith("blk.") else ""
        source, std = prefix + entry.spellings[0].name, shape[-1] ** -0.5
        if entry.role == "experts":
            for expert in range(shape[0]):
                yield from _fp8(source.replace("{e}", str(expert)), shape[1:], std)
        elif entry.role == "attention":
            yield from _fp8(source, shape, std)
        elif entry.role in ("router", "bias"):
            yield Tensor(source, "F32", shape, 0.0, 0.02 if entry.role == "bias" else std)
        else:
            mean, std = (1.0, 0.1) if entry.role == "norm" else (0.0, 1.0 if entry.role == "embedding" else 2.6 * std)
            yield Tensor(source, "BF16", shape, mean, std)


def _fp8(name: str, shape: tuple[int, ...], std: float) -> Iterator[Tensor]:
    yield Tensor(name, "F8_E4M3", shape, 0.0, SPREAD)
    grid = tuple(-(-n // BLOCK) for n in shape)
    yield Tensor(f"{name}_scale_inv", "F32", grid, std / SPREAD, 0.1 * std / SPREAD)


def fill(tensor: Tensor) -> Iterator[npt.NDArray[np.uint8]]:
    """The tensor's bytes in pieces; a function of its name alone."""
    rng = np.random.Generator(np.random.SFC64([*tensor.name.encode()]))
    left = math.prod(tensor.shape)
    while left:
        n = min(left, CHUNK_VALUES)
        draws = rng.integers(0, 1 << 64, (n + 3) // 4, np.uint64).view(np.uint16)[:n]
        if tensor.dtype == "F8_E4M3":
            yield CODES[draws]
        else:
            values = QUANTILES[draws] * np.float32(tensor.std) + np.float32(tensor.mean)
            yield (
                values.view(np.uint8)
                if tensor.dtype == "F32"
                else (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
            )
        left -= n


def plan_shards(tensors: Iterator[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.n_bytes for t in shards[-1]) + tensor.n_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def write_shard(path: Path, tensors: list[Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.n_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for piece in fill(tensor):
                file.write(piece.data)


def config_json(config: SourceConfig) -> dict[str, object]:
    """config.json in the original spelling."""
    return {
        "architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "hidden_act": "silu",
        "num_hidden_layers": config.n_layers, "hidden_size": config.n_embd, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim, "rotary_dim": config.rotary_dim,
        "intermediate_size": config.n_ff, "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.n_experts_used, "vocab_size": config.n_vocab,
        "max_position_embeddings": config.n_ctx_train, "rope_theta": config.rope_theta, "rms_norm_eps": config.rms_eps,
        "use_routing_bias": True, "use_qk_norm": True, "qk_norm_type": "per_layer", "scoring_func": "sigmoid",
        "attn_type_list": [1] * config.n_layers, "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "fp8", "fmt": "float8_e4m3fn", "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        },
    }  # fmt: skip


def tokenizer_json(n_vocab: int) -> tuple[dict[str, object], dict[str, object]]:
    """tokenizer.json and tokenizer_config.json: the made-up byte-level BPE of make_slice.py."""
    keys = {key.name: key.value for key in vocabulary_keys(n_vocab)}
    tokens, n_base = keys["tokenizer.ggml.tokens"], n_vocab - N_ADDED
    added = [
        {"id": n_base + i, "content": tokens[n_base + i], "special": not 50 <= i <= 53, "single_word": False,
         "lstrip": False, "rstrip": False, "normalized": False}
        for i in range(N_ADDED)
    ]  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens[:n_base])},
            "merges": keys["tokenizer.ggml.merges"],
        },
    }  # fmt: skip
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token"}
    special = {names[role]: tokens[n_base + i] for role, i in SPECIAL.items() if role in names}
    return tokenizer, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **special}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=200_064)
    parser.add_argument("--shard-gb", type=float, default=2.0)
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f"{args.output} exists already")
    start = time.perf_counter()
    config = slice_config(args.layers, args.experts, args.vocab)
    shards = plan_shards(list_tensors(config), int(args.shard_gb * 1e9))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    args.output.mkdir(parents=True)
    tokenizer, tokenizer_config = tokenizer_json(args.vocab)
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    n_bytes = sum(tensor.n_bytes for shard in shards for tensor in shard)
    texts = {
        "config.json": config_json(config),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config,
        INDEX_NAME: {"metadata": {"total_size": n_bytes}, "weight_map": weight_map},
    }
    for name, text in texts.items():
        (args.output / name).write_text(json.dumps(text, ensure_ascii=False, indent=1), encoding="utf-8")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write_shard, [args.output / name for name in names], shards))
    seconds = time.perf_counter() - start
    print(f"{args.output}: {n_bytes:,} bytes in {len(shards)} shards, {seconds:.0f} s")


if __name__ == "__main__":
    main()
