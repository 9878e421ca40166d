"""Which file a MODEL argument means: a file, the first of a split, a directory with one model, or the bundled one.

A directory may be a repository in a Hugging Face cache, and its models may lie in folders, one for each quantization.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from m2lite.errors import BadModelError, UsageError
from m2lite.storage.gguf_reader import SPLIT_NAME
from m2lite.storage.hub import find_snapshot

BUNDLED = Path(__file__).parent.parent / "models" / "m2-tiny"
MOST_NAMES = 8


def locate_model(path: str | os.PathLike[str] | None = None) -> Path:
    """The GGUF file to open; raises with the candidates when there is not exactly one."""
    if path is None:
        if not models_in(BUNDLED):
            raise UsageError(f"No model was named and the bundled one is not in {BUNDLED}.", "Name a GGUF file.")
        path = BUNDLED
    path = find_snapshot(path)
    if not path.is_dir():
        return _existing(path)
    found = models_in(path)
    if len(found) == 1:
        return _existing(found[0])
    if not found:
        raise _nothing_in(path)
    names = ", ".join(_describe(model, path) for model in found[:MOST_NAMES])
    more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
    raise UsageError(f"{path} holds {len(found)} models: {names}{more}.", "Name one of them.")


def _existing(path: Path) -> Path:
    if path.exists():
        return path
    if path.is_symlink():
        raise BadModelError(f"{path} is a link to a file that is not there.", "Download the file again.")
    raise UsageError(f"{path} does not exist.", "Name a GGUF file or a directory with one.")


def models_in(directory: Path) -> list[Path]:
    """The models in `directory`, or else in its folders: no prediction modules (mtp-*), of a split only one part."""
    return _models(directory.glob("*.gguf")) or _models(directory.glob("[!.]*/*.gguf"))


def _models(paths: Iterable[Path]) -> list[Path]:
    """The first part stands for a split; where that is missing the lowest, so that the missing one is named."""
    found: dict[Path, Path] = {}
    for path in sorted(paths):
        if not path.name.startswith(("mtp-", ".")):
            match = SPLIT_NAME.fullmatch(path.name)
            found.setdefault(path.with_name(f"{match['stem']}-of-{match['count']}") if match else path, path)
    return sorted(found.values())


def _describe(model: Path, directory: Path) -> str:
    """m.gguf; or, of a split, Q4_K_M/m-00001-of-00003.gguf (3 parts)."""
    match = SPLIT_NAME.fullmatch(model.name)
    return f"{model.relative_to(directory)}" + (f" ({int(match['count'])} parts)" if match else "")


def _nothing_in(path: Path) -> BadModelError:
    if any(path.glob("[!.]*.safetensors")):
        return BadModelError(
            f"{path} holds safetensors and no GGUF file.", f"Convert them first: m2lite convert {path} -o model.gguf"
        )
    return BadModelError(f"{path} holds no GGUF file.", "Name the model file or its directory.")
