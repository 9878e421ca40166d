"""What a command reads, by name, so that none of it is written to. Opens no file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from m2lite.errors import M2liteError
from m2lite.settings import config_path
from m2lite.system.outputs import Places

PNG = b"\x89PNG\r\n\x1a\n"  # a picture replaces a picture, and nothing else


def places_beside(*files: str | Path | None, models: Iterable[str | os.PathLike[str] | None] = ()) -> Places:
    """The places of a command that reads these files and models, each model with all that belongs to it."""
    places = Places().reads(config_path(), *files)
    for model in models:
        places.reads(*_files_of(model))
    return places


def _files_of(model: str | os.PathLike[str] | None) -> list[Path]:
    from m2lite.engine.locate import locate_model
    from m2lite.storage.hub import find_snapshot
    from m2lite.storage.sidecar import model_files

    named = [] if model is None else [Path(model)]
    try:
        snapshot = [] if model is None else [find_snapshot(model)]
        return [*named, *snapshot, *model_files(locate_model(model))]
    except M2liteError:  # whoever opens it says what is wrong with it
        return named
