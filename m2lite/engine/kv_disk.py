"""Pages of KV on disk, below the prefix cache: a prompt that was computed once is read instead, also after a restart.

A page's name is a hash of everything that its numbers follow from: the model file, the type of the cache, the version
of the numerics, and all tokens up to its end. So a page that would be wrong is not found. Knows pages, no sequences.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from m2lite.model.numerics import NUMERICS_VERSION
from m2lite.storage.identity import file_identity
from m2lite.storage.pages import PageStore
from m2lite.system.paths import user_dir

if TYPE_CHECKING:  # these import Numba
    from m2lite.engine.runner import ModelRunner
    from m2lite.storage.gguf_reader import GGUFFile

DEFAULT_BYTES = 16 << 30  # or a tenth of what is free on the disk
_NO_MODULES = bytes(16)
_MOST_ANSWER = 4 << 18  # bytes of an answer's ids


class KVDisk:
    """The pages of one model, KV type and version of the numerics."""

    def __init__(self, gguf: GGUFFile, runner: ModelRunner, budget_bytes: int | None = None) -> None:
        """`budget_bytes`: of all models' pages on disk."""
        self._gguf, self._budget_bytes = gguf, budget_bytes
        pool, self._sidecar = runner.pool, runner.drafting.sidecar
        self._pool, self._kv, self.trunk_bytes, self.page_bytes = pool, pool.kv, pool.trunk_bytes, pool.page_bytes
        self.n_written = self.n_read = 0  # bytes

    @cached_property
    def _seed(self) -> bytes:
        """Of all names: reads both ends of every tensor, so not before somebody asks."""
        identity = hashlib.sha256(b"m2lite kv 2")
        for part in (file_identity(self._gguf), self._kv, str(self.trunk_bytes), str(NUMERICS_VERSION)):
            identity.update(part.encode() + b"\0")
        return identity.digest()

    @cached_property
    def _modules(self) -> bytes:
        """16 bytes that stand for the prediction modules whose K and V are kept behind the trunk's."""
        if self._sidecar is None:
            return _NO_MODULES
        n_bytes = self.page_bytes - self.trunk_bytes
        return hashlib.sha256(f"{file_identity(self._sidecar)} {n_bytes}".encode()).digest()[:16]

    @cached_property
    def store(self) -> PageStore:
        """Where the pages lie."""
        root = kv_dir()
        budget = default_budget(root) if self._budget_bytes is None else self._budget_bytes
        return PageStore(root / self._seed.hex()[:32], budget)

    def name(self, key: bytes) -> str:
        """Of the page with that key of the prefix cache."""
        return hashlib.sha256(self._seed + key).hexdigest()

    def has(self, key: bytes, has_drafts: bool) -> bool:
        """Whether the page lies there, with the modules' K and V if `has_drafts`."""
        info = self.store.info(self.name(key))
        return info is not None and (not has_drafts or info == self._modules)

    def n_there(self, keys: Sequence[bytes]) -> int:
        """How many of the first pages lie there, sound or not."""
        return next((n for n, key in enumerate(keys) if not self.store.has(self.name(key))), len(keys))

    def read(self, key: bytes, page: int) -> tuple[bool, bool]:
        """(whether that page of the pool now holds it, whether with the K and V of the modules in use)."""
        into, routing = self._pool.page_view(page), self._pool.routing
        if not kv_dir().is_dir():
            return False, False
        found = self.store.read(self.name(key), into)
        if found is None or found[0] < self.trunk_bytes:
            return False, False
        n_bytes, info, note = found
        self.n_read += n_bytes + len(note)
        if routing is not None:
            routing.load(page, note)
        has_drafts = info == self._modules and n_bytes == self.page_bytes
        if not has_drafts:
            np.frombuffer(into, np.uint8)[self.trunk_bytes :] = 0  # of other modules
        return True, has_drafts

    def write(self, key: bytes, page: int, has_drafts: bool) -> bool:
        """Keep that page of the pool, and which experts it chose where that is kept; False where the disk does not."""
        routing, content = self._pool.routing, self._pool.page_view(page)
        note = b"" if routing is None else routing.page(page)
        content = content if has_drafts else content[: self.trunk_bytes]
        is_kept = self.store.write(self.name(key), content, self._modules if has_drafts else _NO_MODULES, note)
        self.n_written += (len(content) + len(note)) * is_kept
        return is_kept

    def write_answer(self, key: bytes, ids: memoryview) -> None:
        """Keep the bytes of an answer's ids; where the disk does not take them, they are lost."""
        if len(ids):
            self.store.write(f"{self.name(key)}-answer", ids)

    def read_answer(self, key: bytes) -> bytes | None:
        name = f"{self.name(key)}-answer"
        if not kv_dir().is_dir() or not self.store.has(name):
            return None
        into = memoryview(bytearray(_MOST_ANSWER))
        found = self.store.read(name, into)
        return None if found is None else bytes(into[: found[0]])

    def trim(self, keys: list[bytes]) -> None:
        """Down to the budget; pages with these keys stay."""
        mine = {self.name(key) for key in keys}
        self.store.trim(mine.__contains__)


def kv_dir() -> Path:
    return user_dir("cache") / "kv"


def default_budget(root: Path) -> int:
    """In bytes, for this disk."""
    place = next(path for path in (root, *root.parents) if path.exists())
    return min(DEFAULT_BYTES, shutil.disk_usage(place).free // 10)
