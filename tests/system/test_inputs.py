"""Text inputs: pipes, packed files, devices, and files that change between two readings."""

from __future__ import annotations

import gzip
import io
import os
import sys
import threading
from pathlib import Path

import pytest

from m2lite.errors import M2liteError, ResourceError, UsageError
from m2lite.system import inputs
from m2lite.system.inputs import TextInput, check_regular, read_input

TEXT = b"".join(b"line %d\n" % n for n in range(500_000))  # several blocks
MOST = 1 << 20


def lines_of(text: TextInput) -> list[bytes]:
    return list(text.lines(MOST))


def fed(path: Path, data: bytes) -> threading.Thread:
    """A FIFO at `path` into which somebody writes."""
    os.mkfifo(path)
    thread = threading.Thread(target=path.write_bytes, args=(data,))
    thread.start()
    return thread


def test_a_file_is_the_same_each_time(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"BZh is text\n" + TEXT + b"no newline")
    text = TextInput(str(path))
    expected = [b"BZh is text\n", *TEXT.splitlines(keepends=True), b"no newline"]
    assert lines_of(text) == lines_of(text) == expected
    assert text.n_bytes == len(TEXT) + 22 and text.n_grown == 0


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_fifo_is_taken_once_and_read_again(tmp_path: Path, pack: type[bytes]) -> None:
    thread = fed(tmp_path / "fifo", pack(TEXT))
    text = TextInput(str(tmp_path / "fifo"))
    thread.join()
    assert lines_of(text) == lines_of(text) == TEXT.splitlines(keepends=True)


def test_stdin_may_be_packed_and_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(gzip.compress(b"a\nb\n"))

    monkeypatch.setattr(sys, "stdin", Stdin)
    assert lines_of(TextInput("-")) == [b"a\n", b"b\n"]
    assert not Stdin.buffer.closed
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="- cannot be read: stdin is closed"):
        TextInput("-")


def test_what_is_appended_is_told_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(TEXT)
    text = TextInput(str(path))
    first = lines_of(text)
    with path.open("ab") as file:
        file.write(b"more\n")
    assert lines_of(text) == first and text.n_grown == 5


@pytest.mark.parametrize("at", [0, len(TEXT) - 2])
def test_nothing_of_a_block_that_changed_is_given(tmp_path: Path, at: int) -> None:
    path = tmp_path / "in"
    path.write_bytes(TEXT)
    text = TextInput(str(path))
    first = lines_of(text)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"X")
    found = []
    with pytest.raises(M2liteError, match=r"has changed since it was checked: what stands from byte [\d,]+ on"):
        for line in text.lines(MOST):
            found.append(line)
    assert found == first[: len(found)] and (len(found) > 0) == (at > 0)
    os.truncate(path, 100)
    with pytest.raises(M2liteError, match="has changed since"):
        lines_of(text)


def test_a_file_renamed_into_its_place_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"old\n")
    text = TextInput(str(path))
    (tmp_path / "new").write_bytes(b"new\n")
    (tmp_path / "new").rename(path)
    assert lines_of(text) == [b"old\n"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (gzip.compress(TEXT)[:-9], "packed with gzip and damaged"),
        (b"\x1f\x8bgarbage of all kinds", "packed with gzip and damaged"),
        (b"\xfd7zXZ\0 something", "packed with xz, which is not read here"),
        (b"BZh91AY&SY something", "packed with bzip2, which"),
        (b"PK\x03\x04 something", "packed with zip, which"),
    ],
)
def test_what_cannot_be_unpacked(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=words):
        TextInput(str(path))
    with pytest.raises(UsageError, match=words):
        read_input(path, 1 << 30)


def test_zstd(tmp_path: Path) -> None:
    path = tmp_path / "in.zst"
    if sys.version_info < (3, 14):
        path.write_bytes(b"\x28\xb5\x2f\xfd something")
        with pytest.raises(UsageError, match="packed with zstd, which is not read here"):
            TextInput(str(path))
        return
    from compression import zstd

    path.write_bytes(zstd.compress(TEXT))
    assert read_input(path, 1 << 30) == TEXT
    path.write_bytes(zstd.compress(TEXT)[:-9])
    with pytest.raises(UsageError, match="packed with zstd and damaged"):
        TextInput(str(path))


def test_unpacking_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes(64 << 20)))
    with pytest.raises(UsageError, match="more than 1,000 bytes"):
        read_input(path, 1000)
    monkeypatch.setattr(inputs, "_FREE_BYTES", 1000)
    with pytest.raises(UsageError, match=r"unpacks to more than [\d,]+ bytes, from [\d,]+\."):
        TextInput(str(path))


def test_what_cannot_be_kept_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.gz"
    path.write_bytes(gzip.compress(TEXT))
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(inputs.tempfile, "TemporaryFile", lambda **_: full)
        with pytest.raises(ResourceError, match=r"does not fit into .*, where it is kept: No space left"):
            TextInput(str(path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "No such file"),
        ("", "Is a directory"),
        ("a\0b", "null byte"),
        ("~nosuchuser/x", "home directory"),
        ("/dev/zero", "a device, which never ends"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        TextInput(name or str(tmp_path))


def test_an_empty_device_is_an_empty_text() -> None:
    assert lines_of(TextInput(os.devnull)) == []


def test_models_are_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    check_regular(tmp_path / "nowhere")
    for path, words in ((tmp_path / "fifo", "a FIFO"), (tmp_path, "a directory"), (Path(os.devnull), "a device")):
        with pytest.raises(UsageError, match=f"is {words}, not a file"):
            check_regular(path)
