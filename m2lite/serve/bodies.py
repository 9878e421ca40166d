"""Bodies of requests as values, within bounds. Knows no dialect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m2lite.errors import UsageError
from m2lite.serve.errors import Refused
from m2lite.system.json_text import JsonError, parse_object

_MOST_ITEMS = 1_000_000  # of all arrays and objects of a body


def read_object(data: bytes) -> dict[str, Any]:
    """The JSON object that a body is."""
    try:
        return parse_object(data, most_items=_MOST_ITEMS)
    except JsonError as error:
        raise Refused(400, "invalid_json", f"The body is no JSON ({error}).", "Correct it.") from None


def read_flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A field that is true or false; null counts as missing."""
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise UsageError(f"{name} is {value!r}.", "Use true or false.")
    return default if value is None else value


def wants_usage(body: Mapping[str, Any]) -> bool:
    """Whether a stream shall end with what it cost: OpenAI's stream_options.include_usage."""
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise UsageError(f"stream_options is a {type(options).__name__}, expected an object.")
    return read_flag(options, "include_usage")
