"""Where the prediction modules of a model lie: a file of their own beside it, since llama.cpp refuses them inside."""

from __future__ import annotations

from pathlib import Path

from m2lite.errors import BadModelError
from m2lite.storage.gguf_reader import SPLIT_NAME, GGUFFile
from m2lite.storage.identity import trunk_identity


def sidecar_path(model: Path) -> Path:
    """Where the prediction modules of a model file lie; of a split, beside the name without numbers."""
    part = SPLIT_NAME.fullmatch(model.name)
    return model.with_name(f"mtp-{part['stem']}.gguf" if part else f"mtp-{model.name}")


def model_files(model: Path) -> list[Path]:
    """What belongs to a model file by its name, no file is opened: all parts of a split, prediction modules beside."""
    part, parts = SPLIT_NAME.fullmatch(model.name), [model]
    if part:
        try:
            beside = sorted(model.parent.iterdir())
        except OSError:
            beside = []
        others = ((path, SPLIT_NAME.fullmatch(path.name)) for path in beside)
        parts += [path for path, o in others if o and o.group("stem", "count") == part.group("stem", "count")]
    return [*dict.fromkeys(parts), sidecar_path(model)]


def check_trunk(sidecar: GGUFFile, model: GGUFFile) -> None:
    """Raises BadModelError unless the modules were made for this model, in whatever precision."""
    found, identity = sidecar.metadata.get("m2lite.mtp.trunk"), trunk_identity(model)
    if found != identity:
        raise BadModelError(
            f"{sidecar.path}: the MTP modules belong to trunk {found!r}, the model is {identity!r}.",
            "Convert both from the same checkpoint.",
        )
