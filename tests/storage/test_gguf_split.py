"""Split files: found, checked against each other, and read as one."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest

from m2lite.errors import BadModelError
from m2lite.storage.gguf_reader import open_gguf

if TYPE_CHECKING:
    from tests.storage.conftest import RawGGUF

Lie = Callable[[int, "RawGGUF"], None]


def part_name(number: int, count: int = 3) -> str:
    return f"m-{number:05}-of-{count:05}.gguf"


@pytest.fixture
def split(tmp_path: Path, raw: RawGGUF) -> Callable[..., Path]:
    """Three parts with one tensor each; `lie` may change the keys and the tensor of a part before it is written."""

    def split(lie: Lie = lambda _index, _part: None) -> Path:
        for index in range(3):
            part = type(raw)()
            part.key("split.no", raw.U16, struct.pack("<H", index))
            part.key("split.count", raw.U16, struct.pack("<H", 3))
            part.key("split.tensors.count", raw.I32, struct.pack("<i", 3))
            part.tensor(f"t{index}", (4,))
            part.data = np.full(4, index, np.float32).tobytes()
            if index == 0:
                part.text("general.architecture", "x").number("general.alignment", 64)
                part.alignment = 64
            lie(index, part)
            (tmp_path / part_name(index + 1)).write_bytes(part.build())
        return tmp_path / part_name(1)

    return split


def test_parts_are_read_as_one(split: Callable[..., Path]) -> None:
    path = split()
    with open_gguf(path) as ours:
        assert [part.name for part in ours.parts] == [part_name(i) for i in (1, 2, 3)]
        assert ours.size_bytes == sum(part.stat().st_size for part in ours.parts)
        assert ours.metadata["general.architecture"] == "x"
        for index, (name, tensor) in enumerate(ours.tensors.items()):
            assert (name, tensor.part) == (f"t{index}", index)
            view = ours.view(name)
            assert view.view(np.float32).tolist() == [index] * 4
            assert view.ctypes.data == ours.address(name)
        os.utime(ours.parts[2], ns=(1, 1))
        with pytest.raises(BadModelError, match=r"m-00003-of-00003.gguf: model file changed on disk"):
            ours.check_unchanged()


def test_split_by_the_gguf_package(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "minimax-m2", split_max_tensors=2)
    writer.add_array("tokens", ["a", "b"])
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full((2, 3), i, np.float32))
    writer.write_header_to_file(tmp_path / "big.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "big-00001-of-00003.gguf") as ours:
        assert ours.array("tokens", str) == ["a", "b"]
        assert [(name, tensor.part) for name, tensor in ours.tensors.items()] == [
            ("t0", 0),
            ("t1", 0),
            ("t2", 1),
            ("t3", 1),
            ("t4", 2),
        ]
        for i in range(5):
            assert ours.view(f"t{i}").view(np.float32).tolist() == [i] * 6


def test_parts_may_be_symbolic_links(split: Callable[..., Path], tmp_path: Path) -> None:
    split()
    cache = tmp_path / "snapshot"
    cache.mkdir()
    for number in (1, 2, 3):
        blob = (tmp_path / part_name(number)).rename(tmp_path / f"blob{number}")
        (cache / part_name(number)).symlink_to(blob)
    with open_gguf(cache / part_name(1)) as ours:
        assert len(ours.tensors) == 3
    with pytest.raises(
        BadModelError, match=r"blob1: is part 1 of 3, but its name does not end in -00001-of-00003.gguf"
    ):
        open_gguf(tmp_path / "blob1")


def test_another_part_names_the_first(split: Callable[..., Path], tmp_path: Path) -> None:
    split()
    with pytest.raises(BadModelError, match=r"is part 2 of 3, not the first. Open m-00001-of-00003.gguf."):
        open_gguf(tmp_path / part_name(2))
    (tmp_path / part_name(3)).rename(tmp_path / "x.gguf")
    with pytest.raises(BadModelError, match=r"is part 3 of 3, not the first. Open the first part."):
        open_gguf(tmp_path / "x.gguf")


def test_missing_and_damaged_parts(split: Callable[..., Path], tmp_path: Path) -> None:
    path = split()
    last = tmp_path / part_name(3)
    content = last.read_bytes()
    last.write_bytes(content[:-1])
    with pytest.raises(BadModelError, match=r"m-00003-of-00003.gguf: the file is 1 bytes short: tensor 't2' ends"):
        open_gguf(path)
    last.unlink()
    with pytest.raises(BadModelError, match=r"part 3 of 3 is missing: m-00003-of-00003.gguf\. "):
        open_gguf(path)
    (tmp_path / part_name(2)).unlink()
    with pytest.raises(BadModelError, match=r"part 2 of 3 is missing: m-00002-of-00003.gguf \(and 1 more\)"):
        open_gguf(path)
    path.rename(tmp_path / part_name(1, 4))
    with pytest.raises(BadModelError, match="is part 1 of 3, but its name does not end in"):
        open_gguf(tmp_path / part_name(1, 4))


def set_key(key: str, value_type: int, value: bytes) -> Callable[[RawGGUF], None]:
    def change(part: RawGGUF) -> None:
        part.keys = [old for old in part.keys if old[8 : 8 + len(key)] != key.encode()]
        part.key(key, value_type, value)

    return change


U16, I32, F32, STRING = 2, 5, 6, 8


@pytest.mark.parametrize(
    ("index", "key", "value_type", "value", "message"),
    [
        (1, "split.no", U16, b"\2\0", "m-00002-of-00003.gguf: claims to be part 3, expected part 2"),
        (1, "split.no", STRING, bytes(8), "key 'split.no' is '', expected a whole number"),
        (0, "split.count", F32, bytes(4), "key 'split.count' is 0.0, expected a whole number"),
        (0, "split.count", U16, b"\0\0", "claims to be part 1 of 0"),
        (0, "split.no", U16, b"\7\0", "claims to be part 8 of 3"),
        (0, "split.no", I32, b"\xff\xff\xff\xff", "claims to be part 0 of 3"),
        (0, "split.count", I32, b"\0\0\0\x7f", "claims to be part 1 of 2130706432"),
        (2, "split.count", U16, b"\4\0", "the parts do not agree: key 'split.count' is 4 here and 3 in the first"),
        (2, "general.architecture", STRING, b"\1" + bytes(7) + b"y", "key 'general.architecture' is 'y' here and 'x'"),
    ],
)
def test_lying_keys(
    split: Callable[..., Path], index: int, key: str, value_type: int, value: bytes, message: str
) -> None:
    change = set_key(key, value_type, value)
    path = split(lambda i, part: change(part) if i == index else None)
    with pytest.raises(BadModelError, match=message):
        open_gguf(path)


def test_missing_keys_and_wrong_totals(split: Callable[..., Path]) -> None:
    def without_number(index: int, part: RawGGUF) -> None:
        if index == 2:
            del part.keys[0]

    def wrong_total(_: int, part: RawGGUF) -> None:
        part.keys[2] = part.keys[2][:-4] + struct.pack("<i", 4)

    def same_tensor(index: int, part: RawGGUF) -> None:
        if index == 2:
            part.tensors = []
            part.tensor("t0", (4,))

    for lie, message in [
        (without_number, "m-00003-of-00003.gguf: key 'split.no' is missing"),
        (wrong_total, "key 'split.tensors.count' promises 4 tensors, the 3 parts hold 3"),
        (same_tensor, "m-00003-of-00003.gguf: tensor 't0' is also in m-00001-of-00003.gguf"),
    ]:
        with pytest.raises(BadModelError, match=message):
            open_gguf(split(lie))


def test_split_of_one(raw: RawGGUF, tmp_path: Path) -> None:
    raw.key("split.count", raw.U16, b"\1\0").key("split.tensors.count", raw.I32, struct.pack("<i", 0))
    (tmp_path / "one.gguf").write_bytes(raw.header())
    open_gguf(tmp_path / "one.gguf").close()
