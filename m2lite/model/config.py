"""The frozen dimensions of a MiniMax-M2, read from GGUF metadata and range-checked. Opens no file, sees no tensor.

Source of the keys: llama.cpp's loader for the architecture `minimax-m2`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2lite.errors import BadModelError
from m2lite.storage.gguf_header import GGUFArray

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
    def expert_dtype(self) -> np.dtype[Any]:
        """Of ids of experts where many are kept: uint8, or uint16 for more than 256."""
        return np.min_scalar_type(self.n_experts - 1)

    @property
    def n_kv(self) -> int:
        """Width of all key (or value) heads together."""
        return self.n_kv_heads * self.head_dim


def _is(*values: object) -> Callable[[Any], bool]:
    return lambda value: value in values


_OFF, _ONE = _is(0), _is(0, 1)
# What M2 does not have: key (below the architecture) -> (is the value harmless, what it would mean).
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "attention.sliding_window": (_OFF, "a sliding window"),
    "attention.sliding_window_pattern": (_OFF, "a sliding window pattern"),
    "attention.layer_types": (lambda v: False, "other attention types"),
    "attention.q_lora_rank": (_OFF, "latent attention"),
    "attention.kv_lora_rank": (_OFF, "latent attention"),
    "attention.logit_softcapping": (_OFF, "soft-capped attention"),
    "attn_logit_softcapping": (_OFF, "soft-capped attention"),
    "router_logit_softcapping": (_OFF, "a soft-capped router"),
    "final_logit_softcapping": (_OFF, "soft-capped logits"),
    "attention.clamp_kqv": (_OFF, "clamped attention"),
    "attention.max_alibi_bias": (_OFF, "ALiBi positions"),
    "attention.causal": (_is(True), "attention to what comes later"),
    "logit_scale": (_ONE, "scaled logits"),
    "residual_scale": (_ONE, "scaled residuals"),
    "embedding_scale": (_ONE, "scaled embeddings"),
    "use_parallel_residual": (_OFF, "parallel blocks"),
    "expert_gating_func": (_is(SIGMOID), "another expert scoring function than sigmoid (2)"),
    "expert_shared_count": (_OFF, "shared experts"),
    "expert_shared_feed_forward_length": (_OFF, "shared experts"),
    "expert_group_count": (_ONE, "expert groups"),
    "expert_group_used_count": (_ONE, "expert groups"),
    "expert_weights_norm": (_is(True), "expert weights that do not sum to 1"),
    "expert_weights_scale": (_ONE, "scaled expert weights"),
    "swiglu_clamp_exp": (_OFF, "clamped experts"),
    "leading_dense_block_count": (_OFF, "dense layers"),
    "interleave_moe_layer_step": (_ONE, "layers without experts"),
    "moe_every_n_layers": (_ONE, "layers without experts"),
    # Without a type llama.cpp takes the factor as linear; with `none` it ignores it: _check_scaling.
    "rope.scaling.type": (_is("none", "linear"), "scaled rotary positions"),
    "rope.scaling.attn_factor": (_is(1), "attention scaled with the positions"),
    "rope.scaling.alpha": (_ONE, "scaled rotary positions"),
    "rope.scaling.yarn_log_multiplier": (_OFF, "scaled rotary positions"),
    "rope.scaling.yarn_ext_factor": (_is(0, -1), "scaled rotary positions"),
    "rope.scaling.yarn_attn_factor": (_is(1, -1), "attention scaled with the positions"),
    "rope.dimension_sections": (_OFF, "positions of several dimensions"),
    "nextn_predict_layers": (_OFF, "prediction modules inside the main file (they belong in a sidecar)"),
}
# Understood, and without a say in what an M2 computes.
_WITHOUT_SAY = frozenset(
    {
        "vocab_size", "tensor_data_layout", "pooling_type", "attention.layer_norm_epsilon", "rope.freq_base_swa",
        "rope.dimension_count_swa", "attention.key_length_swa", "attention.value_length_swa", "rope.scaling.factor",
        "rope.scale_linear", "rope.scaling.original_context_length", "rope.scaling.finetuned",
        "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "attention.scale",
    }
)  # fmt: skip
_READ = frozenset(
    {
        "block_count", "context_length", "embedding_length", "feed_forward_length", "expert_feed_forward_length",
        "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "expert_count",
        "expert_used_count",
    }
)  # fmt: skip


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
    metadata = _per_model(metadata)
    _check_refused(metadata, n_extra_layers)
    _check_scaling(metadata)

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
    _check_unknown(metadata, head_dim)
    return config


def _per_model(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with one number where the file has the same for every layer; M2's layers are all alike."""
    n_layers = metadata.get(f"{ARCHITECTURE}.block_count")
    found = dict(metadata)
    for key, value in metadata.items():
        if not key.startswith(f"{ARCHITECTURE}.") or not isinstance(value, GGUFArray):
            continue
        items = value.numpy().tolist() if value.item_type.kind is not str else []
        if not items:
            raise BadModelError(f"{key} is {value!r}, expected one value.", "This is not an M2.")
        others = [layer for layer, item in enumerate(items) if item != items[0]]
        if others:
            layers = ", ".join(map(str, others[:6])) + (f" and {len(others) - 6} more" if others[6:] else "")
            raise BadModelError(
                f"{key} is {items[0]} in layer 0 and {items[others[0]]} in layer {others[0]} (another than layer 0's in"
                f" {layers} of {len(items)}); M2's layers are all alike.",
                "This is not an M2.",
            )
        if key.removeprefix(f"{ARCHITECTURE}.") in _READ and len(items) != n_layers:
            raise BadModelError(
                f"{key} has {len(items)} values, one for each of {n_layers} layers is expected.", "The file is damaged."
            )
        found[key] = items[0]
    return found


def _check_scaling(metadata: Mapping[str, Any]) -> None:
    """Rotary positions are not scaled: llama.cpp divides them by the factor unless the type is `none`."""
    if metadata.get(f"{ARCHITECTURE}.rope.scaling.type") == "none":
        return
    for name in ("rope.scaling.factor", "rope.scale_linear"):
        value = metadata.get(f"{ARCHITECTURE}.{name}", 1)
        if value not in (0, 1):
            raise BadModelError(
                f"{ARCHITECTURE}.{name} is {value!r}: scaled rotary positions, which MiniMax-M2 does not have.",
                "Use a file without scaling.",
            )


def _check_unknown(metadata: Mapping[str, Any], head_dim: int) -> None:
    """A key of the architecture that nobody here knows may decide what is computed, unless it is off."""
    scale = metadata.get(f"{ARCHITECTURE}.attention.scale", 0)
    if scale != 0 and (not isinstance(scale, float) or not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6)):
        raise BadModelError(
            f"{ARCHITECTURE}.attention.scale is {scale!r}, M2's is {head_dim**-0.5:.6g}.", "This is not an M2."
        )
    for key, value in metadata.items():
        name = key.removeprefix(f"{ARCHITECTURE}.")
        if name == key or name in _READ | _WITHOUT_SAY | _REFUSED.keys() or value in (0, "", "none"):
            continue
        if not isinstance(value, str) or name.startswith(("rope.", "attention.", "expert")):
            raise BadModelError(
                f"{key} is {value!r}: no MiniMax-M2 is known to have it, and it may change what the model computes.",
                "Use a file without it, or a newer m2lite.",
            )


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
