"""What every target shares: the table of them, and files for the readers that take no bytes. Knows no reader."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from m2lite.errors import M2liteError
from m2lite.system.json_text import JsonError

Target = Callable[[bytes], None]
TARGETS: dict[str, Target] = {}
ROOM = 1 << 20  # zeros behind a header whose tensors are not in the input


def target(function: Target) -> Target:
    """Into the table, and M2liteError is no finding."""

    @functools.wraps(function)
    def run(data: bytes) -> None:
        with contextlib.suppress(M2liteError, JsonError):
            function(data)

    TARGETS[function.__name__.removeprefix("fuzz_")] = run
    return run


@functools.cache
def folder() -> Path:
    """Of this process; in memory where the system has a place for that."""
    shared = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="m2lite-fuzz-", dir=shared if os.access(shared, os.W_OK) else None))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def put(name: str, data: bytes, room: int = 0) -> Path:
    """A file of its own for every input: an earlier one may still be mapped. `room` zeros follow, which take none."""
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.truncate(len(data) + room)
    return path


def check_text(value: object) -> None:
    """It can be written as JSON in UTF-8: what was read goes on into files."""
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
