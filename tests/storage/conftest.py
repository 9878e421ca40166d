"""Files for the storage tests, built byte by byte, so that every field can lie."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest


class RawGGUF:
    """A GGUF file in the making; `n_keys`, `n_tensors`, `version` and `magic` may be set to lie."""

    U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)

    def __init__(self) -> None:
        self.magic = b"GGUF"
        self.version = 3
        self.n_keys: int | None = None
        self.n_tensors: int | None = None
        self.keys: list[bytes] = []
        self.tensors: list[bytes] = []
        self.data = b""
        self.alignment = 32

    @staticmethod
    def string(text: bytes | str, n_bytes: int | None = None) -> bytes:
        raw = text.encode() if isinstance(text, str) else text
        return struct.pack("<Q", len(raw) if n_bytes is None else n_bytes) + raw

    @staticmethod
    def array(item_type: int, items: bytes, n_items: int) -> bytes:
        return struct.pack("<IQ", item_type, n_items) + items

    def key(self, key: bytes | str, value_type: int, value: bytes) -> RawGGUF:
        self.keys.append(self.string(key) + struct.pack("<I", value_type) + value)
        return self

    def text(self, key: str, value: bytes | str) -> RawGGUF:
        return self.key(key, self.STRING, self.string(value))

    def number(self, key: str, value: int) -> RawGGUF:
        return self.key(key, self.U32, struct.pack("<I", value))

    def strings(self, key: str, items: list[bytes]) -> RawGGUF:
        return self.key(key, self.ARRAY, self.array(self.STRING, b"".join(map(self.string, items)), len(items)))

    def tensor(
        self, name: bytes | str, dims: tuple[int, ...], ggml_type: int = 0, offset: int = 0, n_dims: int | None = None
    ) -> RawGGUF:
        self.tensors.append(
            self.string(name)
            + struct.pack(f"<I{len(dims)}Q", len(dims) if n_dims is None else n_dims, *dims)
            + struct.pack("<IQ", ggml_type, offset)
        )
        return self

    def header(self) -> bytes:
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        start = self.magic + struct.pack("<IQQ", self.version, n_tensors, n_keys)
        return start + b"".join(self.keys) + b"".join(self.tensors)

    def build(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data


def small_file() -> RawGGUF:
    """A valid file with every kind of thing in it, and no padding after its last tensor."""
    raw = RawGGUF().text("general.architecture", "x").number("general.alignment", 32)
    raw.strings("t", [b"a", b"bc", "é".encode()])
    raw.key("s", raw.ARRAY, raw.array(raw.F32, struct.pack("<2f", 0.5, 1.5), 2))
    raw.key("b", raw.BOOL, b"\x01")
    raw.tensor("w", (32, 2), ggml_type=2, offset=0).tensor("n", (3,), offset=64)
    raw.data = bytes(range(36)) + bytes(28) + struct.pack("<3f", 1, 2, 3)
    return raw


@pytest.fixture
def raw() -> RawGGUF:
    return RawGGUF()


@pytest.fixture
def small() -> RawGGUF:
    return small_file()


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def save(content: bytes, name: str = "model.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return save
