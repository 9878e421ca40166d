"""What drafts cost here and how often they come true, kept for the next process: a small file per model and machine.

It changes no token, and losing it costs some calls in which that is learnt anew. Numbers are believed within bounds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from m2lite import machine
from m2lite.drafting.planner import Planner
from m2lite.errors import M2liteError
from m2lite.model.mtp import Mtp
from m2lite.model.weights import Weights
from m2lite.storage.durable import atomic_write
from m2lite.storage.gguf_reader import GGUFFile
from m2lite.system.json_text import JsonError, parse_object
from m2lite.system.paths import is_private, make_private, user_dir

_VERSION = 1  # of what the numbers mean
_MOST_BYTES, _MOST_ITEMS = 1 << 16, 4096


def kept_path(weights: Weights, mtp: Mtp | None, n_threads: int, load: str) -> Path:
    """Where it is kept: by the model's norm and tensors, its modules', the processor, threads and how it is loaded."""
    digest = hashlib.sha256(weights.output_norm.values.tobytes())
    setting = (
        machine.processor_name(),
        n_threads,
        load,
        _table(weights.gguf),
        None if mtp is None else _table(mtp.gguf),
    )
    digest.update(repr(setting).encode())
    return user_dir("cache") / "drafts" / f"{digest.hexdigest()[:32]}.json"


def _table(gguf: GGUFFile) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, tensor.format.name, tuple(tensor.shape)) for name, tensor in sorted(gguf.tensors.items())]


def load_kept(path: Path, planner: Planner) -> bool:
    """Begin with what is kept there; False, and nothing changed, where there is nothing or it is damaged."""
    try:
        if not is_private(path.parent) or not path.is_file():  # opening a pipe would wait for its other end
            return False
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        kept = parse_object(data, most_bytes=_MOST_BYTES, most_items=_MOST_ITEMS)
        if kept.get("version") != _VERSION:
            return False
        planner.restore(kept)
    except (OSError, JsonError, ValueError):
        return False
    return True


def save_kept(path: Path, planner: Planner) -> None:
    """Keep what was learnt; where it cannot be written it is not."""
    content = json.dumps({"version": _VERSION, **planner.learnt()}).encode()
    with contextlib.suppress(OSError, M2liteError):
        if make_private(path.parent):
            atomic_write(path, content)
