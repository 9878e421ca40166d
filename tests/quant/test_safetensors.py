"""The safetensors header, honest and hostile."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from m2lite.errors import BadModelError, M2liteError
from m2lite.quant.safetensors import SafetensorsFile
from tests.golden.models import write_safetensors

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=np.float16)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": ("F32", A), "b": ("F16", B)})
    return path


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The same file with another header."""
    data = path.read_bytes()
    n_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n_bytes])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n_bytes :])


def refusal(path: Path) -> str:
    with pytest.raises(BadModelError) as caught:
        SafetensorsFile(path)
    return str(caught.value)


def test_reads_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": A, "b": B}, path, metadata={"format": "np"})
    shard = SafetensorsFile(path)
    assert {name: (t.dtype, t.shape) for name, t in shard.tensors.items()} == {"a": ("F32", (2, 3)), "b": ("F16", (4,))}
    tensor = shard.tensors["a"]
    assert (shard.read(tensor.offset, tensor.n_bytes).view(np.float32) == A.reshape(-1)).all()
    shard.close()
    shard.close()


def test_the_safetensors_library_reads_what_the_tests_write(good: Path) -> None:
    assert (safetensors.numpy.load_file(good)["a"] == A).all()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "a web page"),
        (b"<html><head></head></html>", "a web page"),
        (b"", "not a safetensors file (0 bytes)"),
        (b"abc", "not a safetensors file (3 bytes)"),
        (struct.pack("<Q", 1 << 60) + b"{}", "not a safetensors file"),
        (struct.pack("<Q", 100_000_001) + b"{" + b" " * 64, "not a safetensors file"),
        (struct.pack("<Q", 80) + b"{" + b" " * 60, "19 bytes short within its header"),
        (struct.pack("<Q", 4) + b"{]}}", "header of model.safetensors is damaged"),
        (struct.pack("<Q", 4) + b'{"\xff}', "header of model.safetensors is damaged"),
        (struct.pack("<Q", 20_002) + b'{"a":' + b"[" * 9_999 + b"]" * 9_997 + b"}", "is damaged"),
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert words in refusal(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h["b"].update(data_offsets=[25, 33]), "leaves a hole"),
        (lambda h: h["b"].update(data_offsets=[20, 28]), "overlaps"),
        (lambda h: h["b"].update(data_offsets=[24, 30]), "6 bytes where F16 [4] takes 8"),
        (lambda h: h["b"].update(data_offsets=[32, 24]), "takes 8"),
        (lambda h: h["b"].update(data_offsets=[-8, 0]), "the data_offsets [-8, 0]"),
        (lambda h: h["b"].update(data_offsets=[24]), "the data_offsets [24]"),
        (lambda h: h["b"].update(shape=[2, -2]), "the shape [2, -2]"),
        (lambda h: h["b"].update(shape=[4.0]), "the shape [4.0]"),
        (lambda h: h["b"].update(shape=[True, 4]), "the shape [True, 4]"),
        (lambda h: h["b"].update(shape=[1 << 62, 1 << 62]), "takes"),
        (lambda h: h["b"].update(dtype="F8_E4M3"), "takes 4"),
        (lambda h: h["b"].update(dtype="Q4"), "the unknown dtype 'Q4'"),
        (lambda h: h["b"].update(dtype=["F16"]), "the unknown dtype"),
        (lambda h: h["b"].update(extra=1), "not exactly the fields"),
        (lambda h: h.update(b=[1, 2]), "not exactly the fields"),
        (lambda h: h.pop("b"), "8 bytes behind its last tensor"),
    ],
)  # fmt: skip
def test_a_lying_header_is_refused(good: Path, change: Callable[[dict[str, Any]], None], words: str) -> None:
    rewrite(good, change)
    assert words in refusal(good)


def test_a_name_that_occurs_twice_is_refused(good: Path) -> None:
    data = good.read_bytes()
    good.write_bytes(data.replace(b'"b":', b'"a":'))
    assert "the key 'a' is given twice" in refusal(good)


def test_every_truncation_is_refused(good: Path) -> None:
    data = good.read_bytes()
    for length in range(len(data)):
        good.write_bytes(data[:length])
        refusal(good)
    good.write_bytes(data[:-3])
    assert "3 bytes short. The download may be incomplete." in refusal(good)


def test_no_flipped_byte_of_the_header_is_a_crash(good: Path) -> None:
    data = good.read_bytes()
    n_header = 8 + int.from_bytes(data[:8], "little")
    for place in range(n_header):
        for bit in (1, 4, 128):
            good.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            try:
                shard = SafetensorsFile(good)
            except M2liteError:
                continue
            for tensor in shard.tensors.values():
                assert len(shard.read(tensor.offset, tensor.n_bytes)) == tensor.n_bytes
            shard.close()


def test_special_files_are_refused_and_never_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    assert "not a regular file" in refusal(tmp_path / "fifo.safetensors")
    assert "not a regular file" in refusal(tmp_path)
    assert "is missing" in refusal(tmp_path / "none.safetensors")


def test_a_file_that_shrinks_or_changes_is_noticed(good: Path) -> None:
    shard = SafetensorsFile(good)
    shard.check_unchanged()
    os.truncate(good, good.stat().st_size - 4)
    with pytest.raises(BadModelError, match="4 bytes early"):
        shard.read(shard.tensors["b"].offset, shard.tensors["b"].n_bytes)
    with pytest.raises(BadModelError, match="changed while it was read"):
        shard.check_unchanged()
    shard.close()


def test_an_error_of_the_disk_names_file_and_byte(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    shard = SafetensorsFile(good)
    offset = shard.tensors["b"].offset
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(BadModelError, match=rf"model\.safetensors cannot be read at byte {offset}: Input/output error"):
        shard.read(offset, 4)
    shard.close()


def test_a_header_length_that_reads_like_another_format(tmp_path: Path) -> None:
    """640 bytes of header begin as a pickle does."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(640)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    shard = SafetensorsFile(path)
    assert path.read_bytes()[:2] == b"\x80\x02" and list(shard.tensors) == ["a"]
    shard.close()
