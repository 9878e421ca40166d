"""Random MiniMax-M2 checkpoints in Hugging Face form, the same bytes on every machine. Knows no engine and no torch."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m2lite.quant.vocabulary import PATTERN

F32 = npt.NDArray[np.float32]

# M2's control tokens; "special" ones are control (3), the others user-defined (4).
SPECIAL_TOKENS = ("]!p~[", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "]~b]", "[e~[", "]!d~[", "]~!b[")
PLAIN_TOKENS = ("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>")
N_UNUSED = 4  # ids at the end that no token has, as in M2's own vocabulary


@dataclass(frozen=True)
class Case:
    """A random model and the tokens that it is run on."""

    name: str
    seed: int
    n_layers: int = 2
    n_embd: int = 128
    n_heads: int = 6
    n_kv_heads: int = 2
    head_dim: int = 128
    rotary_dim: int = 64
    n_ff: int = 64
    n_experts: int = 16
    n_experts_used: int = 4
    n_vocab: int = 512
    bias_std: float = 0.02
    first_position: int = 0
    n_tokens: int = 48
    n_mtp: int = 0
    # Scales: logits as peaked as a real model's (entropy 2-4 nats), and blocks that each add a fraction of the
    # residual, so that a near-tie in routing that rounding decides costs little.
    head_std: float = 2.6
    attention_gain: float = 0.7
    moe_gain: float = 0.2
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        raw = _raw(self.seed, "tokens", self.n_tokens)
        return (raw % np.uint64(self.n_vocab - N_UNUSED)).astype(np.int32)

    @property
    def positions(self) -> npt.NDArray[np.int32]:
        return np.arange(self.first_position, self.first_position + self.n_tokens, dtype=np.int32)


CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        # Seeds without near-ties in routing (make_golden.py checks it), in which an engine's rounding would show.
        Case("a-rotary", seed=5),
        Case(
            "b-experts",
            seed=6,
            n_experts=256,
            n_experts_used=8,
            n_ff=32,
            n_embd=96,
            n_heads=4,
            head_dim=64,
            rotary_dim=32,
        ),
        # Sigmoid scores lie within 0.5 +- 0.25 here: a bias of 0.2 reorders many of the picks.
        Case("c-bias", seed=1, n_experts=32, n_experts_used=4, bias_std=0.2, n_layers=3),
        Case("d-far", seed=10, first_position=190_000, n_layers=3),
    )
}


def _raw(seed: int, name: str, count: int) -> npt.NDArray[np.uint64]:
    """Raw Philox output: NumPy promises these bits to stay, which it does not of its distributions."""
    key = np.array([seed, zlib.crc32(name.encode())], np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def normal(seed: int, name: str, shape: Sequence[int], std: float, mean: float = 0.0) -> F32:
    """Bell-shaped numbers from integer arithmetic alone: the sum of four 16-bit uniforms."""
    parts = _raw(seed, name, math.prod(shape)).view(np.uint16).reshape(*shape, 4).astype(np.int64)
    centred = (parts.sum(axis=-1) - 2 * 65535).astype(np.float64)
    scale = std / math.sqrt((65536.0**2 - 1) / 3)  # four times the variance (n^2 - 1) / 12 of one
    return np.asarray(mean + centred * scale, np.float32)


def hf_config(case: Case) -> dict[str, Any]:
    """config.json in M2's own (old) spelling."""
    return {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "attn_type_list": [1] * case.n_layers,
        "bos_token_id": None,
        "eos_token_id": None,
        "head_dim": case.head_dim,
        "hidden_act": "silu",
        "hidden_size": case.n_embd,
        "intermediate_size": case.n_ff,
        "max_position_embeddings": 196608,
        "num_attention_heads": case.n_heads,
        "num_experts_per_tok": case.n_experts_used,
        "num_hidden_layers": case.n_layers,
        "num_key_value_heads": case.n_kv_heads,
        "num_local_experts": case.n_experts,
        "qk_norm_type": "per_layer",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000,
        "rotary_dim": case.rotary_dim,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "tie_word_embeddings": False,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": case.n_vocab,
        **case.extra,
    }


def hf_weights(case: Case) -> dict[str, F32]:
    """Every tensor under its original Hugging Face name, in float32."""

    def make(name: str, *shape: int, std: float, mean: float = 0.0) -> tuple[str, F32]:
        return name, normal(case.seed, name, shape, std, mean)

    def norm(name: str, width: int) -> tuple[str, F32]:
        return make(name, width, std=0.1, mean=1.0)

    def layer(prefix: str) -> Iterator[tuple[str, F32]]:
        embd, q, kv = case.n_embd, case.n_heads * case.head_dim, case.n_kv_heads * case.head_dim
        yield norm(prefix + "input_layernorm.weight", embd)
        yield norm(prefix + "post_attention_layernorm.weight", embd)
        attention, moe = prefix + "self_attn.", prefix + "block_sparse_moe."
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield make(f"{attention}{name}_proj.weight", rows, embd, std=embd**-0.5)
        yield make(attention + "o_proj.weight", embd, q, std=case.attention_gain * q**-0.5)
        yield norm(attention + "q_norm.weight", q)
        yield norm(attention + "k_norm.weight", kv)
        yield make(moe + "gate.weight", case.n_experts, embd, std=embd**-0.5)
        yield make(moe + "e_score_correction_bias", case.n_experts, std=case.bias_std)
        for e in range(case.n_experts):
            yield make(f"{moe}experts.{e}.w1.weight", case.n_ff, embd, std=embd**-0.5)
            yield make(f"{moe}experts.{e}.w3.weight", case.n_ff, embd, std=embd**-0.5)
            down_std = case.moe_gain * (case.n_experts_used / case.n_ff) ** 0.5
            yield make(f"{moe}experts.{e}.w2.weight", embd, case.n_ff, std=down_std)

    tensors = dict([make("model.embed_tokens.weight", case.n_vocab, case.n_embd, std=1.0)])
    for i in range(case.n_layers):
        tensors.update(layer(f"model.layers.{i}."))
    tensors.update([norm("model.norm.weight", case.n_embd)])
    tensors.update([make("lm_head.weight", case.n_vocab, case.n_embd, std=case.head_std * case.n_embd**-0.5)])
    for i in range(case.n_mtp):
        prefix = f"model.mtp.layers.{i}."
        tensors.update([norm(prefix + f"{n}.weight", case.n_embd) for n in ("enorm", "hnorm", "final_layernorm")])
        eh_proj = make(prefix + "eh_proj.weight", case.n_embd, 2 * case.n_embd, std=(2 * case.n_embd) ** -0.5)
        tensors.update([eh_proj])
        tensors.update(layer(prefix + "transformer_layer."))
    return tensors


def tokenizer_json(n_vocab: int) -> dict[str, Any]:
    """A byte-level BPE of M2's kind: 256 bytes, merges, control tokens, and N_UNUSED ids left free."""
    added = [*SPECIAL_TOKENS, *PLAIN_TOKENS]
    n_base = n_vocab - len(added) - N_UNUSED
    assert n_base > 256
    vocab = {text: i for i, text in enumerate(byte_alphabet())}
    merges: list[list[str]] = []
    grow = list("etaoinshrdlucmfwypvbgk")
    grow = ["Ġ" + c for c in grow] + grow
    queue = [(left, right) for left in grow for right in grow if not right.startswith("Ġ")]
    while len(vocab) < n_base:
        parts = [(left, right) for left, right in queue if left + right not in vocab][: n_base - len(vocab)]
        for left, right in parts:
            if left in vocab and left + right not in vocab:
                merges.append([left, right])
                vocab[left + right] = len(vocab)
            elif left not in vocab:
                merges.append(["Ġ", left[1:]])
                vocab[left] = len(vocab)
            if len(vocab) == n_base:
                break
        queue = [(left + right, c) for left, right in queue[:600] for c in "etaoinshrdlu"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": n_base + i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": text in SPECIAL_TOKENS,
            }
            for i, text in enumerate(added)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocab, "merges": merges},
    }


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level BPE, by byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


CHAT_TEMPLATE = (
    "{{ ']~!b[' }}{% for m in messages %}]~b]{{ 'ai' if m.role == 'assistant' else m.role }}\n{{ m.content }}[e~[\n"
    "{% endfor %}{% if add_generation_prompt %}]~b]ai\n<think>\n{% endif %}"
)


def write_texts(directory: Path, n_vocab: int) -> None:
    """The small files beside the weights."""
    special = {"bos_token": "]~!b[", "eos_token": "[e~[", "unk_token": "]!d~["}
    generation = {"bos_token_id": 200019, "do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 40}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json(n_vocab), ensure_ascii=False))
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
    (directory / "generation_config.json").write_text(json.dumps(generation))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, npt.NDArray[Any]]]) -> None:
    """A safetensors file from (dtype name, array holding exactly its bytes) pairs, in the given order."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, value) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [offset, offset + value.nbytes]}
        offset += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, value in tensors.values():
            file.write(np.ascontiguousarray(value).tobytes())


def write_checkpoint(directory: Path, case: Case, weights: Mapping[str, F32] | None = None) -> Path:
    """The case as a float32 checkpoint in one file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(case)))
    write_texts(directory, case.n_vocab)
    weights = hf_weights(case) if weights is None else weights
    write_safetensors(directory / "model.safetensors", {name: ("F32", value) for name, value in weights.items()})
    return directory
