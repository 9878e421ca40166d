"""Compiled kernels on disk: where, and one checked file for each function and signature. Knows no kernel.

Numba's own cache keeps an index beside numbered files: two processes that compile at once can give one number to two
signatures, a file that was cut short raises EOFError at every start, a full disk ends the program, and everything is
compiled again for a copy of the same sources. Here a file's name follows from all that its code follows from, and what
it holds is checked before it is used; what cannot be read or written is compiled again.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import pickle
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from m2lite.system.paths import user_dir

_KEPT = 8  # directories, each of one version of the sources


def _owned_private(path: Path) -> bool:
    """The files are pickles: only a directory that nobody else can write is used."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.lstat()
    except OSError:
        return False
    ours = stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022
    return ours and os.access(path, os.W_OK)


def choose_directory(name: str) -> Path:
    """The directory called `name`, where the user's caches are, else among temporary files, else of this process."""
    user = Path(os.environ.get("M2LITE_CACHE_DIR") or user_dir("cache")) / "kernels"
    for root in (user, Path(tempfile.gettempdir()) / f"m2lite-kernels-{os.getuid()}"):
        path = root / name
        if _owned_private(root) and _owned_private(path):
            with suppress(OSError):
                os.utime(path)  # its own time is that of its last new file: one in use must not look old
                old = sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
                for stale in old[:-_KEPT]:
                    shutil.rmtree(stale, ignore_errors=True)
            return path
    path = Path(tempfile.mkdtemp(prefix="m2lite-kernels-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


class KernelCache(NullCache):  # type: ignore[misc]
    """Of one function, in the form that Numba asks for."""

    def __init__(self, function: Callable[..., Any], directory: Path) -> None:
        self._directory = directory
        code = function.__code__
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        self._key = (function.__module__, function.__qualname__, code.co_firstlineno, code.co_code, dumps(cells))
        self._name = function.__qualname__.replace("<locals>.", "").replace("/", "")

    def load_overload(self, signature: Any, target: Any) -> CompileResult | None:
        """What was compiled for this signature and processor; None where that is not there, or not whole."""
        target.refresh()  # as Numba's does: it may not have been used yet
        try:
            found = self._path(signature, target.codegen()).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(found[32:]).digest() != found[:32]:
            return None
        return CompileResult._rebuild(target, *pickle.loads(found[32:]))  # noqa: S301  # ours: see `_owned_private`

    def save_overload(self, signature: Any, result: CompileResult) -> None:
        """Keep it, if there is room. What depends on this process's addresses is not kept."""
        if result.library.has_dynamic_globals or not all(x.can_cache for x in result.lifted):
            return
        data = dumps(result._reduce())
        path = self._path(signature, result.codegen)
        with suppress(OSError), tempfile.TemporaryDirectory(prefix=".new-", dir=self._directory) as folder:
            new = Path(folder) / "kernel"
            new.write_bytes(hashlib.sha256(data).digest() + data)
            new.replace(path)

    def _path(self, signature: Any, codegen: Any) -> Path:
        key = hashlib.sha256(repr((self._key, signature, codegen.magic_tuple())).encode()).hexdigest()
        return self._directory / f"{self._name[:80]}-{key[:24]}.kernel"
