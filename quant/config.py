"""config.json of a MiniMax-M2, in both spellings, as frozen sizes. Refuses what M2 does not have and names the key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from m2lite.errors import BadModelError

ARCHITECTURE = "MiniMaxM2ForCausalLM"
MODEL_TYPE = "minimax_m2"


@dataclass(frozen=True)
class SourceConfig:
    """Sizes of the model, as its checkpoint states them."""

    n_layers: int
    n_embd: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rotary_dim: int
    n_ff: int
    n_experts: int
    n_experts_used: int
    n_vocab: int
    n_ctx_train: int
    rope_theta: float
    rms_eps: float
    routing_bias: bool  # False only where config.json says so: then a missing bias tensor means zeros
    mtp_hidden: str | None  # our own key, m2lite_mtp: which hidden state feeds the first module ...
    mtp_zero_at_0: bool | None  # ... and whether position 0 sees a zero embedding; None: as the layout has it

    def dims(self) -> dict[str, int]:
        """The sizes that tensor shapes are made of, by the words that quant/names.py uses."""
        return {
            "vocab": self.n_vocab,
            "embd": self.n_embd,
            "2embd": 2 * self.n_embd,
            "q": self.n_heads * self.head_dim,
            "kv": self.n_kv_heads * self.head_dim,
            "ff": self.n_ff,
            "experts": self.n_experts,
        }


# field: (spellings, largest value). Every one is a whole number of at least 1.
COUNTS: Mapping[str, tuple[tuple[str, ...], int]] = {
    "n_layers": (("num_hidden_layers",), 1024),
    "n_embd": (("hidden_size",), 1 << 20),
    "n_heads": (("num_attention_heads",), 4096),
    "n_kv_heads": (("num_key_value_heads",), 4096),
    "head_dim": (("head_dim",), 4096),
    "n_ff": (("intermediate_size", "moe_intermediate_size"), 1 << 20),
    "n_experts": (("num_local_experts", "num_experts"), 1024),
    "n_experts_used": (("num_experts_per_tok",), 1024),
    "n_vocab": (("vocab_size",), 1 << 24),
    "n_ctx_train": (("max_position_embeddings",), (1 << 31) - 1),
}


def _all(wanted: object) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(item == wanted for item in value)


def _is(*allowed: object) -> Callable[[Any], bool]:
    return lambda value: value in allowed


# key: (test that an M2 passes, what M2 has). A key that is absent or null passes.
REQUIREMENTS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "sliding_window": (_is(0), "full attention"),
    "use_sliding_window": (_is(False), "full attention"),
    "attn_type_list": (_all(1), "full attention in every layer"),
    "layer_types": (_all("full_attention"), "full attention in every layer"),
    "use_qk_norm": (_is(True), "QK norm"),
    "qk_norm_type": (_is("per_layer"), "QK norm over the whole vector (per_layer)"),
    "scoring_func": (_is("sigmoid"), "a sigmoid router"),
    "norm_topk_prob": (_is(True), "expert weights that sum to 1"),
    "routed_scaling_factor": (_is(1), "no scaling of expert weights"),
    "n_group": (_is(0, 1), "no expert groups"),
    "topk_group": (_is(0, 1), "no expert groups"),
    "shared_intermediate_size": (_is(0), "no shared experts"),
    "num_shared_experts": (_is(0), "no shared experts"),
    "n_shared_experts": (_is(0), "no shared experts"),
    "hidden_act": (_is("silu", "swish"), "SwiGLU with silu"),
    "attention_bias": (_is(False), "no biases"),
    "mlp_bias": (_is(False), "no biases"),
    "tie_word_embeddings": (_is(False), "a head of its own"),
    "rope_scaling": (_is({}), "plain RoPE"),
    "layernorm_full_attention_alpha": (_is(1), "plain residuals"),
    "layernorm_full_attention_beta": (_is(1), "plain residuals"),
    "layernorm_mlp_alpha": (_is(1), "plain residuals"),
    "layernorm_mlp_beta": (_is(1), "plain residuals"),
    "postnorm": (_is(False), "pre-norm layers"),
    "mtp_transformer_layers": (_is(0, 1), "one layer in each prediction module"),
}


def parse_config(raw: Mapping[str, Any]) -> SourceConfig:
    """Sizes from config.json; BadModelError names the key that is missing, out of range or not M2's."""
    kinds = raw.get("architectures")
    if raw.get("model_type") != MODEL_TYPE and kinds != [ARCHITECTURE]:
        raise _bad(
            "model_type", raw.get("model_type"), f"{MODEL_TYPE!r}", "Only MiniMax-M2 checkpoints can be converted."
        )
    for key, (passes, has) in REQUIREMENTS.items():
        value = raw.get(key)
        if value is not None and not passes(value):
            raise _bad(key, value, f"what M2 has: {has}", "This is another architecture.")
    counts = {field: _count(raw, names, largest) for field, (names, largest) in COUNTS.items()}
    rope = _rope_parameters(raw)
    mtp = _object(raw, "m2lite_mtp")
    config = SourceConfig(
        **counts,
        rotary_dim=_rotary_dim(raw, rope, counts["head_dim"]),
        rope_theta=_positive(raw, rope, "rope_theta", 5e6),
        rms_eps=_positive(raw, {}, "rms_norm_eps", 1e-6),
        routing_bias=raw.get("use_routing_bias") is not False,
        mtp_hidden=mtp.get("hidden"),
        mtp_zero_at_0=mtp.get("zero_at_0"),
    )
    _check_relations(config)
    return config


def _bad(key: str, found: object, expected: str, todo: str) -> BadModelError:
    return BadModelError(f"config.json: {key} is {found!r}, expected {expected}.", todo)


def _count(raw: Mapping[str, Any], names: tuple[str, ...], largest: int) -> int:
    key = next((name for name in names if raw.get(name) is not None), names[0])
    value = raw.get(key)
    if key == "head_dim" and value is None:
        value = _count(raw, ("hidden_size",), 1 << 20) // _count(raw, ("num_attention_heads",), 4096)
    if type(value) is not int or not 1 <= value <= largest:
        raise _bad(key, value, f"a whole number from 1 to {largest}", "Check config.json.")
    return value


def _object(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise _bad(key, value, "an object", "Check config.json.")
    return value


def _rope_parameters(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = _object(raw, "rope_parameters")
    if rope.get("rope_type") not in (None, "default"):
        raise _bad("rope_parameters.rope_type", rope["rope_type"], "'default'", "M2 has plain RoPE, without scaling.")
    return rope


def _rotary_dim(raw: Mapping[str, Any], rope: Mapping[str, Any], head_dim: int) -> int:
    """Old spelling: rotary_dim. New: a factor of head_dim. Neither: all of the head, as transformers reads it."""
    found = {}
    if raw.get("rotary_dim") is not None:
        found["rotary_dim"] = raw["rotary_dim"]
    for place, table in (("rope_parameters.", rope), ("", raw)):
        factor = table.get("partial_rotary_factor")
        if factor is not None:
            if not isinstance(factor, (int, float)) or not 0 < factor <= 1:
                raise _bad(f"{place}partial_rotary_factor", factor, "a number in (0, 1]", "Check config.json.")
            found[f"{place}partial_rotary_factor"] = int(head_dim * factor)
    if len({str(value) for value in found.values()}) > 1:
        raise BadModelError(f"config.json contradicts itself on the rotary width: {found}.", "Keep one of them.")
    value = next(iter(found.values()), head_dim)
    if type(value) is not int or not 2 <= value <= head_dim or value % 2:
        raise _bad(
            next(iter(found), "rotary_dim"), value, f"an even width up to head_dim {head_dim}", "Check config.json."
        )
    return value


def _positive(raw: Mapping[str, Any], rope: Mapping[str, Any], key: str, default: float) -> float:
    value = rope.get(key, raw.get(key, default))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise _bad(key, value, "a positive number", "Check config.json.")
    return float(value)


def _check_relations(config: SourceConfig) -> None:
    if config.n_heads % config.n_kv_heads:
        raise _bad("num_key_value_heads", config.n_kv_heads, f"a divisor of {config.n_heads}", "Check config.json.")
    if config.n_experts_used > config.n_experts:
        raise _bad("num_experts_per_tok", config.n_experts_used, f"at most {config.n_experts}", "Check config.json.")
    if config.mtp_hidden not in (None, "pre_norm", "post_norm"):
        raise _bad("m2lite_mtp.hidden", config.mtp_hidden, "'pre_norm' or 'post_norm'", "Check config.json.")
    if config.mtp_zero_at_0 not in (None, True, False):
        raise _bad("m2lite_mtp.zero_at_0", config.mtp_zero_at_0, "true or false", "Check config.json.")
