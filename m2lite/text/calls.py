"""Reads the XML of MiniMax-M2's tool calls, as the chat template writes it. Pure functions of texts and schemas.

The template writes a string as it is, every other value as JSON, and nothing around either. So a value is every byte
between its tags, and ends where what follows can only be the next tag of the format. Text that a reading leaves out,
and values that look as if they might have been meant otherwise, are told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from m2lite.system.json_text import JsonError, parse_json
from m2lite.text.schema import ANYTHING, Allowed, Arguments, Schema, SchemaError

_TAG = re.compile(r"<(invoke|parameter)\s+name=|</(invoke|parameter)>")
_NAME = re.compile(r"\s*(?:\"([^\"<>\n]*)\"|'([^'<>\n]*)'|\"([^\n]{0,1000}?)\"|([^>\s\"']*))\s*>")
_NEXT_CALL = re.compile(r"\s*(<invoke|\Z)")  # or nothing more
_MOST_TRIES = 64  # of ends of a value that is JSON
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
_MOST_ERRORS = 20
_SHOWN = 80  # characters of what is quoted in an error


def parse_tool_calls(
    text: str, tools: Sequence[Mapping[str, Any]] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The calls in `text`, one block without its own tags, as {"type": "function", "function": {"name", "arguments"}},
    and what was wrong with it or may have been meant otherwise, a sentence each.

    A call that is cut off is an error and no call. A value that does not fit its schema is an error and stays a string.
    """
    reading = _read(text, tools or ())
    errors, more = reading.errors[:_MOST_ERRORS], len(reading.errors) - _MOST_ERRORS
    return reading.calls, [*errors, f"There are {more:,} more warnings of this kind."] if more > 0 else errors


def is_whole_call(text: str, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `text` is calls of these tools and nothing else; their values need not fit."""
    reading = _read(text, tools)
    return bool(reading.calls) and reading.is_whole


def _read(text: str, tools: Sequence[Mapping[str, Any]]) -> _Reading:
    functions = [tool.get("function", tool) for tool in tools]
    reading = _Reading(text, {function["name"]: function for function in functions})
    reading.read()
    return reading


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


@dataclass
class _Reading:
    """One text as it is read from tag to tag."""

    text: str
    functions: Mapping[str, Mapping[str, Any]]
    calls: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    is_whole: bool = True  # nothing was cut off, left out, or names no tool

    def read(self) -> None:
        self.tags = [_Tag(f"{m[1] or m[2]}", m.start(), m.end(), m[1] is None) for m in _TAG.finditer(self.text)]
        self.endless = len(self.tags)  # from here on no `</parameter>` is surely the end of a value
        self.last_close = max((n for n in range(len(self.tags)) if self._closes_call(n)), default=-1)
        self.last_invoke = max((n for n in range(len(self.tags)) if self._is_known_invoke(n)), default=-1)
        at, place = 0, 0  # the tag that comes next, and the end of the text that was read
        while at < len(self.tags):
            tag = self.tags[at]
            opened = self._name(tag, self.functions) if tag.opens("invoke") else None
            if opened is None:
                at += 1
                continue
            name, begin = opened
            self._leave_out(place, tag.start, "")
            at, place = self._read_call(name, self._behind(at, begin), begin)
        if self.text.strip() and not self.calls and not self.errors:
            self.errors.append(f"The tool call holds no <invoke>: {self.text.strip()[:_SHOWN]!r}.")
        else:
            self._leave_out(place, len(self.text), "")

    def _read_call(self, name: str, at: int, place: int) -> tuple[int, int]:
        """Read the call whose name ends at `place`, from tag `at` on; the tag behind it, and where that call ends."""
        alternatives = self._alternatives(name)
        known = dict.fromkeys(key for each in alternatives for key in each.names)
        missing = _required(alternatives)
        values: list[tuple[str, str]] = []
        while at < len(self.tags):
            tag = self.tags[at]
            if tag.closes("invoke"):
                self._leave_out(place, tag.start, f" in the call of {name!r}")
                self._take(name, values, alternatives)
                return at + 1, tag.end
            if tag.opens("invoke") and self._name(tag, self.functions) is not None:
                break
            opened = self._name(tag, known) if tag.opens("parameter") else None
            if opened is None:  # a tag that has no place here is text that has none
                at += 1
                continue
            key, begin = opened
            self._leave_out(place, tag.start, f" in the call of {name!r}")
            first = self._behind(at, begin)
            missing = missing - {key} if key in missing else missing
            end = self._value_end(first, begin, missing, _allowed(key, alternatives))
            if end is None:
                at = len(self.tags)
                break
            if any(self._may_end_value(n) for n in range(first, end)):
                self.errors.append(f"The call of {name!r}: {key!r} holds tags of a call, which were read as its text.")
            values.append((key, self.text[begin : self.tags[end].start]))
            at, place = end + 1, self.tags[end].end
        self.errors.append(f"The call of {name!r} is cut off.")
        self.is_whole = False
        return at, self.tags[at].start if at < len(self.tags) else len(self.text)

    def _value_end(self, at: int, begin: int, missing: frozenset[str], allowed: Sequence[Allowed]) -> int | None:
        """The closing tag of the value that begins at `begin` and in which tag `at` comes first."""
        first = next((n for n in range(at, len(self.tags)) if self.tags[n].closes("parameter")), None)
        if first is None:
            return None
        if allowed and not any(each.may_be_text for each in allowed):
            return self._json_end(first, begin, allowed)
        if first < self.endless:
            for n in range(first, len(self.tags)):
                if self.tags[n].closes("parameter") and self._ends_value(n, missing):
                    return n
            self.endless = first
        return first

    def _json_end(self, first: int, begin: int, allowed: Sequence[Allowed]) -> int:
        """JSON says itself where it ends; the first closing tag if it is none."""
        closing = (n for n in range(first, len(self.tags)) if self.tags[n].closes("parameter"))
        for n in islice(closing, _MOST_TRIES):
            if any(_convert(self.text[begin : self.tags[n].start], each)[1] for each in allowed):
                return n
        return first

    def _ends_value(self, n: int, missing: frozenset[str]) -> bool:
        """Whether tag `n`, a `</parameter>`, is the end of a value and no part of it."""
        following = self.tags[n + 1] if n + 1 < len(self.tags) else None
        if following is None:
            return False
        if self.text[self.tags[n].end : following.start].strip():  # a part of it, unless what must come comes behind
            opened = self._name(following, missing) if missing and following.opens("parameter") else None
            return opened is not None and opened[0] in missing
        if following.opens("parameter"):
            return True
        return following.closes("invoke") and (
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
            self.errors.append(f"Text{where} beside its values was left out: {text[:_SHOWN]!r}.")
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

    def _take(self, name: str, values: Sequence[tuple[str, str]], alternatives: Sequence[Arguments]) -> None:
        """The whole call, by the alternative that fits it best."""
        tried = [_Typed(name, values, each) for each in alternatives] or [_Typed(name, values, None)]
        best = min(tried, key=lambda each: each.n_misfits)
        self.errors += best.errors
        self.calls.append({"type": "function", "function": {"name": name, "arguments": best.arguments}})


class _Typed:
    """A call's values by one alternative of its schema."""

    def __init__(self, name: str, values: Sequence[tuple[str, str]], alternative: Arguments | None) -> None:
        self.arguments = dict[str, Any]()
        self.errors = list[str]()
        for key, raw in values:
            if key in self.arguments:
                self.errors.append(f"The call of {name!r} gives {key!r} twice; the last one counts.")
            allowed = None if alternative is None else alternative.of(key) or ANYTHING
            self.arguments[key], fits = _convert(raw, allowed)
            if alternative is not None and alternative.has_no(key):
                self.errors.append(f"The call of {name!r} gives {key!r}, which its schema does not know.")
            elif not fits:
                self.errors.append(f"The call of {name!r}: {key!r} is {raw[:_SHOWN]!r}, expected {allowed}.")
        missing = set() if alternative is None else alternative.required - self.arguments.keys()
        self.n_misfits = len(self.errors) + len(missing)


def _required(alternatives: Sequence[Arguments]) -> frozenset[str]:
    """Arguments that must come, whichever alternative holds."""
    required = [each.required for each in alternatives]
    return required[0].intersection(*required[1:]) if required else frozenset()


def _allowed(key: str, alternatives: Sequence[Arguments]) -> list[Allowed]:
    """What each alternative that says something of the argument allows."""
    return [allowed for each in alternatives if (allowed := each.of(key)) is not None]


def _convert(raw: str, allowed: Allowed | None) -> tuple[Any, bool]:
    """The value, and whether it fits. Where a string may stand, only what the template writes for another value is
    that value: `1.10` is no number. Nothing is known of its type: null, or the string as it is."""
    if allowed is None:
        return (None, True) if raw.strip() == "null" else (raw, True)
    may_be_text = allowed.accepts(raw)
    try:
        value = parse_json(raw if may_be_text else _PYTHON_WORDS.get(raw.strip(), raw))
    except JsonError:
        return raw, may_be_text
    if may_be_text:
        is_written_so = not isinstance(value, str) and json.dumps(value, ensure_ascii=False) == raw
        return (value if is_written_so and allowed.accepts(value) else raw), True
    if isinstance(value, float) and value.is_integer() and allowed.types & {"integer", "number"} == {"integer"}:
        value = int(value)
    if value is None or (not isinstance(value, str) and allowed.accepts(value)):
        return value, True
    return raw, False
