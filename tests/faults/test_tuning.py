"""The file of what was found for this machine at every file operation: the old or the new one, never a mixture."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2lite.engine.tuned import Change, Tuning, load_tuning, save_tuning
from tests.faults.disk import at_every_call

OLD, NEW = (Tuning([Change("tiles_ahead", n, {"decode": (1.1, 1.2, 1.3)})], {}, 4e10, str(n)) for n in (3, 4))


def test_keeping_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(folder: Path, is_done: bool, is_dead: bool) -> None:
        assert load_tuning(folder / "t" / "x.json") in ([NEW] if is_done else [OLD, NEW])
        assert is_dead or [path.name for path in (folder / "t").iterdir()] == ["x.json"]
        save_tuning(folder / "t" / "x.json", NEW)
        assert load_tuning(folder / "t" / "x.json") == NEW

    def prepare(folder: Path) -> None:
        save_tuning(folder / "t" / "x.json", OLD)

    def job(folder: Path) -> None:
        save_tuning(folder / "t" / "x.json", NEW)

    assert at_every_call(tmp_path, monkeypatch, prepare, job, check) > 5
