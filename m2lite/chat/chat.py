"""What a chat is made of: the conversation, how it is answered, and where it is saved. Knows no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2lite.chat.store import Message, Saved, SavedChat
from m2lite.chat.tools import Tools
from m2lite.dialogue.conversation import AnswerOptions, Conversation, Pieces, Turn
from m2lite.errors import UsageError
from m2lite.system.inputs import read_input
from m2lite.system.outputs import Places
from m2lite.text.reply import KINDS, Piece, Reply

_MOST_FILE_BYTES = 4 << 20
PART_S = 5.0  # after which the text of an unfinished answer goes to disk

# How an answer is begun: by `Conversation.ask` and its like, with the AnswerOptions that whoever shows it fills in.
Begin = Callable[..., Pieces]


@dataclass
class Chat:
    """A conversation that is saved as it goes."""

    conversation: Conversation
    options: AnswerOptions  # without who stops an answer and who hears of its progress
    show_thinking: bool = True
    is_plain: bool = False  # answers are shown as they are, not as Markdown
    saved: SavedChat | None = None  # None: nothing is saved
    tools: Tools | None = None
    approve: str = "ask"  # which calls run: ask, never or all
    approved: set[str] = field(default_factory=set)  # tools whose calls run without being asked for again
    max_rounds: int = 3  # of the same calls with the same results, and nothing else said; 0: without end
    places: Places = field(default_factory=Places)  # what was read for it, and must not be written over
    attached: list[tuple[str, str]] = field(default_factory=list)  # (name, text) of files that go with the next message

    def open(self, saved: SavedChat) -> None:
        """Go on with a saved chat; a system message that there is now takes the place of its own."""
        if self.saved is not None:
            self.saved.close()
        self.saved = saved
        system = self.conversation.system
        self.conversation.restore(saved.saved.messages, said_of(saved.saved))
        if system is not None:
            self.conversation.set_system(system)

    def save(self) -> None:
        """What is new goes to disk. A chat in which nothing was said is not begun."""
        conversation, saved = self.conversation, self.saved
        if saved is None or not (conversation.n_turns or saved.saved.messages):
            return
        said, answer = conversation.said, None
        if conversation.messages and conversation.messages[-1]["role"] == "assistant":
            answer = {"finish_reason": said.finish_reason, "attempt": said.attempt, "tokens": said.tokens}
        saved.save(conversation.messages, answer)

    def keeper(self) -> Keeper:
        """For the answer that was just asked for."""
        conversation = self.conversation
        answer = conversation.answer
        before = conversation.said.reply if answer.n_given else None
        return Keeper(None if answer.is_aside else self.saved, conversation.asked, before)

    def close(self) -> None:
        if self.saved is not None:
            self.saved.close()


class Keeper:
    """Puts the text of an answer on disk while it is written: the process may be killed."""

    def __init__(self, saved: SavedChat | None, messages: list[Message], before: Reply | None) -> None:
        """`messages` are those that are answered; `before` is the beginning of an answer that is continued."""
        self._saved, self._messages = saved, messages
        self._new = dict.fromkeys(KINDS, "")
        if before is not None:
            self._new |= {"thinking": before.thinking, "content": before.content}
        self._at = time.monotonic()

    def begin(self) -> None:
        """What is answered goes to disk, where it is not there yet."""
        if self._saved is not None:
            self._saved.save(self._messages)

    def add(self, piece: Piece) -> None:
        self._new[piece.kind] += piece.text
        if self._saved is not None and time.monotonic() - self._at >= PART_S:
            self.begin()
            self._saved.save_part({kind: text for kind, text in self._new.items() if text})
            self._new = dict.fromkeys(KINDS, "")
            self._at = time.monotonic()


def said_of(saved: Saved) -> Turn:
    """The answer at the end of a saved chat."""
    found: Mapping[str, Any] = saved.answer or {"finish_reason": "stop"}
    message = saved.messages[-1] if saved.messages else {}
    return Turn(
        tokens=list(found.get("tokens", [])),
        reply=Reply(str(message.get("reasoning_content") or ""), str(message.get("content", ""))),
        finish_reason=str(found.get("finish_reason")),
        attempt=found.get("attempt", 0),
    )


def with_files(text: str, files: Sequence[tuple[str, str]]) -> str:
    """The text behind (name, text) of files that go with it."""
    shown = [f"{name}:\n{fence(body)}\n{body.rstrip(chr(10))}\n{fence(body)}\n\n" for name, body in files]
    return "".join(shown) + text


def fence(text: str) -> str:
    """Backquotes that the text does not hold."""
    n = 3
    while "`" * n in text:
        n += 1
    return "`" * n


def export_markdown(messages: list[Message]) -> str:
    """The chat for people: questions as headings, thinking as quotes."""
    parts = []
    for message in messages:
        role, content = message["role"], str(message["content"])
        thinking = str(message.get("reasoning_content") or "")
        parts.append(f"## {role}\n")
        if thinking:
            parts.append("".join(f"> {line}\n" for line in thinking.splitlines()))
        parts.append(content + "\n")
    return "\n".join(parts)


def read_text(path: Path) -> str:
    """A text file that goes with a message; UsageError says why not."""
    try:
        data = read_input(path, _MOST_FILE_BYTES)
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{data[error.start]:02x}"
        raise UsageError(f"{path} cannot be read: it is not UTF-8 text: {byte}.") from None
