"""What was found for this machine: used here, and a file that is wrong or another machine's is not, with a word."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m2lite import Model
from m2lite.engine import tuned
from m2lite.engine.tuned import Change, Tuning, load_tuning, save_tuning, this_machine, tuning_path
from m2lite.errors import M2liteError
from m2lite.kernels.dots import GROUP
from m2lite.simd import jit, tuning
from m2lite.simd.tuning import DEFAULTS, PARAMETERS, VALUES

RATIO = (1.01, 1.02, 1.03)
FOUND = Tuning([Change("tiles_ahead", 4, {"decode": RATIO}), Change("chunks", 2, {"prompt": RATIO})],
               {"decode": RATIO, "prompt": RATIO}, 4e10, "2026-11-30")  # fmt: skip


@pytest.fixture(autouse=True)
def defaults_afterwards() -> Iterator[None]:
    yield
    tuning.use({})
    jit.start(2)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuned, "machine_cache_dir", lambda: tmp_path / "cache")
    return tuning_path(this_machine())


def test_what_is_kept_is_read(path: Path) -> None:
    assert load_tuning() == Tuning()
    save_tuning(path, FOUND)
    assert load_tuning() == FOUND
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_model_uses_it_unless_it_is_switched_off(path: Path, bundled_model: Path) -> None:
    save_tuning(path, FOUND)
    for is_wanted in (True, False, True):
        with Model.open(bundled_model, draft="off", tuning=is_wanted) as model:
            assert dict(VALUES) == DEFAULTS | (FOUND.values if is_wanted else {})
            assert not any("tuning" in warning for warning in model.runner.warnings)


def test_threads_are_those_that_were_asked_for(
    path: Path, bundled_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2lite.machine.n_usable_cores", lambda: 2)
    save_tuning(path, FOUND._replace(changes=[Change("threads_percent", 50, {"decode": RATIO})]))
    for asked, n in ((None, 1), (2, 2)):
        with Model.open(bundled_model, draft="off", threads=asked) as model:
            assert model.n_threads == n


def changed(**values: Any) -> Any:
    return lambda content: content | values


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (changed(format=2), "another version"),
        (lambda content: content | {"machine": content["machine"] | {"cores": 99}}, "another machine's"),
        (lambda content: content | {"machine": content["machine"] | {"version": "0"}}, "another machine's"),
        (changed(machine=None), "another machine's"),
        (changed(changes={}), "damaged"), (changed(changes=[1]), "damaged"), (changed(gains=None), "damaged"),
        (changed(gains={"rest": [1, 1, 1]}), "damaged"), (changed(gains={"decode": [1, 1]}), "damaged"),
        (changed(read_bytes_per_s="fast"), "damaged"), (changed(date=1), "damaged"),
        (changed(changes=[{"name": "speed", "value": 1, "ratios": {}}]), "no parameter 'speed'"),
        (changed(changes=[{"name": "chunks", "value": 1 << 40, "ratios": {}}]), "cannot be '1099511627776'"),
        (changed(changes=[{"name": "chunks", "value": True, "ratios": {}}]), "cannot be 'True'"),
        (changed(changes=[{"name": "chunks", "value": 8.5, "ratios": {}}]), "cannot be"),
        (changed(changes=[{"name": "chunks", "value": 4, "ratios": {}}] * 2), "twice"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_or_foreign_is_not_used(path: Path, change: Any, why: str) -> None:
    save_tuning(path, FOUND)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    found = load_tuning()
    assert not found.changes and why in found.warning and str(path) in found.warning


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff" * 9, b" " * (1 << 17), b"{" * 5000])
def test_a_damaged_file_is_not_used(path: Path, content: bytes) -> None:
    save_tuning(path, FOUND)
    path.write_bytes(content)
    assert load_tuning().warning and not load_tuning().changes


def test_a_place_of_others_is_not_used(path: Path, bundled_model: Path) -> None:
    """Nothing is read there and nothing written, and a model that is opened says so."""
    save_tuning(path, FOUND)
    path.parent.chmod(0o777)
    assert "not yours alone" in load_tuning().warning
    with pytest.raises(M2liteError, match="not yours alone"):
        save_tuning(path, Tuning())
    with Model.open(bundled_model, draft="off") as model:
        assert any("not yours alone" in warning for warning in model.runner.warnings) and dict(VALUES) == DEFAULTS


def test_what_is_no_file_is_not_read(path: Path) -> None:
    save_tuning(path, FOUND)
    path.unlink()
    path.mkdir()
    assert "no file" in load_tuning().warning
    path.rmdir()
    path.symlink_to("/dev/zero")
    assert "no file" in load_tuning().warning


def test_memory_of_another_speed_is_another_machines() -> None:
    assert FOUND.is_of(3.5e10) and not FOUND.is_of(2e10) and not FOUND.is_of(9e10)


def test_every_default_is_among_the_values() -> None:
    assert all(row.default in row.values and row.works for row in PARAMETERS.values())


def test_rows_that_meet_weights_together_are_whole_groups_of_a_panel() -> None:
    assert all(n % GROUP == 0 for n in PARAMETERS["rows_at_once"].values)
