"""storage/hub.py: paths into a Hugging Face cache as `hf download` lays it out."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2lite.errors import BadModelError, UsageError
from m2lite.storage.hub import find_snapshot

OLD, NEW = "1" * 40, "a" * 40


def make_cache(root: Path, *commits: str, main: str | None = None, name: str = "models--MiniMaxAI--MiniMax-M2") -> Path:
    """HF_HOME/hub/models--*, with one linked file in every snapshot."""
    repository = root / "hub" / name
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "0123abcd").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "snapshots").mkdir()
    for commit in commits:
        (repository / "snapshots" / commit).mkdir()
        (repository / "snapshots" / commit / "config.json").symlink_to("../../blobs/0123abcd")
    if main is not None:
        (repository / "refs" / "main").write_text(main)
    return repository


def test_a_repository_is_the_snapshot_of_main(tmp_path: Path) -> None:
    repository = make_cache(tmp_path, OLD, NEW, main=OLD)
    assert find_snapshot(repository) == find_snapshot(repository / "snapshots") == repository / "snapshots" / OLD
    assert find_snapshot(str(repository)) == repository / "snapshots" / OLD


def test_without_main_the_only_snapshot_counts(tmp_path: Path) -> None:
    repository = make_cache(tmp_path, NEW)
    assert find_snapshot(repository) == repository / "snapshots" / NEW
    (repository / "refs" / "main").write_text(OLD)  # fetched as metadata only, or half removed
    assert find_snapshot(repository) == repository / "snapshots" / NEW


@pytest.mark.parametrize("ref", [None, OLD[:-1], "../../../etc", "", "\xe9"])
def test_several_snapshots_need_a_choice(tmp_path: Path, ref: str | None) -> None:
    repository = make_cache(tmp_path, OLD, NEW, main=ref)
    with pytest.raises(UsageError, match=f"holds 2 snapshots, {OLD}, {NEW}, and refs/main names none") as caught:
        find_snapshot(repository)
    assert str(repository / "snapshots") in caught.value.todo


def test_an_empty_repository_says_how_to_fetch_it(tmp_path: Path) -> None:
    repository = make_cache(tmp_path)
    with pytest.raises(BadModelError, match=r"holds no snapshot of MiniMaxAI/MiniMax-M2. Fetch it: hf download Mini"):
        find_snapshot(repository)


def test_everything_else_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = make_cache(tmp_path, NEW, main=NEW)
    snapshot = repository / "snapshots" / NEW
    plain = tmp_path / "plain"
    (plain / "snapshots").mkdir(parents=True)  # a folder of that name makes no repository
    for path in (snapshot, snapshot / "config.json", plain, tmp_path / "missing", plain / "snapshots"):
        assert find_snapshot(path) == path
    assert find_snapshot(snapshot / "config.json").is_symlink()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_snapshot("~/plain") == plain and find_snapshot("~/hub/" + repository.name) == snapshot


def test_the_cache_itself_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    make_cache(tmp_path, NEW, main=NEW)
    make_cache(tmp_path, NEW, name="models--unsloth--MiniMax-M2-GGUF")
    for path in (tmp_path, tmp_path / "hub"):
        with pytest.raises(UsageError, match="is a cache of 2 repositories: models--MiniMaxAI--MiniMax-M2, models--un"):
            find_snapshot(path)
    (tmp_path / "m.gguf").touch()  # a directory with a model of its own, in which a cache lies too
    assert find_snapshot(tmp_path) == tmp_path


def test_names(tmp_path: Path) -> None:
    (tmp_path / "models--a--b--c" / "snapshots").mkdir(parents=True)
    with pytest.raises(BadModelError, match="holds no snapshot of a/b--c"):
        find_snapshot(tmp_path / "models--a--b--c")
