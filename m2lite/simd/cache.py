"""Compiled kernels on disk: where, and one checked file for each function and signature. Knows no kernel.

Numba's own cache keeps an index beside numbered files: two processes that compile at once can give one number to two
signatures, a file that was cut short raises EOFError at every start, a full disk ends the program, and everything is
compiled again for a copy of the same sources. Here a file's name follows from all that its code follows from, and what
it holds is checked before it is used; what cannot be read or written is compiled again.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import pickle
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

from m2lite.simd.claims import CLOCK, claims_in
from m2lite.simd.kept_code import loaded, to_keep
from m2lite.system.paths import machine_cache_dir, make_private

_KEPT = 8  # directories, each of one version of the sources
_STALE_S = 3600.0
_NOWHERE = Path(os.devnull) / "kernels"

LOST: list[str] = []  # a sentence on what could not be kept

# What compiled code may refer to by name, and what gives the name its address: that comes before the code is loaded.
SYMBOLS: dict[str, Callable[[], None]] = {}

SAVING = threading.Lock()  # held where a process that ends would leave a temporary file
_PATIENCE_S, _POLL_S = 120.0, 0.01  # with which another process's work is waited for


def choose_directory(name: str) -> tuple[Path, str]:
    """The directory called `name` among the user's caches, and what is wrong with it, in words, or "".

    It may be missing, or not be private: then nothing is read there, and nothing is written. The files are pickles.
    """
    root = machine_cache_dir() / "kernels"
    path, why = root / name, ""
    try:
        if not make_private(root) or not make_private(path):
            why, path = "it is not yours alone to write", _NOWHERE
        elif not os.access(path, os.W_OK):
            why = "it is read-only"
        else:
            _tidy(root, path)
    except OSError as error:
        why, path = error.strerror or str(error), _NOWHERE
    return path, f"compiled kernels cannot be kept in {root} ({why}): starts take longer" if why else ""


def _tidy(root: Path, path: Path) -> None:
    """The oldest versions go, and what writers left that were killed."""
    with suppress(OSError):
        os.utime(path)  # its own time is that of its last new file: one in use must not look old
        now = path.stat().st_mtime
        old = sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
        for stale in [*old[:-_KEPT], *(p for p in path.glob(".new-*") if p.stat().st_mtime < now - _STALE_S)]:
            shutil.rmtree(stale, ignore_errors=True)


def _content(path: Path) -> Any:
    """What is in a file of the cache; None where it is not there, or not whole."""
    try:
        found = path.read_bytes()
    except OSError:
        return None
    is_whole = hashlib.sha256(found[32:]).digest() == found[:32]
    return pickle.loads(found[32:]) if is_whole else None  # noqa: S301  # ours: see `choose_directory`


class KernelCache(NullCache):  # type: ignore[misc]
    """Of one function, in the form that Numba asks for."""

    def __init__(self, function: Callable[..., Any], directory: Path) -> None:
        self._directory, self._claims = directory, claims_in(directory)
        code = function.__code__
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        self._key = (function.__module__, function.__qualname__, code.co_firstlineno, code.co_code, dumps(cells))
        self._name = function.__qualname__.replace("<locals>.", "").replace("/", "")

    def load_overload(self, signature: Any, target: Any) -> CompileResult | None:
        """What was compiled for this signature and processor; None where that is not there, or not whole.

        What another process compiles is waited for. The next call is that of save_overload.
        """
        rtsys.initialize(target)  # whose functions code may call; all else is only needed to compile
        path = self._path(signature, target.codegen())
        if (found := _content(path)) is None:
            CLOCK.begin(path.name)
            given_up = time.monotonic() + _PATIENCE_S
            while not self._claims.take(path.name) and time.monotonic() < given_up:
                time.sleep(_POLL_S)
            if (found := _content(path)) is None:
                gc.enable()  # the command line begins without, and compiling leaves much
                return None
            self._done(path)
        names, kept = found
        for name in names:
            SYMBOLS[name]()
        return loaded(target, kept)

    def save_overload(self, signature: Any, result: CompileResult) -> None:
        """Keep it, if there is room. What depends on this process's addresses is not kept."""
        path = self._path(signature, result.codegen)
        if not result.library.has_dynamic_globals and all(x.can_cache for x in result.lifted):
            functions = result.library._final_module.functions
            names = [function.name for function in functions if function.is_declaration and function.name in SYMBOLS]
            data = dumps((names, to_keep(result)))
            try:
                with SAVING, tempfile.TemporaryDirectory(prefix=".new-", dir=self._directory) as folder:
                    new = Path(folder) / "kernel"
                    new.write_bytes(hashlib.sha256(data).digest() + data)
                    new.replace(path)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT) and not LOST:
                    LOST.append(f"compiled kernels cannot be kept in {self._directory} ({error.strerror})")
        self._done(path)

    def _done(self, path: Path) -> None:
        self._claims.release(path.name)
        CLOCK.end(path.name)

    def _path(self, signature: Any, codegen: Any) -> Path:
        key = hashlib.sha256(repr((self._key, signature, codegen.magic_tuple())).encode()).hexdigest()
        return self._directory / f"{self._name[:80]}-{key[:24]}.kernel"
