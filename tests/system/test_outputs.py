"""Places: what may be written, and what is an input under another name."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from m2lite.errors import UsageError
from m2lite.system import outputs
from m2lite.system.outputs import Places


@pytest.fixture
def read(tmp_path: Path) -> Path:
    path = tmp_path / "read"
    path.write_text("precious")
    return path


def refusal(places: Places, path: Path | str, beside: tuple[Path, ...] = (), **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        places.approve("-o", path, beside, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_new_name_is_approved_once(tmp_path: Path) -> None:
    places = Places().reads(None, tmp_path / "missing")
    places.approve("-o", tmp_path / "new")
    assert "is written by this command already" in refusal(places, tmp_path / ".." / tmp_path.name / "new")
    for _ in range(2):
        places.approve("-o", tmp_path / "again", is_kept=False)
    assert "is a file that this command reads" in refusal(places, tmp_path / "missing")


def test_an_input_under_any_name(tmp_path: Path, read: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "way").symlink_to("folder")
    os.link(read, tmp_path / "folder" / "hard")
    (tmp_path / "folder" / "soft").symlink_to("../read")
    monkeypatch.chdir(tmp_path / "folder")
    places = Places().reads(read)
    for name in ("../read", "hard", "soft", "../way/hard", tmp_path / "way" / "soft"):
        words = refusal(places, name, kind="replaced")
        assert "is a file that this command reads" in words and f"as {read}" in words
    assert "soft is a file that" in refusal(places, "new", (Path("soft"),))
    assert read.read_text() == "precious"


def test_a_directory_is_all_its_files_and_stdin_is_what_it_reads(
    tmp_path: Path, read: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places().reads(tmp_path)
    assert "this command reads" in refusal(places, read, kind="replaced")
    places.approve("-o", tmp_path / "new")  # beside them is no input
    link = tmp_path / "stdin"
    link.symlink_to(read)
    monkeypatch.setattr(outputs, "_STDIN", link)
    assert "this command reads" in refusal(Places().reads("-"), read, kind="replaced")


def test_what_may_be_there(tmp_path: Path, read: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(read)
    places = Places()
    assert "exists already" in refusal(places, read)
    assert "exists already" in refusal(places, link)
    places.approve("-o", read, kind="replaced", is_kept=False)
    places.approve("-o", link, kind="replaced", is_kept=False)
    places.approve("-o", read, kind="continued", is_kept=False)
    assert f"is a link to {read}. Name the file itself" in refusal(places, link, kind="continued")
    places.approve("-o", link, kind="replaced", begins=b"prec", is_kept=False)
    assert "is no file of this kind" in refusal(places, link, kind="replaced", begins=b"PNG")
    assert "needs the name" in refusal(places, tmp_path / "new", (link,))


@pytest.mark.parametrize("name", ["a\0b", "n" * 300])
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    assert refusal(Places(), tmp_path / name).endswith("Choose another name.")
    assert refusal(Places(), tmp_path / "a", (tmp_path / name,)).endswith("Choose another name.")


def test_a_directory_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert f"nothing can be written in {tmp_path}" in refusal(Places(), tmp_path / "a")


def test_stdout_that_is_appended_to_an_input(tmp_path: Path, read: Path) -> None:
    places = Places().reads(read)
    with read.open("ab") as file, (tmp_path / "other").open("wb") as other:
        places.approve_stdout("-o -", other.fileno())
        places.approve_stdout("-o -", 9999)  # closed
        with pytest.raises(UsageError, match=r"stdout goes to .*read, which this command reads"):
            places.approve_stdout("-o -", file.fileno())
    assert stat.S_ISREG(read.stat().st_mode) and read.read_text() == "precious"
