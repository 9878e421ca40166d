"""Where the prediction modules of a model lie: a file of their own beside it, since llama.cpp refuses them inside."""

from __future__ import annotations

from pathlib import Path

from m2lite.storage.gguf_reader import SPLIT_NAME


def sidecar_path(model: Path) -> Path:
    """Where the prediction modules of a model file lie; of a split, beside the name without numbers."""
    part = SPLIT_NAME.fullmatch(model.name)
    return model.with_name(f"mtp-{part['stem']}.gguf" if part else f"mtp-{model.name}")
