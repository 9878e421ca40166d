"""Reads the XML of MiniMax-M2's tool calls, as the chat template writes it, whole or as it comes. Knows no tokens.

The template writes a string as it is, every other value as JSON, and nothing around either. So a value is every byte
between its tags, and ends where what follows can only be the next tag of the format. Text that a reading leaves out,
and values that look as if they might have been meant otherwise, are told.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from m2lite.text.schema import Allowed, Arguments, Schema, SchemaError
from m2lite.text.values import SHOWN, ArgumentsText, Typed, allowed_by_any, convert, required_by_all

T = TypeVar("T")
Reading = Generator[None, None, T]  # it stops where only what comes next can decide

_TAG = re.compile(r"<(invoke|parameter)\s+name=|</(invoke|parameter)>")
_BEGUN_TAG = re.compile(r"<(?:/?[a-z]*|(?:invoke|parameter)\s+[name]*)\Z")  # or the beginning of one
_NAME = re.compile(r"\s*(?:\"([^\"<>\n]*)\"|'([^'<>\n]*)'|\"([^\n]{0,1000}?)\"|([^>\s\"']*))\s*>")
_NEXT_CALL = re.compile(r"\s*(<invoke|\Z)")  # or nothing more
_MOST_TRIES = 64  # of ends of a value that is JSON
_MOST_ERRORS = 20


def parse_tool_calls(
    text: str, tools: Sequence[Mapping[str, Any]] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The calls in `text`, one block without its own tags, as {"type": "function", "function": {"name", "arguments"}},
    and what was wrong with it or may have been meant otherwise, a sentence each.

    A call that is cut off is an error and no call. A value that does not fit its schema is an error and stays a string.
    """
    reader = CallReader(tools)
    reader.finish(text)
    errors, more = reader.errors[:_MOST_ERRORS], len(reader.errors) - _MOST_ERRORS
    return reader.calls, [*errors, f"There are {more:,} more warnings of this kind."] if more > 0 else errors


def is_whole_call(text: str, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `text` is calls of these tools and nothing else; their values need not fit."""
    reader = CallReader(tools)
    reader.finish(text)
    return bool(reader.calls) and reader.is_whole


class CallPiece(NamedTuple):
    """A call begins, whose name is `text`; or `text` more of the JSON of its arguments, which is whole at its end."""

    kind: Literal["begin", "arguments"]
    text: str


@dataclass(frozen=True)
class _Tag:
    name: str
    start: int
    end: int  # of an opening tag: where its own name begins
    is_closing: bool

    def opens(self, name: str) -> bool:
        return self.name == name and not self.is_closing

    def closes(self, name: str) -> bool:
        return self.name == name and self.is_closing


class CallReader:
    """One block of calls, from tag to tag. However its text is cut, the pieces of a call add up to the same: what a
    piece says is certain, and the rest waits for what decides it."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        functions = [tool.get("function", tool) for tool in tools or ()]
        self.calls = list[dict[str, Any]]()  # those that are whole
        self.errors = list[str]()
        self.is_whole = True  # nothing was cut off, left out, or names no tool
        self.functions: Mapping[str, Mapping[str, Any]] = {each["name"]: each for each in functions}
        self.text, self.is_end = "", False
        self.tags, self._n_scanned = list[_Tag](), 0  # characters of the text in which tags were looked for
        self.last_close = self.last_invoke = -1  # known at the end
        self.is_endless = False  # no `</parameter>` that follows is surely the end of a value
        self._pieces = list[CallPiece]()
        self._value: tuple[ArgumentsText, int] | None = None  # whose text goes on, and where it begins
        self._reading = self._read()

    def push(self, text: str) -> list[CallPiece]:
        """What `text` more makes certain."""
        self.text += text
        self._scan()
        next(self._reading, None)
        if self._value is not None:
            arguments, begin = self._value
            arguments.more(self.text, begin, self._n_scanned)
        return self._told()

    def finish(self, text: str = "") -> list[CallPiece]:
        """The same, and nothing follows."""
        self.text += text
        self._scan()
        self.is_end = True
        self.last_close = max((n for n in range(len(self.tags)) if self._closes_call(n)), default=-1)
        self.last_invoke = max((n for n in range(len(self.tags)) if self._is_known_invoke(n)), default=-1)
        next(self._reading, None)
        return self._told()

    def _told(self) -> list[CallPiece]:
        found, self._pieces = self._pieces, []
        return found

    def _scan(self) -> None:
        """Find the tags of what came; what may be the beginning of one is looked at again."""
        for match in _TAG.finditer(self.text, self._n_scanned):
            name, is_closing = f"{match[1] or match[2]}", match[1] is None
            self.tags.append(_Tag(name, match.start(), match.end(), is_closing))
            self._n_scanned = match.end()
        last = self.text.rfind("<", self._n_scanned)
        self._n_scanned = last if last >= 0 and _BEGUN_TAG.match(self.text, last) else len(self.text)

    def _read(self) -> Reading[None]:
        at, place = 0, 0  # the tag that comes next, and the end of the text that was read
        while (tag := (yield from self._tag(at))) is not None:
            opened = (yield from self._named(tag, self.functions)) if tag.opens("invoke") else None
            if opened is None:
                at += 1
                continue
            name, begin = opened
            self._leave_out(place, tag.start, "")
            at, place = yield from self._read_call(name, self._behind(at, begin), begin)
        if self.text.strip() and not self.calls and not self.errors:
            self.errors.append(f"The tool call holds no <invoke>: {self.text.strip()[:SHOWN]!r}.")
        else:
            self._leave_out(place, len(self.text), "")

    def _tag(self, at: int) -> Reading[_Tag | None]:
        while at >= len(self.tags) and not self.is_end:
            yield
        return self.tags[at] if at < len(self.tags) else None

    def _named(self, tag: _Tag, known: Mapping[str, Any] | frozenset[str]) -> Reading[tuple[str, int] | None]:
        """The name in an opening tag, as `_name` has it, once that is certain."""
        full = [f'"{name}">' for name in known]
        while not self.is_end:
            rest = self.text[tag.end : tag.end + max(map(len, full), default=0)]
            may_be_longer = any(len(rest) < len(each) and each.startswith(rest) for each in full)
            if not may_be_longer and self._name(tag, known) is not None:
                break
            yield
        return self._name(tag, known)

    def _read_call(self, name: str, at: int, place: int) -> Reading[tuple[int, int]]:
        """Read the call whose name ends at `place`, from tag `at` on; the tag behind it, and where that call ends."""
        alternatives = self._alternatives(name)
        known = dict.fromkeys(key for each in alternatives for key in each.names)
        missing = required_by_all(alternatives)
        values = list[tuple[str, str]]()
        self._pieces.append(CallPiece("begin", name))
        arguments = ArgumentsText(alternatives, lambda text: self._pieces.append(CallPiece("arguments", text)))
        while (tag := (yield from self._tag(at))) is not None:
            is_next = tag.opens("invoke") and (yield from self._named(tag, self.functions)) is not None
            if tag.closes("invoke") or is_next:
                self._leave_out(place, tag.start, f" in the call of {name!r}")
                if is_next:
                    self.errors.append(f"The call of {name!r} has no end and was taken to end where the next begins.")
                    self.is_whole = False
                self._take(name, values, alternatives, arguments)
                return (at, tag.start) if is_next else (at + 1, tag.end)
            opened = (yield from self._named(tag, known)) if tag.opens("parameter") else None
            if opened is None:  # a tag that has no place here is text that has none
                at += 1
                continue
            key, begin = opened
            self._leave_out(place, tag.start, f" in the call of {name!r}")
            first = self._behind(at, begin)
            missing = missing - {key} if key in missing else missing
            arguments.begin(key)
            end = yield from self._value_end(first, begin, missing, allowed_by_any(key, alternatives), arguments)
            if end is None:
                break
            if any(self._may_end_value(n) for n in range(first, end)):
                self.errors.append(f"The call of {name!r}: {key!r} holds tags of a call, which were read as its text.")
            arguments.end_value(self.text, begin, self.tags[end].start)
            values.append((key, self.text[begin : self.tags[end].start]))
            at, place = end + 1, self.tags[end].end
        self.errors.append(f"The call of {name!r} is cut off.")
        self.is_whole = False
        return len(self.tags), len(self.text)

    def _value_end(
        self, at: int, begin: int, missing: frozenset[str], allowed: Sequence[Allowed], arguments: ArgumentsText
    ) -> Reading[int | None]:
        """The closing tag of the value that begins at `begin` and in which tag `at` comes first."""
        self._value = arguments, begin
        first = yield from self._closing(at)
        self._value = None
        arguments.more(self.text, begin, len(self.text) if first is None else self.tags[first].start)
        if first is None:
            return None
        if allowed and not any(each.may_be_text for each in allowed):
            return (yield from self._json_end(first, begin, allowed))
        n: int | None = first
        while n is not None and not self.is_endless:
            if (yield from self._ends_value(n, missing)):
                return n
            n = yield from self._closing(n + 1)
        self.is_endless = True
        return first

    def _closing(self, at: int) -> Reading[int | None]:
        """The first `</parameter>` from tag `at` on."""
        while (tag := (yield from self._tag(at))) is not None:
            if tag.closes("parameter"):
                return at
            at += 1
        return None

    def _json_end(self, first: int, begin: int, allowed: Sequence[Allowed]) -> Reading[int]:
        """JSON says itself where it ends; the first closing tag if it is none."""
        n: int | None = first
        for _ in range(_MOST_TRIES):
            if n is None:
                break
            if any(convert(self.text[begin : self.tags[n].start], each)[1] for each in allowed):
                return n
            n = yield from self._closing(n + 1)
        return first

    def _ends_value(self, n: int, missing: frozenset[str]) -> Reading[bool]:
        """Whether tag `n`, a `</parameter>`, is the end of a value and no part of it."""
        following = yield from self._tag(n + 1)
        if following is None:
            return False
        if self.text[self.tags[n].end : following.start].strip():  # a part of it, unless what must come comes behind
            opened = (yield from self._named(following, missing)) if missing and following.opens("parameter") else None
            return opened is not None and opened[0] in missing
        if following.opens("parameter"):
            return True
        if not following.closes("invoke"):
            return False
        while not self.is_end:
            match = _NEXT_CALL.match(self.text, following.end)
            if (match and match[1]) or any(self._is_known_invoke(m) for m in range(n + 2, len(self.tags))):
                return True
            yield
        return (
            n + 1 in (self.last_close, len(self.tags) - 1)
            or _NEXT_CALL.match(self.text, following.end) is not None
            or self.last_invoke > n
        )

    def _may_end_value(self, n: int) -> bool:
        """Whether tag `n` might have been the end of a value: what comes next may come behind one."""
        following = self.tags[n + 1] if n + 1 < len(self.tags) else None
        if not self.tags[n].closes("parameter") or following is None:
            return False
        return following.opens("parameter") or following.name == "invoke"

    def _closes_call(self, n: int) -> bool:
        """Whether tag `n` ends a call right behind a value."""
        if n == 0 or not self.tags[n].closes("invoke") or not self.tags[n - 1].closes("parameter"):
            return False
        return not self.text[self.tags[n - 1].end : self.tags[n].start].strip()

    def _is_known_invoke(self, n: int) -> bool:
        opened = self._name(self.tags[n], self.functions) if self.tags[n].opens("invoke") else None
        return opened is not None and (not self.functions or opened[0] in self.functions)

    def _behind(self, at: int, place: int) -> int:
        """The first tag behind tag `at` that begins at `place` or later."""
        return next((n for n in range(at + 1, len(self.tags)) if self.tags[n].start >= place), len(self.tags))

    def _name(self, tag: _Tag, known: Mapping[str, Any] | frozenset[str]) -> tuple[str, int] | None:
        """The name in an opening tag, and where the tag ends. One that is known may hold any character."""
        for name in sorted(known, key=len, reverse=True):
            if self.text.startswith(f'"{name}">', tag.end):
                return name, tag.end + len(name) + 3
        match = _NAME.match(self.text, tag.end)
        if match is None:
            return None
        return next(group for group in match.groups() if group is not None), match.end()

    def _leave_out(self, start: int, end: int, where: str) -> None:
        """Text that belongs to nothing."""
        text = self.text[start:end].strip()
        if text:
            self.errors.append(f"Text{where} beside its values was left out: {text[:SHOWN]!r}.")
            self.is_whole = False

    def _alternatives(self, name: str) -> list[Arguments]:
        """What the tool's schema says of its arguments; nothing if there is no such tool."""
        if self.functions and name not in self.functions:
            self.errors.append(f"The call of {name!r} names no tool; there are {', '.join(map(repr, self.functions))}.")
            self.is_whole = False
        parameters = self.functions.get(name, {}).get("parameters")
        try:
            return Schema(parameters).arguments() if isinstance(parameters, Mapping) else []
        except SchemaError as error:
            self.errors.append(f"The schema of {name!r} {error}.")
            return []

    def _take(
        self, name: str, values: Sequence[tuple[str, str]], alternatives: Sequence[Arguments], arguments: ArgumentsText
    ) -> None:
        """The whole call, by the alternative that fits it best."""
        tried = [Typed(name, values, each) for each in alternatives] or [Typed(name, values, None)]
        best = min(tried, key=lambda each: each.n_misfits)
        self.errors += best.errors
        self.calls.append({"type": "function", "function": {"name": name, "arguments": best.arguments}})
        arguments.end(best.arguments)
