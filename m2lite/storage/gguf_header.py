"""The header of a GGUF file: bytes to values and a tensor table. Knows types, not what they mean; touches no file.

Nothing in a file is trusted: counts and lengths are exact Python ints and are checked before anything is sliced or
allocated, and whatever does not hold is a BadModelError that names the key or tensor and the byte.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from m2lite.errors import BadModelError
from m2lite.formats.table import BY_TYPE, FORMATS, IK_TYPE_NAMES, TYPE_NAMES, BlockFormat

Scalar = str | int | float | bool
Item = TypeVar("Item", str, bytes, int, float, bool)

_MAX_HEADER_BYTES = 256 << 20  # M2's is about 8 MB
_MAX_KEYS = 65_536
_MAX_TENSORS = 131_072
_MAX_KEY_BYTES = 65_535
_MAX_NAME_BYTES = 63  # what ggml holds
_MAX_STRING_BYTES = 64 << 20
_MAX_TEMPLATE_BYTES = 1 << 20
_MAX_ITEMS = 16 << 20
_MAX_DIMS = 4
_VERSIONS = (2, 3)  # the same bytes; 3 added big-endian files
_DEFAULT_ALIGNMENT = 32
_ALIGNMENTS = tuple(1 << shift for shift in range(3, 17))
KEY_ALIGNMENT = "general.alignment"
KEY_TENSOR_HASHES = "m2lite.tensor_xxh64"  # one xxh64 per tensor, in the order of the table
KEY_HEADER_HASH = "m2lite.header_xxh64"  # of the header with these eight bytes zero
_KEY_TEMPLATE = "tokenizer.chat_template"

_ASK_AGAIN = "Download or convert it again."
_DOWNLOAD = "Download the model again."
_CONVERT = "Convert the model again."
_INCOMPLETE = "Is the download incomplete? Fetch the whole file."


@dataclass(frozen=True)
class ValueType:
    """A metadata type: its name, its struct code ("" where the length varies) and what Python reads it as."""

    name: str
    code: str
    kind: type[Scalar] | None

    @property
    def n_bytes(self) -> int:
        return struct.calcsize("<" + self.code)


_STRING, _ARRAY = ValueType("STRING", "", str), ValueType("ARRAY", "", None)
VALUE_TYPES = (
    ValueType("UINT8", "B", int),
    ValueType("INT8", "b", int),
    ValueType("UINT16", "H", int),
    ValueType("INT16", "h", int),
    ValueType("UINT32", "I", int),
    ValueType("INT32", "i", int),
    ValueType("FLOAT32", "f", float),
    ValueType("BOOL", "B", bool),
    _STRING,
    _ARRAY,
    ValueType("UINT64", "Q", int),
    ValueType("INT64", "q", int),
    ValueType("FLOAT64", "d", float),
)

# (how a file begins, what that means), for files that are not GGUF.
_FOREIGN: tuple[tuple[bytes | tuple[bytes, ...], str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, the model itself was not fetched", "Run `git lfs pull` there."),
    ((b"<!doctype html", b"<html"), "an HTML page, likely an error or login page saved as the model", _DOWNLOAD),
    (b"<?xml", "an XML page, likely an error message saved as the model", _DOWNLOAD),
    (b'{"error', "an error message in JSON saved as the model", _DOWNLOAD),
    ((b"invalid username or password", b"entry not found"), "an error message saved as the model", _DOWNLOAD),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first."),
    (b"pk\x03\x04", "a zip archive or a PyTorch checkpoint", "Convert the checkpoint's safetensors instead."),
    ((b"ggjt", b"tjgg", b"lmgg"), "a GGML file from before GGUF", _CONVERT),
    (b"fuug", "a GGUF file in swapped byte order", "Convert it again on a little-endian machine."),
    (b"\0\0\0\0", "zeros where the format's name belongs, an unfinished download or conversion", _ASK_AGAIN),
)


@dataclass(frozen=True, eq=False)
class GGUFArray:
    """An array in the metadata, decoded when asked for."""

    key: str
    item_type: ValueType
    n_items: int
    offset: int  # of the first item
    n_bytes: int
    _path: str = field(repr=False)
    _data: mmap.mmap | bytes = field(repr=False)

    def __len__(self) -> int:
        return self.n_items

    def items(self, kind: type[Item], type_name: str | None = None) -> list[Item]:
        """All items; `kind` is str, bytes (a string's raw bytes), int (any integer type), float or bool.

        Where the reader of a key must be exact, `type_name` is the one accepted type, such as "INT32".
        """
        wanted = str if kind is bytes else kind
        if self.item_type.kind is not wanted or (type_name or self.item_type.name) != self.item_type.name:
            raise BadModelError(
                f"{self._path}: key '{self.key}' is an array of {self.item_type.name}, expected "
                f"{type_name or kind.__name__}.",
                _CONVERT,
            )
        if self.item_type is not _STRING:
            return cast("list[Item]", self.numpy().tolist())
        strings: list[Any] = self._byte_strings()
        if kind is bytes:
            return strings
        try:
            return [string.decode() for string in strings]
        except UnicodeDecodeError as error:
            raise BadModelError(
                f"{self._path}: key '{self.key}': string {strings.index(error.object)} of {self.n_items} is not UTF-8 "
                f"({error.reason} at its byte {error.start}: {error.object[:32]!r}).",
                _CONVERT,
            ) from None

    def __repr__(self) -> str:
        """For a person who reads an error."""
        if self.item_type is _STRING:
            return f"an array of {self.n_items:,} strings"
        items = np.frombuffer(self._raw()[: 8 * self.item_type.n_bytes], "<" + self.item_type.code).tolist()
        return f"an array of {self.n_items:,} {self.item_type.name} ({', '.join(map(str, items))}" + (
            ", ...)" if self.n_items > 8 else ")"
        )

    def one(self) -> Scalar | None:
        """The one number of an array whose items are all equal, as some write for every layer; else None."""
        if self.item_type is _STRING or not self.n_items:
            return None
        values = self.numpy()
        return cast("Scalar", values[0].item()) if (values == values[0]).all() else None

    def numpy(self) -> NDArray[Any]:
        """The items of an array of numbers, as a copy."""
        if self.item_type is _STRING:
            raise TypeError(f"key '{self.key}' holds strings")
        values = np.frombuffer(self._raw(), "<" + self.item_type.code)
        if self.item_type.kind is not bool:
            return values
        if values.max(initial=0) > 1:
            index = int((values > 1).argmax())
            raise BadModelError(
                f"{self._path}: key '{self.key}': item {index} is a BOOL of {values[index]}, expected 0 or 1 "
                f"(byte {self.offset + index}).",
                _ASK_AGAIN,
            )
        return values.astype(np.bool_)

    def _raw(self) -> bytes:
        return self._data[self.offset : self.offset + self.n_bytes]

    def _byte_strings(self) -> list[bytes]:
        raw, position = self._raw(), 0
        length_at = struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(self.n_items):
            start = position + 8
            position = start + length_at(raw, position)[0]
            strings.append(raw[start:position])
        return strings


Value = Scalar | GGUFArray


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `shape` is row-major: [experts, out, in], [out, in] or [n]."""

    name: str
    format: BlockFormat
    shape: tuple[int, ...]
    offset: int  # in its file
    n_bytes: int
    part: int  # index of its file in a split


@dataclass(frozen=True)
class Header:
    """What one file says of itself. `spans` are the bytes of each key's type and value, `n_bytes` the header's own."""

    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    alignment: int
    spans: dict[str, tuple[int, int]]
    n_bytes: int


class _Cursor:
    """A position in the header that never passes its end."""

    def __init__(self, data: mmap.mmap | bytes, path: str) -> None:
        self.data = data
        self.path = path
        self.position = 0
        self.size = len(data)
        self.end = min(self.size, _MAX_HEADER_BYTES)

    def error(self, what: str, todo: str = _ASK_AGAIN) -> BadModelError:
        return BadModelError(f"{self.path}: {what}.", todo)

    def need(self, n_bytes: int, what: str) -> None:
        if n_bytes <= self.end - self.position:
            return
        if self.position + n_bytes <= self.size:
            raise self.error(
                f"{what} at byte {self.position} lies beyond the limit of {_MAX_HEADER_BYTES} header bytes"
            )
        raise self.error(
            f"{what} at byte {self.position} needs {n_bytes} bytes, but the file ends at byte {self.size}", _INCOMPLETE
        )

    def number(self, value_type: ValueType, what: str) -> int | float:
        self.need(value_type.n_bytes, what)
        (number,) = struct.unpack_from("<" + value_type.code, self.data, self.position)
        self.position += value_type.n_bytes
        return cast("int | float", number)

    def u32(self, what: str) -> int:
        return cast("int", self.number(VALUE_TYPES[4], what))

    def u64(self, what: str) -> int:
        return cast("int", self.number(VALUE_TYPES[10], what))

    def string(self, what: str, limit: int) -> bytes:
        start = self.position
        n_bytes = self.u64(f"length of {what}")
        if n_bytes > limit:
            raise self.error(f"{what} at byte {start} is {n_bytes} bytes long, at most {limit} are allowed")
        self.need(n_bytes, what)
        self.position += n_bytes
        return self.data[self.position - n_bytes : self.position]

    def name(self, what: str, limit: int) -> str:
        start = self.position
        raw = self.string(what, limit)
        if not raw:
            raise self.error(f"{what} at byte {start} is empty")
        if not raw.isascii():
            raise self.error(f"{what} at byte {start} is not ASCII: {raw[:64]!r}")
        return raw.decode("ascii")

    def skip_strings(self, n_items: int, what: str) -> None:
        """Pass `n_items` strings; the one loop here that runs hundreds of thousands of times."""
        data, position, last = self.data, self.position, self.end - 8
        length_at = struct.Struct("<Q").unpack_from
        for index in range(n_items):
            if position > last or (n_bytes := length_at(data, position)[0]) > last - position:
                self.position = position
                self.string(f"string {index} of {n_items} of {what}", _MAX_STRING_BYTES)
                raise AssertionError("a string both fits and does not")
            position += 8 + n_bytes
        self.position = position


def _parse_value(cursor: _Cursor, key: str) -> Value:
    what = f"key '{key}'"
    value_type = _parse_type(cursor, what)
    start = cursor.position
    if value_type is _ARRAY:
        return _parse_array(cursor, key, what)
    if value_type is _STRING:
        limit = _MAX_TEMPLATE_BYTES if key.startswith(_KEY_TEMPLATE) else _MAX_STRING_BYTES
        raw = cursor.string(f"the string of {what}", limit)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise cursor.error(f"{what}: the string at byte {start} is not UTF-8 ({error.reason})") from None
    number = cursor.number(value_type, what)
    if value_type.kind is not bool:
        return number
    if number not in (0, 1):
        raise cursor.error(f"{what} is a BOOL of {number} at byte {start}, expected 0 or 1")
    return bool(number)


def _parse_type(cursor: _Cursor, what: str) -> ValueType:
    start = cursor.position
    number = cursor.u32(f"type of {what}")
    if number >= len(VALUE_TYPES):
        raise cursor.error(f"{what} has value type {number} at byte {start}, known are 0 to {len(VALUE_TYPES) - 1}")
    return VALUE_TYPES[number]


def _parse_array(cursor: _Cursor, key: str, what: str) -> GGUFArray:
    item_type = _parse_type(cursor, f"the items of {what}")
    if item_type is _ARRAY:
        raise cursor.error(f"{what} is an array of arrays (byte {cursor.position - 4}), which GGUF models do not use")
    n_items = cursor.u64(f"length of {what}")
    if n_items > _MAX_ITEMS:
        raise cursor.error(f"{what} has {n_items} items (byte {cursor.position - 8}), at most {_MAX_ITEMS} are allowed")
    start = cursor.position
    if item_type is _STRING:
        cursor.skip_strings(n_items, what)
    else:
        cursor.need(n_items * item_type.n_bytes, f"the data of {what} ({n_items} items)")
        cursor.position += n_items * item_type.n_bytes
    return GGUFArray(key, item_type, n_items, start, cursor.position - start, cursor.path, cursor.data)


def _parse_metadata(cursor: _Cursor, n_keys: int) -> tuple[dict[str, Value], dict[str, tuple[int, int]]]:
    metadata: dict[str, Value] = {}
    spans: dict[str, tuple[int, int]] = {}
    for index in range(n_keys):
        start = cursor.position
        key = cursor.name(f"metadata key {index} of {n_keys}", _MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.error(f"key '{key}' appears a second time at byte {start}")
        start = cursor.position
        metadata[key] = _parse_value(cursor, key)
        spans[key] = start, cursor.position
        if key == KEY_ALIGNMENT and (found := cursor.data[start : start + 4]) != b"\x04\0\0\0":
            name = VALUE_TYPES[int.from_bytes(found, "little")].name
            raise cursor.error(f"key '{key}' is a {name} at byte {start}, expected UINT32")
    alignment = metadata.get(KEY_ALIGNMENT, _DEFAULT_ALIGNMENT)
    if alignment not in _ALIGNMENTS:
        raise cursor.error(
            f"key '{KEY_ALIGNMENT}' is {alignment}, expected a power of two from {_ALIGNMENTS[0]} to {_ALIGNMENTS[-1]}"
        )
    return metadata, spans


def _parse_entry(cursor: _Cursor, index: int, n_tensors: int, part: int) -> TensorInfo:
    """A row of the tensor table as it is in the file: its offset is from where the data begins."""
    name = cursor.name(f"name of tensor {index} of {n_tensors}", _MAX_NAME_BYTES)
    what = f"tensor '{name}'"
    start = cursor.position
    n_dims = cursor.u32(f"number of dimensions of {what}")
    if not 1 <= n_dims <= _MAX_DIMS:
        raise cursor.error(f"{what} has {n_dims} dimensions (byte {start}), expected 1 to {_MAX_DIMS}")
    dims = tuple(cursor.u64(f"dimension {axis} of {what}") for axis in range(n_dims))
    if 0 in dims or math.prod(dims) >= 1 << 63:
        raise cursor.error(
            f"{what} has dimensions {dims} (byte {start + 4}), {math.prod(dims)} weights; expected 1 to 2^63 - 1"
        )
    start = cursor.position
    number = cursor.u32(f"type of {what}")
    fmt = BY_TYPE.get(number)
    if fmt is None:
        supported = ", ".join(FORMATS)
        if number in TYPE_NAMES:
            raise cursor.error(
                f"{what} is stored as {TYPE_NAMES[number]}, which is not supported yet; supported are {supported}",
                "Use a file of these types, or convert the model again.",
            )
        if number in IK_TYPE_NAMES:
            raise cursor.error(
                f"{what} is stored as {IK_TYPE_NAMES[number]} (type {number}), a type that only ik_llama.cpp has; "
                f"supported are {supported}",
                "Use a file of these types, or quantize the F16, BF16 or F32 file anew: m2lite quantize.",
            )
        raise cursor.error(f"{what} has unknown type {number} at byte {start}; supported are {supported}")
    if dims[0] % fmt.n_weights:
        raise cursor.error(
            f"{what} has rows of {dims[0]} weights, which are not whole {fmt.name} blocks of {fmt.n_weights}"
        )
    n_bytes = math.prod(dims) // fmt.n_weights * fmt.n_bytes
    return TensorInfo(name, fmt, dims[::-1], cursor.u64(f"offset of {what}"), n_bytes, part)


def _place(cursor: _Cursor, entries: Sequence[TensorInfo], alignment: int) -> dict[str, TensorInfo]:
    """Absolute offsets, checked to be aligned, ascending, apart and within the file."""
    data_offset = cursor.position + -cursor.position % alignment
    tensors: dict[str, TensorInfo] = {}
    free_from, before = data_offset, ""
    for entry in entries:
        what = f"tensor '{entry.name}'"
        if entry.name in tensors:
            raise cursor.error(f"{what} appears twice")
        if entry.offset % alignment:
            raise cursor.error(f"{what} has offset {entry.offset}, not a multiple of the alignment {alignment}")
        offset = data_offset + entry.offset
        if offset < free_from:
            raise cursor.error(f"{what} begins at byte {offset}, before {before} ends at byte {free_from}")
        tensors[entry.name] = replace(entry, offset=offset)
        free_from, before = offset + entry.n_bytes, what
    if free_from > cursor.size and before:
        raise cursor.error(
            f"the file is {free_from - cursor.size} bytes short: {before} ends at byte {free_from}, the file at byte "
            f"{cursor.size}",
            _INCOMPLETE,
        )
    return tensors


def parse_header(data: mmap.mmap | bytes, path: str = "file", part: int = 0) -> Header:
    check_magic(bytes(data[:64]), len(data), path)
    cursor = _Cursor(data, path)
    cursor.position = 4
    version = cursor.u32("format version")
    if version not in _VERSIONS:
        if version & 0xFFFF == 0 and version:
            raise cursor.error("is a big-endian GGUF file, only little-endian ones are supported", "Convert it again.")
        raise cursor.error(f"is GGUF version {version}, supported are versions 2 and 3", _CONVERT)
    n_tensors = cursor.u64("number of tensors")
    n_keys = cursor.u64("number of metadata keys")
    for found, limit, what in ((n_tensors, _MAX_TENSORS, "tensors"), (n_keys, _MAX_KEYS, "metadata keys")):
        if found > limit:
            raise cursor.error(f"claims {found} {what}, at most {limit} are allowed")
    metadata, spans = _parse_metadata(cursor, n_keys)
    alignment = cast("int", metadata.get(KEY_ALIGNMENT, _DEFAULT_ALIGNMENT))
    entries = [_parse_entry(cursor, index, n_tensors, part) for index in range(n_tensors)]
    n_bytes = cursor.position
    return Header(metadata, _place(cursor, entries, alignment), alignment, spans, n_bytes)


def check_magic(start: bytes, size: int, path: str) -> None:
    if start.startswith(b"GGUF"):
        return
    if not size:
        raise BadModelError(f"{path}: not a GGUF file: it is empty.", _ASK_AGAIN)
    plain = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, meaning, todo in _FOREIGN:
        if plain.startswith(magic):
            raise BadModelError(f"{path}: not a GGUF file but {meaning}.", todo)
    if start[8:9] == b"{":
        todo = "Convert its directory with `m2lite convert` first."
        raise BadModelError(f"{path}: not a GGUF file but, it seems, a safetensors file.", todo)
    raise BadModelError(f"{path}: not a GGUF file: it begins with {start[:4]!r}, expected b'GGUF'.", _ASK_AGAIN)
