"""Changes to an input that keep its form: JSON stays JSON, a length before a text stays its length. Knows no target."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

# Targets whose inputs are JSON, whole or line by line, and those with 64-bit lengths before texts.
JSON = frozenset({
    "json_text", "config", "texts", "manifest", "calls", "schema", "tools", "request", "journal", "chat", "batch",
    "results", "served", "messages", "responses", "completions", "tokenizer", "safetensors", "drafts", "tuning",
})  # fmt: skip
SIZED = frozenset({"gguf", "model", "sidecar", "imatrix"})

_ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 1.5, -0.0, 1e300, "", "x", "0", "null",
    "\ud800", "\udc00x", "\0", "\x1b[31m", "\u202e", "é" * 50, "a" * 300, [], {}, [[]], [None], [0], {"": 0}, {"a": {}},
    [0] * 50, "../x", "/etc/passwd", "nan",
]  # fmt: skip
_RAW = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "-" + "9" * 400,
    "1e-999",
    "[" * 200 + "]" * 200,
    '"\\ud800"',
]
_MARK = "\ufdd0mark\ufdd1"


def mutate_json(data: bytes, rng: random.Random) -> bytes | None:
    """Another value, key or line; None where `data` holds no JSON."""
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data):  # safetensors
        n_bytes = int.from_bytes(data[:8], "little")
        text = _mutate_value(data[8 : 8 + n_bytes], rng)
        return None if text is None else len(text).to_bytes(8, "little") + text + data[8 + n_bytes :]
    lines = data.split(b"\n")
    if len(lines) < 3 or data.lstrip()[:2] in (b"{\n", b"[\n"):
        return _mutate_value(data, rng)
    at = rng.randrange(len(lines))
    choice = rng.randrange(8)
    if choice == 0:
        lines.insert(at, rng.choice(lines))
    elif choice == 1:
        del lines[at]
    else:
        changed = _mutate_value(lines[at], rng)
        if changed is None:
            return None
        lines[at] = changed
    return b"\n".join(lines)


def _mutate_value(data: bytes, rng: random.Random) -> bytes | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    places = list(_places(value))
    if not places:
        return json.dumps(rng.choice(_ODD)).encode()
    holder, key = rng.choice(places)
    raw = None
    choice = rng.randrange(9)
    if choice == 0:
        del holder[key]
    elif choice == 1:
        holder[key], raw = _MARK, rng.choice(_RAW)
    elif choice == 2 and isinstance(holder, dict):
        holder[str(rng.choice(_ODD))] = holder.pop(key)
    elif choice == 3 and isinstance(holder, dict):
        holder[_MARK] = holder[key]
        raw = json.dumps(key)  # a key twice
    elif choice == 4 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif choice == 5:
        other, where = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[where])) if where in _keys(other) else None
    elif choice == 6:
        holder[key] = [holder[key]]
    else:
        holder[key] = rng.choice(_ODD)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7 or "\\ud" in json.dumps(value))
    if raw is not None:
        text = text.replace(json.dumps(_MARK), raw).replace(f'"{_MARK}"', raw)
    return text.encode("utf-8", "surrogatepass")


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def _places(value: Any) -> Any:
    """(container, key) of every value in it."""
    rest = [value]
    while rest:
        holder = rest.pop()
        if isinstance(holder, dict | list):
            for key in list(_keys(holder)):
                yield holder, key
                rest.append(holder[key])


def mutate_sized(data: bytes, rng: random.Random) -> bytes | None:
    """A text with its length before it is replaced, cut, or its length changed; or a number behind it."""
    places = []
    for at in range(max(0, len(data) - 9)):
        (n,) = struct.unpack_from("<Q", data, at)
        if 0 < n <= 64 and at + 8 + n <= len(data) and data[at + 8 : at + 8 + n].isascii():
            places.append((at, n))
    if not places:
        return None
    at, n = rng.choice(places)
    text, rest = data[at + 8 : at + 8 + n], data[at + 8 + n :]
    choice = rng.randrange(5)
    if choice == 0:
        other, m = rng.choice(places)
        text = data[other + 8 : other + 8 + m]
    elif choice == 1:
        text = rng.choice([b"", b"\xff", b"\x1b[0m", text[:-1], text + b"x", text * 2])
    elif choice == 2:
        return data[:at] + struct.pack("<Q", rng.choice([0, n - 1, n + 1, 2**32, 2**63, 2**64 - 1])) + data[at + 8 :]
    elif choice == 3 and len(rest) >= 8:  # a type, a count, a value
        where, width = rng.randrange(min(16, len(rest) - 7)), rng.choice([1, 4, 8])
        number = rng.choice([0, 1, 2, 3, 8, 9, 12, 13, 32, 255, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
        rest = rest[:where] + (number % (1 << 8 * width)).to_bytes(width, "little") + rest[where + width :]
    else:
        text = bytes(rng.randrange(32, 127) for _ in range(rng.randrange(1, 40)))
    return data[:at] + struct.pack("<Q", len(text)) + text + rest
