"""How often each expert was used in earlier runs: a small file per model in the user's cache directory. Knows numbers.

It depends on the model, not on its precision, and losing it costs nothing but reads.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m2lite.errors import M2liteError
from m2lite.storage.durable import atomic_write
from m2lite.system.paths import is_private, make_private, user_dir


def heat_path(identity: str) -> Path:
    """Where a model's heat is kept; the file need not exist."""
    return user_dir("cache") / "heat" / f"{identity[:32]}.npy"


def _header(n_layers: int, n_experts: int) -> bytes:
    """As `numpy.save` begins the file of such a table. It is compared, never parsed."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (n_layers, n_experts)})
    return file.getvalue()


def load_heat(path: Path, n_layers: int, n_experts: int) -> NDArray[np.float64] | None:
    """float64 [n_layers, n_experts], or None where there is none or it is damaged."""
    header, n_bytes = _header(n_layers, n_experts), 4 * n_layers * n_experts
    try:
        if not is_private(path.parent) or not path.is_file():  # opening a pipe would wait for its other end
            return None
        with path.open("rb") as file:
            content = file.read(len(header) + n_bytes + 1)
    except OSError:
        return None
    if len(content) != len(header) + n_bytes or not content.startswith(header):
        return None
    heat = np.frombuffer(content, "<f4", offset=len(header)).reshape(n_layers, n_experts)
    return heat.astype(np.float64) if np.isfinite(heat).all() and (heat >= 0).all() else None


def save_heat(path: Path, heat: NDArray[np.float64]) -> None:
    """Keep heat [n_layers, n_experts]; where it cannot be written it is not."""
    content = _header(*heat.shape) + heat.astype("<f4").tobytes()
    with contextlib.suppress(OSError, M2liteError):
        if make_private(path.parent):
            atomic_write(path, content)


def draw_text(heat: NDArray[np.float64], width: int) -> list[str]:
    """A line per layer and a character per expert, or per a few neighbours where `width` has no more room."""
    shades = " .:-=+*#%@"
    n_layers, n_experts = heat.shape
    per_mark = -(-n_experts // max(1, width))
    padded = np.zeros((n_layers, -(-n_experts // per_mark) * per_mark))
    padded[:, :n_experts] = heat
    means = padded.reshape(n_layers, -1, per_mark).mean(axis=2)
    levels = np.ceil(np.sqrt(means / max(means.max(), 1e-30)) * (len(shades) - 1)).astype(int)
    return ["".join(shades[level] for level in row) for row in levels]


def draw_png(heat: NDArray[np.float64], scale: int = 4) -> bytes:
    """A grey picture, a row per layer and a column per expert, white for the hottest."""
    grey = np.sqrt(heat / max(float(heat.max()), 1e-30)) * 255
    pixels = grey.astype(np.uint8).repeat(scale, axis=0).repeat(scale, axis=1)
    height, width = pixels.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each line begins with its filter: none
    rows[:, 1:] = pixels

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
