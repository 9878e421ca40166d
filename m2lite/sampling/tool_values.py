"""How the value of a tool's parameter may be written between its tags, as parts of a grammar of llguidance.

The inverse of text/calls.py: a string stands as it is, up to its closing tag, everything else as JSON. Text is an
expression over terminals; FREE and END are the grammar's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Any, Final

from m2lite.system.json_text import JsonError, parse_json
from m2lite.text.schema import ANYTHING, TYPES, Allowed, Schema

# What the values of a grammar refer to: any text without the closing tag, and that tag.
TERMINALS: Final = r"""FREE: /(?s:.*)/ & ~/(?s:.*)<\/parameter>(?s:.*)/
END: "</parameter>\n"
"""
_CLOSING: Final = "</parameter>"
_FREE: Final = "FREE"
_NO_CONTAINER: Final = r"/(?s:[^\[{].*)?/"  # text that begins like no array and no object
_SCALARS: Final = {
    "null": '"null"',
    "boolean": "/true|false/",
    "integer": "/-?(0|[1-9][0-9]{0,17})/",
    "number": r"/-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?/",
}
# Beside text, and written as the reader takes it: `1.10` would be text.
_EXACT_SCALARS: Final = _SCALARS | {
    "integer": "/-?[1-9][0-9]{0,17}|0/",
    "number": r"/-?[1-9][0-9]{0,17}|0|-?(0|[1-9][0-9]{0,8})\.[0-9]{0,2}[1-9]/",
}
_DAYS = "(0[1-9]|[12][0-9]"
_DATE = rf"[0-9]{{4}}-((0[13578]|1[02])-{_DAYS}|3[01])|(0[469]|11)-{_DAYS}|30)|02-{_DAYS}))"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
_ZONE, _BYTE = r"(\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])", "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_FORMATS: Final = {
    "date": f"/{_DATE}/",
    "time": f"/{_TIME}{_ZONE}/",
    "date-time": f"/{_DATE}T{_TIME}{_ZONE}/",
    "email": r"/[a-zA-Z0-9_%+-]+(\.[a-zA-Z0-9_%+-]+)*@[a-zA-Z0-9]+(-[a-zA-Z0-9]+)*(\.[a-zA-Z0-9]+(-[a-zA-Z0-9]+)*)+/"
    " & /[^@]{1,64}@.{1,190}/",
    "ipv4": rf"/{_BYTE}(\.{_BYTE}){{3}}/",
    "uuid": "/[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}/",
}
_SAYS_NOTHING: Final = frozenset({
    "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment",
    "$schema", "$defs", "definitions",
})  # fmt: skip
_UNKNOWN_TO_TEXT: Final = ("not", "if", "$dynamicRef", "$recursiveRef")
_OF_TEXT: Final = frozenset({"type", "const", "enum", "pattern", "minLength", "maxLength", "format"})
_MOST_LENGTH: Final = 1 << 20  # characters; no answer has as many
_MOST_DEPTH: Final = 50


class CannotKeep(Exception):
    """A schema that a grammar cannot keep to whole: what it says."""


@dataclass(frozen=True)
class ValueForm:
    """Text of an expression over terminals, or JSON of a schema, or either; both None: there is no value."""

    text: str | None = None
    json: Mapping[str, Any] | None = None


ANY_TEXT: Final = ValueForm(_FREE)


def literal(text: str) -> str:
    """The text as a string of a grammar."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


class Values:
    """The forms of values by one tool's schema."""

    def __init__(self, root: object) -> None:
        self._schema = Schema(root)
        self._definitions = {
            key: root[key] for key in ("$defs", "definitions") if isinstance(root, Mapping) and key in root
        }
        self._merged = list[object]()  # kept: what is known of a schema goes by its object's id

    def targets(self, schema: Mapping[str, Any]) -> list[Any]:
        """The schemas that hold beside it: those of its allOf, and what it refers to."""
        return self._schema.all_of(schema)

    def form(self, schemas: list[Any]) -> ValueForm:
        """Of a value that all of them allow; CannotKeep where a call would be read as something else."""
        schema = schemas[0] if len(schemas) == 1 else {"allOf": schemas}
        self._merged.append(schema)
        allowed = self._schema.allowed(schema)
        if not allowed.types and not allowed.literals:
            return ValueForm()
        if not allowed.may_be_text:
            scalars = self._scalars(schema)
            return ValueForm(json=self.json(schema)) if scalars is None else ValueForm(scalars)
        if allowed.types <= {"string"} and all(isinstance(x, str) for x in allowed.literals):
            return ValueForm(self._text(schema, 0))
        return self._mixed(schema)

    def may_be_text(self, schemas: list[Any]) -> bool:
        return reduce(Allowed.both, map(self._schema.allowed, schemas), ANYTHING).may_be_text

    def loose(self, schemas: list[Any]) -> ValueForm:
        """The same without what cannot be kept, which the reading of a call then tells."""
        allowed = reduce(Allowed.both, map(self._schema.allowed, schemas), ANYTHING)
        if allowed.may_be_text:
            return ANY_TEXT
        return ValueForm(json={"type": sorted(allowed.types)} if allowed.types else {})

    def json(self, schema: Any) -> dict[str, Any]:
        """The schema as one of its own, with what it refers to."""
        rest: list[Any] = [schema, self._definitions]
        while rest:
            item = rest.pop()
            if isinstance(item, Mapping):
                reference = item.get("$ref", "#/$defs/")
                if not isinstance(reference, str) or not reference.startswith(("#/$defs/", "#/definitions/")):
                    raise CannotKeep(f"refers to {reference!r}, which is not below $defs")
                if "$id" in item or "$dynamicRef" in item:
                    raise CannotKeep("has an $id or a $dynamicRef of its own")
                rest += item.values()
            elif isinstance(item, list):
                rest += item
        return {**schema, **self._definitions}

    def _scalars(self, schema: Mapping[str, Any]) -> str | None:
        """Numbers, booleans and null of which nothing more is said; None for anything else."""
        types = _types(schema)
        if not types or not types <= _SCALARS.keys() or schema.keys() - _SAYS_NOTHING - {"type"}:
            return None
        return _any(_SCALARS[name] for name in sorted(types))

    def _text(self, schema: Any, depth: int) -> str | None:
        """The strings that the schema allows; None if there are none."""
        if depth > _MOST_DEPTH:
            raise CannotKeep("has no end")
        if not isinstance(schema, Mapping):
            return None if schema is False else _FREE
        for name in _UNKNOWN_TO_TEXT:
            if name in schema:
                raise CannotKeep(f"says {name!r} of text")
        types = _types(schema)
        if types and "string" not in types:
            return None
        parts = _plain_text(schema)
        for each in self.targets(schema):
            parts.append(self._text(each, depth + 1))
        for name in ("anyOf", "oneOf"):
            if isinstance(schema.get(name), list) and schema[name]:
                if name == "oneOf":
                    self._check_one_of(schema[name])
                parts.append(_any(found for each in schema[name] if (found := self._text(each, depth + 1))) or None)
        if None in parts:
            return None
        return " & ".join(dict.fromkeys(f"{part}" for part in parts if part != _FREE)) or _FREE

    def _check_one_of(self, schemas: list[Any]) -> None:
        for a, b in combinations(map(self._schema.allowed, schemas), 2):
            both = a.both(b)
            if both.types or both.literals:
                raise CannotKeep("says oneOf of schemas of which two may fit (use anyOf)")

    def _mixed(self, schema: Any) -> ValueForm:
        """Text or something else, which the reader must be able to tell apart."""
        texts, scalars, others, is_open = list[str](), list[str](), list[Any](), False
        for leaf in self._leaves(schema, 0):
            types, said, allowed = _types(leaf) or TYPES, leaf.keys() - _SAYS_NOTHING, self._schema.allowed(leaf)
            if allowed.types <= {"string"} and all(isinstance(x, str) for x in allowed.literals):
                is_open |= bool(allowed.types)
                texts += [text] if (text := self._text(leaf, 0)) else []
            elif said <= {"type"}:
                texts += [_FREE] if "string" in types else []
                scalars += [_EXACT_SCALARS[name] for name in sorted(types & _SCALARS.keys())]
                others += [{"type": name} for name in sorted(types & {"array", "object"})]
            elif not allowed.types and said <= {"type", "const", "enum"}:
                texts += [literal(x) for x in allowed.literals if isinstance(x, str)]
                others += [{"const": x} for x in allowed.literals if not isinstance(x, str)]
            elif not allowed.may_be_text:
                others.append(leaf)
            else:
                raise CannotKeep(f"allows {allowed}, and says more of it")
        if _FREE in texts and all(x.keys() <= {"type", "const"} for x in others):
            return ANY_TEXT  # whatever it is read as fits
        if _FREE in texts and all(self._schema.allowed(x).types <= {"array", "object"} for x in others):
            return ValueForm(_NO_CONTAINER, self.json({"anyOf": others}))
        if is_open:  # what the reader takes for another value than text is that only as the template writes it
            is_doubtful = any(isinstance(x.get("const", []), dict | list) for x in others)
        else:
            is_doubtful = any(map(_looks_otherwise, self._schema.allowed(schema).literals))
            is_doubtful = is_doubtful and any("const" not in x for x in others)
        if is_doubtful:
            raise CannotKeep("allows text that may be another value, and says more of both")
        text = _any([*texts, *scalars])
        return ValueForm(text or None, self.json({"anyOf": others}) if others else None)

    def _leaves(self, schema: Any, depth: int) -> list[Mapping[str, Any]]:
        """The alternatives that it is made of, each for types that say nothing of others."""
        if depth > _MOST_DEPTH:
            raise CannotKeep("has no end")
        if not isinstance(schema, Mapping):
            return [] if schema is False else [{}]
        said = schema.keys() - _SAYS_NOTHING
        if len(said) == 1 and said <= {"anyOf", "oneOf", "allOf", "$ref"}:
            name = next(iter(said))
            inner = self.targets(schema) if name in ("allOf", "$ref") else schema[name]
            if isinstance(inner, list) and (len(inner) == 1 or name in ("anyOf", "oneOf")):
                if name == "oneOf":
                    self._check_one_of(inner)
                return [leaf for each in inner for leaf in self._leaves(each, depth + 1)]
        types = _types(schema)
        if len(types) > 1 and said != {"type"} and not said & {"anyOf", "oneOf", "allOf", "$ref", "const", "enum"}:
            split: list[Mapping[str, Any]] = [{**schema, "type": name} for name in sorted(types)]
            split = [_without_foreign(each) for each in split]
            self._merged += split
            return split
        return [schema]


def _without_foreign(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema of one type without what it says of text, if it is of another."""
    if schema["type"] == "string":
        return {key: value for key, value in schema.items() if key in _OF_TEXT or key in _UNKNOWN_TO_TEXT}
    return {key: value for key, value in schema.items() if key == "type" or key not in _OF_TEXT}


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    """Those that it names."""
    named = schema.get("type")
    return frozenset(x for x in (named if isinstance(named, list) else [named]) if isinstance(x, str))


def _looks_otherwise(value: object) -> bool:
    """Whether the text might be read as a number, null or the like."""
    try:
        return isinstance(value, str) and not isinstance(parse_json(value), str)
    except JsonError:
        return False


def _any(parts: Iterable[str]) -> str:
    """One of the expressions."""
    parts = list(dict.fromkeys(parts))
    return _FREE if _FREE in parts else parts[0] if len(parts) == 1 else f"({' | '.join(parts)})" if parts else ""


def _plain_text(schema: Mapping[str, Any]) -> list[str | None]:
    """What the schema itself says of strings: expressions that all hold; None: there is none."""
    parts: list[str | None] = [_FREE]
    for values in ([schema["const"]] if "const" in schema else None, schema.get("enum")):
        if isinstance(values, list):
            texts = [x for x in values if isinstance(x, str)]
            parts.append(_any(literal(x) for x in texts if _CLOSING not in x) or None)
            if texts and parts[-1] is None:
                raise CannotKeep(f"says only text with {_CLOSING}, which ends a value")
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if not _is_length(least) or not (most is None or _is_length(most)):
        raise CannotKeep(f"says minLength {least!r} and maxLength {most!r} (limit {_MOST_LENGTH:,})")
    if least or most is not None:
        if most is not None and most < least:
            return [None]
        parts.append(f"/(?s:.{{{int(least)},{'' if most is None else int(most)}}})/")
    if isinstance(schema.get("pattern"), str):
        parts.append(_pattern(schema["pattern"]))
    if "format" in schema:
        if not isinstance(schema["format"], str) or schema["format"] not in _FORMATS:
            raise CannotKeep(f"says format {schema['format']!r} (known are {', '.join(_FORMATS)})")
        parts.append(_FORMATS[schema["format"]])
    return parts


def _is_length(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value <= _MOST_LENGTH


def _pattern(pattern: str) -> str:
    """JSON schema's expression, which is searched for, as one that fits the whole text."""
    branches = list[str]()
    for pieces in _branches(pattern):
        is_begun, is_ended = pieces[:1] == ["^"], pieces[-1:] == ["$"]
        inner = pieces[is_begun : len(pieces) - is_ended]
        if {"^", "$", r"\A", r"\z"} & set(inner):
            raise CannotKeep(f"says pattern {pattern!r} (^ and $ may only begin and end it)")
        branches.append(f"{'' if is_begun else '(?s:.*)'}(?:{''.join(inner)}){'' if is_ended else '(?s:.*)'}")
    return f"/{'|'.join(branches)}/"


def _branches(pattern: str) -> list[list[str]]:
    """The alternatives of an expression, each as its characters, escapes and classes."""
    found, depth, in_class = [list[str]()], 0, False
    for piece in re.findall(r"\\.|.", pattern, re.DOTALL):
        if piece in (r"\d", r"\w"):  # of ASCII, as in ECMA's
            piece = {"d": "0-9", "w": "a-zA-Z0-9_"}[piece[1]]
            piece = piece if in_class else f"[{piece}]"
        elif piece == "/" or (len(piece) == 1 and ord(piece) < 32):
            piece = f"\\x{ord(piece):02x}"
        elif piece == "|" and not depth and not in_class:
            found.append([])
            continue
        if in_class:
            in_class = piece != "]"
            found[-1][-1] += piece
            continue
        in_class = piece == "["
        depth += (piece == "(") - (piece == ")")
        found[-1].append(piece)
    return found
