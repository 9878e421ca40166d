"""The KV cache of rows on disk, page by page: a row that was computed once is read instead. Knows tokens, not chats.

A page's key is a hash of everything that its numbers follow from: the model file, the type of the cache, the kernels'
source, and all tokens up to its end. So rows with a common beginning share pages, only new pages are written, and a
page that would be wrong is not found.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from m2lite.decode.engine import Stop
from m2lite.decode.session import Model, Session
from m2lite.model.cache import PAGE
from m2lite.storage.identity import file_identity
from m2lite.storage.pages import PageStore
from m2lite.system.paths import user_dir

DEFAULT_BYTES = 16 << 30  # or a tenth of what is free on the disk


class Snapshots:
    """Of one model."""

    def __init__(self, model: Model, budget_bytes: int | None = None) -> None:
        """`budget_bytes`: of all models' pages on disk."""
        self._model, self._budget_bytes = model, budget_bytes

    @cached_property
    def _seed(self) -> bytes:
        """Of all keys: reads both ends of every tensor, so not before somebody asks."""
        from m2lite.kernels.jit import source_hash

        pool = self._model.engine.pool
        identity = hashlib.sha256(b"m2lite kv 1")
        for part in (file_identity(self._model.gguf), pool.kv, str(pool.page_bytes), source_hash()):
            identity.update(part.encode() + b"\0")
        return identity.digest()

    @cached_property
    def store(self) -> PageStore:
        """Where the pages of this model lie."""
        root = snapshots_dir()
        budget = default_budget(root) if self._budget_bytes is None else self._budget_bytes
        return PageStore(root / self._seed.hex()[:32], self._model.engine.pool.page_bytes, budget)

    def keys(self, tokens: Sequence[int]) -> Iterator[str]:
        """Of the whole pages of a row."""
        chain = self._seed
        for start in range(0, len(tokens) - PAGE + 1, PAGE):
            chain = hashlib.sha256(chain + struct.pack(f"<{PAGE}i", *tokens[start : start + PAGE])).digest()
            yield chain.hex()

    def restore(self, session: Session, stop: Stop | None = None) -> int:
        """Read the pages of the session's row that its cache lacks; how many positions it then holds."""
        if not snapshots_dir().is_dir():
            return session.n_cached
        keys = list(self.keys(session.tokens[:-1]))  # the last token is computed: its logits are wanted
        return session.fill_pages(lambda index, into: self.store.read(keys[index], into), len(keys), stop)

    def save(self, session: Session, stop: Stop | None = None) -> int:
        """Write the pages that the session's cache holds and the disk lacks; how many."""
        keys = list(self.keys(session.tokens[: session.n_cached]))
        new = [index for index, key in enumerate(keys) if not self.store.has(key)]
        n_written = 0
        for index, page in session.whole_pages(new):
            if (stop is not None and stop()) or not self.store.write(keys[index], page):
                break
            n_written += 1
        if n_written:
            mine = set(keys)
            self.store.trim(mine.__contains__)
        return n_written


def snapshots_dir() -> Path:
    return user_dir("cache") / "kv"


def default_budget(root: Path) -> int:
    """In bytes, for this disk."""
    place = next(path for path in (root, *root.parents) if path.exists())
    return min(DEFAULT_BYTES, shutil.disk_usage(place).free // 10)
