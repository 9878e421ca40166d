"""What the values of a tool call are, by the schema of its tool. Pure functions of texts and schemas.

A string is written as it is, every other value as JSON. Where a string may stand, only what the template writes for
another value is that value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from m2lite.system.json_text import JsonError, parse_json
from m2lite.text.schema import ANYTHING, Allowed, Arguments, json_type

SHOWN: Final = 80  # characters of what is quoted in an error
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
_ENOUGH = 100  # characters by which a value shows what it is
_NUMBER = re.compile(r"[-+.\deE]*")
# Whether JSON of the type, as the template writes it, may begin so.
_MAY_BEGIN: dict[str, Callable[[str], bool]] = {
    "null": "null".startswith,
    "boolean": lambda text: "true".startswith(text) or "false".startswith(text),
    "integer": lambda text: _NUMBER.fullmatch(text) is not None,
    "number": lambda text: _NUMBER.fullmatch(text) is not None,
    "array": lambda text: text[:1] in ("", "["),
    "object": lambda text: text[:1] in ("", "{") and text[1:2] in ("", "}", '"'),
}


class Typed:
    """A call's values by one alternative of its schema."""

    def __init__(self, name: str, values: Sequence[tuple[str, str]], alternative: Arguments | None) -> None:
        self.arguments = dict[str, Any]()
        self.errors = list[str]()
        for key, raw in values:
            if key in self.arguments:  # the first one may have been told already
                self.errors.append(f"The call of {name!r} gives {key!r} twice; the first one counts.")
                continue
            allowed = None if alternative is None else alternative.of(key) or ANYTHING
            self.arguments[key], fits = convert(raw, allowed)
            if alternative is not None and alternative.has_no(key):
                self.errors.append(f"The call of {name!r} gives {key!r}, which its schema does not know.")
            elif not fits:
                self.errors.append(f"The call of {name!r}: {key!r} is {raw[:SHOWN]!r}, expected {allowed}.")
        missing = set() if alternative is None else alternative.required - self.arguments.keys()
        self.n_misfits = len(self.errors) + len(missing)


def required_by_all(alternatives: Sequence[Arguments]) -> frozenset[str]:
    """Arguments that must come, whichever alternative holds."""
    required = [each.required for each in alternatives]
    return required[0].intersection(*required[1:]) if required else frozenset()


def allowed_by_any(key: str, alternatives: Sequence[Arguments]) -> list[Allowed]:
    """What each alternative that says something of the argument allows."""
    return [allowed for each in alternatives if (allowed := each.of(key)) is not None]


def convert(raw: str, allowed: Allowed | None) -> tuple[Any, bool]:
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


def is_string(beginning: str, allowed: Allowed | None) -> bool:
    """Whether a value that begins so is a string, as it is written, whatever follows."""
    if allowed is None:
        return not "null".startswith(beginning.strip())
    if "string" not in allowed.types:
        return False
    kinds = allowed.types | {json_type(literal) for literal in allowed.literals}
    return not any(_MAY_BEGIN[kind](beginning) for kind in kinds - {"string"})


def closed(arguments: str) -> str:
    """The JSON of a call's arguments as far as it came, closed where the call was cut off; else as it is."""
    for end in ("}", '"}'):
        with suppress(ValueError, RecursionError):
            json.loads(arguments + end)
            return arguments + end
    return arguments


class ArgumentsText:
    """The JSON of a call's arguments while its values come. What was told is not taken back."""

    def __init__(self, alternatives: Sequence[Arguments], tell: Callable[[str], None]) -> None:
        """`alternatives`: of the schema. Where it depends on the one that fits what a value is, the end tells it."""
        self._alternatives, self._take = alternatives, tell
        self._n_told, self._keys = 0, set[str]()
        self._is_held = False  # the rest comes with the end
        self._tell("{")  # which alone is no JSON: a call that is cut off here is none without arguments

    def begin(self, key: str) -> None:
        """A value begins. One that was given before does not count."""
        found = [each.of(key) or ANYTHING for each in self._alternatives]
        kinds = {(each.types, json.dumps(each.literals, sort_keys=True)) for each in found}
        self._is_held = self._is_held or len(kinds) > 1
        self._allowed = found[0] if found else None
        self._head = f"{', ' if self._keys else ''}{json.dumps(key, ensure_ascii=False)}: "
        self._is_again = key in self._keys
        self._keys.add(key)
        self._n_raw, self._is_string = 0, False  # of the value: characters that were told

    def more(self, text: str, begin: int, end: int) -> None:
        """The value begins with text[begin:end]."""
        if self._is_held or self._is_again:
            return
        if not self._is_string and is_string(text[begin : min(end, begin + _ENOUGH)], self._allowed):
            self._tell(f'{self._head}"')
            self._is_string = True
        if self._is_string:
            self._tell(json.dumps(text[begin + self._n_raw : end], ensure_ascii=False)[1:-1])
            self._n_raw = end - begin

    def end_value(self, text: str, begin: int, end: int) -> None:
        """It is text[begin:end]."""
        self.more(text, begin, end)
        if self._is_held or self._is_again:
            return
        if self._is_string:
            self._tell('"')
        else:
            value, _ = convert(text[begin:end], self._allowed)
            self._tell(self._head + json.dumps(value, ensure_ascii=False))

    def end(self, arguments: dict[str, Any]) -> None:
        """The call is whole."""
        self._tell(json.dumps(arguments, ensure_ascii=False)[self._n_told :])

    def _tell(self, text: str) -> None:
        if text:
            self._n_told += len(text)
            self._take(text)
