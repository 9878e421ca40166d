"""Small valid inputs of every target, from which a fuzzer starts. Knows formats, no fuzzer."""

from __future__ import annotations

import functools
import json
import math
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

import tinymodel
from m2lite.drafting.chances import Chances
from m2lite.drafting.cost import CallCost, Sizes
from m2lite.drafting.kept import save_kept
from m2lite.drafting.planner import Planner
from m2lite.engine.tuned import Change, Tuning, save_tuning
from m2lite.formats.table import FORMATS
from m2lite.quant.header import Key, array, boolean, build_header, float32, string, uint32
from m2lite.quant.imatrix import Importance, write_imatrix
from m2lite.quant.journal import Journal, Ticket, WrittenTensor
from m2lite.storage.heat import save_heat
from m2lite.text.m2_template import SOURCE
from tests.golden.models import SPECIAL_TOKENS, Case, hf_config, tokenizer_json

ARCH = "minimax-m2"
SIZES = {"embd": 32, "q": 32, "kv": 32, "ff": 32, "experts": 2, "vocab": tinymodel.N_VOCAB, "2 embd": 64}
_LAYER: dict[str, tuple[str, ...]] = {
    "attn_norm.weight": ("embd",),
    "attn_q.weight": ("q", "embd"),
    "attn_k.weight": ("kv", "embd"),
    "attn_v.weight": ("kv", "embd"),
    "attn_q_norm.weight": ("q",),
    "attn_k_norm.weight": ("kv",),
    "attn_output.weight": ("embd", "q"),
    "ffn_norm.weight": ("embd",),
    "ffn_gate_inp.weight": ("experts", "embd"),
    "exp_probs_b.bias": ("experts",),
    "ffn_gate_exps.weight": ("experts", "ff", "embd"),
    "ffn_up_exps.weight": ("experts", "ff", "embd"),
    "ffn_down_exps.weight": ("experts", "embd", "ff"),
}


def _tensors(table: dict[str, tuple[str, ...]], prefix: str = "") -> list[tuple[str, tuple[int, ...], Any]]:
    """One-dimensional tensors and routers in F32, the others in Q8_0 or Q4_0."""
    found = []
    for name, shape in table.items():
        is_exact = len(shape) == 1 or "gate_inp" in name
        kind = "F32" if is_exact else "Q4_0" if "exps" in name else "Q8_0"
        found.append((prefix + name, tuple(SIZES[size] for size in shape), FORMATS[kind]))
    return found


def _sizes(n_layers: int) -> list[Key]:
    counts = {
        "block_count": n_layers, "context_length": 512, "embedding_length": SIZES["embd"],
        "feed_forward_length": SIZES["ff"], "expert_feed_forward_length": SIZES["ff"], "attention.head_count": 2,
        "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16,
        "rope.dimension_count": 8, "expert_count": SIZES["experts"], "expert_used_count": 1, "expert_gating_func": 2,
    }  # fmt: skip
    keys = [uint32(f"{ARCH}.{name}", value) for name, value in counts.items()]
    return [
        *keys, float32(f"{ARCH}.attention.layer_norm_rms_epsilon", 1e-6), float32(f"{ARCH}.rope.freq_base", 5e6),
    ]  # fmt: skip


def _vocabulary() -> list[Key]:
    added = [*tinymodel.CONTROL, *tinymodel.PLAIN]
    n_unused = tinymodel.N_VOCAB - 256 - len(added) - 1
    tokens = [*tinymodel.byte_letters(), *added, *(f"<u{i}>" for i in range(n_unused)), "qz"]
    types = [1] * 256 + [3] * len(tinymodel.CONTROL) + [4] * len(tinymodel.PLAIN) + [5] * n_unused + [1]
    return [
        string("tokenizer.ggml.model", "gpt2"), string("tokenizer.ggml.pre", "minimax-m2"),
        array("tokenizer.ggml.tokens", tokens), array("tokenizer.ggml.token_type", types),
        array("tokenizer.ggml.merges", ["q z"]), uint32("tokenizer.ggml.bos_token_id", tinymodel.BEGIN),
        uint32("tokenizer.ggml.eos_token_id", tinymodel.END), boolean("tokenizer.ggml.add_bos_token", False),
    ]  # fmt: skip


@functools.cache
def model_header() -> bytes:
    """Of a model of one layer."""
    ends = {"token_embd.weight": ("vocab", "embd"), "output_norm.weight": ("embd",), "output.weight": ("vocab", "embd")}
    tensors = [*_tensors(_LAYER, "blk.0."), *_tensors(ends)]
    return build_header(ARCH, [*_sizes(1), *_vocabulary()], tensors, 32).data


def _piece_model_header() -> bytes:
    """The same with a SentencePiece vocabulary."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "e", "\u2581e"]
    types = [2, 3, 3, *[6] * 256, 1, 1, 1]
    keys = [
        string("tokenizer.ggml.model", "llama"), array("tokenizer.ggml.tokens", tokens),
        array("tokenizer.ggml.token_type", types), array("tokenizer.ggml.scores", [0.0] * len(tokens)),
        uint32("tokenizer.ggml.bos_token_id", 1), uint32("tokenizer.ggml.eos_token_id", 2),
    ]  # fmt: skip
    return build_header(ARCH, [*_sizes(1), *keys], _tensors(_LAYER, "blk.0."), 32).data


def _sidecar_header() -> bytes:
    """One module behind the layer of `model_header`."""
    extra: dict[str, tuple[str, ...]] = {
        "nextn.enorm.weight": ("embd",), "nextn.hnorm.weight": ("embd",),
        "nextn.eh_proj.weight": ("embd", "2 embd"), "nextn.shared_head_norm.weight": ("embd",),
    }  # fmt: skip
    keys = [
        uint32(f"{ARCH}.nextn_predict_layers", 1), string("m2lite.mtp.concat", "embedding,hidden"),
        string("m2lite.mtp.hidden", "pre_norm"), boolean("m2lite.mtp.zero_at_0", True),
        boolean("m2lite.mtp.shared_norm", False), string("m2lite.mtp.trunk", "0" * 64),
    ]  # fmt: skip
    return build_header(ARCH, [*_sizes(2), *keys], _tensors(_LAYER | extra, "blk.1."), 32).data


def _whole_gguf() -> bytes:
    """Every type of key, a string of each kind, two tensors and the hashes."""
    kinds = ["UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "FLOAT32", "BOOL", "UINT64", "INT64", "FLOAT64"]
    keys = [Key(f"k.{kind}", kind == "BOOL" or 1, kind) for kind in kinds]
    keys += [Key(f"a.{kind}", [kind == "BOOL" or 1] * 3, kind) for kind in ("UINT8", "INT32", "BOOL", "UINT64")]
    keys += [array("a.STRING", ["a", "é", ""]), array("a.FLOAT32", [0.5, 1.5])]
    tensors = [("w", (2, 32), FORMATS["Q4_0"]), ("n", (3,), FORMATS["F32"])]
    header = build_header("x", keys, tensors, 32, hashed=True)
    data = bytearray(header.data) + bytes(header.size_bytes - len(header.data))
    bodies = [data[slot.offset : slot.offset + slot.n_bytes] for slot in header.slots]
    data[: len(header.data)] = header.seal([xxhash.xxh64(body).intdigest() for body in bodies])
    return bytes(data)


def _written(write: Callable[[Path], object], name: str = "x") -> bytes:
    """What a writer of the product writes."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def _drafts() -> bytes:
    sizes = Sizes(1 << 20, 1 << 14, 2, 8, 2)
    planner = Planner(3, CallCost(sizes, sizes), Chances(3))
    for n in (1, 2, 40):
        planner.cost.saw(n, n - 1, 4 * n, 1e-3 * n)
    return _written(lambda path: save_kept(path, planner))


def _tuning() -> bytes:
    ratio = (1.01, 1.02, 1.03)
    changes = [Change("tiles_ahead", 4, {"decode": ratio, "prompt": ratio}), Change("chunks", 16, {"decode": ratio})]
    found = Tuning(changes, {"decode": ratio}, 4e10, "2026-11-30T20:00:00+00:00")
    return _written(lambda path: save_tuning(path, found), "tuning.json")


def _imatrix() -> bytes:
    entries = {"blk.0.a": (np.ones((1, 4)), np.ones(1)), "blk.0.e": (np.ones((2, 4)), np.array([3.0, 0.0]))}
    return _written(lambda path: write_imatrix(path, Importance(entries, ("text",), 2, 512)))


def _safetensors() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
        "c": {"dtype": "F8_E4M3", "shape": [0, 5], "data_offsets": [22, 22]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(22)


@functools.cache
def tokenizer_seed() -> bytes:
    return json.dumps(tokenizer_json(300), ensure_ascii=False).encode()


def _pieces() -> bytes:
    from m2lite.text.pieces import _field

    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{n:02X}>", 6) for n in range(256)), ("e", 1), ("x", 4)]
    model = b"".join(_field(1, _field(1, text.encode()) + _field(2, -1.0) + _field(3, kind)) for text, kind in pieces)
    return model + _field(2, _field(3, 2) + _field(40, 0)) + _field(3, _field(1, b"identity") + _field(4, 0))


def _journal() -> bytes:
    def write(path: Path) -> None:
        with Journal(path) as journal:
            journal.begin(Ticket("ab", (), 9, {"type": "f32"}, ("x.gguf",)))
            journal.add([WrittenTensor("a.weight", 32, 128, 7), WrittenTensor("b.weight", 160, 64, 8)])

    return _written(write, "x.gguf.journal")


def _pages() -> list[bytes]:
    """Without a note and with one."""
    noted = bytes(16) + struct.pack("<I", 9) + bytes(64) + b"who chose"
    contents = (b"m2litek2", bytes(80)), (b"m2litek3", noted)
    return [magic + xxhash.xxh3_128_digest(rest) + rest for magic, rest in contents]


def _chat() -> bytes:
    said = {"role": "assistant", "content": "é", "reasoning_content": "hm",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}  # fmt: skip
    events: list[dict[str, Any]] = [
        {"m2lite_chat": 1, "model": "m.gguf", "created": "2026-11-29T00:00:00+0000"},
        {"add": {"role": "system", "content": "Be brief."}}, {"add": {"role": "user", "content": "Hi"}},
        {"add": said}, {"answer": {"finish_reason": "stop", "attempt": 0, "tokens": [1, 2]}},
        {"add": {"role": "tool", "content": [{"type": "text", "text": "3"}]}}, {"cut": 2},
        {"part": {"thinking": "a", "content": "b"}},
    ]  # fmt: skip
    return _lines(*events)


def _lines(*values: object) -> bytes:
    return b"".join(json.dumps(value, ensure_ascii=False).encode() + b"\n" for value in values)


_ASK = [{"role": "user", "content": "Hi"}]
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/b"}, "c": {"enum": ["x", None]}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"b": {"type": "array", "items": {"type": "string", "maxLength": 5}, "minItems": 1}},
}
_TOOL = {"type": "function", "function": {"name": "f", "description": "?", "parameters": _SCHEMA}}
_REQUEST: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "s"}, *_ASK, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "3"}]},
    ],
    "tools": [_TOOL], "model": "m", "temperature": 0.5, "top_k": 3, "seed": 7, "stop": ["x"], "max_tokens": 9,
    "logprobs": True, "top_logprobs": 2, "think_budget": 3,
}  # fmt: skip
_WITH_SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA}}}
_CHOSEN = {
    "tools": [{"type": "function", "function": _TOOL["function"] | {"strict": True}}],  # type: ignore[operator]
    "tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": False,
}  # fmt: skip
_CALL = '<invoke name="f">\n<parameter name="a">1</parameter>\n<parameter name="b">["x"]</parameter>\n</invoke>'


def _batch() -> bytes:
    return _lines(
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": _REQUEST},
        {"custom_id": "b", "prompt": "Hi", **_WITH_SCHEMA}, {"messages": _ASK},
    )  # fmt: skip


def _results() -> bytes:
    from m2lite.batch.results import result_line

    return _lines(result_line("b", {"choices": []}, None), result_line("a", None, "wrong"), result_line("é", {}, None))


def _manifest() -> bytes:
    from tests.fuzz.targets import MANIFEST

    return json.dumps(MANIFEST | {"input_sha256": "0" * 64, "json_schema": _SCHEMA, "stop": []}, indent=1).encode()


_TOML = b"""# settings
model = "m.gguf"
ctx = "32k"
threads = 4
temp = 0.7
think = "hide"
seed = 0x1F
"""


def _bytes(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


# target: its inputs, made when they are asked for.
SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "json_text": lambda: [_bytes({"a": [1, 2.5, None, "é😀"]})],
    "gguf": lambda: [_whole_gguf()],
    "model": lambda: [model_header(), _piece_model_header()],
    "sidecar": lambda: [_sidecar_header()],
    "imatrix": lambda: [_imatrix()],
    "safetensors": lambda: [_safetensors()],
    "config": lambda: [_bytes(hf_config(Case("x", 1)))],
    "tokenizer": lambda: [tokenizer_seed()],
    "texts": lambda: [_bytes({
        "tokenizer_config.json": {"eos_token": {"content": "[e~["}, "bos_token": SPECIAL_TOKENS[-1],
                                  "chat_template": [{"name": "default", "template": "x"}]},
        "generation_config.json": {"temperature": 1.0, "top_k": 40, "eos_token_id": [1, 2]},
    })],
    "pieces": lambda: [_pieces()],
    "journal": lambda: [_journal()],
    "page": _pages,
    "heat": lambda: [_written(lambda path: save_heat(path, np.full((2, 8), math.pi)), "x.npy")],
    "drafts": lambda: [_drafts()],
    "tuning": lambda: [_tuning()],
    "chat": lambda: [_chat()],
    "settings": lambda: [_TOML],
    "batch": lambda: [_batch(), b"Hi\n\nHow are you?\n"],
    "results": lambda: [_results()],
    "manifest": lambda: [_manifest()],
    "template": lambda: [SOURCE.encode(), b"{% for m in messages %}{{ m.content|tojson }}{% endfor %}"],
    "calls": lambda: [_bytes({"tools": [_TOOL], "text": _CALL})],
    "reply": lambda: [b"\xc0a\nb\xff\x07\n\nstop c\xff\x08" + _CALL.encode() + b"\xff\x09d\xff\x03"],
    "schema": lambda: [_bytes(_SCHEMA), _bytes({"name": "s", "schema": _SCHEMA})],
    "tools": lambda: [_bytes({"tools": [_TOOL]})],
    "request": lambda: [
        _bytes(_REQUEST), _bytes({"messages": _ASK, **_WITH_SCHEMA}), _bytes({"messages": _ASK, **_CHOSEN}),
    ],
    "served": lambda: [_bytes({
        "messages": [
            {"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "1"}, {"role": "system", "content": [{"text": "x"}]},
        ],
        "tools": [{"type": "namespace", "tools": [_TOOL]}, {"type": "web_search"}], "stream": True,
        "stream_options": {"include_usage": True}, "thinking": {"type": "enabled", "budget_tokens": 5},
        "chat_template_kwargs": {"enable_thinking": True}, "unknown": [1], "seed": 1,
    })],
    "messages": lambda: [_bytes({
        "model": "m", "max_tokens": 9, "stream": True, "thinking": {"type": "enabled", "budget_tokens": 5},
        "system": [{"type": "text", "text": "x-anthropic-billing-header: a=1;"}, {"type": "text", "text": "Be brief."}],
        "tools": [{"name": "f", "input_schema": _SCHEMA, "strict": True}, {"type": "web_search_20250305"}],
        "tool_choice": {"type": "auto"}, "stop_sequences": ["x"], "unknown": [1],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "system", "content": "x"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look."}, {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c", "is_error": True, "content": [
                    {"type": "text", "text": "1"}, {"type": "image", "source": {"type": "base64", "data": "x"}}]},
                {"type": "document", "source": {"type": "text", "data": "x"}}]},
        ],
    })],
    "responses": lambda: [_bytes({
        "model": "m", "max_output_tokens": 9, "stream": True, "instructions": "Be brief.", "truncation": "disabled",
        "reasoning": {"effort": "low"}, "include": ["message.output_text.logprobs"], "top_logprobs": 1,
        "tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]}, {"type": "function",
                  "name": "f", "parameters": _SCHEMA, "strict": True}, {"type": "web_search"}],
        "tool_choice": "auto", "metadata": {"a": "b"}, "unknown": [1],
        "input": [
            {"role": "developer", "content": "x"}, {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
            {"type": "function_call", "call_id": "c", "name": "f", "namespace": "n", "arguments": "{\"a\": 1}"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]},
            {"type": "web_search_call"}, {"role": "user", "content": "And?"},
        ],
    })],
    "completions": lambda: [_bytes({
        "model": "m", "prompt": ["Hi", [1, 2]], "echo": True, "logprobs": 1, "max_tokens": 0, "stop": ["x"], "seed": 1,
        "stream": True, "stream_options": {"include_usage": True}, "best_of": 1, "suffix": "", "unknown": [1],
    })],
}  # fmt: skip
