"""Bad files: a BadModelError that says what is wrong, at once, whatever the file claims."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from m2lite.errors import BadModelError
from m2lite.formats.table import FORMATS, TYPE_NAMES
from m2lite.storage.gguf_header import GGUFArray, parse_header
from m2lite.storage.gguf_reader import open_gguf
from tests.bounded import bounded_work

if TYPE_CHECKING:
    from tests.storage.conftest import RawGGUF

Save = Callable[..., Path]
N_CALLS = 20_000  # what a refusal may make, whatever the file claims
HUGE = [2**64 - 1, 2**63, 2**62, 2**40]


@contextmanager
def refused(message: str) -> Iterator[None]:
    """BadModelError with this text, in few calls and under 10 MB."""
    with bounded_work(N_CALLS, 10e6), pytest.raises(BadModelError, match=message) as caught:
        yield
    assert caught.value.exit_code == 4
    assert caught.value.what.endswith(".") and caught.value.todo.endswith(".")


# Row 1: what is not a GGUF file at all.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file: it is empty"),
        (b"GGU", "not a GGUF file: it begins with b'GGU', expected b'GGUF'"),
        (b"GGUF", r"format version at byte 4 needs 4 bytes, but the file ends at byte 4. Is the download incomplete"),
        (b"hello, world", "not a GGUF file: it begins with b'hell'"),
        (b"\xff" * 100, "not a GGUF file: it begins with"),
        (bytes(100), "zeros where the format's name belongs"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", "an HTML page"),
        (b"\xef\xbb\xbf\n  <HTML>", "an HTML page"),
        (b"<?xml version='1.0'?><Error>", "an XML page"),
        (b'{"error":"Repository not found"}', "an error message in JSON"),
        (b"Entry not found", "an error message"),
        (b"\x1f\x8b\x08", "a gzip archive"),
        (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint"),
        (b"tjgg\1\0\0\0", "a GGML file from before GGUF"),
        (b"FUUG\0\0\0\3", "swapped byte order"),
        (struct.pack("<Q", 50) + b'{"a": {"dtype"', "a safetensors file.*m2lite convert"),
    ],
)
def test_foreign_files(save: Save, content: bytes, message: str) -> None:
    with refused(message):
        open_gguf(save(content))


def test_things_that_are_no_files(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "loop").symlink_to("loop")
    for path, message in [
        (fifo, "not a GGUF file but a FIFO"),
        (tmp_path, "not a GGUF file but a directory"),
        (Path("/dev/zero"), "not a GGUF file but no regular file"),
        (tmp_path / "none.gguf", "cannot be opened: No such file or directory"),
        (tmp_path / "loop", "cannot be opened: Too many levels of symbolic links"),
        (tmp_path / "a\0b", "cannot be opened: .*embedded null"),
    ]:
        with refused(message):
            open_gguf(path)


# Rows 2 to 4: version, counts, lengths.


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (0, "is GGUF version 0, supported are versions 2 and 3"),
        (1, "is GGUF version 1, supported"),
        (4, "is GGUF version 4, supported"),
        (0x03000000, "big-endian"),
        (2**32 - 1, "is GGUF version 4294967295, supported"),
    ],
)
def test_versions(small: RawGGUF, version: int, message: str) -> None:
    small.version = version
    with refused(message):
        parse_header(small.build())


@pytest.mark.parametrize("count", [*HUGE, 131_073])
def test_counts_beyond_reason(small: RawGGUF, count: int) -> None:
    small.n_tensors = count
    with refused(f"claims {count} tensors, at most 131072 are allowed"):
        parse_header(small.build())
    small.n_tensors, small.n_keys = 2, count
    with refused(f"claims {count} metadata keys, at most 65536 are allowed"):
        parse_header(small.build())


def test_counts_that_are_off_by_one(small: RawGGUF) -> None:
    for n_tensors, n_keys in [(3, 5), (2, 6), (2, 4), (131_072, 5), (2, 65_536)]:
        small.n_tensors, small.n_keys = n_tensors, n_keys
        with refused("file: "):
            parse_header(small.build())
    small.n_keys, small.n_tensors = 5, 1  # the second tensor is taken for data: valid, and in range
    assert list(parse_header(small.build()).tensors) == ["w"]


@pytest.mark.parametrize("n_bytes", [*HUGE, 65_536, 1000])
def test_lengths_past_the_end(n_bytes: int, raw: RawGGUF, small: RawGGUF) -> None:
    limit_or_end = f"{n_bytes} bytes long, at most|needs {n_bytes} bytes, but the file ends at byte"
    string = raw.string(b"abc", n_bytes)
    small.keys.append(string)
    with refused(rf"metadata key 5 of 6 at byte \d+ ({limit_or_end}|is {limit_or_end})"):
        parse_header(small.build())
    small.keys[-1] = raw.string("k") + struct.pack("<I", raw.STRING) + string
    with refused(rf"the string of key 'k' at byte \d+ (is )?({limit_or_end})"):
        parse_header(small.build())
    small.keys[-1] = raw.string("k") + struct.pack("<I", raw.ARRAY) + raw.array(raw.STRING, raw.string("a") + string, 2)
    with refused(rf"string 1 of 2 of key 'k' at byte \d+ (is )?({limit_or_end})"):
        parse_header(small.build())
    for item_type, item_bytes in [(raw.U8, 1), (raw.F64, 8)]:
        small.keys[-1] = raw.string("k") + struct.pack("<I", raw.ARRAY) + raw.array(item_type, b"", n_bytes)
        with refused(
            rf"key 'k' has {n_bytes} items .byte \d+|the data of key 'k' .* at byte \d+ needs {n_bytes * item_bytes}"
        ):
            parse_header(small.build())
    small.keys.pop()
    small.tensors[0] = raw.string(b"w", n_bytes)
    with refused(rf"name of tensor 0 of 2 at byte \d+ is {n_bytes} bytes long, at most 63"):
        parse_header(small.build())


def test_many_strings_that_are_not_there(raw: RawGGUF) -> None:
    raw.key("k", raw.ARRAY, raw.array(raw.STRING, raw.string("a"), 16 << 20))
    with refused("string 1 of 16777216 of key 'k' at byte"):
        parse_header(raw.build())


def test_template_is_limited(raw: RawGGUF) -> None:
    with refused("the string of key 'tokenizer.chat_template' at byte .* 1048577 bytes long, at most 1048576"):
        parse_header(raw.text("tokenizer.chat_template", b"x" * (1048576 + 1)).build())


def test_header_is_limited(raw: RawGGUF, tmp_path: Path) -> None:
    """Three sparse arrays of 128 MiB: only the keys are on disk, but walking such a header must end."""
    path = tmp_path / "sparse.gguf"
    raw.n_keys = 3
    with path.open("wb") as file:
        file.write(raw.header())
        for i in range(3):
            file.write(raw.string(str(i)) + struct.pack("<I", raw.ARRAY) + raw.array(raw.U64, b"", 16 << 20))
            file.seek(128 << 20, os.SEEK_CUR)
        file.truncate()
    with refused("the data of key '1' .16777216 items. at byte .* lies beyond the limit of 268435456 header bytes"):
        open_gguf(path)


# Row 5: types.


def test_value_types(small: RawGGUF, raw: RawGGUF) -> None:
    nested = b"".join(struct.pack("<IQ", raw.ARRAY, 1) for _ in range(2000))
    for value_type, value, message in [
        (raw.ARRAY, nested, "key 'k' is an array of arrays"),
        (13, b"", "key 'k' has value type 13 at byte .*, known are 0 to 12"),
        (2**32 - 1, b"", "key 'k' has value type 4294967295"),
        (raw.ARRAY, raw.array(77, b"", 0), "the items of key 'k' has value type 77"),
        (raw.BOOL, b"\x07", "key 'k' is a BOOL of 7 at byte .*, expected 0 or 1"),
        (raw.STRING, raw.string(b"\xff"), "key 'k': the string at byte .* is not UTF-8"),
    ]:
        small.keys = [raw.string("k") + struct.pack("<I", value_type) + value]
        with refused(message):
            parse_header(small.build())


# Rows 6 and 7: names.


def test_names(small: RawGGUF, raw: RawGGUF) -> None:
    good = small.keys[:]
    for key, message in [
        (b"\xff\xfe", r"metadata key 5 of 6 at byte \d+ is not ASCII: b'\\xff\\xfe'"),
        ("schlüssel".encode(), "is not ASCII"),
        (b"", r"metadata key 5 of 6 at byte \d+ is empty"),
        (b"b", r"key 'b' appears a second time at byte \d+"),
        (b"general.architecture", "key 'general.architecture' appears a second time"),
    ]:
        small.keys = good[:]
        small.key(key, raw.BOOL, b"\0")
        with refused(message):
            parse_header(small.build())
    small.keys = good
    for name, message in [
        (b"w", "tensor 'w' appears twice"),
        (b"", r"name of tensor 2 of 3 at byte \d+ is empty"),
        (b"\xc3\xa9", "name of tensor 2 of 3 .* is not ASCII"),
        (b"x" * 64, "is 64 bytes long, at most 63"),
    ]:
        del small.tensors[2:]
        small.tensor(name, (1,), offset=96)
        small.data = bytes(200)
        with refused(message):
            parse_header(small.build())


def test_names_are_made_printable(small: RawGGUF, raw: RawGGUF) -> None:
    small.key("a\x1b[31m\nb", 99, b"")
    with refused(r"key 'a\\x1b\[31m\\nb' has value type 99"):
        parse_header(small.build())


# Row 8: alignment.


@pytest.mark.parametrize("alignment", [0, 1, 3, 4, 33, 131_072, 2**31, 2**32 - 1])
def test_alignment_values(raw: RawGGUF, alignment: int) -> None:
    with refused(f"key 'general.alignment' is {alignment}, expected a power of two from 8 to 65536"):
        parse_header(raw.number("general.alignment", alignment).build())


def test_alignment_types(raw: RawGGUF) -> None:
    for value_type, value, name in [
        (raw.I32, struct.pack("<i", 32), "INT32"),
        (raw.U64, struct.pack("<Q", 32), "UINT64"),
        (raw.F32, struct.pack("<f", 32), "FLOAT32"),
        (raw.STRING, raw.string("32"), "STRING"),
        (raw.ARRAY, raw.array(raw.U32, struct.pack("<I", 32), 1), "ARRAY"),
    ]:
        raw.keys = []
        with refused(rf"key 'general.alignment' is a {name} at byte \d+, expected UINT32"):
            parse_header(raw.key("general.alignment", value_type, value).build())


# Rows 9 and 10: shapes and types of tensors.


@pytest.mark.parametrize(
    ("dims", "ggml_type", "n_dims", "message"),
    [
        (
            (2**32, 2**32, 4),
            0,
            None,
            r"dimensions \(4294967296, 4294967296, 4\).*73786976294838206464 weights; expected",
        ),
        ((2**63,), 0, None, "9223372036854775808 weights; expected 1 to"),
        ((2**62, 1), 0, None, rf"the file is \d+ bytes short: tensor 't' ends at byte {2**64 + 96}"),
        ((0,), 0, None, "0 weights; expected 1 to"),
        ((32, 0, 5), 2, None, "0 weights; expected 1 to"),
        ((), 0, None, r"tensor 't' has 0 dimensions \(byte 33\), expected 1 to 4"),
        ((1, 1, 1, 1, 1), 0, None, "tensor 't' has 5 dimensions"),
        ((1,), 0, 2**31, "tensor 't' has 2147483648 dimensions"),
        ((1,), 0, 2**32 - 1, "tensor 't' has 4294967295 dimensions"),
        ((33,), 2, None, "tensor 't' has rows of 33 weights, which are not whole Q4_0 blocks of 32"),
        ((16, 2), 8, None, "tensor 't' has rows of 16 weights, which are not whole Q8_0 blocks of 32"),
        ((256,), 9, None, "tensor 't' is stored as Q8_1, which is not supported yet; supported are F32, F16, BF16"),
        (
            (256,),
            139,
            None,
            r"tensor 't' is stored as IQ4_K \(type 139\), a type that only ik_llama.cpp has; supp",
        ),
        ((256,), 212, None, r"tensor 't' is stored as Q4_K_R4 \(type 212\), a type that only ik_llama.cpp has"),
        ((256,), 43, None, r"tensor 't' has unknown type 43 at byte \d+"),
        ((256,), 2**32 - 1, None, "tensor 't' has unknown type 4294967295"),
    ],
)
def test_shapes(raw: RawGGUF, dims: tuple[int, ...], ggml_type: int, n_dims: int | None, message: str) -> None:
    raw.tensor("t", dims, ggml_type, n_dims=n_dims)
    raw.data = bytes(1000)
    with refused(message):
        parse_header(raw.build())


def test_every_unsupported_type_is_named(raw: RawGGUF) -> None:
    for ggml_type, name in TYPE_NAMES.items():
        raw.tensors, raw.data = [], bytes(2000)
        raw.tensor("t", (256,), ggml_type)
        if name in FORMATS:
            assert parse_header(raw.build()).tensors["t"].format.name == name
        else:
            with refused(f"stored as {name}, which is not supported yet"):
                parse_header(raw.build())


# Row 11: offsets.


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (65, "tensor 'n' has offset 65, not a multiple of the alignment 32"),
        (0, r"tensor 'n' begins at byte \d+, before tensor 'w' ends at byte \d+"),
        (32, r"tensor 'n' begins at byte \d+, before tensor 'w' ends"),
        (
            96,
            r"the file is 32 bytes short: tensor 'n' ends at byte \d+, the file at .* Is the download incomplete\?",
        ),
        (2**63, rf"the file is {2**63 - 64} bytes short"),
        (2**64 - 32, rf"the file is {2**64 - 96} bytes short"),
    ],
)
def test_offsets(small: RawGGUF, offset: int, message: str) -> None:
    small.tensors.pop()
    small.tensor("n", (3,), offset=offset)
    with refused(message):
        parse_header(small.build())


def test_tensors_must_ascend(raw: RawGGUF) -> None:
    raw.tensor("a", (1,), offset=32).tensor("b", (1,), offset=0)
    raw.data = bytes(64)
    with refused("tensor 'b' begins at byte .*, before tensor 'a' ends"):
        parse_header(raw.build())


# Rows 12 to 14: truncations, flips, mutations.


def test_every_truncation_is_refused(small: RawGGUF, save: Save) -> None:
    whole = small.build()
    parse_header(whole)
    for size in range(len(whole)):
        with pytest.raises(BadModelError):
            parse_header(whole[:size])
        if size % 50 == 0 or size > len(whole) - 3:
            with pytest.raises(BadModelError):
                open_gguf(save(whole[:size]))


def survives(content: bytes) -> bool:
    """Whether it loads. If so, every tensor lies in the file and every array decodes or is refused."""
    try:
        header = parse_header(content)
    except BadModelError:
        return False
    end = 0
    for tensor in header.tensors.values():
        assert end <= tensor.offset and tensor.offset % header.alignment == 0
        end = tensor.offset + tensor.n_bytes
        rows = 1
        for dim in tensor.shape[:-1]:
            rows *= dim
        assert tensor.n_bytes == rows * tensor.format.row_bytes(tensor.shape[-1]) > 0
    assert end <= len(content)
    for value in header.metadata.values():
        if isinstance(value, GGUFArray):
            try:
                assert len(value.items(value.item_type.kind)) == len(value)  # type: ignore[type-var]
            except BadModelError:
                pass
    return True


def test_every_flip_of_a_header_byte(small: RawGGUF) -> None:
    """Every byte, every value: most are refused, the rest is valid. None crashes, hangs or leaves the file."""
    content = bytearray(small.build())
    n_loaded = 0
    for position in range(len(small.header())):
        whole = content[position]
        for value in range(256):
            content[position] = value
            n_loaded += survives(bytes(content))
        content[position] = whole
    assert n_loaded > 0


FIELDS = [struct.pack("<Q", n) for n in [*HUGE, 0, 1, 31, 32, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**24]]


def mutated(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(changed) + 1)
        other = rng.randrange(len(changed) + 1)
        n_bytes = rng.choice((1, 4, 8, 16, 50))
        match rng.randrange(6):
            case 0:
                changed[at : at + 8] = rng.choice(FIELDS)
            case 1:
                changed[at : at + 4] = rng.choice(FIELDS)[:4]
            case 2:
                del changed[at : at + n_bytes]
            case 3:
                changed[at:at] = changed[other : other + n_bytes]
            case 4:
                changed[at : at + n_bytes] = changed[other : other + n_bytes]
            case 5:
                changed[at : at + 1] = rng.randbytes(1)
    if rng.random() < 0.9:
        changed[:8] = content[:8]
    return bytes(changed)


def test_mutations(small: RawGGUF) -> None:
    """A seeded fuzzer: always the same files."""
    content, rng = small.build(), random.Random(20_240_607)
    for _ in range(20_000):
        survives(mutated(content, rng))
