"""Header bytes against the gguf package's writer and reader, and the hashes in them."""

from __future__ import annotations

import io
from typing import Any

import gguf
import numpy as np
import pytest
import xxhash
from gguf.gguf_writer import WriterState

from m2lite.errors import BadModelError
from m2lite.formats.table import FORMATS
from m2lite.quant.header import (
    Key,
    array,
    boolean,
    build_header,
    choose_alignment,
    float32,
    hash_header,
    int32,
    raw,
    string,
    uint16,
    uint32,
)
from m2lite.storage.gguf_header import parse_header

KEYS = [
    string("a.text", "größe ]~b["),
    string("a.bytes", b"\xff\xfe"),  # type: ignore[arg-type]
    uint16("a.u16", 65535),
    uint32("a.u32", 2**32 - 1),
    int32("a.i32", -5),
    float32("a.f32", 1e-6),
    boolean("a.yes", True),
    array("a.texts", ["x", "", "ŝ"]),
    array("a.ints", [1, -2, 3]),
    array("a.floats", [0.5, -1.25]),
    array("a.raws", [b"\xe2\x96", b"\x81"]),  # type: ignore[arg-type]
]
TENSORS = [
    ("one.weight", (3, 64), FORMATS["Q4_0"]),
    ("two.weight", (2, 5, 32), FORMATS["F32"]),
    ("three.bias", (7,), FORMATS["F16"]),
]


def by_the_package(alignment: int) -> bytes:
    writer = gguf.GGUFWriter(None, "minimax-m2")
    writer.add_custom_alignment(alignment)
    for key in KEYS:
        writer.add_key_value(key.name, key.value, gguf.GGUFValueType[key.kind])
    for name, shape, kind in TENSORS:
        n_bytes = int(np.prod(shape[:-1])) * kind.row_bytes(shape[-1])
        number = gguf.GGMLQuantizationType(kind.ggml_type)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, raw_dtype=number)
    buffer = io.BytesIO()
    writer.fout = [buffer]  # type: ignore[list-item]
    writer.state = WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return buffer.getvalue()


@pytest.mark.parametrize("alignment", [32, 4096])
def test_the_bytes_are_those_of_the_gguf_package(alignment: int) -> None:
    header = build_header("minimax-m2", KEYS, TENSORS, alignment)
    assert header.data == by_the_package(alignment)
    assert all(slot.offset % alignment == 0 for slot in header.slots) and header.size_bytes % alignment == 0


def test_our_reader_finds_what_was_put_in() -> None:
    header = build_header("minimax-m2", KEYS[:1] + KEYS[2:], TENSORS, 64, hashed=True)
    parsed = parse_header(header.data + bytes(header.size_bytes - len(header.data)))
    assert parsed.n_bytes == len(header.data) and parsed.alignment == 64
    assert [(i.name, i.offset, i.n_bytes) for i in parsed.tensors.values()] == [
        (slot.name, slot.offset, slot.n_bytes) for slot in header.slots
    ]
    again = [raw(key, header.data[slice(*parsed.spans[key])]) for key in list(parsed.metadata)[4:]]
    assert build_header("minimax-m2", again, TENSORS, 64, hashed=True).data == header.data


def test_hashes_are_patched_in_place() -> None:
    header = build_header("minimax-m2", [], TENSORS, hashed=True)
    sealed = header.seal([11, 2**64 - 1, 33])
    changed = [i for i, (a, b) in enumerate(zip(header.data, sealed, strict=True)) if a != b]
    assert set(changed) <= {*range(header.tensor_hashes_at, header.tensor_hashes_at + 24),
                            *range(header.header_hash_at, header.header_hash_at + 8)}  # fmt: skip
    parsed = parse_header(sealed + bytes(header.size_bytes - len(sealed)))
    hashes: Any = parsed.metadata["m2lite.tensor_xxh64"]
    assert hashes.items(int, "UINT64") == [11, 2**64 - 1, 33]
    zeroed = bytearray(sealed)
    zeroed[header.header_hash_at : header.header_hash_at + 8] = bytes(8)
    assert parsed.metadata["m2lite.header_xxh64"] == xxhash.xxh64_intdigest(bytes(zeroed))
    assert parsed.metadata["m2lite.header_xxh64"] == hash_header(sealed, header.header_hash_at)


def test_text_that_is_none_is_refused() -> None:
    for key in (string("a", "\ud800"), array("a", ["x", "\ud800"])):
        with pytest.raises(BadModelError, match=r"a would hold '\\ud800', which is not valid text"):
            build_header("minimax-m2", [key], [])
    with pytest.raises(AssertionError, match="a key twice"):
        build_header("minimax-m2", [Key("a", 1, "UINT32"), Key("a", 2, "UINT32")], [])


def test_pages_where_they_cost_less_than_one_percent() -> None:
    assert choose_alignment([4096 * 100, 100 * 4096 + 1]) == 4096
    assert choose_alignment([4096, 5000]) == 32
