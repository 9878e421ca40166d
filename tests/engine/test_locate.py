"""decode/locate.py: what a MODEL argument means."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from m2lite.engine.locate import BUNDLED, locate_model, models_in
from m2lite.errors import BadModelError, UsageError
from m2lite.storage.gguf_reader import open_gguf

COMMIT = "b" * 40


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def split(folder: Path, stem: str, count: int) -> list[Path]:
    return [folder / f"{stem}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]


def test_a_file_a_directory_of_one_and_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "a.gguf"
    touch(model, tmp_path / "mtp-a.gguf", tmp_path / "._a.gguf", tmp_path / "notes.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_model(tmp_path) == locate_model(model) == locate_model("~/a.gguf") == locate_model("~") == model
    assert locate_model(None).parent == BUNDLED
    with pytest.raises(UsageError, match="does not exist"):
        locate_model(tmp_path / "b.gguf")


def test_a_split_is_one_model_and_several_are_named(tmp_path: Path) -> None:
    parts = split(tmp_path, "m-Q4_K_M", 3)
    touch(*parts)
    assert locate_model(tmp_path) == parts[0]
    touch(*split(tmp_path, "m-Q4_K_M", 2), tmp_path / "b.gguf")
    with pytest.raises(UsageError, match=r"holds 3 models: b.gguf, m-Q4_K_M-00001-of-00002.gguf \(2 parts\), m-Q4_K"):
        locate_model(tmp_path)
    touch(*(tmp_path / f"c{i}.gguf" for i in range(9)))
    with pytest.raises(UsageError, match=r"holds 12 models: .* and 4 more"):
        locate_model(tmp_path)


def test_a_split_without_its_first_part_is_still_found(tmp_path: Path) -> None:
    touch(*split(tmp_path, "m", 3)[1:])
    assert locate_model(tmp_path).name == "m-00002-of-00003.gguf"  # the reader then names what is missing


def test_folders_of_quantizations_are_looked_into(tmp_path: Path) -> None:
    small, large = split(tmp_path / "UD-IQ2_M", "m-UD-IQ2_M", 2), split(tmp_path / "Q4_K_M", "m-Q4_K_M", 3)
    touch(*small, tmp_path / ".cache" / "huggingface" / "x.gguf")
    assert locate_model(tmp_path) == small[0]
    touch(*large)
    with pytest.raises(UsageError) as caught:
        locate_model(tmp_path)
    assert "Q4_K_M/m-Q4_K_M-00001-of-00003.gguf (3 parts), UD-IQ2_M/m-UD-IQ2_M-00001-of-00002.gguf (2 parts)." in str(
        caught.value
    )
    touch(tmp_path / "own.gguf")  # what lies in the directory itself comes first
    assert models_in(tmp_path) == [tmp_path / "own.gguf"]


def test_a_directory_without_a_model_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(BadModelError, match="holds no GGUF file"):
        locate_model(tmp_path)
    touch(tmp_path / "._model.gguf")  # what macOS leaves beside files
    touch(tmp_path / "._model.safetensors")
    with pytest.raises(BadModelError, match="holds no GGUF file"):
        locate_model(tmp_path)
    touch(tmp_path / "model-00001-of-00130.safetensors")
    with pytest.raises(BadModelError, match=r"holds safetensors and no GGUF file. Convert them first: m2lite convert"):
        locate_model(tmp_path)


def test_a_cached_repository_opens_through_its_links(tmp_path: Path) -> None:
    """A split file whose parts are links to blobs, as `hf download unsloth/...` leaves it."""
    repository = tmp_path / "models--unsloth--MiniMax-M2-GGUF"
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "minimax-m2", split_max_tensors=1)
    for i in range(2):
        writer.add_tensor(f"t{i}", np.full(32, i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder = repository / "snapshots" / COMMIT / "Q8_0"
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, part in enumerate(split(tmp_path, "m", 2)):
        part.rename(repository / "blobs" / f"{i}{i}")
        (folder / part.name).symlink_to(f"../../../blobs/{i}{i}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    found = locate_model(repository)
    assert found == folder / "m-00001-of-00002.gguf"
    with open_gguf(found) as model:
        assert set(model.tensors) == {"t0", "t1"} and model.view("t1").view("<f4").mean() == 1
    (repository / "blobs" / "00").unlink()
    with pytest.raises(BadModelError, match=r"00001-of-00002.gguf is a link to a file that is not there"):
        locate_model(repository)
    with pytest.raises(BadModelError, match="is a link to a file that is not there"):
        locate_model(found)
