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

from m2lite.decode.drafts import n_common
from m2lite.errors import M2liteError, UsageError
from m2lite.shown import shown
from m2lite.storage.durable import LineLog, fsops
from m2lite.system.paths import user_dir
from m2lite.text.reply import Said

VERSION = 1
_SUFFIX = ".jsonl"
_NAME = re.compile(r"[\w][\w .+-]{0,99}")
_TITLE = 60  # characters of the first question in a list

Message = dict[str, Any]


@dataclass
class Saved:
    """What a file says: the messages, and of an answer at their end the ids and how it ended."""

    messages: list[Message] = field(default_factory=list)
    answer: dict[str, Any] | None = None
    first: dict[str, Any] = field(default_factory=dict)
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


def check_name(name: str) -> str:
    """Raises UsageError for what cannot be the name of a file everywhere."""
    if not _NAME.fullmatch(name) or name != name.strip() or name.endswith("."):
        raise UsageError(f"{name!r} cannot be the name of a chat.", "Use letters, digits, spaces, and . + - _ within.")
    return name


def session_path(name: str) -> Path:
    return sessions_dir() / (check_name(name) + _SUFFIX)


def new_name() -> str:
    """By the clock, and unused."""
    stem = time.strftime("%Y-%m-%d %H.%M.%S")
    names = (stem if n == 1 else f"{stem} {n}" for n in range(1, 1000))
    return next(name for name in names if not session_path(name).exists())


def list_sessions() -> list[Path]:
    """The files of saved chats, the one that was written last first."""
    try:
        found = [path for path in sessions_dir().iterdir() if path.suffix == _SUFFIX and path.is_file()]
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
    with path.open("rb") as file:
        data = file.read()
    return parse_lines(data[: data.rfind(b"\n") + 1].splitlines(), path)


def parse_lines(lines: Sequence[bytes], path: Path) -> Saved:
    saved, parts = Saved(), dict[str, str]()
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            if number == 1 and event["m2lite_chat"] != VERSION:
                raise UsageError(f"{path}: a chat of version {event['m2lite_chat']!r}, known is {VERSION}.")
            _follow(saved, parts, event)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            saved.bad_line = number
            break
    if parts:  # an answer that nobody finished: the process was killed
        saved.messages.append(partial_message(parts))
        saved.answer, saved.is_partial = {"finish_reason": "interrupted"}, True
    return saved


def _follow(saved: Saved, parts: dict[str, str], event: dict[str, Any]) -> None:
    """One line's event; raises for what is none."""
    (kind,) = event.keys() & {"m2lite_chat", "add", "cut", "answer", "part"}
    value = event[kind]
    if kind == "m2lite_chat":
        saved.first = event
    elif kind == "part":
        for name, text in value.items():
            parts[name] = parts.get(name, "") + text
        return
    elif kind == "answer":
        saved.answer = dict(value)
        tokens = value.get("tokens")
        if saved.messages and isinstance(tokens, list) and all(isinstance(token, int) for token in tokens):
            saved.messages[-1] = Said.of(saved.messages[-1], tokens)
    elif kind == "add":
        if value["role"] not in ("system", "user", "assistant", "tool") or not isinstance(value["content"], str | list):
            raise ValueError("no message")
        saved.messages.append(value)
        saved.answer = None
    else:
        del saved.messages[range(len(saved.messages) + 1)[value] :]
        saved.answer = None
    parts.clear()


def partial_message(parts: Mapping[str, str]) -> Message:
    """An answer that was not finished, from its texts by kind."""
    message: Message = {"role": "assistant", "content": parts.get("content", "")}
    return message | ({"reasoning_content": parts["thinking"]} if parts.get("thinking") else {})


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
        told = None if answer is None else dict(answer)
        if told is not None and (events or told != self.saved.answer):
            events.append({"answer": told})
        if events:
            self._append(events)
            self.saved.messages, self.saved.answer, self.saved.is_partial = list(messages), told, False

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
        if not self._log.lines:
            created = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            events = [{"m2lite_chat": VERSION, "model": self.model, "created": created}, *events]
        self._log.append([json.dumps(event, ensure_ascii=False) for event in events])

    def rename(self, name: str) -> None:
        """UsageError if the name is taken."""
        target = session_path(name)
        if self._log is not None:
            _take_name(self.path, target)
            self._log.path = target
        elif target.exists():
            raise UsageError(f"{target}: exists already.", "Choose another name.")
        self.name = name

    def close(self) -> None:
        if self._log is not None:
            log, self._log = self._log, None
            log.close()


def _take_name(path: Path, target: Path) -> None:
    """A link is made only where there is none yet: nobody else's chat is overwritten."""
    try:
        os.link(path, target)
    except FileExistsError:
        raise UsageError(f"{target}: exists already.", "Choose another name.") from None
    except OSError as error:
        raise M2liteError(f"{target}: cannot be written: {error.strerror}.") from error
    with contextlib.suppress(OSError):
        fsops.unlink(path)


def delete_session(name: str) -> None:
    """UsageError if there is none, or if it is open."""
    path = session_path(name)
    if not path.exists():
        raise UsageError(f"There is no saved chat {name!r}.", "/sessions lists them.")
    log = LineLog(path)
    log.remove()
