"""Pages of the prefix cache at every file operation: a page is what was written, or none; nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2lite.storage.pages import PageStore
from tests.faults.disk import at_every_call

PAGES = {f"key{n}": bytes([n + 1]) * 900 for n in range(3)}
NOTES = {"key0": b"", "key1": b"a note", "key2": b"another note"}


def store_in(folder: Path) -> PageStore:
    return PageStore(folder / "kv" / "model", 2 * 956)


def test_pages_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: set[str] = set()

    def job(folder: Path) -> None:
        store = store_in(folder)
        written.clear()
        written.update(key for key, page in PAGES.items() if store.write(key, memoryview(page), note=NOTES[key]))
        store.trim()

    def check(folder: Path, is_done: bool, is_dead: bool) -> None:
        store, into = store_in(folder), bytearray(900)
        found = set()
        for key, page in PAGES.items():
            if (read := store.read(key, memoryview(into))) is not None:
                assert into == page and read == (900, bytes(16), NOTES[key])
                found.add(key)
        assert found == {key for key in PAGES if store.has(key)} and len(written - found) <= 1
        store.trim()
        files = list(store.directory.iterdir()) if store.directory.exists() else []
        assert len(files) <= 2 and all(path.suffix == ".page" for path in files)
        job(folder)
        assert written == set(PAGES)

    def job_without_errors(folder: Path) -> None:
        job(folder)  # a disk that refuses costs pages and nothing else

    assert at_every_call(tmp_path, monkeypatch, lambda folder: None, job_without_errors, check) > 15
