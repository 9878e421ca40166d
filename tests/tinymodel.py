"""Tiny MiniMax-M2 models in GGUF, written with the `gguf` package: random ones, and ones that follow a script.

In a scripted model attention and experts add nothing, every token has its own direction in the embedding, and the
head's row of a token is the sum of the directions of the tokens that it follows: so the logits name the successor of
the last token and hardly anything else, and the real engine says what the test wants to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from m2lite.text.m2_template import SOURCE

F32 = npt.NDArray[np.float32]

CONTROL = ("]!p~[", "]~b]", "[e~[", "]!d~[", "]~!b[")
PLAIN = ("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>")
PAD, TURN, END, UNKNOWN, BEGIN = range(256, 261)
THINK, THOUGHT, CALL, CALLED, PHRASE = range(261, 266)  # the last only where `write_model` is told what it says
N_VOCAB = 272  # some ids are unused, as in M2's own vocabulary; the last is the only merge


@dataclass(frozen=True)
class Shape:
    n_layers: int = 2
    n_embd: int = 64
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 32
    rotary_dim: int = 16
    n_experts: int = 8
    n_experts_used: int = 2
    n_ff: int = 32
    n_ctx: int = 4096
    rope_theta: float = 10_000.0
    n_vocab: int = N_VOCAB


# Every row is whole super-blocks of 256.
WIDE = Shape(n_embd=512, n_heads=4, n_kv_heads=2, head_dim=128, rotary_dim=64, n_ff=256)


def byte_letters() -> list[str]:
    """GPT-2's letter of every byte, in byte order, which is the order of ids here."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def chain(*steps: int | str | bytes) -> dict[int, int]:
    """The successor table of a walk through ids and texts; a token that comes twice has two successors, so don't."""
    ids: list[int] = []
    for step in steps:
        ids += [step] if isinstance(step, int) else list(step.encode() if isinstance(step, str) else step)
    table = dict(pairwise(ids))
    assert len(table) == len(ids) - 1, "a token comes twice"
    return table


# After `<think>\n`: thinking, an answer with a two-byte character, the end.
REPLY = chain("\n", "hm", THOUGHT, "Fine é", END)
# Never ends: letters in a circle, straight from the newline, inside the thinking.
ENDLESS = chain("\n", "abcdefgh") | {ord("h"): ord("a")}
# Thinks a little, then answers in a circle.
ENDLESS_ANSWER = chain("\n", "hm", THOUGHT, "abcdefg") | {ord("g"): ord("a")}


def write_model(
    path: Path,
    script: Mapping[int, int] | None = None,
    *,
    seed: int = 0,
    shape: Shape | None = None,
    arch: str = "minimax-m2",
    template: str | None = SOURCE,
    metadata: Mapping[str, int | str | bool | float] | None = None,
    formats: Mapping[str, str] | None = None,
    phrase: str | None = None,
    end: int = END,
    embedded: float = 1.0,
    tokenizer: Path | None = None,
) -> Path:
    """Write a model to `path` and return it. Without a script the weights are random.

    `tokenizer`: a model whose tokenizer it has, of `shape.n_vocab` tokens, and not the one of bytes.
    `end`: what the file calls the end of a reply, right or wrong.
    `embedded`: the length of a token's direction; the longer, the more follows from the last token, and ids vary.
    `phrase`: the text of the token PHRASE, for a script that has to say the same letter twice.

    `formats` says the block format of tensors whose names end so ("attn_q.weight"), or of a kind ("exact", "experts").
    """
    shape = shape or Shape()
    writer = gguf.GGUFWriter(path, arch)
    _write_metadata(writer, arch, shape)
    if tokenizer is None:
        _write_bytes(writer, phrase, end)
    else:
        _copy_tokenizer(writer, tokenizer)
    for key, value in (metadata or {}).items():
        add = {int: writer.add_uint32, str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
        add[type(value)](key, value)  # type: ignore[operator]
    if template is not None:
        writer.add_chat_template(template)
    random = np.random.default_rng(seed)
    for name, (dims, kind) in _tensors(shape).items():
        if kind == "norm":
            values = np.ones(dims, np.float32)
        elif script is not None and name.endswith(("attn_output.weight", "ffn_down_exps.weight")):
            values = np.zeros(dims, np.float32)
        else:
            values = random.standard_normal(dims, np.float32) * np.float32(dims[-1] ** -0.5)
        if name == "token_embd.weight":
            embed = values = values / np.linalg.norm(values, axis=1, keepdims=True) * np.float32(embedded)
        if name == "output.weight" and script is not None:
            values = np.zeros(dims, np.float32)
            for token, successor in script.items():
                values[successor] += 8 * embed[token]
        kinds = {"norm": "F32", "exact": "F32", "dense": "Q8_0", "experts": "Q4_0"} | dict(formats or {})
        quant = next((q for end, q in kinds.items() if name.endswith("." + end)), kinds[kind])
        if name.startswith(("token_embd", "output.")):
            quant = kinds.get(name, quant)
        ggml_type = gguf.GGMLQuantizationType[quant]
        try:
            packed = gguf.quants.quantize(values, ggml_type)
        except NotImplementedError:  # its encoder searches: any bytes will do
            packed = random_blocks(random, quant, dims)
        writer.add_tensor(name, packed, raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Where a format's float16 scales lie, where they do not begin the block.
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ1_M": ()}
SPREADS = {"Q6_K": 900, "IQ1_M": 4, "Q3_K": 60, "IQ4_XS": 900, "Q4_K": 200, "Q5_K": 400, "Q2_K": 12}

# The mean of the codes, which the second scale takes away: weights whose mean is not 0 make every token the same.
MEANS = {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}


def random_blocks(random: np.random.Generator, name: str, dims: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Random codes with scales that give weights of about dims[-1] ** -0.5."""
    n_weights, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    raw = random.integers(0, 256, (*dims[:-1], dims[-1] // n_weights, n_bytes), np.uint8)
    scale = np.float16(dims[-1] ** -0.5 / SPREADS.get(name, 80))
    for at, times in zip(HALVES.get(name, (0,)), (1.0, MEANS.get(name, 1.0)), strict=False):
        raw[..., at : at + 2] = np.array([scale * times], np.float16).view(np.uint8)
    return raw.reshape(*dims[:-1], -1)


def _tensors(shape: Shape) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> row-major shape and kind."""
    d, q, kv = shape.n_embd, shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    e, ff = shape.n_experts, shape.n_ff
    layer: dict[str, tuple[tuple[int, ...], str]] = {
        "attn_norm.weight": ((d,), "norm"),
        "attn_q.weight": ((q, d), "dense"),
        "attn_k.weight": ((kv, d), "dense"),
        "attn_v.weight": ((kv, d), "dense"),
        "attn_q_norm.weight": ((q,), "norm"),
        "attn_k_norm.weight": ((kv,), "norm"),
        "attn_output.weight": ((d, q), "dense"),
        "ffn_norm.weight": ((d,), "norm"),
        "ffn_gate_inp.weight": ((e, d), "exact"),
        "exp_probs_b.bias": ((e,), "exact"),
        "ffn_gate_exps.weight": ((e, ff, d), "experts"),
        "ffn_up_exps.weight": ((e, ff, d), "experts"),
        "ffn_down_exps.weight": ((e, d, ff), "experts"),
    }
    tensors: dict[str, tuple[tuple[int, ...], str]] = {"token_embd.weight": ((shape.n_vocab, d), "exact")}
    for i in range(shape.n_layers):
        tensors |= {f"blk.{i}.{name}": value for name, value in layer.items()}
    return tensors | {"output_norm.weight": ((d,), "norm"), "output.weight": ((shape.n_vocab, d), "exact")}


def _write_metadata(writer: gguf.GGUFWriter, arch: str, shape: Shape) -> None:
    for key, value in {
        "block_count": shape.n_layers,
        "context_length": shape.n_ctx,
        "embedding_length": shape.n_embd,
        "feed_forward_length": shape.n_ff,
        "expert_feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_heads,
        "attention.head_count_kv": shape.n_kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "rope.dimension_count": shape.rotary_dim,
        "expert_count": shape.n_experts,
        "expert_used_count": shape.n_experts_used,
        "expert_gating_func": 2,
        "vocab_size": shape.n_vocab,
    }.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32(f"{arch}.rope.freq_base", shape.rope_theta)


def _copy_tokenizer(writer: gguf.GGUFWriter, path: Path) -> None:
    for key, field in gguf.GGUFReader(path).fields.items():
        if key.startswith("tokenizer.ggml."):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)


def _write_bytes(writer: gguf.GGUFWriter, phrase: str | None, end: int) -> None:
    plain = PLAIN if phrase is None else (*PLAIN, phrase)
    added = [*CONTROL, *plain]
    n_unused = N_VOCAB - 256 - len(added) - 1
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("minimax-m2")
    writer.add_token_list([*byte_letters(), *added, *(f"<unused{i}>" for i in range(n_unused)), "qz"])
    writer.add_token_types([1] * 256 + [3] * len(CONTROL) + [4] * len(plain) + [5] * n_unused + [1])
    writer.add_token_merges(["q z"])  # one, since the writer leaves an empty list out
    writer.add_bos_token_id(BEGIN)
    writer.add_eos_token_id(end)
    writer.add_unk_token_id(UNKNOWN)
    writer.add_pad_token_id(PAD)
    writer.add_add_bos_token(False)
