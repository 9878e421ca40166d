"""A model of M2's widths that costs no disk: its large matrices are holes in a file, which read as zeros.

A product takes as long with zeros as with other weights. What decides where memory is read is random: embedding and
routers. Few layers, experts and words are enough to be larger than caches.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from m2lite.formats.table import FORMATS
from m2lite.quant.header import Key, array, boolean, build_header, float32, string, uint32
from m2lite.text.bpe import BYTE_OF_LETTER

ARCH = "minimax-m2"
N_EMBD, N_FF, N_HEADS, N_KV_HEADS, HEAD_DIM = 3072, 1536, 48, 8, 128  # as M2's
N_LAYERS, N_EXPERTS, N_USED, N_VOCAB = 4, 40, 8, 4096


def write_zeros(path: Path) -> None:
    """1.4 GB to look at, in Q4_0; 20 MB of it are written."""
    q, kv = N_HEADS * HEAD_DIM, N_KV_HEADS * HEAD_DIM
    layer = {
        "attn_norm.weight": (N_EMBD,), "attn_q.weight": (q, N_EMBD), "attn_k.weight": (kv, N_EMBD),
        "attn_v.weight": (kv, N_EMBD), "attn_q_norm.weight": (q,), "attn_k_norm.weight": (kv,),
        "attn_output.weight": (N_EMBD, q), "ffn_norm.weight": (N_EMBD,), "ffn_gate_inp.weight": (N_EXPERTS, N_EMBD),
        "exp_probs_b.bias": (N_EXPERTS,), "ffn_gate_exps.weight": (N_EXPERTS, N_FF, N_EMBD),
        "ffn_up_exps.weight": (N_EXPERTS, N_FF, N_EMBD), "ffn_down_exps.weight": (N_EXPERTS, N_EMBD, N_FF),
    }  # fmt: skip
    table: dict[str, tuple[int, ...]] = {"token_embd.weight": (N_VOCAB, N_EMBD), "output_norm.weight": (N_EMBD,)}
    table |= {f"blk.{i}.{name}": shape for i in range(N_LAYERS) for name, shape in layer.items()}
    table |= {"output.weight": (N_VOCAB, N_EMBD)}
    tensors = [(name, shape, FORMATS[_format_of(name, shape)]) for name, shape in table.items()]
    header, rng = build_header(ARCH, [*_sizes(), *_vocabulary()], tensors), np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(header.data)
        file.truncate(header.size_bytes)
        for slot in header.slots:
            if slot.name.endswith("norm.weight"):
                values = np.ones(slot.shape, "<f4")
            elif slot.name.endswith("inp.weight"):
                values = (rng.standard_normal(slot.shape) / N_EMBD**0.5).astype("<f4")
            elif slot.name.startswith("token_embd"):
                values = rng.standard_normal(slot.shape).astype("<f2")
            else:
                continue
            file.seek(slot.offset)
            file.write(values.tobytes())


def _format_of(name: str, shape: tuple[int, ...]) -> str:
    if len(shape) == 1 or name.endswith("inp.weight"):
        return "F32"
    return "F16" if name.startswith("token_embd") else "Q4_0"


def _sizes() -> list[Key]:
    counts = {
        "block_count": N_LAYERS, "context_length": 4096, "embedding_length": N_EMBD, "feed_forward_length": N_FF,
        "expert_feed_forward_length": N_FF, "attention.head_count": N_HEADS, "attention.head_count_kv": N_KV_HEADS,
        "attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM, "rope.dimension_count": HEAD_DIM // 2,
        "expert_count": N_EXPERTS, "expert_used_count": N_USED, "expert_gating_func": 2,
    }  # fmt: skip
    keys = [uint32(f"{ARCH}.{name}", value) for name, value in counts.items()]
    return [
        *keys, float32(f"{ARCH}.attention.layer_norm_rms_epsilon", 1e-6), float32(f"{ARCH}.rope.freq_base", 5e6),
    ]  # fmt: skip


def _vocabulary() -> list[Key]:
    """A word for each byte, and words that nobody writes."""
    n_unused = N_VOCAB - 257
    tokens = [*BYTE_OF_LETTER, *(f"<u{i}>" for i in range(n_unused)), "qz"]
    return [
        string("tokenizer.ggml.model", "gpt2"), string("tokenizer.ggml.pre", "minimax-m2"),
        array("tokenizer.ggml.tokens", tokens), array("tokenizer.ggml.token_type", [1] * 256 + [5] * n_unused + [1]),
        array("tokenizer.ggml.merges", ["q z"]), uint32("tokenizer.ggml.eos_token_id", 0),
        boolean("tokenizer.ggml.add_bos_token", False),
    ]  # fmt: skip
