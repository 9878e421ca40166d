"""Chats that are left, killed and opened again, in a real terminal."""

from __future__ import annotations

import itertools
import json
import os
import signal
import stat
from pathlib import Path

import pytest

from m2lite import Model, Sampling
from m2lite.chat.chat import Chat
from m2lite.chat.commands import last_exchange
from m2lite.chat.store import SavedChat, read_session
from m2lite.dialogue.conversation import Conversation
from tests.chat.conftest import Start
from tests.chat.terminal import CTRL_C, CTRL_D, ENTER, TAB, Terminal

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long

Models = dict[str, Path]


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """A place for chats that no other test sees."""
    return {"XDG_DATA_HOME": str(tmp_path)}


def chats(home: dict[str, str]) -> list[Path]:
    return sorted(Path(home["XDG_DATA_HOME"], "m2lite", "chats").glob("*.jsonl"))


def say(chat: Terminal, line: str, answer: str) -> None:
    chat.ask(line)
    chat.wait_for(answer)
    chat.wait_for_prompt()


def leave(chat: Terminal) -> None:
    chat.send(CTRL_D)
    assert chat.exit_code() == 0


def test_yesterday(start: Start, model_files: Models, home: dict[str, str]) -> None:
    chat = start(model_files["reply"], env=home)
    say(chat, "/sessions", "no chat is saved yet")
    assert chats(home) == []
    say(chat, "Hello there", "10 tok · ")
    leave(chat)
    [path] = chats(home)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    chat = start(model_files["reply"], "-c", env=home)
    assert "1 turns" in chat.raw and "> Hello there" in chat.raw and "Fine é" in chat.raw
    say(chat, "Again", "10 tok · ")
    say(chat, "/sessions", r"\* .* 2 turns  Hello there")
    say(chat, "/rename talk", "this chat is now talk")
    say(chat, "/clear", "forgot 2 turns; /load talk brings them back")
    say(chat, "New", "10 tok · ")
    say(chat, "/load nothing", "error: There is no saved chat 'nothing'")
    say(chat, "/load talk", "— talk: 2 turns")
    say(chat, "/stats", "turns 2")
    say(chat, "/delete talk", "error: 'talk' is this chat")
    leave(chat)
    assert [path.stem == "talk" for path in chats(home)].count(True) == 1 and len(chats(home)) == 2


def test_nothing_is_saved_if_so_wanted(start: Start, model_files: Models, home: dict[str, str]) -> None:
    chat = start(model_files["reply"], "--no-save", env=home)
    say(chat, "Hello", "10 tok · ")
    say(chat, "/rename x", "error: This chat is not saved")
    assert chats(home) == []
    say(chat, "/save kept", "saved as kept")
    leave(chat)
    assert [path.stem for path in chats(home)] == ["kept"]


def test_killed_while_it_answers(start: Start, model_files: Models, home: dict[str, str]) -> None:
    chat = start(model_files["answer"], "--session", "k", env=home)
    chat.ask("Hello")
    chat.wait_for("abcdefgabcdefg")
    chat.process.kill(signal.SIGKILL)
    chat.exit_code()
    chat = start(model_files["answer"], "-c", env=home)
    assert "> Hello" in chat.raw and "this question has no answer yet" in chat.raw
    chat.ask("/continue")
    chat.wait_for("abcdefgabcdefg")
    chat.send(CTRL_C)
    chat.wait_for(r"— stopped \(kept \d+ tokens\)\. /continue to go on")
    chat.wait_for_prompt()
    leave(chat)


def test_killed_in_a_long_answer(bundled_model: Path, home: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written every few seconds, here with every piece, is there, and goes on."""
    monkeypatch.setenv("XDG_DATA_HOME", home["XDG_DATA_HOME"])
    monkeypatch.setattr("m2lite.chat.chat.PART_S", 0.0)
    with Model.open(bundled_model) as model:
        chat = Chat(Conversation(model.session()), {"sampling": Sampling(seed=1)}, saved=SavedChat("k"))
        pieces = chat.conversation.ask("Tell me a story about a fox.", **chat.options)
        keeper, said = chat.keeper(), dict.fromkeys(("thinking", "content"), "")
        for piece in itertools.islice(pieces, 60):
            keeper.add(piece)
            said[piece.kind] += piece.text
        chat.close()  # as a kill would: nothing else is written
        again = Chat(Conversation(model.session()), {"sampling": Sampling(seed=1)})
        again.open(SavedChat("k"))
        assert again.conversation.messages[1] == {
            "role": "assistant", "content": said["content"], "reasoning_content": said["thinking"],
        }  # fmt: skip
        assert len(said["content"]) > 20 and "this answer was not finished" in last_exchange(again)
        list(again.conversation.resume(**chat.options))
        again.save()
        again.close()
        [_, whole] = read_session(chats(home)[0]).messages
        assert whole["content"].startswith(said["content"]) and len(whole["content"]) > len(said["content"])
        pieces.close()


def test_stop_and_go_on(start: Start, model_files: Models, home: dict[str, str]) -> None:
    chat = start(model_files["answer"], "--max-tokens", "10", "--session", "s", env=home)
    say(chat, "Hello", "/continue goes on")
    say(chat, "/continue", "/continue goes on")
    leave(chat)
    answers = [json.loads(line)["add"] for line in chats(home)[0].read_text().splitlines() if '"assistant"' in line]
    assert answers[1]["content"].startswith(answers[0]["content"]) and len(answers[1]["content"]) >= 17


def test_one_terminal_at_a_time(start: Start, model_files: Models, home: dict[str, str]) -> None:
    chat = start(model_files["reply"], "--session", "s", env=home)
    say(chat, "Hello", "10 tok · ")
    other = Terminal(
        ["chat", str(model_files["reply"]), "-c"], {**os.environ, **home, "TERM": "xterm"}, 24, 80
    )  # it never comes to its prompt
    other.wait_for(rf"in use by pid {chat.process.pid}")
    assert other.exit_code() == 2


def test_commands_on_the_last_turn(start: Start, model_files: Models, home: dict[str, str], tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\necho 'from the editor' > \"$1\"\n")
    editor.chmod(0o755)
    chat = start(model_files["reply"], "--session", "t", env=home | {"EDITOR": str(editor), "VISUAL": str(editor)})
    say(chat, "/undo", "error: Nothing was asked yet")
    say(chat, "Hello", "10 tok · ")
    say(chat, "/regen", "10 tok · ")
    say(chat, "/continue", "error: The last answer is complete")
    say(chat, "/edit", "10 tok · ")
    say(chat, "/context", r"turn 1: from the editor")
    say(chat, "/undo", "forgot: from the editor")
    say(chat, "/stats", "turns 0")
    say(chat, "/undo now", "error: /undo takes nothing behind it")
    leave(chat)


def test_settings_and_files(start: Start, model_files: Models, home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("from the file]~b]\x1b[2J")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    chat = start(model_files["reply"], "--session", "f", env=home, columns=200)
    say(chat, "/set", "temp 1.0  top_k 40")
    say(chat, "/set temp 0.5", r"temp 0.5")
    say(chat, "/set temp hot", "error: /set temp hot: expected a number")
    say(chat, "/set color red", "error: 'color' cannot be set")
    say(chat, "/think hide", "thinking is folded")
    say(chat, "Hello", r"thought for [\d.]+ s")
    say(chat, "/think off", "thinking is off")
    say(chat, "/think loud", "error: /think loud: expected show")
    say(chat, f"/read {tmp_path}/none", "cannot be read: No such file")
    say(chat, f"/read {tmp_path}/bytes", "it is not UTF-8 text: byte 0 is 0xff")
    say(chat, f"/read {tmp_path}/notes.txt", "notes.txt: 21 tokens, which go with your next message")
    say(chat, "/think show", "thinking is shown")
    say(chat, "What is in it?", "10 tok · ")
    say(chat, f"/export md {tmp_path}/out.md", "out.md: 4 messages")
    say(chat, f"/export json {tmp_path}/out.json", "out.json: 4 messages")
    say(chat, f"/export md {tmp_path}/out.md", "error: .*out.md: exists already")
    leave(chat)
    messages = json.loads((tmp_path / "out.json").read_text())
    assert "from the file]~b]\x1b[2J" in messages[2]["content"] and messages[2]["content"].endswith("What is in it?")
    assert messages[3]["reasoning_content"] == "hm"
    assert "## user" in (tmp_path / "out.md").read_text() and "> hm" in (tmp_path / "out.md").read_text()


def test_several_lines_between_marks_and_tab(start: Start, model_files: Models, home: dict[str, str]) -> None:
    chat = start(model_files["reply"], "--session", "m", env=home)
    chat.send('"""one' + ENTER + "/two" + ENTER + 'three"""' + ENTER)
    chat.wait_for("10 tok · ")
    chat.wait_for_prompt()
    chat.send("/cont" + TAB)
    chat.wait_for("go on with an answer that was stopped")
    chat.send("\x15")
    chat.send("/stat" + TAB)
    chat.wait_for_text("> /stats")
    chat.send(ENTER)
    chat.wait_for("turns 1")
    chat.wait_for_prompt()
    leave(chat)
    assert '{"role": "user", "content": "one\\n/two\\nthree"}' in chats(home)[0].read_text()


def test_what_cannot_be_saved_is_told(start: Start, model_files: Models, home: dict[str, str], tmp_path: Path) -> None:
    """Or a directory that cannot be made: the answer comes, and what was not saved is saved when it can be."""
    (tmp_path / "m2lite").mkdir()
    (tmp_path / "m2lite" / "chats").touch()
    chat = start(model_files["reply"], "--session", "d", env=home)
    chat.ask("Hello")
    chat.wait_for("error: the chat is not saved: .*chats: cannot be made")
    chat.wait_for("10 tok · ")
    chat.wait_for_prompt()
    (tmp_path / "m2lite" / "chats").unlink()
    say(chat, "Again", "10 tok · ")
    leave(chat)
    assert '"content": "Hello"' in chats(home)[0].read_text() and chat.raw.count("is not saved") == 1
