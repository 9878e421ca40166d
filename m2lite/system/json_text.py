"""Reads JSON that a stranger wrote, within bounds, and refuses what another reader might take otherwise.

Refused: what is no UTF-8, halves of surrogate pairs, a key given twice, NaN and numbers beyond float64, and more bytes
or items than the caller allows, or too many levels. A limit on bytes bounds the memory: Python needs 30 times as much.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

_MOST_DEPTH = 100
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_HALF_ESCAPED = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")


class JsonError(ValueError):
    """Not JSON, or JSON that is refused: a phrase that says why."""


def parse_json(data: bytes | str, *, most_bytes: int | None = None, most_items: int | None = None) -> Any:
    """The value that `data` spells; JsonError for everything else, never another error.

    `most_items` counts the elements of all arrays and objects together.
    """
    if most_bytes is not None and len(data) > most_bytes:
        raise JsonError(f"more than {most_bytes:,} bytes")
    text = _decode(data) if isinstance(data, bytes) else data
    _check_structure(text, most_items)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)
    except JsonError:
        raise
    except (ValueError, RecursionError) as error:
        what = "a number of thousands of digits" if "int_max_str_digits" in str(error) else str(error)
        raise JsonError(what) from None
    if _HALF_ESCAPED.search(text) or not _is_whole(text):
        _check_whole(value)
    return value


def parse_object(data: bytes | str, *, most_bytes: int | None = None, most_items: int | None = None) -> dict[str, Any]:
    """As `parse_json`, for an object; JsonError for another value."""
    value = parse_json(data, most_bytes=most_bytes, most_items=most_items)
    if not isinstance(value, dict):
        raise JsonError(f"{kind_of(value)} where an object is expected")
    return value


def kind_of(value: object) -> str:
    """What JSON calls the value, with its article."""
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JsonError(f"no UTF-8: byte {error.start:,} is 0x{data[error.start]:02x}") from None


def _check_structure(text: str, most_items: int | None) -> None:
    """Items and depth, before any of it takes memory. Exact counting leaves out strings, and is rarely needed."""
    n_open = text.count("[") + text.count("{")
    is_many = most_items is not None and n_open + text.count(",") > most_items
    if not is_many and n_open <= _MOST_DEPTH:
        return
    bare = _STRINGS.sub("", text)
    if most_items is not None and bare.count(",") + bare.count("[") + bare.count("{") > most_items:
        raise JsonError(f"more than {most_items:,} items")
    depth = 0
    for match in re.finditer(r"[\[{]|[\]}]", bare):
        depth += 1 if match[0] in "[{" else -1
        if depth > _MOST_DEPTH:
            raise JsonError(f"more than {_MOST_DEPTH} levels deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen = set[str]()
        for key, _ in pairs:
            if key in seen:
                raise JsonError(f"the key {key!r} is given twice")
            seen.add(key)
    return table


def _no_constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(f"the number {text[:40]} is out of range")
    return value


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_whole(value: object) -> None:
    """No string in it, keys included, holds half of a character, which UTF-8 cannot spell."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            if not _is_whole(item):
                half = next(c for c in item if "\ud800" <= c <= "\udfff")
                raise JsonError(f"the string {item[:60]!r} holds U+{ord(half):04X}, half of a character")
        elif isinstance(item, dict):
            rest += [*item, *item.values()]
        elif isinstance(item, list):
            rest += item
