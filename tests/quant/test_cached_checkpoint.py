"""HF_DIR may be a repository in a Hugging Face cache: every file of its snapshot is a link into blobs/."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from m2lite.engine.locate import locate_model
from m2lite.errors import UsageError
from m2lite.quant.convert import convert
from m2lite.storage.gguf_reader import open_gguf
from tests.quant import checkpoints

COMMIT = "c" * 40


def cached(root: Path, plain: Path) -> Path:
    """The files of a plain directory, as `hf download` keeps them."""
    repository = root / "models--MiniMaxAI--MiniMax-M2"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file in plain.iterdir():
        name = hashlib.sha256(file.read_bytes()).hexdigest()
        (repository / "blobs" / name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{name}")
    return repository


def test_a_cached_repository_converts_as_its_plain_copy_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = checkpoints.write(tmp_path / "plain", checkpoints.small(), n_shards=3)
    hub = tmp_path / "hub"
    repository = cached(hub, plain)
    expected = checkpoints.digests(convert(plain, tmp_path / "a.gguf", "q8_0"))
    monkeypatch.setenv("HOME", str(hub))
    for path in (repository, f"~/{repository.name}", repository / "snapshots" / COMMIT):
        assert checkpoints.digests(convert(path, tmp_path / "b.gguf", "q8_0", overwrite=True)) == expected
    with pytest.raises(UsageError, match="is a cache of 1 repositories: models--MiniMaxAI--MiniMax-M2"):
        convert(hub, tmp_path / "c.gguf", "q8_0")


def shared(hub: Path, plain: Path) -> Path:
    """The same with one store for all repositories, as huggingface_hub 2.4 has it: blobs/ holds links too."""
    repository, store = hub / "models--MiniMaxAI--MiniMax-M2", hub / "blobs" / "ab"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs", repository / "refs", store):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(plain.iterdir())):
        (store / f"xet{number}").write_bytes(file.read_bytes())
        (repository / "blobs" / f"etag{number}").symlink_to(f"../../blobs/ab/xet{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/etag{number}")
    return repository


def test_a_cache_with_a_shared_store_converts_and_opens(tmp_path: Path) -> None:
    plain = checkpoints.write(tmp_path / "plain", checkpoints.small(), n_shards=3)
    expected = convert(plain, tmp_path / "a.gguf", "q8_0", split_max_bytes=80_000)
    repository = shared(tmp_path / "hub", plain)
    made = convert(repository, tmp_path / "b.gguf", "q8_0", split_max_bytes=80_000)
    assert [path.read_bytes() for path in made.paths] == [path.read_bytes() for path in expected.paths]
    (told,) = made.warnings
    assert "holds links to files elsewhere" in told and str(tmp_path / "hub" / "blobs" / "ab") in told
    # GGUF files in such a cache: every part of a split is a link to a link.
    folder = tmp_path / "parts"
    folder.mkdir()
    for path in made.paths[:-1]:  # the last is the prediction modules'
        path.rename(folder / path.name)
    with open_gguf(locate_model(shared(tmp_path / "hub2", folder))) as gguf:
        assert len(gguf.parts) == len(made.paths) - 1 > 1 and len(gguf.tensors) == made.n_tensors
