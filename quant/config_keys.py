"""The keys of config.json: which must have M2's value, which are read, which decide nothing. Data only.

Gathered from the published M2s, from MiniMaxM2Config and from what other architectures call their arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final


def _all(wanted: object) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(item == wanted for item in value)


def _is(*allowed: object) -> Callable[[Any], bool]:
    return lambda value: value in allowed


_NO_SCALE = (_is(1), "no such factor")
_NO_SHARED = (_is(0), "no shared experts")
_NO_BIAS = (_is(False), "no biases")
_ALL_MOE = "experts in every layer"
_OFF = _is(0, False, [], {}, "none", "default")

# key: (test that an M2 passes, what M2 has). A key that is absent or null passes.
REQUIREMENTS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "sliding_window": (_is(0), "full attention"),
    "use_sliding_window": (_is(False), "full attention"),
    "sliding_window_pattern": (_OFF, "full attention"),
    "attention_chunk_size": (_OFF, "full attention"),
    "attn_type_list": (_all(1), "full attention in every layer"),
    "layer_types": (_all("full_attention"), "full attention in every layer"),
    "full_attention_interval": (_is(0, 1), "full attention in every layer"),
    "sparse_attention_config": (_OFF, "full attention"),
    "index_topk": (_OFF, "full attention"),
    "attention_sinks": (_OFF, "no attention sinks"),
    "use_attention_sinks": (_OFF, "no attention sinks"),
    "attn_output_gate": (_OFF, "attention without a gate"),
    "use_qk_norm": (_is(True), "QK norm"),
    "qk_norm_type": (_is("per_layer"), "QK norm over the whole vector (per_layer)"),
    "scoring_func": (_is("sigmoid"), "a sigmoid router"),
    "score_function": (_is("sigmoid"), "a sigmoid router"),
    "moe_router_activation_func": (_is("sigmoid"), "a sigmoid router"),
    "topk_method": (_is("noaux_tc"), "the best of all experts"),
    "norm_topk_prob": (_is(True), "expert weights that sum to 1"),
    "routed_scaling_factor": (_is(1), "no scaling of expert weights"),
    "n_group": (_is(0, 1), "no expert groups"),
    "topk_group": (_is(0, 1), "no expert groups"),
    "shared_intermediate_size": _NO_SHARED,
    "shared_expert_intermediate_size": _NO_SHARED,
    "num_shared_experts": _NO_SHARED,
    "n_shared_experts": _NO_SHARED,
    "num_zero_experts": (_is(0), "no empty experts"),
    "zero_expert_num": (_is(0), "no empty experts"),
    "first_k_dense_replace": (_is(0), _ALL_MOE),
    "num_dense_layers": (_is(0), _ALL_MOE),
    "mlp_only_layers": (_OFF, _ALL_MOE),
    "decoder_sparse_step": (_is(1), _ALL_MOE),
    "moe_layer_freq": (lambda value: value == 1 or _all(1)(value), _ALL_MOE),
    "interleave_moe_layer_step": (_is(0, 1), _ALL_MOE),
    "hidden_act": (_is("silu", "swish"), "SwiGLU with silu"),
    "hidden_activation": (_is("silu", "swish"), "SwiGLU with silu"),
    "swiglu_limit": (_OFF, "SwiGLU without a limit"),
    "swiglu_alpha": _NO_SCALE,
    "attention_bias": _NO_BIAS,
    "qkv_bias": _NO_BIAS,
    "use_qkv_bias": _NO_BIAS,
    "use_bias": _NO_BIAS,
    "mlp_bias": _NO_BIAS,
    "lm_head_bias": _NO_BIAS,
    "tie_word_embeddings": (_is(False), "a head of its own"),
    "rope_interleave": (_is(False), "rotary halves (NeoX)"),
    "rope_interleaved": (_is(False), "rotary halves (NeoX)"),
    "no_rope_layers": (_all(1), "rotary positions in every layer"),
    "no_rope_layer_interval": (_OFF, "rotary positions in every layer"),
    "position_embedding_type": (_is("rope", "rotary"), "rotary positions"),
    "alibi": (_OFF, "rotary positions"),
    "kv_lora_rank": (_is(0), "attention without low rank"),
    "q_lora_rank": (_is(0), "attention without low rank"),
    "num_kv_shared_layers": (_is(0), "keys and values in every layer"),
    "clip_qkv": (_OFF, "attention without clipping"),
    "attn_logit_softcapping": (_OFF, "no soft capping"),
    "final_logit_softcapping": (_OFF, "no soft capping"),
    "router_logit_softcapping": (_OFF, "no soft capping"),
    "logit_scale": _NO_SCALE,
    "logits_scaling": _NO_SCALE,
    "embedding_multiplier": _NO_SCALE,
    "residual_multiplier": _NO_SCALE,
    "lm_head_multiplier": _NO_SCALE,
    "scale_emb": _NO_SCALE,
    "scale_depth": _NO_SCALE,
    "layernorm_full_attention_alpha": (_is(1), "plain residuals"),
    "layernorm_full_attention_beta": (_is(1), "plain residuals"),
    "layernorm_mlp_alpha": (_is(1), "plain residuals"),
    "layernorm_mlp_beta": (_is(1), "plain residuals"),
    "postnorm": (_is(False), "pre-norm layers"),
    "use_parallel_residual": (_is(False), "one block after the other"),
    "attention_multiplier": _NO_SCALE,
    "query_pre_attn_scalar": (_OFF, "attention scaled by the width of a head"),
    "mlp_layer_types": (_all("sparse"), _ALL_MOE),
    "mtp_transformer_layers": (_is(0, 1), "one layer in each prediction module"),
}

# What a key of another architecture is called when it decides what is computed. One that is not known above is refused.
ARITHMETIC: Final = re.compile(
    "multipl|cap|scal|clip|rope|rotary|window|norm|bias|activation|_act$|attn|attention|router|routing|expert|moe|gate|"
    "layer_types|dense|residual|temperature|alibi|sink"
)

# Objects of a model that M2 would only be a part of.
WRAPPERS = ("text_config", "llm_config", "language_config", "vision_config", "audio_config", "thinker_config")

# What a table of rotary positions may say: what is read, or without scaling decides nothing; and key -> plain values.
ROPE_READ = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_PLAIN = (None, "default")
ROPE_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "rope_type": _PLAIN,
    "type": _PLAIN,
    "factor": (None, 1),
    "attention_factor": (None, 1),
    "mscale": (None, 1),
    "mscale_all_dim": (None, 0, 1),
    "finetuned": (None, False),
}

# Read, here or elsewhere.
_READ = """
    model_type architectures rope_parameters rope_scaling rope_theta rotary_dim partial_rotary_factor rms_norm_eps
    use_routing_bias m2lite_mtp quantization_config model_name eos_token_id
"""
READ = frozenset(_READ.split())

# For training, for the library that saved it, or for kinds of layers that an M2 does not have.
_HARMLESS = """
    _name_or_path add_cross_attention attention_dropout attn_implementation auto_map bos_token_id
    chunk_size_feed_forward classifier_dropout cross_attention_hidden_size decoder_start_token_id do_sample dtype
    expert_dropout finetuning_task hidden_dropout id2label ignore_index initializer_range is_decoder
    is_encoder_decoder label2id layernorm_linear_attention_alpha layernorm_linear_attention_beta length_penalty
    max_length max_model_len max_window_layers min_p mlp_intermediate_size model_max_length num_labels num_mtp_modules
    num_nextn_predict_layers output_attentions output_hidden_states output_router_logits pad_token_id prefix
    pretraining_tp problem_type pruned_heads repetition_penalty return_dict router_aux_loss_coef router_jitter_noise
    router_z_loss_coef sep_token_id shared_moe_mode task_specific_params temperature tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version unk_token_id unsloth_fixed
    unsloth_version use_bfloat16 use_cache use_mtp
"""
HARMLESS = frozenset(_HARMLESS.split())
