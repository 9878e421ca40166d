"""Reads the XML of MiniMax-M2's tool calls. A pure function of the text and the tools' schemas."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from m2lite.system.json_text import JsonError, parse_json

_INVOKE = re.compile(r"<invoke\s+name=([^>\n]*)>")
_PARAMETER = re.compile(r"\s*<parameter\s+name=([^>\n]*)>")
_INVOKE_END = re.compile(r"</invoke>")
# A value may hold the closing tag itself; the true one is followed by the next tag of the format.
_VALUE_END = re.compile(r"</parameter>(?=\s*(?:<parameter\s+name=|</invoke>))")
_LOOSE_VALUE_END = re.compile(r"</parameter>")
_JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "object": dict,
    "array": list,
    "null": type(None),
}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


def parse_tool_calls(
    text: str, tools: Sequence[Mapping[str, Any]] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The calls in `text` as {"type": "function", "function": {"name", "arguments"}}, and what was wrong with it.

    A call that is cut off is an error and no call. A value that does not fit its schema is an error and stays a string.
    """
    schemas = {function["name"]: function for tool in tools or () for function in [tool.get("function", tool)]}
    calls: list[dict[str, Any]] = []
    errors: list[str] = []
    position = 0
    while match := _INVOKE.search(text, position):
        name = _unquote(match[1])
        values, position = _read_parameters(text, match.end())
        if position < 0:
            errors.append(f"The call of {name!r} is cut off.")
            break
        if schemas and name not in schemas:
            errors.append(f"The call of {name!r} names no tool; there are {', '.join(map(repr, schemas))}.")
        types = _parameter_types(schemas.get(name, {}))
        arguments: dict[str, Any] = {}
        for parameter, raw in values:
            if parameter in arguments:
                errors.append(f"The call of {name!r} gives {parameter!r} twice; the last one counts.")
            arguments[parameter], fits = _convert(raw, types.get(parameter, set()))
            if not fits:
                wanted = " or ".join(sorted(types[parameter]))
                errors.append(f"The call of {name!r}: {parameter!r} is {raw[:80]!r}, expected {wanted}.")
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    if text.strip() and not calls and not errors:
        errors.append(f"The tool call holds no <invoke>: {text.strip()[:80]!r}.")
    return calls, errors


def _read_parameters(text: str, position: int) -> tuple[list[tuple[str, str]], int]:
    """Name and raw value of each parameter from `position` on, and where the call ends; -1 if it does not."""
    values: list[tuple[str, str]] = []
    while match := _PARAMETER.match(text, position):
        end = _VALUE_END.search(text, match.end()) or _LOOSE_VALUE_END.search(text, match.end())
        if not end:
            return values, -1
        raw = text[match.end() : end.start()].removeprefix("\n").removesuffix("\n")
        values.append((_unquote(match[1]), raw))
        position = end.end()
    end = _INVOKE_END.search(text, position)
    return values, end.end() if end else -1


def _unquote(name: str) -> str:
    name = name.strip()
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'" else name


def _parameter_types(function: Mapping[str, Any]) -> dict[str, set[str]]:
    schema = function.get("parameters")
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(properties, Mapping):
        return {}
    return {name: _schema_types(item) for name, item in properties.items()}


def _schema_types(schema: object, depth: int = 0) -> set[str]:
    """The JSON types that a schema names; empty if it names none."""
    if not isinstance(schema, Mapping) or depth > 8:
        return set()
    named = schema.get("type")
    types = {named} if isinstance(named, str) else {t for t in _list(named) if isinstance(t, str)}
    for value in [*_list(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]:
        types.add(_json_type(value))
    for key in ("anyOf", "oneOf", "allOf"):
        for item in _list(schema.get(key)):
            types |= _schema_types(item, depth + 1)
    return types & {*_JSON_TYPES, "string"}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _json_type(value: object) -> str:
    if isinstance(value, str):
        return "string"
    return next((name for name, kind in _JSON_TYPES.items() if isinstance(value, kind)), "string")


def _convert(raw: str, types: set[str]) -> tuple[Any, bool]:
    """The value by its schema's types, and whether it fits. No type named: null, or the string as it is."""
    if raw.strip() == "null" and ("null" in types or "string" not in types):
        return None, True
    if not types - {"null", "string"}:
        return raw, not types or "string" in types
    try:
        value = parse_json(_PYTHON_WORDS.get(raw.strip(), raw))
    except JsonError:
        return raw, "string" in types
    if isinstance(value, float) and value.is_integer() and "integer" in types and "number" not in types:
        value = int(value)
    kind = _json_type(value)
    fits = kind in types or (kind == "integer" and "number" in types)
    return (value, True) if fits else (raw, "string" in types)
