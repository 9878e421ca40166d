"""The directories in which `hf download` keeps repositories. Knows their layout, opens no model and asks no server.

<cache>/hub/models--ORG--NAME/ holds refs/<branch> (a commit), snapshots/<commit>/ (links) and blobs/ (the bytes).
"""

from __future__ import annotations

import os
from pathlib import Path

from m2lite.errors import BadModelError, UsageError
from m2lite.system.paths import named_path

REPOSITORY = "models--"
BRANCH = "main"
_MAX_REF_BYTES = 200


def find_snapshot(path: str | os.PathLike[str]) -> Path:
    """The files behind a path: of a repository in a cache the snapshot of `main`, or the only one; else the path.

    Links are kept: parts of a split lie beside each other in the snapshot, not in blobs/.
    """
    path = named_path(path)
    if path.name == "snapshots" and path.parent.name.startswith(REPOSITORY):
        path = path.parent
    if not path.is_dir():
        return path
    snapshots = path / "snapshots"
    if snapshots.is_dir() and (path.name.startswith(REPOSITORY) or (path / "refs").is_dir()):
        return _snapshot_of(path, snapshots)
    _check_not_cache(path)
    return path


def _snapshot_of(repository: Path, snapshots: Path) -> Path:
    commit = _read_ref(repository / "refs" / BRANCH)
    if commit is not None and (snapshots / commit).is_dir():
        return snapshots / commit
    found = sorted(child for child in snapshots.iterdir() if child.is_dir() and not child.name.startswith("."))
    if len(found) == 1:
        return found[0]
    name = repository.name.removeprefix(REPOSITORY).replace("--", "/", 1)  # ORG/NAME, as on the hub
    if not found:
        raise BadModelError(f"{repository} holds no snapshot of {name}.", f"Fetch it: hf download {name}")
    raise UsageError(
        f"{repository} holds {len(found)} snapshots, {', '.join(child.name for child in found[:4])}"
        f"{', ...' if len(found) > 4 else ''}, and refs/{BRANCH} names none of them.",
        f"Name one of the directories in {snapshots}.",
    )


def _read_ref(path: Path) -> str | None:
    """The commit that a ref names; None for no ref, or for one that is not a plain name."""
    try:
        with path.open("rb") as file:
            commit = file.read(_MAX_REF_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return commit if commit.isalnum() else None


def _check_not_cache(path: Path) -> None:
    """The cache as a whole is no model: say which repositories it holds."""
    if (path / "config.json").exists() or any(path.glob("[!.]*.gguf")):
        return
    for directory in (path, path / "hub"):
        if not directory.is_dir():
            continue
        found = sorted(child.name for child in directory.iterdir() if child.name.startswith(REPOSITORY))
        if found:
            raise UsageError(
                f"{directory} is a cache of {len(found)} repositories: {', '.join(found[:8])}"
                f"{', ...' if len(found) > 8 else ''}.",
                "Name one of these directories.",
            )
