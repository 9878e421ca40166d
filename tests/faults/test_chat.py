"""A saved chat at every file operation: whatever was saved is there again, under one name or the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m2lite.chat.store import SavedChat, delete_session, list_sessions, read_session, session_path
from m2lite.errors import UsageError
from tests.faults.disk import at_every_call

ASK, SAY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "é" * 300, "reasoning_content": "hm"}
MORE, LAST = {"role": "user", "content": "And\nmore?"}, {"role": "assistant", "content": "Hello"}
TURN, WHOLE = [ASK, SAY], [ASK, SAY, MORE, LAST]
ANSWER = {"finish_reason": "stop", "attempt": 0, "tokens": [1]}

Job = Callable[[Path], None]


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch) -> Callable[[Job], Job]:
    """The job with the folder as the user's home."""

    def wrap(job: Job) -> Job:
        def run(folder: Path) -> None:
            monkeypatch.setenv("XDG_DATA_HOME", str(folder))
            job(folder)

        return run

    return wrap


def prepare(folder: Path) -> None:
    chat = SavedChat("a", "m")
    chat.save(TURN, ANSWER)
    chat.close()


def check_goes_on(name: str) -> None:
    chat = SavedChat(name)
    chat.save(WHOLE, ANSWER)
    chat.close()
    saved = read_session(session_path(name))
    assert (saved.messages, saved.answer, saved.bad_line) == (WHOLE, ANSWER, None)


def test_saving_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_home: Callable[[Job], Job]) -> None:
    confirmed: list[list[Any]] = []

    def job(folder: Path) -> None:
        confirmed[:] = [[]]
        chat = SavedChat("a", "m")
        try:
            for messages in (TURN[:1], TURN, WHOLE[:3]):
                chat.save(messages, ANSWER if len(messages) == 2 else None)
                confirmed.append(list(messages))
            chat.save_part({"thinking": "a"})
            confirmed.append([*WHOLE[:3], {"role": "assistant", "content": "", "reasoning_content": "a"}])
            chat.save(WHOLE, ANSWER)
            confirmed.append(WHOLE)
        finally:
            chat.close()

    def check(folder: Path, is_done: bool, is_dead: bool) -> None:
        saved = read_session(session_path("a")).messages if session_path("a").exists() else []
        n_kept = len(confirmed[-1])
        assert saved == WHOLE[: len(saved)] or saved == confirmed[-1] or saved[:3] == WHOLE[:3]
        assert len(saved) >= n_kept and (saved[: min(n_kept, 3)] == confirmed[-1][:3])
        check_goes_on("a")

    assert at_every_call(tmp_path, monkeypatch, lambda folder: None, at_home(job), at_home_check(at_home, check)) > 20


def at_home_check(at_home: Callable[[Job], Job], check: Callable[[Path, bool, bool], None]) -> Any:
    return lambda folder, is_done, is_dead: at_home(lambda folder: check(folder, is_done, is_dead))(folder)


def test_renaming_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_home: Callable[[Job], Job]) -> None:
    def job(folder: Path) -> None:
        chat = SavedChat("a")
        try:
            chat.rename("b")
        finally:
            chat.close()

    def check(folder: Path, is_done: bool, is_dead: bool) -> None:
        names = [path.stem for path in list_sessions()]
        assert names and set(names) <= {"a", "b"} and (names == ["b"] or not is_done or len(names) == 2)
        assert all(read_session(session_path(name)).messages == TURN for name in names)
        check_goes_on(names[0])

    assert at_every_call(tmp_path, monkeypatch, at_home(prepare), at_home(job), at_home_check(at_home, check)) >= 5


def test_deleting_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_home: Callable[[Job], Job]) -> None:
    def job(folder: Path) -> None:
        delete_session("a")

    def check(folder: Path, is_done: bool, is_dead: bool) -> None:
        if session_path("a").exists():
            assert not is_done and read_session(session_path("a")).messages == TURN
            delete_session("a")
        assert list_sessions() == []

    assert at_every_call(tmp_path, monkeypatch, at_home(prepare), at_home(job), at_home_check(at_home, check)) >= 3


def test_setting_a_damaged_chat_aside_at_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_home: Callable[[Job], Job]
) -> None:
    behind = b"{\n" + json.dumps({"add": LAST}).encode() + b"\n"

    def damage(folder: Path) -> None:
        prepare(folder)
        with session_path("a").open("ab") as file:
            file.write(behind)

    def job(folder: Path) -> None:
        chat = SavedChat("a")
        try:
            chat.save(WHOLE, ANSWER)
        finally:
            chat.close()

    def check(folder: Path, is_done: bool, is_dead: bool) -> None:
        kept = [session_path("a"), *session_path("a").parent.glob("*.damaged*")]
        assert any(path.read_bytes().endswith(behind) for path in kept)
        assert read_session(session_path("a")).messages[:2] == TURN
        check_goes_on("a")
        assert any(path.read_bytes().endswith(behind) for path in session_path("a").parent.glob("*.damaged*"))

    assert at_every_call(tmp_path, monkeypatch, at_home(damage), at_home(job), at_home_check(at_home, check)) > 12


def test_a_name_that_is_taken_stays(at_home: Callable[[Job], Job], tmp_path: Path) -> None:
    def job(folder: Path) -> None:
        prepare(folder)
        other = SavedChat("b")
        other.save(WHOLE)
        with pytest.raises(UsageError, match="exists already"):
            other.rename("a")
        assert other.name == "b"
        other.close()
        assert read_session(session_path("a")).messages == TURN

    at_home(job)(tmp_path)
