"""What is on record of the experts' use: read back as it was, ignored when damaged, drawn."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from m2lite.storage.heat import draw_png, draw_text, load_heat, save_heat

HEAT = np.random.default_rng(0).gamma(0.5, 3, (3, 10))


def test_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "heat.npy"
    assert load_heat(path, 3, 10) is None
    save_heat(path, HEAT)
    found = load_heat(path, 3, 10)
    assert found is not None and np.array_equal(found, HEAT.astype(np.float32))
    assert load_heat(path, 4, 10) is None  # another model's


def test_a_place_of_others_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "heat" / "heat.npy"
    save_heat(path, HEAT)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.parent.chmod(0o777)
    before = path.read_bytes()
    save_heat(path, HEAT + 1)
    assert load_heat(path, 3, 10) is None and path.read_bytes() == before


@pytest.mark.parametrize("bad", [b"", b"\x93NUMPY", b"x" * 500, "nan", "negative", "object"])
def test_damage_is_ignored(tmp_path: Path, bad: bytes | str) -> None:
    path = tmp_path / "heat.npy"
    if isinstance(bad, bytes):
        path.write_bytes(bad)
    else:
        values = {"nan": np.nan, "negative": -1.0, "object": None}[bad]
        content = io.BytesIO()
        np.save(content, np.full((3, 10), values, object if bad == "object" else np.float32), allow_pickle=True)
        path.write_bytes(content.getvalue())
    assert load_heat(path, 3, 10) is None


def test_what_is_no_file_is_ignored(tmp_path: Path) -> None:
    """Reading a pipe would wait for ever; a device would never end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        assert load_heat(path, 3, 10) is None


def test_every_cut_and_every_changed_byte_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "heat.npy"
    save_heat(path, HEAT)
    content = path.read_bytes()
    n_header = len(content) - HEAT.size * 4
    assert np.array_equal(np.load(path), HEAT.astype(np.float32))  # still NumPy's format
    for n in (*range(n_header + 1), len(content) - 1):
        path.write_bytes(content[:n])
        assert load_heat(path, 3, 10) is None
    for n in range(n_header):
        path.write_bytes(content[:n] + bytes([content[n] ^ 0x15]) + content[n + 1 :])
        assert load_heat(path, 3, 10) is None
    path.write_bytes(content + b"x")
    assert load_heat(path, 3, 10) is None


def test_nowhere_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    save_heat(tmp_path / "file" / "heat.npy", HEAT)


def test_drawn_as_text() -> None:
    heat = np.zeros((2, 8))
    heat[0, 3], heat[1, 7] = 100, 1
    assert draw_text(heat, 80) == ["   @    ", "       ."]
    assert draw_text(heat, 4) == [" @  ", "   ."]
    assert draw_text(heat, 3) == [" @ ", "  ."]  # three experts to a mark
    assert draw_text(np.zeros((1, 4)), 4) == ["    "]


def test_drawn_as_png() -> None:
    data = draw_png(HEAT, scale=2)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (20, 6)
    at = data.index(b"IDAT")
    (n_bytes,) = struct.unpack(">I", data[at - 4 : at])
    rows = np.frombuffer(zlib.decompress(data[at + 4 : at + 4 + n_bytes]), np.uint8).reshape(height, width + 1)
    hottest = np.unravel_index(np.argmax(HEAT), HEAT.shape)
    assert rows[2 * hottest[0], 1 + 2 * hottest[1]] == 255
