"""The model's tokens as a reply: thinking, content, tool calls. Knows MiniMax-M2's format, no weights, no terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from m2lite.text.calls import parse_tool_calls
from m2lite.text.stop_text import StopTexts
from m2lite.text.tokenizer import Tokenizer

__all__ = ["Piece", "Reply", "ReplyStream", "Said", "opens_thinking", "parse_tool_calls"]

Kind = Literal["thinking", "content", "tool_call"]
KINDS: Final[tuple[Kind, ...]] = ("thinking", "content", "tool_call")


@dataclass(frozen=True)
class Piece:
    """Some text of one kind. The text of a tool call is the XML between its two tags."""

    kind: Kind
    text: str


class Said(dict[str, Any]):
    """An assistant message that knows the ids which it was, without the one that ended it; None: not known."""

    tokens: Sequence[int] | None = None

    @classmethod
    def of(cls, message: Mapping[str, Any], tokens: Sequence[int] | None) -> Said:
        said = cls(message)
        said.tokens = tokens
        return said


@dataclass(frozen=True)
class Reply:
    """A whole reply. `errors` are the tool calls that could not be read, one sentence each."""

    thinking: str
    content: str
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def message(self) -> dict[str, Any]:
        """The reply as an assistant message, to continue the conversation with."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message


class ReplyStream:
    r"""Sorts tokens into pieces. The line breaks that belong to the format are taken off, as M2 writes them:
    `thinking\n</think>\n\ncontent\n<minimax:tool_call>calls</minimax:tool_call>`."""

    def __init__(self, tokenizer: Tokenizer, in_thinking: bool, stop_texts: Sequence[str] = ()) -> None:
        """`stop_texts` end the content before the first of them."""
        self._tokenizer = tokenizer
        self._stops = StopTexts(stop_texts)
        has_tags = tokenizer.think_open_id is not None and tokenizer.think_close_id is not None
        self._kind: Kind = "thinking" if in_thinking and has_tags else "content"
        # (kind, tag) -> the kind that follows, the line breaks dropped after the tag, the one dropped before it
        self._tags: dict[tuple[Kind, int | None], tuple[Kind, int, bool]] = {
            ("thinking", tokenizer.think_close_id): ("content", 2, True),
            ("content", tokenizer.think_open_id): ("thinking", 1, False),
            ("content", tokenizer.tool_open_id): ("tool_call", 0, True),
            ("tool_call", tokenizer.tool_close_id): ("content", 0, False),
        }
        self._decoder = tokenizer.stream(start=False)
        self._skip = 0  # line breaks still to drop at the start of this stretch
        self._held = ""  # a line break that a tag may yet claim
        self._blank = True  # nothing of this stretch but white space so far
        self._texts: dict[Kind, list[str]] = {kind: [] for kind in KINDS}

    @property
    def kind(self) -> Kind:
        """What the next token belongs to, unless it is a tag."""
        return self._kind

    @property
    def is_stopped(self) -> bool:
        """A stop text has come: nothing behind it counts."""
        return self._stops.is_found

    def push(self, index: int) -> list[Piece]:
        """The text that this token completes; none for a tag, a stop token or a part of a character."""
        if index in self._tokenizer.stop_ids or self.is_stopped:
            return []
        if (self._kind, index) in self._tags:
            kind, skip, claims = self._tags[self._kind, index]
            return self._turn(kind, skip, claims)
        if self._kind == "thinking" and self._blank and index == self._tokenizer.think_open_id:
            return self._turn("thinking", 1, True)  # the prompt has opened the thinking already
        return self._take(self._decoder.push(index))

    def finish(self) -> list[Piece]:
        """What is left when no token follows."""
        return self._take(self._decoder.flush()) + self._release() + self._let_go()

    def reply(self, tools: Sequence[Mapping[str, Any]] | None = None) -> Reply:
        """All that was pushed, with the tool calls read by the tools' schemas. Call `finish` before."""
        thinking, content, xml = ("".join(self._texts[kind]) for kind in KINDS)
        return Reply(thinking, content, *parse_tool_calls(xml, tools))

    def _turn(self, kind: Kind, skip: int, claims: bool) -> list[Piece]:
        """Another stretch of text begins."""
        pieces = self._take(self._decoder.flush())
        if not claims:
            pieces += self._release()
        pieces += self._let_go()
        self._decoder = self._tokenizer.stream()
        self._kind, self._skip, self._held, self._blank = kind, skip, "", True
        return pieces

    def _take(self, text: str) -> list[Piece]:
        while self._skip and text.startswith("\n"):
            text, self._skip = text[1:], self._skip - 1
        if not text:
            return []
        self._skip = 0
        self._blank = self._blank and text.isspace()
        text, self._held = self._held + text, ""
        if self._kind != "tool_call" and text.endswith("\n"):
            text, self._held = text[:-1], "\n"
        return self._piece(text)

    def _release(self) -> list[Piece]:
        text, self._held = self._held, ""
        return self._piece(text)

    def _let_go(self) -> list[Piece]:
        """What might have been the beginning of a stop text is none."""
        return self._keep(self._stops.flush())

    def _piece(self, text: str) -> list[Piece]:
        return self._keep(self._stops.push(text) if self._kind == "content" else text)

    def _keep(self, text: str) -> list[Piece]:
        if not text:
            return []
        self._texts[self._kind].append(text)
        return [Piece(self._kind, text)]


def opens_thinking(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether the reply to this prompt begins inside the thinking: its last think tag opens."""
    tags = (tokenizer.think_open_id, tokenizer.think_close_id)
    last = next((index for index in reversed(prompt) if index in tags), None)
    return last is not None and last == tokenizer.think_open_id
