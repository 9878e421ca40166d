"""What a model file holds, for `inspect` and the start line. Reads the header only, never a weight."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from m2lite.formats.table import FORMATS
from m2lite.storage.gguf_reader import GGUFArray, GGUFFile, open_gguf

if TYPE_CHECKING:
    from m2lite.text.tokenizer import Tokenizer


def type_table(gguf: GGUFFile) -> list[dict[str, Any]]:
    """Per block format, the largest first: tensors, bytes, and whether it runs "fast" (as integers) or "generic"."""
    n_tensors, n_bytes = Counter[str](), Counter[str]()
    for tensor in gguf.tensors.values():
        n_tensors[tensor.format.name] += 1
        n_bytes[tensor.format.name] += tensor.n_bytes
    return [
        {
            "type": name,
            "n_tensors": n_tensors[name],
            "n_bytes": size,
            "runs": "fast" if FORMATS[name].tile else "generic",
        }
        for name, size in sorted(n_bytes.items(), key=lambda item: (-item[1], item[0]))
    ]


def type_mix(gguf: GGUFFile) -> dict[str, float]:
    """Block format -> share of the tensor bytes, the largest first."""
    table = type_table(gguf)
    total = sum(row["n_bytes"] for row in table) or 1
    return {row["type"]: row["n_bytes"] / total for row in table}


def size_table(gguf: GGUFFile) -> dict[str, int]:
    """Where the bytes of all parts go; header, tensors and padding add up to the file."""
    header = sum(part.n_bytes for part in gguf.headers)
    tensors = sum(tensor.n_bytes for tensor in gguf.tensors.values())
    padding = gguf.size_bytes - header - tensors
    return {"file": gguf.size_bytes, "header": header, "tensors": tensors, "padding": padding}


def tokenizer_checks(tokenizer: Tokenizer, n_vocab: int) -> list[dict[str, Any]]:
    """What a chat needs of the tokenizer, each with whether it holds."""
    text = "Hello, wörld! 你好 🙂 1234\n\tend"
    marks = ("]~!b[", "]~b]", "[e~[")
    checks = {
        f"the vocabulary has as many tokens as the head has rows ({n_vocab})": tokenizer.n_vocab == n_vocab,
        "the ids of special tokens are those of special tokens": not tokenizer.warnings,
        "the marks of M2's turns are control tokens": all(mark in tokenizer.control_strings for mark in marks),
        "text in several scripts comes back as it was": tokenizer.decode(tokenizer.encode(text)) == text,
    }
    return [{"check": name, "ok": bool(ok)} for name, ok in checks.items()]


def format_mix(mix: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in mix.items() if share >= 0.005)


def describe_file(path: str) -> dict[str, Any]:
    """Header, types, dimensions, tokenizer and template of the file, as plain values that JSON can hold."""
    with open_gguf(path) as gguf:
        try:
            return _describe(gguf)
        finally:
            gguf.check_unchanged()  # of one that was cut meanwhile nothing of it is true


def _describe(gguf: GGUFFile) -> dict[str, Any]:
    from m2lite.model.config import parse_config
    from m2lite.text.template import load_template
    from m2lite.text.tokenizer import load_tokenizer

    config = parse_config(gguf.metadata)
    tokenizer = load_tokenizer(gguf)
    template = load_template(gguf)
    return {
        "path": str(gguf.path),
        "parts": [str(part) for part in gguf.parts],
        "size_bytes": gguf.size_bytes,
        "n_tensors": len(gguf.tensors),
        "sizes": size_table(gguf),
        "types": type_table(gguf),
        "type_mix": {name: round(share, 4) for name, share in type_mix(gguf).items()},
        "config": {name: getattr(config, name) for name in config.__dataclass_fields__},
        "tokenizer": {
            "n_vocab": tokenizer.n_vocab,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "stop_ids": sorted(tokenizer.stop_ids),
            "stop_tokens": [tokenizer.token_text(stop) for stop in sorted(tokenizer.stop_ids)],
            "warnings": list(tokenizer.warnings) or None,
            "n_control": len(tokenizer.control_strings),
        },
        "tokenizer_checks": tokenizer_checks(tokenizer, config.n_vocab),
        "template": {"origin": template.origin, "sha256": template.sha256, "warning": template.warning},
        "metadata": {key: _plain(value) for key, value in gguf.metadata.items()},
        "tensors": [
            {"name": t.name, "type": t.format.name, "shape": list(t.shape), "n_bytes": t.n_bytes}
            for t in gguf.tensors.values()
        ],
    }


def _plain(value: Any) -> Any:
    """Arrays by their length only: a vocabulary is no metadata that anyone reads here."""
    return f"array of {len(value):,} items" if isinstance(value, GGUFArray) else value
