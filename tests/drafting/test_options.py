"""What may be asked of drafts, and which file of modules is used."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from m2lite import BadModelError, Model, UsageError
from m2lite.drafting.drafted import Drafted
from m2lite.drafting.options import DraftOptions, open_drafting
from m2lite.storage.gguf_reader import open_gguf
from m2lite.storage.sidecar import sidecar_path
from tests.drafting.harness import drafter_of
from tests.model.test_refused import rewrite


@contextmanager
def opened(
    path: Path, mode: str = "auto", n_tokens: int | None = None, mtp: Path | None = None
) -> Iterator[DraftOptions]:
    gguf = open_gguf(path)
    try:
        options = open_drafting(gguf, mode, n_tokens, mtp)
        yield options
        options.close()
    finally:
        gguf.close()


def test_a_sidecar_of_another_model(bundled_model: Path, tmp_path: Path) -> None:
    """Beside the model it is not used, and that is said; asked for by name it is an error."""
    path = tmp_path / bundled_model.name
    shutil.copy(bundled_model, path)
    rewrite(sidecar_path(bundled_model), sidecar_path(path), {"m2lite.mtp.trunk": "0" * 64})
    with opened(path) as options:
        assert options.n_modules == 0 and options.describe() == "drafts auto: prompt lookup"
        assert "is not used" in (options.warning or "") and "'0000" in (options.warning or "")
    for asked in ({"mode": "mtp"}, {"mtp": sidecar_path(path)}):
        with pytest.raises(BadModelError, match="belong to trunk '0000"), opened(path, **asked):  # type: ignore[arg-type]
            pass
    with opened(path, mtp=sidecar_path(bundled_model)) as options:
        assert options.n_modules == 3 and options.describe() == "drafts auto: prompt lookup and 3 MTP modules"
        options.drop_modules("there is no room")
        assert options.n_modules == 0 and options.warning == "mtp-m2-tiny.gguf is not used: there is no room"


def test_a_damaged_sidecar(bundled_model: Path, tmp_path: Path) -> None:
    path = tmp_path / bundled_model.name
    shutil.copy(bundled_model, path)
    sidecar_path(path).write_bytes(sidecar_path(bundled_model).read_bytes()[:1000])
    with opened(path) as options:
        assert options.n_modules == 0 and options.warning
    with pytest.raises(BadModelError), opened(path, "mtp"):
        pass


def test_bad_settings(bundled_model: Path, model_files: dict[str, Path]) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mode": "always"}, "Draft mode 'always' does not exist"),
        ({"n_tokens": 8}, "8 draft tokens were asked for. Use 1 to 7"),
        ({"n_tokens": 0}, "0 draft tokens"),
        ({"mode": "off", "mtp": Path("x.gguf")}, "--mtp was given with --draft off"),
        ({"mtp": Path("nowhere.gguf")}, r"nowhere.gguf does not exist"),
    ]
    for asked, message in cases:
        with pytest.raises(UsageError, match=message), opened(bundled_model, **asked):
            pass
    with pytest.raises(UsageError, match="there are no prediction modules"), opened(model_files["random"], "mtp"):
        pass
    with Model.open(model_files["random"]) as model, pytest.raises(UsageError, match="without prediction modules"):
        drafter_of(model).open("mtp")


def test_counts() -> None:
    found = Drafted()
    found.add("mtp", 3, 3, 4)  # all right, and the token behind them
    found.add("mtp", 3, 1, 2)
    found.add("ngram", 2, 0, 1)
    found.add("", 0, 0, 1)
    found.add("mtp", 3, 2, 2)  # the answer ended with the second draft
    assert (found.n_steps, found.n_tokens, found.n_proposed, found.n_accepted) == (5, 10, 11, 6)
    assert found.reached == [4, 3, 1] and found.accepted == [3, 2, 1]
    assert found.sources == {"mtp": 3, "ngram": 1} and found.tokens_per_step == 2.0
    other = Drafted()
    other.add("ngram", 5, 5, 6)
    other.include(found)
    assert other.reached == [5, 4, 2, 1, 1] and other.n_steps == 6
