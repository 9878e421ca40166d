"""The model's tokens as a reply: thinking, content, tool calls. Knows MiniMax-M2's format, no weights, no terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, Literal

from m2lite.text.calls import is_whole_call, parse_tool_calls
from m2lite.text.stop_text import StopTexts
from m2lite.text.tokenizer import Tokenizer

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
    """A whole reply. `errors`: what was wrong with its tool calls or may have been meant otherwise, in sentences."""

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

    def __init__(
        self,
        tokenizer: Tokenizer,
        in_thinking: bool,
        stop_texts: Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """`stop_texts` end the content before the first of them; `tools` are those that may be called.

        A whole call of one of `tools` inside the thinking ends the thinking. Until it is whole, its pieces are held.
        """
        self._tokenizer, self._tools = tokenizer, tools
        self._stops = StopTexts(stop_texts)
        has_tags = tokenizer.think_open_id is not None and tokenizer.think_close_id is not None
        # What the next token belongs to, unless it is a tag.
        self.kind: Kind = "thinking" if in_thinking and has_tags else "content"
        # (kind, tag) -> the kind that follows, the line breaks dropped after the tag, the one dropped before it
        self._tags: dict[tuple[Kind, int | None], tuple[Kind, int, bool]] = {
            ("thinking", tokenizer.think_close_id): ("content", 2, True),
            ("content", tokenizer.tool_open_id): ("tool_call", 0, True),
            ("tool_call", tokenizer.tool_close_id): ("content", 0, False),
        }
        self._may_open = self.kind == "content" and has_tags  # `<think>` opens the thinking: nothing was said yet
        self._decoder = tokenizer.stream(start=False)
        self._skip = 0  # line breaks still to drop at the start of this stretch
        self._held = ""  # a line break that a tag may yet claim
        self._blank = True  # nothing of this stretch but white space so far
        self._texts: dict[Kind, list[str]] = {kind: [] for kind in KINDS}
        self._blocks: list[int] = []  # where in the texts of calls each block begins
        # The ids of what may be a call inside the thinking, its opening tag first.
        self._pending: list[int] | None = None
        self._ended_by_call = False

    @property
    def is_stopped(self) -> bool:
        """A stop text has come: nothing behind it counts."""
        return self._stops.is_found

    @property
    def stop_text(self) -> str | None:
        """Which one has come."""
        return self._stops.found

    def push(self, index: int) -> list[Piece]:
        """The text that this token completes; none for a tag, a stop token or a part of a character."""
        if index in self._tokenizer.stop_ids or self.is_stopped:
            return []
        tokenizer = self._tokenizer
        if self.kind == "thinking" and self._tools and index == tokenizer.tool_open_id:
            pieces = self._give_up()
            self._pending = [index]
            return pieces
        if self._pending is not None:
            if index != tokenizer.think_close_id:
                self._pending.append(index)
                return self._settle() if index == tokenizer.tool_close_id else []
            return self._give_up() + self._push(index)
        return self._push(index)

    def finish(self) -> list[Piece]:
        """What is left when no token follows."""
        pieces = self._settle() if self._pending is not None else []
        return pieces + self._take(self._decoder.flush()) + self._release() + self._let_go()

    def reply(self) -> Reply:
        """All that was pushed, with the tool calls read by the tools' schemas. Call `finish` before."""
        thinking, content, _ = ("".join(self._texts[kind]) for kind in KINDS)
        calls, errors = list[dict[str, Any]](), list[str]()
        for begin, end in pairwise([*self._blocks, len(self._texts["tool_call"])]):
            found, wrong = parse_tool_calls("".join(self._texts["tool_call"][begin:end]), self._tools)
            calls += found
            errors += wrong
        if self._ended_by_call:
            errors.insert(0, "The model called a tool inside its thinking, which was taken to end there.")
        return Reply(thinking, content, calls, errors)

    def _push(self, index: int) -> list[Piece]:
        if (self.kind, index) in self._tags:
            kind, skip, claims = self._tags[self.kind, index]
            return self._turn(kind, skip, claims)
        if self._ended_by_call and self._blank and self.kind == "content" and index == self._tokenizer.think_close_id:
            return self._turn("content", 2, True)  # it closes what the call has closed
        if self._blank and index == self._tokenizer.think_open_id:
            if self.kind == "thinking":
                return self._turn("thinking", 1, True)  # the prompt has opened the thinking already
            if self._may_open:
                return self._turn("thinking", 1, False)
        return self._take(self._decoder.push(index))

    def _settle(self) -> list[Piece]:
        """The call inside the thinking is whole, or there is nothing more of it: it counts, or is a thought."""
        assert self._pending is not None
        ids = self._pending[1:]
        is_closed = ids[-1:] == [self._tokenizer.tool_close_id]
        text = self._tokenizer.decode(ids[:-1] if is_closed else ids)
        if not is_whole_call(text, self._tools or ()):
            return self._give_up()
        pending, self._pending, self._ended_by_call = self._pending, None, True
        pieces = self._turn("tool_call", 0, True)
        for index in pending[1:]:
            pieces += self._push(index)
        return pieces

    def _give_up(self) -> list[Piece]:
        """What might have been a call is a thought."""
        pending, self._pending = self._pending or [], None
        return [piece for index in pending for piece in self._push(index)]

    def _turn(self, kind: Kind, skip: int, claims: bool) -> list[Piece]:
        """Another stretch of text begins."""
        pieces = self._take(self._decoder.flush())
        if not claims:
            pieces += self._release()
        pieces += self._let_go()
        self._decoder = self._tokenizer.stream()
        self.kind, self._skip, self._held, self._blank = kind, skip, "", True
        self._may_open = False
        if kind == "tool_call":
            self._blocks.append(len(self._texts[kind]))
        return pieces

    def _take(self, text: str) -> list[Piece]:
        while self._skip and text.startswith("\n"):
            text, self._skip = text[1:], self._skip - 1
        if not text:
            return []
        self._skip = 0
        self._blank = self._blank and text.isspace()
        text, self._held = self._held + text, ""
        if self.kind != "tool_call" and text.endswith("\n"):
            text, self._held = text[:-1], "\n"
        return self._piece(text)

    def _release(self) -> list[Piece]:
        text, self._held = self._held, ""
        return self._piece(text)

    def _let_go(self) -> list[Piece]:
        """What might have been the beginning of a stop text is none."""
        return self._keep(self._stops.flush())

    def _piece(self, text: str) -> list[Piece]:
        return self._keep(self._stops.push(text) if self.kind == "content" else text)

    def _keep(self, text: str) -> list[Piece]:
        if not text:
            return []
        self._texts[self.kind].append(text)
        return [Piece(self.kind, text)]


def opens_thinking(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether the reply to this prompt begins inside the thinking: its last think tag opens."""
    tags = (tokenizer.think_open_id, tokenizer.think_close_id)
    last = next((index for index in reversed(prompt) if index in tags), None)
    return last is not None and last == tokenizer.think_open_id


def close_thinking(tokenizer: Tokenizer) -> list[int]:
    """The ids that end the thinking, as the template writes it."""
    if tokenizer.think_close_id is None:
        return []
    return [*tokenizer.encode("\n"), tokenizer.think_close_id, *tokenizer.encode("\n\n")]
