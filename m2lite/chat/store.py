"""Saved chats: one file of JSON lines each, in the user's data directory. Knows messages, no model and no terminal.

A file is a history that only grows: a first line says what it is, `{"add": message}` appends a message, `{"cut": n}`
leaves the first n, `{"answer": {...}}` tells what the last message's ids were, and `{"part": {...}}` is text of an
answer that is still being written. What is on disk survives the process; a last line that was torn off is dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2lite.engine.prefix_cache import n_common
from m2lite.errors import M2liteError, UsageError
from m2lite.shown import shown
from m2lite.storage.durable import atomic_write
from m2lite.storage.line_log import LineLog
from m2lite.system.json_text import JsonError, parse_object
from m2lite.system.paths import user_dir
from m2lite.text.messages import check_messages
from m2lite.text.reply import Reply, Said

VERSION = 1
_MOST_BYTES = 1 << 30  # of a saved chat
_SUFFIX = ".jsonl"
_NAME = re.compile(r"[\w][\w .+-]{0,99}")
_TITLE = 60  # characters of the first question in a list

Message = dict[str, Any]


@dataclass
class Saved:
    """What a file says: the messages, and of an answer at their end the ids and how it ended."""

    messages: list[Message] = field(default_factory=list)
    answer: dict[str, Any] | None = None
    is_partial: bool = False  # the last message is made of parts: nobody finished it
    bad_line: int | None = None  # the first that could not be read: what is behind it does not count

    @property
    def n_turns(self) -> int:
        return sum(message["role"] == "user" for message in self.messages)

    @property
    def title(self) -> str:
        return one_line(next((str(m["content"]) for m in self.messages if m["role"] == "user"), ""), _TITLE)


def one_line(text: str, most: int) -> str:
    """The text in one line of at most so many characters; an ellipsis says that there is more."""
    line = shown(" ".join(text.split()))
    return line if len(line) <= most else line[: most - 1] + "…"


def sessions_dir() -> Path:
    """Where chats are saved; it need not exist."""
    return user_dir("data") / "chats"


def session_path(name: str) -> Path:
    """UsageError for what cannot be the name of a file everywhere."""
    if not _NAME.fullmatch(name) or name != name.strip() or name.endswith("."):
        raise UsageError(f"{name!r} cannot be the name of a chat.", "Use letters, digits, spaces, and . + - _ within.")
    return sessions_dir() / (name + _SUFFIX)


def new_name() -> str:
    """By the clock, and unused."""
    stem = time.strftime("%Y-%m-%d %H.%M.%S")
    names = (stem if n == 1 else f"{stem} {n}" for n in range(1, 1000))
    return next(name for name in names if not session_path(name).exists())


def list_sessions() -> list[Path]:
    """The files of saved chats, the one that was written last first."""
    try:
        files = [path for path in sessions_dir().iterdir() if path.suffix == _SUFFIX and path.is_file()]
        found = [path for path in files if _NAME.fullmatch(path.stem)]  # ._x is macOS's
    except OSError:
        return []
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def latest_session() -> str:
    """The name of the chat that was written last; UsageError if there is none."""
    found = list_sessions()
    if not found:
        raise UsageError(f"There is no saved chat in {sessions_dir()}.", "Leave --continue out.")
    return found[0].stem


def read_session(path: Path) -> Saved:
    """What the file says; what follows a line that cannot be read is left out, and told."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    if len(data) > _MOST_BYTES:
        raise UsageError(f"{path} has more than {_MOST_BYTES:,} bytes: no chat.", "Move it away.")
    return parse_lines(data.split(b"\n")[:-1], path)


def parse_lines(lines: Sequence[bytes], path: Path) -> Saved:
    saved, parts = Saved(), dict[str, list[str]]()
    for number, line in enumerate(lines, 1):
        try:
            event = parse_object(line)
            if number == 1 and event.get("m2lite_chat", VERSION) != VERSION:
                raise UsageError(f"{path}: a chat of version {event['m2lite_chat']!r}, known is {VERSION}.")
            _follow(saved, parts, event, is_first=number == 1)
        except JsonError:
            saved.bad_line = number
            break
    if parts:  # an answer that nobody finished: the process was killed
        thinking, content = ("".join(parts.get(kind, ())) for kind in ("thinking", "content"))
        saved.messages.append(Reply(thinking, content).message())
        saved.answer, saved.is_partial = {"finish_reason": "interrupted"}, True
    return saved


def _follow(saved: Saved, parts: dict[str, list[str]], event: dict[str, Any], is_first: bool) -> None:
    """One line's event; JsonError for what is none."""
    kinds = event.keys() & {"m2lite_chat", "add", "cut", "answer", "part"}
    if len(kinds) != 1 or is_first != ("m2lite_chat" in kinds):
        raise JsonError("no event")
    kind = kinds.pop()
    value = event[kind]
    if kind == "part":
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise JsonError("no part of an answer")
        for name, text in value.items():
            parts.setdefault(name, []).append(text)
        return
    elif kind == "answer":
        _check_answer(value)
        saved.answer = value
        if saved.messages and "tokens" in value:
            saved.messages[-1] = Said.of(saved.messages[-1], value["tokens"])
    elif kind == "add":
        saved.messages.append(_checked(value))
        saved.answer = None
    elif kind == "cut":
        if type(value) is not int or not 0 <= value <= len(saved.messages):
            raise JsonError("cuts what is not there")
        del saved.messages[value:]
        saved.answer = None
    parts.clear()


def _checked(message: Any) -> Message:
    """A message that can be answered or be an answer; JsonError for another."""
    before = [_CALL] if isinstance(message, dict) and message.get("role") == "tool" else []
    try:
        check_messages([*before, message])
    except UsageError as error:
        raise JsonError(str(error)) from None
    if not isinstance(message.get("content"), str | list):
        raise JsonError("no content")
    return message  # type: ignore[no-any-return]


def _check_answer(value: Any) -> None:
    """What an answer's numbers may be, where they are there: they choose random numbers and lines of a table."""
    tokens, attempt = (value.get("tokens", []), value.get("attempt", 0)) if isinstance(value, dict) else (None, None)
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 1 << 31 for token in tokens):
        raise JsonError("no answer's tokens")
    if type(attempt) is not int or not 0 <= attempt < 1 << 32 or not isinstance(value.get("finish_reason", ""), str):
        raise JsonError("no answer's end")


_CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "any", "arguments": {}}}]}


class SavedChat:
    """A chat on disk, and the lock on it. The file appears with the first message."""

    def __init__(self, name: str, model: str = "") -> None:
        """Open the chat of that name, or begin it; `model` is noted at the beginning.

        UsageError if another process has it open.
        """
        self.name, self.model = name, model
        self._log: LineLog | None = None
        self.saved = Saved()
        path = session_path(name)
        if path.exists():
            self._log = LineLog(path)
            try:
                self.saved = parse_lines(self._log.lines, path)
            except BaseException:
                self.close()
                raise

    @property
    def path(self) -> Path:
        return session_path(self.name)

    def save(self, messages: Sequence[Message], answer: Mapping[str, Any] | None = None) -> None:
        """Make the file say `messages`, and of the last of them `answer`: only what is new is written."""
        known = self.saved.messages[:-1] if self.saved.is_partial else self.saved.messages
        n_same = n_common(known, messages)
        events: list[dict[str, Any]] = [] if n_same == len(known) else [{"cut": n_same}]
        events += [{"add": message} for message in messages[n_same:]]
        saved = None if answer is None else dict(answer)
        if saved is not None and (events or saved != self.saved.answer):
            events.append({"answer": saved})
        if events:
            self._append(events)
            self.saved.messages, self.saved.answer, self.saved.is_partial = list(messages), saved, False

    def save_part(self, texts: Mapping[str, str]) -> None:
        """More text of the answer that is being written, by kind; the whole message takes its place."""
        self._append([{"part": dict(texts)}])

    def _append(self, events: Sequence[Mapping[str, Any]]) -> None:
        if self._log is None:
            try:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise M2liteError(f"{self.path.parent}: cannot be made: {error.strerror}.") from error
            log = LineLog(self.path)
            if log.lines:
                log.close()
                raise UsageError(f"{self.path}: was begun by another process.", "Use /save with another name.")
            self._log = log
        if self.saved.bad_line is not None:
            self._set_aside(self._log, self.saved.bad_line)
            self.saved.bad_line = None
        if not self._log.lines:
            created = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            events = [{"m2lite_chat": VERSION, "model": self.model, "created": created}, *events]
        self._log.append([json.dumps(event, ensure_ascii=False) for event in events])
        self._stay_latest()

    def _stay_latest(self) -> None:
        """Who wrote last has the latest time, which `latest_session` goes by, also when the clock was set back."""
        with contextlib.suppress(OSError):
            other = next((path for path in list_sessions() if path != self.path), None)
            newest = 0 if other is None else other.stat().st_mtime_ns
            if self.path.stat().st_mtime_ns <= newest:
                os.utime(self.path, ns=(newest + 1, newest + 1))

    def _set_aside(self, log: LineLog, bad_line: int) -> None:
        """What is written from here on would stand behind a line that ends the chat: that and the rest leave the file.

        All that it held stays beside it, as NAME.jsonl.damaged.
        """
        kept = self.path.with_name(self.path.name + ".damaged")
        n = 2
        while kept.exists():
            kept, n = self.path.with_name(f"{self.path.name}.damaged{n}"), n + 1
        atomic_write(kept, b"".join(line + b"\n" for line in log.lines))
        log.cut(bad_line - 1)

    def rename(self, name: str) -> None:
        """UsageError if the name is taken."""
        target = session_path(name)
        if self._log is None:
            if target.exists():
                raise UsageError(f"{target}: exists already.", "Choose another name.")
            self.name = name
            return
        try:
            self._log.rename(target)
        finally:
            self.name = self._log.path.name.removesuffix(_SUFFIX)

    def close(self) -> None:
        if self._log is not None:
            log, self._log = self._log, None
            log.close()


def delete_session(name: str) -> None:
    """UsageError if there is none, or if it is open."""
    path = session_path(name)
    if not path.exists():
        raise UsageError(f"There is no saved chat {name!r}.", "/sessions lists them.")
    log = LineLog(path)
    log.remove()
