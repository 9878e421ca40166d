"""HF_DIR may be a repository in a Hugging Face cache: every file of its snapshot is a link into blobs/."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from m2lite.errors import UsageError
from m2lite.quant.convert import convert
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
