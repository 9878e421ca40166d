"""Real file systems that are full: exit code 5 with numbers, what was finished stays, and room is enough to go on."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from m2lite.chat.store import SavedChat, read_session
from m2lite.errors import ResourceError
from m2lite.quant.convert import Conversion, convert
from m2lite.quant.journal import Journal
from tests.conftest import Run
from tests.quant import checkpoints

MakeDisk = Callable[[int], Path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[MakeDisk]:
    """A file system of so many bytes, in memory."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    mounted: list[Path] = []

    def make(n_bytes: int) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "m2lite-test", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path, n_left: int) -> Path:
    """A file that leaves so many bytes free, in whole pages."""
    status = os.statvfs(disk)
    filler = disk / "filler"
    with filler.open("wb") as file:
        file.write(bytes(status.f_bavail * status.f_frsize - n_left))
    return filler


def test_a_conversion(run_inline: Run, f32: Conversion, source: Path, small_disk: MakeDisk) -> None:
    """Told before anything is written; then with room for one of both files; then with enough."""
    disk = small_disk(4 << 20)
    filler = fill(disk, 64 << 10)
    for command in ("convert", "quantize"):
        given = source if command == "convert" else f32.path
        done = run_inline(command, given, "-o", disk / "x.gguf", "--type", "f32")
        assert done.returncode == 5 and re.search(r"takes [\d.]+ KiB, .* has [\d.]+ KiB free", done.stderr), done.stderr
        assert [path.name for path in disk.iterdir()] == ["filler"]
    filler.unlink()
    done = run_inline("convert", source, "-o", disk / "x.gguf", "--type", "f32")
    assert done.returncode == 0, done.stderr
    assert checkpoints.digest(disk / "x.gguf") == checkpoints.digest(f32.path)


def test_a_conversion_whose_disk_fills_on_the_way(
    f32: Conversion, source: Path, small_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Space is reserved first; what fails later is the journal. Going on gives the same bytes."""
    disk = small_disk(4 << 20)
    monkeypatch.setattr("m2lite.quant.job.BATCH_BYTES", 1)
    begin = Journal.begin

    def begin_and_fill(self: Journal, ticket: Any) -> None:
        begin(self, ticket)
        fill(disk, 0)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "begin", begin_and_fill)
        with pytest.raises(
            ResourceError, match=r"no room: [\d.]+ \w+ are needed, 0 B are free .* run the same command"
        ) as e:
            convert(source, disk / "x.gguf", "f32")
    assert e.value.exit_code == 5
    assert {path.name for path in disk.iterdir()} == {"filler", "x.gguf.part", "mtp-x.gguf.part", "x.gguf.journal"}
    (disk / "filler").unlink()
    assert convert(source, disk / "x.gguf", "f32").resumed_bytes > 0
    assert checkpoints.digest(disk / "x.gguf") == checkpoints.digest(f32.path)


def test_a_batch(run_inline: Run, model_files: dict[str, Path], tmp_path: Path, small_disk: MakeDisk) -> None:
    disk, given = small_disk(1 << 20), tmp_path / "in.jsonl"
    given.write_text("".join(json.dumps({"custom_id": f"n{n}" + "x" * 400, "prompt": "a"}) + "\n" for n in range(12)))
    command = ("--model", model_files["reply"], "--seed", "1", "--inflight", "2", "--order", "input")

    def results(out: Path) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in out.read_text().splitlines()]
        for line in found:
            line["response"]["body"].pop("created")
        return found

    assert run_inline("batch", given, "-o", tmp_path / "whole.jsonl", *command).returncode == 0
    whole = results(tmp_path / "whole.jsonl")
    filler = fill(disk, 12 << 10)  # the manifest, and two pages of results
    done = run_inline("batch", given, "-o", disk / "out.jsonl", *command)
    assert done.returncode == 5 and re.search(r"no room: [\d.]+ \w+ are needed, [\d.]+ \w+ are free", done.stderr), (
        done.stderr
    )
    kept = results(disk / "out.jsonl")
    assert 3 <= len(kept) < 12 and all(line in whole for line in kept)
    filler.unlink()
    assert run_inline("batch", given, "-o", disk / "out.jsonl", *command).returncode == 0
    assert results(disk / "out.jsonl") == whole
    assert {path.name for path in disk.iterdir()} == {"out.jsonl", "out.jsonl.manifest.json"}


def test_a_chat(small_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = small_disk(256 << 10)
    monkeypatch.setenv("XDG_DATA_HOME", str(disk))
    chat, messages = SavedChat("a"), list[dict[str, Any]]()
    chat.save([{"role": "user", "content": "Hi"}])
    filler = fill(disk, 8 << 10)
    with pytest.raises(ResourceError, match=r"a\.jsonl: no room: [\d.]+ \w+ are needed, [\d.]+ \w+ are free"):
        for n in range(100):
            chat.save([*messages, {"role": "user", "content": f"{n}" * 500}])
            messages.append({"role": "user", "content": f"{n}" * 500})
    assert len(messages) > 3 and read_session(chat.path).messages == messages
    filler.unlink()
    chat.save([*messages, {"role": "user", "content": "more"}])
    chat.close()
    assert read_session(chat.path).messages == [*messages, {"role": "user", "content": "more"}]
