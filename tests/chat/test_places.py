"""What a chat writes is never what it reads: /export, /save, and the tool write_file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m2lite import Model
from m2lite.chat.chat import Chat
from m2lite.chat.commands import run_command
from m2lite.chat.store import session_path
from m2lite.chat.tools import Limits, run_tool
from m2lite.commands.places import places_beside
from m2lite.dialogue.conversation import Conversation
from m2lite.errors import UsageError
from m2lite.sampling.draw import Sampling
from m2lite.system.outputs import Places


@pytest.fixture
def model(model_files: dict[str, Path], tmp_path: Path) -> Path:
    (tmp_path / "mtp-model.gguf").write_text("modules")
    return Path(shutil.copy(model_files["reply"], tmp_path / "model.gguf"))


@pytest.fixture
def places(model: Path) -> Places:
    return places_beside(models=[model])


def write(limits: Limits, path: str) -> str:
    call = {"function": {"name": "write_file", "arguments": {"path": path, "content": "gone"}}}
    return run_tool(call, limits, lambda: False)


def test_a_tool_writes_no_file_of_the_open_model(model: Path, tmp_path: Path, places: Places) -> None:
    os.link(model, tmp_path / "hard")
    (tmp_path / "soft").symlink_to("model.gguf")
    limits, before = Limits(tmp_path, places=places), model.read_bytes()
    for name in ("model.gguf", "hard", "soft", "mtp-model.gguf"):
        assert "is a file that this command reads" in write(limits, name)
    assert model.read_bytes() == before and (tmp_path / "mtp-model.gguf").read_text() == "modules"
    for _ in range(2):  # its own files it may write again
        assert write(limits, "notes/a.txt") == "4 bytes written to notes/a.txt"


def test_a_chat_is_not_exported_or_saved_over_anything(
    opened: Callable[[str], Any], model: Path, tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    loaded: Model = opened("reply")
    with loaded.session() as session:
        chat = Chat(Conversation(session), {"sampling": Sampling(seed=1)}, places=places)
        (tmp_path / "dangling").symlink_to("nowhere")
        for name in ("model.gguf", "mtp-model.gguf", "dangling", "none/a", "."):
            with pytest.raises(UsageError):
                run_command(chat, f"/export md {tmp_path}/{name}")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "model.gguf", "mtp-model.gguf"]
        session_path("a").parent.mkdir(parents=True)
        os.link(model, session_path("a"))
        with pytest.raises(UsageError, match="is a file that this command reads"):
            run_command(chat, "/save a")
