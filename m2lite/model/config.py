"""The frozen dimensions of a MiniMax-M2, read from GGUF metadata and range-checked. Opens no file, sees no tensor.

Source of the keys: llama.cpp's loader for the architecture `minimax-m2`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from m2lite.errors import BadModelError

ARCHITECTURE = "minimax-m2"
SIGMOID = 2  # llama.cpp's number for the expert gating function
MAX_CTX = 1 << 24
BLOCK = 32  # widths are whole blocks of this many weights


@dataclass(frozen=True)
class Config:
    """Sizes of a model; `n_ctx_train` in tokens, the others in elements."""

    n_layers: int
    n_embd: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rotary_dim: int
    n_ff: int  # of one expert
    n_experts: int
    n_experts_used: int
    n_vocab: int
    n_ctx_train: int
    rope_theta: float
    rms_eps: float

    @property
    def n_q(self) -> int:
        """Width of all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def n_kv(self) -> int:
        """Width of all key (or value) heads together."""
        return self.n_kv_heads * self.head_dim


# What M2 does not have: key (below the architecture) -> (is the value harmless, what it would mean).
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "attention.sliding_window": (lambda v: v == 0, "a sliding window"),
    "attention.sliding_window_pattern": (lambda v: not v, "a sliding window pattern"),
    "attention.layer_types": (lambda v: False, "other attention types"),
    "attention.kv_lora_rank": (lambda v: v == 0, "latent attention"),
    "attention.logit_softcapping": (lambda v: v == 0, "soft-capped attention"),
    "final_logit_softcapping": (lambda v: v == 0, "soft-capped logits"),
    "expert_gating_func": (lambda v: v == SIGMOID, "another expert scoring function than sigmoid (2)"),
    "expert_shared_count": (lambda v: v == 0, "shared experts"),
    "expert_shared_feed_forward_length": (lambda v: v == 0, "shared experts"),
    "expert_group_count": (lambda v: v in (0, 1), "expert groups"),
    "expert_weights_scale": (lambda v: v in (0, 1), "scaled expert weights"),
    "leading_dense_block_count": (lambda v: v == 0, "dense layers"),
    "interleave_moe_layer_step": (lambda v: v in (0, 1), "layers without experts"),
    "rope.scaling.type": (lambda v: v == "none", "scaled rotary positions"),
    "nextn_predict_layers": (lambda v: v == 0, "prediction modules inside the main file (they belong in a sidecar)"),
}


def parse_config(metadata: Mapping[str, Any], n_extra_layers: int = 0, n_vocab: int | None = None) -> Config:
    """The dimensions in `metadata`; BadModelError names the key that is missing, out of range or not M2.

    A sidecar file counts its prediction modules in block_count (`n_extra_layers`) and has no tokenizer (`n_vocab`).
    """
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise BadModelError(
            f"general.architecture is {architecture!r}, expected {ARCHITECTURE!r}.",
            "m2lite runs MiniMax-M2 models only.",
        )
    if "m2lite.mtp.trunk" in metadata and not n_extra_layers:
        raise BadModelError(
            "The file holds prediction modules only, not the model that they belong to.",
            "Open the model: it has the same name without 'mtp-'.",
        )
    _check_refused(metadata, n_extra_layers)

    def integer(name: str, low: int, high: int, default: int | None = None) -> int:
        key = f"{ARCHITECTURE}.{name}"
        value = metadata.get(key, default)
        if value is None:
            raise BadModelError(f"The metadata key {key} is missing.", "Convert the model again.")
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise BadModelError(
                f"{key} is {value!r}, expected an integer in {low:,} to {high:,}.", "The file is damaged."
            )
        return value

    def number(name: str, low: float, high: float) -> float:
        key = f"{ARCHITECTURE}.{name}"
        value = metadata.get(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or not low <= value <= high
        ):
            raise BadModelError(
                f"{key} is {value!r}, expected a number in {low:g} to {high:g}.", "The file is damaged."
            )
        return float(value)

    n_heads, n_ff = integer("attention.head_count", 1, 1024), integer("feed_forward_length", BLOCK, 1 << 16)
    head_dim = integer("attention.key_length", 16, 1024)
    config = Config(
        n_layers=integer("block_count", 1 + n_extra_layers, 1024) - n_extra_layers,
        n_embd=integer("embedding_length", BLOCK, 1 << 16),
        n_heads=n_heads,
        n_kv_heads=integer("attention.head_count_kv", 1, n_heads),
        head_dim=head_dim,
        rotary_dim=integer("rope.dimension_count", 2, head_dim, head_dim),
        n_ff=integer("expert_feed_forward_length", BLOCK, 1 << 16, n_ff),
        n_experts=(n_experts := integer("expert_count", 1, 1024)),
        n_experts_used=integer("expert_used_count", 1, n_experts),
        n_vocab=n_vocab or _n_vocab(metadata),
        n_ctx_train=integer("context_length", 1, MAX_CTX),
        rope_theta=number("rope.freq_base", 1.0, 1e12),
        rms_eps=number("attention.layer_norm_rms_epsilon", 0.0, 1.0),
    )
    _check_consistent(config, integer("attention.value_length", 16, 1024, head_dim), n_ff)
    return config


def _check_refused(metadata: Mapping[str, Any], n_extra_layers: int) -> None:
    for name, (is_harmless, meaning) in _REFUSED.items():
        key = f"{ARCHITECTURE}.{name}"
        if key in metadata and not is_harmless(metadata[key]):
            if name == "nextn_predict_layers" and n_extra_layers:
                continue
            raise BadModelError(
                f"{key} is {metadata[key]!r}: {meaning}, which MiniMax-M2 does not have.", "This is not an M2."
            )


def _n_vocab(metadata: Mapping[str, Any]) -> int:
    key = "tokenizer.ggml.tokens"
    tokens = metadata.get(key)
    if tokens is None or isinstance(tokens, str | int | float):
        raise BadModelError(f"The metadata key {key} is missing or not an array.", "Convert the model again.")
    if not 1 <= len(tokens) <= 1 << 22:
        raise BadModelError(f"{key} has {len(tokens):,} entries, expected 1 to 4,194,304.", "The file is damaged.")
    return len(tokens)


def _check_consistent(config: Config, value_length: int, feed_forward_length: int) -> None:
    def refuse(what: str) -> None:
        raise BadModelError(what, "The file is damaged or not an M2.")

    prefix = f"{ARCHITECTURE}."
    if value_length != config.head_dim:
        refuse(
            f"{prefix}attention.value_length is {value_length}, attention.key_length {config.head_dim}; expected equal."
        )
    if feed_forward_length != config.n_ff:
        refuse(f"{prefix}feed_forward_length is {feed_forward_length}, expert_feed_forward_length {config.n_ff}.")
    if config.n_heads % config.n_kv_heads:
        refuse(f"{prefix}attention.head_count {config.n_heads} is not a multiple of head_count_kv {config.n_kv_heads}.")
    if config.head_dim % 16:
        refuse(f"{prefix}attention.key_length is {config.head_dim}, expected a multiple of 16.")
    if config.rotary_dim % 2:
        refuse(f"{prefix}rope.dimension_count is {config.rotary_dim}, expected an even number.")
    for name, value in (("embedding_length", config.n_embd), ("expert_feed_forward_length", config.n_ff)):
        if value % BLOCK:
            refuse(f"{prefix}{name} is {value}, expected a multiple of {BLOCK}.")
    for width, what in ((config.n_q, "head_count x key_length"), (config.n_kv, "head_count_kv x key_length")):
        if width % BLOCK:
            refuse(f"{prefix}attention {what} is {width}, expected a multiple of {BLOCK}.")
