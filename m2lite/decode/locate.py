"""Which file a MODEL argument means: a file, the first of a split, a directory with one model, or the bundled one."""

from __future__ import annotations

import os
import re
from pathlib import Path

from m2lite.errors import BadModelError, UsageError

BUNDLED = Path(__file__).parent.parent / "models" / "m2-tiny"

_LATER_PART = re.compile(r".*-(?!00001)[0-9]{5}-of-[0-9]{5}\.gguf")


def locate_model(path: str | os.PathLike[str] | None = None) -> Path:
    """The GGUF file to open; raises with the candidates when there is not exactly one."""
    if path is None:
        if not models_in(BUNDLED):
            raise UsageError(f"No model was named and the bundled one is not in {BUNDLED}.", "Name a GGUF file.")
        path = BUNDLED
    path = Path(path).expanduser()
    if not path.exists():
        raise UsageError(f"{path} does not exist.", "Name a GGUF file or a directory with one.")
    if not path.is_dir():
        return path
    found = models_in(path)
    if len(found) == 1:
        return found[0]
    if not found:
        raise BadModelError(f"{path} holds no GGUF file.", "Name the model file or its directory.")
    names = ", ".join(p.name for p in found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    raise UsageError(f"{path} holds {len(found)} models: {names}.", "Name one of them.")


def models_in(directory: Path) -> list[Path]:
    """The models in `directory`: no prediction modules (mtp-*), and of a split the first part only."""
    return sorted(
        p for p in directory.glob("*.gguf") if not p.name.startswith("mtp-") and not _LATER_PART.fullmatch(p.name)
    )
