"""Saved chats: what a file says, what survives, who may write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from m2lite import UsageError
from m2lite.chat.store import (
    SavedChat,
    delete_session,
    latest_session,
    list_sessions,
    new_name,
    read_session,
    session_path,
    sessions_dir,
)

ASK, SAY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "reasoning_content": "hm"}
MORE, LAST = {"role": "user", "content": "And\nmore?"}, {"role": "assistant", "content": "é ☕"}
STOPPED = {"finish_reason": "interrupted", "attempt": 1, "tokens": [5, 6]}


@pytest.fixture(autouse=True)
def data_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path


def lines(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in session_path(name).read_text().splitlines()]


def test_only_what_is_new_is_written() -> None:
    chat = SavedChat("a", "model.gguf")
    assert not session_path("a").exists()
    chat.save([ASK])
    chat.save([ASK, SAY], {"finish_reason": "stop", "attempt": 0, "tokens": [1]})
    n = len(lines("a"))
    chat.save([ASK, SAY], {"finish_reason": "stop", "attempt": 0, "tokens": [1]})
    assert len(lines("a")) == n == 4
    chat.save([ASK, SAY, MORE, LAST], STOPPED)
    assert [next(iter(line)) for line in lines("a")] == ["m2lite_chat", "add", "add", "answer", "add", "add", "answer"]
    assert lines("a")[0]["model"] == "model.gguf"
    chat.save([ASK, SAY])
    assert lines("a")[-1] == {"cut": 2}
    chat.close()
    saved = read_session(session_path("a"))
    assert saved.messages == [ASK, SAY] and saved.answer is None and saved.title == "Hi" and saved.n_turns == 1


def test_what_is_opened_again_goes_on() -> None:
    chat = SavedChat("b")
    chat.save([ASK, SAY, MORE, LAST], STOPPED)
    chat.close()
    again = SavedChat("b")
    assert again.saved.messages == [ASK, SAY, MORE, LAST] and again.saved.answer == STOPPED
    again.save([ASK, SAY, MORE, SAY])
    again.close()
    assert read_session(session_path("b")).messages == [ASK, SAY, MORE, SAY]


def test_it_is_private() -> None:
    chat = SavedChat("c")
    chat.save([ASK])
    chat.close()
    assert chat.path.stat().st_mode & 0o777 == 0o600 and sessions_dir().stat().st_mode & 0o777 == 0o700


def test_every_torn_end_keeps_what_was_whole() -> None:
    """Whatever a crash left: the messages are a beginning of those that were saved, and saving goes on."""
    whole = [ASK, SAY, MORE, LAST]
    chat = SavedChat("d")
    chat.save(whole, STOPPED)
    chat.close()
    data = chat.path.read_bytes()
    seen = set()
    for n in range(len(data)):
        chat.path.write_bytes(data[:n])
        torn = SavedChat("d")
        messages = torn.saved.messages
        assert messages == whole[: len(messages)] and torn.saved.bad_line is None
        seen.add(len(messages))
        torn.save(whole, STOPPED)
        torn.close()
        again = read_session(chat.path)
        assert again.messages == whole and again.answer == STOPPED
    assert seen == {0, 1, 2, 3, 4}


def test_an_answer_that_nobody_finished() -> None:
    chat = SavedChat("e")
    chat.save([ASK])
    chat.save_part({"thinking": "let me "})
    chat.save_part({"thinking": "see", "content": "Hel"})
    chat.save_part({"content": "lo"})
    chat.close()
    killed = SavedChat("e")
    partial = {"role": "assistant", "content": "Hello", "reasoning_content": "let me see"}
    assert killed.saved.messages == [ASK, partial] and killed.saved.answer == {"finish_reason": "interrupted"}
    killed.save([ASK, partial, MORE])  # as it is, it is the answer now
    killed.close()
    assert read_session(chat.path).messages == [ASK, partial, MORE]
    finished = SavedChat("f")
    finished.save([ASK])
    finished.save_part({"content": "Hel"})
    finished.save([ASK, SAY])
    finished.close()
    assert read_session(finished.path).messages == [ASK, SAY]


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b'"x"', b'{"add": {"role": "user"}}', b'{"add": 3}', b'{"cut": 9}', b'{"cut": "a"}', b"\xff",
     b'{"add": {"role": "king", "content": ""}}', b'{"unknown": 1}', b'{"part": []}', b"[" * 100_000,
     b'{"add": {"role": "user", "content": "\\ud800"}}', b'{"add": {"role": "user", "content": "a", "content": "b"}}',
     b'{"add": {"role": "assistant", "content": "", "reasoning_content": 3}}', b'{"cut": true}', b'{"cut": -1}',
     b'{"add": {"role": "assistant", "content": "", "tool_calls": 3}}', b'{"part": {"content": 3}}',
     b'{"answer": {"tokens": [-1]}}', b'{"answer": {"tokens": [4294967296]}}', b'{"answer": {"tokens": "x"}}',
     b'{"answer": {"attempt": -1}}', b'{"answer": [["attempt", 1]]}', b'{"m2lite_chat": 1}', b"",
     b'{"cut": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_a_bad_line_ends_the_chat_and_is_told(line: bytes) -> None:
    chat = SavedChat("g")
    chat.save([ASK, SAY])
    chat.close()
    with chat.path.open("ab") as file:
        file.write(line + b"\n" + json.dumps({"add": MORE}).encode() + b"\n")
    saved = read_session(chat.path)
    assert saved.messages == [ASK, SAY] and saved.bad_line == 4


def test_who_goes_on_after_a_bad_line_loses_nothing() -> None:
    """What is said from then on is there again, and all that the file held stays beside it."""
    for n, name in enumerate(["g.jsonl.damaged", "g.jsonl.damaged2"], 1):
        chat = SavedChat("g")
        chat.save([ASK, SAY])
        chat.close()
        with chat.path.open("ab") as file:
            file.write(b"{\n" + json.dumps({"add": MORE}).encode() + b"\n")
        before = chat.path.read_bytes()
        chat = SavedChat("g")
        chat.save([ASK, SAY, *[MORE, LAST] * n], STOPPED)
        chat.save([ASK, SAY, *[MORE, LAST] * n, MORE])
        chat.close()
        assert chat.path.with_name(name).read_bytes() == before
        saved = read_session(chat.path)
        assert saved.messages == [ASK, SAY, *[MORE, LAST] * n, MORE] and saved.bad_line is None
    assert [path.stem for path in list_sessions()] == ["g"]


def test_a_damaged_first_line() -> None:
    chat = SavedChat("g")
    chat.save([ASK])
    chat.close()
    chat.path.write_bytes(b"x" + chat.path.read_bytes())
    chat = SavedChat("g")
    assert chat.saved.messages == [] and chat.saved.bad_line == 1
    chat.save([MORE])
    chat.close()
    assert read_session(chat.path).messages == [MORE] and chat.path.with_name("g.jsonl.damaged").exists()


def test_a_clock_that_was_set_back_makes_no_chat_older() -> None:
    first, second = SavedChat("first"), SavedChat("second")
    for chat in (first, second):
        chat.save([ASK])
    os.utime(first.path, ns=(2**62, 2**62))  # written before the clock was set back
    second.save([ASK, MORE])
    assert latest_session() == "second"
    first.save([ASK, MORE])
    assert latest_session() == "first"
    for chat in (first, second):
        chat.close()


def test_a_file_of_another_version() -> None:
    sessions_dir().mkdir(parents=True)
    session_path("h").write_text('{"m2lite_chat": 2}\n')
    with pytest.raises(UsageError, match="version 2, known is 1"):
        SavedChat("h")


def test_one_writer() -> None:
    chat = SavedChat("i")
    chat.save([ASK])
    code = "from m2lite.chat.store import SavedChat; SavedChat('i')"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and f"in use by pid {os.getpid()}" in done.stderr, done.stderr
    with pytest.raises(UsageError, match="in use"):
        delete_session("i")
    chat.close()


def test_names() -> None:
    first, second = SavedChat("one"), SavedChat("two")
    first.save([ASK])
    second.save([MORE])
    os.utime(first.path, ns=(1, 1))
    assert [path.stem for path in list_sessions()] == ["two", "one"] and latest_session() == "two"
    with pytest.raises(UsageError, match="exists already"):
        first.rename("two")
    assert first.name == "one" and first.path.exists()
    first.rename("three")
    first.save([ASK, SAY])
    assert not session_path("one").exists() and read_session(session_path("three")).messages == [ASK, SAY]
    first.close()
    second.close()
    delete_session("three")
    assert [path.stem for path in list_sessions()] == ["two"]
    with pytest.raises(UsageError, match="no saved chat 'three'"):
        delete_session("three")
    for name in ("", "../x", "a/b", ".hidden", "a\n", "x" * 200, " a", "a."):
        with pytest.raises(UsageError, match="cannot be the name"):
            session_path(name)
    assert session_path(new_name()).parent == sessions_dir()


def test_there_is_none() -> None:
    assert list_sessions() == []
    with pytest.raises(UsageError, match="no saved chat"):
        latest_session()


def test_ids_of_every_answer_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a chat with --keep-thinking goes on with the row that it had."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    messages: list[dict[str, Any]] = []
    saved = SavedChat("kept")
    for n in range(2):
        messages += [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        saved.save(messages, {"finish_reason": "stop", "attempt": 0, "tokens": [n, 7]})
    saved.close()
    found = read_session(session_path("kept")).messages
    assert found == messages
    assert [getattr(message, "tokens", None) for message in found] == [None, [0, 7], None, [1, 7]]
