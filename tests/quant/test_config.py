"""config.json in both spellings, and what M2 does not have."""

from __future__ import annotations

from typing import Any

import pytest

from m2lite.errors import BadModelError
from m2lite.quant.config import config_warnings, parse_config
from tests.golden.models import hf_config
from tests.quant.checkpoints import SMALL, new_config

OLD = hf_config(SMALL)


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(BadModelError) as caught:
        parse_config(config)
    return str(caught.value)


def test_both_spellings_say_the_same() -> None:
    old, new = parse_config(OLD), parse_config(new_config(SMALL))
    assert old == new
    assert (old.rotary_dim, old.rope_theta, old.rms_eps, old.n_experts_used) == (16, 5e6, 1e-6, 2)


def test_the_published_sizes_pass() -> None:
    published = {
        **OLD, "hidden_size": 3072, "num_hidden_layers": 62, "num_attention_heads": 48, "num_key_value_heads": 8,
        "head_dim": 128, "rotary_dim": 64, "intermediate_size": 1536, "num_local_experts": 256,
        "num_experts_per_tok": 8, "vocab_size": 200064, "attn_type_list": [1] * 62, "mtp_transformer_layers": 1,
        "num_mtp_modules": 3, "use_mtp": True,
    }  # fmt: skip
    dims = parse_config(published).dims()
    assert dims == {"vocab": 200064, "embd": 3072, "2embd": 6144, "q": 6144, "kv": 1024, "ff": 1536, "experts": 256}


def test_without_a_rotary_width_all_of_the_head_is_rotated() -> None:
    config = {key: value for key, value in OLD.items() if key != "rotary_dim"}
    assert parse_config(config).rotary_dim == SMALL.head_dim
    assert parse_config({**config, "partial_rotary_factor": 0.25}).rotary_dim == SMALL.head_dim // 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "mixtral"), ("sliding_window", 4096), ("use_sliding_window", True), ("attn_type_list", [1, 0]),
        ("attn_type_list", 1), ("layer_types", ["full_attention", "sliding_attention"]), ("use_qk_norm", False),
        ("qk_norm_type", "per_head"), ("scoring_func", "softmax"), ("norm_topk_prob", False),
        ("routed_scaling_factor", 2.5), ("n_group", 8), ("topk_group", 4), ("shared_intermediate_size", 1024),
        ("num_shared_experts", 1), ("n_shared_experts", 1), ("hidden_act", "gelu"), ("attention_bias", True),
        ("tie_word_embeddings", True), ("rope_scaling", {"type": "yarn", "factor": 4}), ("mtp_transformer_layers", 2),
        ("layernorm_full_attention_alpha", 3.5), ("postnorm", True),
    ],
)  # fmt: skip
def test_what_m2_lacks_is_refused_by_its_key(key: str, value: object) -> None:
    config = {**OLD, key: value}
    if key == "model_type":
        config["architectures"] = ["MixtralForCausalLM"]
    assert f"config.json: {key} is {value!r}" in refusal(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 0), ("num_hidden_layers", 2.0), ("hidden_size", None), ("num_local_experts", 1025),
        ("num_local_experts", True), ("num_experts_per_tok", 5), ("num_key_value_heads", 3), ("vocab_size", -1),
        ("max_position_embeddings", 1 << 31), ("rotary_dim", 15), ("rotary_dim", 34), ("rotary_dim", "16"),
        ("rms_norm_eps", 0), ("rms_norm_eps", "small"), ("rope_theta", -1), ("rope_theta", float("nan")),
        ("partial_rotary_factor", 2.0), ("rope_parameters", 7), ("m2lite_mtp", 7), ("num_attention_heads", "8"),
    ],
)  # fmt: skip
def test_sizes_out_of_range_are_refused_by_their_key(key: str, value: object) -> None:
    assert f"config.json: {key} is {value!r}" in refusal({**OLD, key: value})


def test_contradictions_are_refused() -> None:
    assert "contradicts itself on the rotary width" in refusal({**OLD, "partial_rotary_factor": 1.0})
    assert "rope_parameters.rope_type is 'yarn'" in refusal({**OLD, "rope_parameters": {"rope_type": "yarn"}})
    assert "m2lite_mtp.hidden" in refusal({**OLD, "m2lite_mtp": {"hidden": "middle"}})
    assert "m2lite_mtp.zero_at_0" in refusal({**OLD, "m2lite_mtp": {"zero_at_0": "no"}})
    assert "model_type is None" in refusal({})
    assert "model_type is None" in refusal({"architectures": 5})


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"full_attention": DEFAULT_ROPE}},
        {"rope_parameters": {"full_attention": DEFAULT_ROPE, "sliding_attention": dict(DEFAULT_ROPE)}},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default", "rope_theta": 5000000.0}},
        {"rope_scaling": {"full_attention": {"rope_type": "default", "factor": 1.0}}},
        {"rope_scaling": {}},
        {"rope_parameters": {**DEFAULT_ROPE, "factor": 1.0, "original_max_position_embeddings": 4096}},
        {"rope_parameters": None, "rope_theta": 5000000, "partial_rotary_factor": 0.5},
    ],
)
def test_every_spelling_of_plain_rope_is_the_same(change: dict[str, Any]) -> None:
    flat = new_config(SMALL)
    assert parse_config({**flat, **change}) == parse_config(flat)
    assert not config_warnings({**flat, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_parameters": {"sliding_attention": DEFAULT_ROPE}}, "rope_parameters.sliding_attention is {"),
        (
            {"rope_parameters": {"full_attention": DEFAULT_ROPE, "sliding_attention": {"rope_type": "default"}}},
            "rope_parameters.sliding_attention is {'rope_type': 'default'}, expected equal to",
        ),
        ({"rope_parameters": {"full_attention": DEFAULT_ROPE, "rope_theta": 1e4}}, "rope_parameters.rope_theta is 100"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "full_attention.rope_type is 'yarn'"),
        ({"rope_parameters": {**DEFAULT_ROPE, "factor": 4.0}}, "rope_parameters.factor is 4.0, expected None or 1"),
        ({"rope_parameters": {**DEFAULT_ROPE, "mrope_section": [8, 4]}}, "rope_parameters.mrope_section is [8, 4]"),
        ({"rope_parameters": {**DEFAULT_ROPE, "rope_theta": "5e6"}}, "rope_parameters.rope_theta is '5e6'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is {'type': 'linear', 'factor': 2}"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling is {'factor': 2}, expected None or 1 (of factor)"),
        ({"rope_theta": 10000.0}, "contradicts itself on the base of the rotary positions"),
        ({"rope_scaling": {"type": "default", "rope_theta": 1e6}}, "contradicts itself on the base"),
        ({"rope_scaling": {"type": "default", "partial_rotary_factor": 1.0}}, "contradicts itself on the rotary width"),
        ({"model_type": "m2_vl", "text_config": {"model_type": "minimax_m2"}}, "text_config is given (model_type)"),
        ({"text_config": {"hidden_size": 64}}, "text_config is given (hidden_size): this is a model within another"),
        ({"vision_config": {"depth": 2}}, "vision_config is given"),
        ({"m2lite_mtp": {"hidden": "pre_norm", "concat": "hidden,embedding"}}, "m2lite_mtp.concat is"),
        ({"sparse_attention_config": {"topk": 16}}, "sparse_attention_config is {'topk': 16}"),
        ({"some_new_attention": {"window": 16}}, "some_new_attention is {'window': 16}"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"logit_scale": 0.0625}, "logit_scale is 0.0625"),
        ({"attn_output_gate": True}, "attn_output_gate is True"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace is 1"),
        ({"attention_multiplier": 0.5}, "attention_multiplier is 0.5"),
        ({"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types is ['dense', 'sparse']"),
        ({"router_temperature": 0.7}, "router_temperature is 0.7, expected no such key in an M2"),
        ({"new_expert_rule": "x"}, "new_expert_rule is 'x', expected no such key"),
        ({"moe_intermediate_size": 48}, "moe_intermediate_size is 48, expected the 32 of intermediate_size"),
        ({"num_experts": 8}, "num_experts is 8, expected the 4 of num_local_experts"),
    ],
)  # fmt: skip
def test_what_would_change_the_arithmetic_is_refused_by_its_key(change: dict[str, Any], words: str) -> None:
    assert words in refusal({**new_config(SMALL), **change})


def test_what_is_not_known_is_told() -> None:
    assert config_warnings(OLD) == config_warnings(new_config(SMALL)) == []
    assert config_warnings({**OLD, "attn_dropout_new": 0, "some_remark": None, "other": [], "_from": "x"}) == []
    (told,) = config_warnings({**OLD, "revision_of_text": 0.7, "remark": "made with care"})
    assert "that are not read, 2 in all" in told
    assert "revision_of_text (0.7), remark (made with care)" in told
    (told,) = config_warnings({**OLD, "model_type": "minimax"})
    assert "model_type is 'minimax', M2's is 'minimax_m2'" in told
    (told,) = config_warnings({key: value for key, value in OLD.items() if key != "rotary_dim"})
    assert "says nothing of the rotary width" in told
