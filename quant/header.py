"""The header of a GGUF file as bytes, where each tensor's bytes go, and the hashes it holds. Writes no file."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import xxhash

from m2lite.errors import BadModelError
from m2lite.formats.table import BlockFormat
from m2lite.storage.gguf_header import KEY_ALIGNMENT, KEY_HEADER_HASH, KEY_TENSOR_HASHES, VALUE_TYPES

MAGIC = b"GGUF"
VERSION = 3
PAGE_BYTES = 4096
DEFAULT_ALIGNMENT = 32

_NUMBERS = {value_type.name: number for number, value_type in enumerate(VALUE_TYPES)}
_CODES = {value_type.name: value_type.code for value_type in VALUE_TYPES}
# What the items of a plain array are written as, as the gguf package does; bytes are a string that is no UTF-8.
_ITEM_KINDS = {str: "STRING", bytes: "STRING", bool: "BOOL", int: "INT32", float: "FLOAT32"}


class Key(NamedTuple):
    """One metadata key; `kind` names a value type, an array's by the type of its items, or is RAW: type and value."""

    name: str
    value: Any
    kind: str


def string(name: str, value: str) -> Key:
    return Key(name, value, "STRING")


def uint16(name: str, value: int) -> Key:
    return Key(name, value, "UINT16")


def uint32(name: str, value: int) -> Key:
    return Key(name, value, "UINT32")


def int32(name: str, value: float) -> Key:
    return Key(name, int(value), "INT32")


def float32(name: str, value: float) -> Key:
    return Key(name, float(value), "FLOAT32")


def boolean(name: str, value: bool) -> Key:
    return Key(name, value, "BOOL")


def array(name: str, value: Sequence[str] | Sequence[int] | Sequence[float]) -> Key:
    return Key(name, value, "ARRAY")


def raw(name: str, value: bytes) -> Key:
    """A key of another file, byte for byte: the number of its type, then its value."""
    return Key(name, value, "RAW")


class Slot(NamedTuple):
    """A tensor's place in the file: `offset` is absolute."""

    name: str
    shape: tuple[int, ...]
    block_format: BlockFormat
    offset: int
    n_bytes: int


class BuiltHeader(NamedTuple):
    """`data` is magic to the last tensor info, without the padding behind it; its hashes are zeros."""

    data: bytes
    slots: tuple[Slot, ...]
    size_bytes: int  # of the whole file
    alignment: int
    tensor_hashes_at: int  # where the values of the two hash keys stand, 0 for a header without
    header_hash_at: int

    def seal(self, hashes: Sequence[int]) -> bytes:
        """The header with the hashes of its tensors, in the order of the slots, and its own."""
        data = bytearray(self.data)
        struct.pack_into(f"<{len(self.slots)}Q", data, self.tensor_hashes_at, *hashes)
        struct.pack_into("<Q", data, self.header_hash_at, hash_header(data, self.header_hash_at))
        return bytes(data)


def hash_header(data: bytes | bytearray | memoryview, hash_at: int) -> int:
    """xxh64 of a header in which the eight bytes of the hash itself are zeros."""
    digest = xxhash.xxh64(data[:hash_at])
    digest.update(bytes(8))
    digest.update(data[hash_at + 8 :])
    return digest.intdigest()


def choose_alignment(sizes: Sequence[int]) -> int:
    """4096, so that every tensor and every expert of whole pages starts on a page; 32 where that costs over 1 %."""
    padding = sum(-size % PAGE_BYTES for size in sizes)
    return PAGE_BYTES if padding * 100 <= sum(sizes) else DEFAULT_ALIGNMENT


def tensor_bytes(block_format: BlockFormat, shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1]) * block_format.row_bytes(shape[-1])


def build_header(
    architecture: str | None,
    keys: Sequence[Key],
    tensors: Sequence[tuple[str, tuple[int, ...], BlockFormat]],
    alignment: int | None = None,
    *,
    hashed: bool = False,
) -> BuiltHeader:
    """Header bytes and offsets; the same arguments give the same bytes. `hashed` leaves room for the hashes.

    No architecture: a later part of a split, which says nothing of its own.
    """
    sizes = [tensor_bytes(block_format, shape) for _, shape, block_format in tensors]
    alignment = alignment or choose_alignment(sizes)
    own = [] if architecture is None else [string("general.architecture", architecture)]
    own.append(uint32(KEY_ALIGNMENT, alignment))
    if hashed:
        own += [Key(KEY_TENSOR_HASHES, [0] * len(sizes), "UINT64"), Key(KEY_HEADER_HASH, 0, "UINT64")]
    keys = [*own, *keys]
    assert len({key.name for key in keys}) == len(keys), "a key twice"
    data = bytearray(pack_start(len(tensors), len(keys)))
    ends = {}
    for key in keys:
        data += pack_key(key)
        ends[key.name] = len(data)
    relative = 0
    for (name, shape, block_format), size in zip(tensors, sizes, strict=True):
        data += pack_tensor(name, shape, block_format, relative)
        relative += size + -size % alignment
    slots = []
    offset = len(data) + -len(data) % alignment
    for (name, shape, block_format), size in zip(tensors, sizes, strict=True):
        slots.append(Slot(name, shape, block_format, offset, size))
        offset += size + -size % alignment
    hashes_at = ends[KEY_TENSOR_HASHES] - 8 * len(sizes) if hashed else 0
    return BuiltHeader(
        bytes(data), tuple(slots), offset, alignment, hashes_at, ends[KEY_HEADER_HASH] - 8 if hashed else 0
    )


def pack_start(n_tensors: int, n_keys: int) -> bytes:
    return MAGIC + struct.pack("<IQQ", VERSION, n_tensors, n_keys)


def pack_tensor(name: str, shape: tuple[int, ...], block_format: BlockFormat, offset: int) -> bytes:
    """A tensor's row of the header; its offset counts from where the tensors begin."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return _pack_string(name.encode()) + dims + struct.pack("<IQ", block_format.ggml_type, offset)


def pack_key(key: Key) -> bytes:
    name = _pack_string(key.name.encode())
    if key.kind == "RAW":
        return name + bytes(key.value)
    if isinstance(key.value, list | tuple):
        return name + _pack_array(key)
    return name + struct.pack("<I", _NUMBERS[key.kind]) + _pack_value(key.name, key.value, key.kind)


def _pack_array(key: Key) -> bytes:
    """Items of `kind`, or for ARRAY of the kind that their Python type goes by."""
    kinds = {_ITEM_KINDS[type(item)] for item in key.value} if key.kind == "ARRAY" else {key.kind}
    assert len(kinds) == 1, f"{key.name}: an array of nothing or of {kinds}"
    kind = kinds.pop()
    start = struct.pack("<IIQ", _NUMBERS["ARRAY"], _NUMBERS[kind], len(key.value))
    if kind != "STRING":
        return start + struct.pack(f"<{len(key.value)}{_CODES[kind]}", *key.value)
    return start + b"".join(_pack_value(key.name, item, kind) for item in key.value)


def _pack_value(name: str, value: Any, kind: str) -> bytes:
    if kind != "STRING":
        return struct.pack("<" + _CODES[kind], value)
    if isinstance(value, bytes):
        return _pack_string(value)
    try:
        return _pack_string(value.encode())
    except UnicodeEncodeError:  # JSON can spell half a character (a lone surrogate), UTF-8 cannot
        what = f"{name} would hold {value!r}, which is not valid text."
        raise BadModelError(what, "Check the tokenizer files.") from None


def _pack_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text
