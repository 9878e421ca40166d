"""The header of a GGUF file as bytes, by the gguf package, and where each tensor's bytes go. Writes no file."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from m2lite.errors import BadModelError
from m2lite.storage.blocks import BlockFormat

PAGE_BYTES = 4096
DEFAULT_ALIGNMENT = 32


class Key(NamedTuple):
    """One metadata key; `kind` names a GGUFValueType."""

    name: str
    value: Any
    kind: str


def string(name: str, value: str) -> Key:
    return Key(name, value, "STRING")


def uint32(name: str, value: int) -> Key:
    return Key(name, value, "UINT32")


def int32(name: str, value: float) -> Key:
    return Key(name, int(value), "INT32")


def float32(name: str, value: float) -> Key:
    return Key(name, float(value), "FLOAT32")


def boolean(name: str, value: bool) -> Key:
    return Key(name, value, "BOOL")


def array(name: str, value: Sequence[str] | Sequence[int]) -> Key:
    return Key(name, value, "ARRAY")


class Slot(NamedTuple):
    """A tensor's place in the file: `offset` is absolute."""

    name: str
    shape: tuple[int, ...]
    block_format: BlockFormat
    offset: int
    n_bytes: int


class Header(NamedTuple):
    data: bytes  # magic to the last tensor info, without the padding behind it
    slots: tuple[Slot, ...]
    size_bytes: int  # of the whole file
    alignment: int


def choose_alignment(sizes: Sequence[int]) -> int:
    """4096, so that every tensor and every expert of whole pages starts on a page; 32 where that costs over 1 %."""
    padding = sum(-size % PAGE_BYTES for size in sizes)
    return PAGE_BYTES if padding * 100 <= sum(sizes) else DEFAULT_ALIGNMENT


def tensor_bytes(block_format: BlockFormat, shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1]) * block_format.row_bytes(shape[-1])


def _check_text(key: Key) -> None:
    """JSON can spell half a character (a lone surrogate), UTF-8 cannot."""
    for item in key.value if key.kind == "ARRAY" else (key.value,):
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                what = f"{key.name} would hold {item!r}, which is not valid text."
                raise BadModelError(what, "Check the tokenizer files.") from None


def build_header(
    architecture: str,
    keys: Sequence[Key],
    tensors: Sequence[tuple[str, tuple[int, ...], BlockFormat]],
    alignment: int | None = None,
) -> Header:
    """Header bytes and offsets; the same arguments give the same bytes."""
    import gguf
    import numpy as np
    from gguf.gguf_writer import WriterState

    sizes = [tensor_bytes(block_format, shape) for _, shape, block_format in tensors]
    alignment = alignment or choose_alignment(sizes)
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_custom_alignment(alignment)
    for key in keys:
        _check_text(key)
        writer.add_key_value(key.name, key.value, gguf.GGUFValueType[key.kind])
    for (name, shape, block_format), size in zip(tensors, sizes, strict=True):
        kind = gguf.GGMLQuantizationType(block_format.ggml_type)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    # The writer would open, and so empty, a named file at once: give it memory instead.
    buffer = io.BytesIO()
    writer.fout = [buffer]  # type: ignore[list-item]
    writer.state = WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    data = buffer.getvalue()
    slots = []
    offset = len(data) + -len(data) % alignment
    for (name, shape, block_format), size in zip(tensors, sizes, strict=True):
        slots.append(Slot(name, shape, block_format, offset, size))
        offset += size + -size % alignment
    return Header(data, tuple(slots), offset, alignment)
