"""The small files beside the weights: read whole, within bounds that go by their kind. Knows no meaning."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

from m2lite.errors import BadModelError
from m2lite.quant.safetensors import check_impostor
from m2lite.system.json_text import JsonError, parse_object


class Bounds(NamedTuple):
    """The most that a file may be. M2's own: 3 kB of settings, an index of 10 MB, a tokenizer of 10 MB."""

    n_bytes: int
    n_items: int


SETTINGS = Bounds(4 << 20, 1 << 16)
BOUNDS = {
    "model.safetensors.index.json": Bounds(64 << 20, 1 << 20),
    "tokenizer.json": Bounds(128 << 20, 1 << 22),
}


def load_json(directory: Path, name: str, *, optional: bool = False) -> dict[str, Any]:
    """A JSON object beside the weights; `optional` gives {} for a missing file."""
    path, bounds = directory / name, BOUNDS.get(name, SETTINGS)
    data = read_small(path, bounds.n_bytes)
    if data is None:
        if optional:
            return {}
        raise BadModelError(f"{path} is missing.", "Give the directory of a Hugging Face checkpoint.")
    check_impostor(path, data)
    try:
        return parse_object(data, most_bytes=bounds.n_bytes, most_items=bounds.n_items)
    except JsonError as error:
        raise BadModelError(f"{path} is not valid JSON: {error}.", "Correct this file or fetch it again.") from None


def read_small(path: Path, most_bytes: int) -> bytes | None:
    """All bytes of a regular file, None where there is none; BadModelError for one of more than `most_bytes`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a FIFO would wait
    except FileNotFoundError:
        if path.is_symlink():
            raise BadModelError(f"{path} is a link to a file that is not there.", "Fetch that file again.") from None
        return None
    except OSError as error:
        raise BadModelError(f"{path} cannot be read: {error.strerror}.", "Check the file.") from None
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise BadModelError(f"{path} is not a regular file.", "Put the file itself there.")
        if status.st_size > most_bytes:
            raise BadModelError(
                f"{path} has {status.st_size:,} bytes, more than the {most_bytes:,} that such a file may have.",
                "Check that it is the right one.",
            )
        try:
            return file.read(most_bytes + 1)[:most_bytes]
        except OSError as error:
            raise BadModelError(f"{path} cannot be read: {error.strerror}.", "Check the file.") from None
