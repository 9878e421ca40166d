"""Checks messages and tools, and brings them to the one form that templates expect. Renders nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from m2lite.errors import UsageError
from m2lite.text.schema import Schema, SchemaError
from m2lite.text.tokenizer import check_text

ROLES = ("system", "user", "assistant", "tool")

Message = dict[str, Any]
Tool = dict[str, Any]


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages in canonical form: content is a string (for a tool also a list of results), never None; tool calls
    are {"type": "function", "function": {"name", "arguments": object}}; every assistant message has its reasoning,
    so that a `</think>` in its content is never taken for the end of one."""
    checked: list[Message] = []
    called = False  # the last assistant message called tools
    for index, message in enumerate(messages):
        where = f"Message {index}"
        if not isinstance(message, Mapping):
            raise UsageError(f"{where} is a {type(message).__name__}, expected an object with role and content.")
        role = message.get("role")
        if role not in ROLES:
            raise UsageError(f"{where} has role {role!r}.", f"Use one of {', '.join(ROLES)}.")
        if role == "system" and index:
            raise UsageError(
                f"{where} is a system message; MiniMax-M2 has only one, in front.", "Put its text into message 0."
            )
        if role == "tool" and not called:
            raise UsageError(f"{where} is a tool result, but no assistant message before it called a tool.")
        result = {key: value for key, value in message.items() if value is not None}
        result["content"] = _check_content(message.get("content"), where, keep_parts=role == "tool")
        if role == "assistant":
            reasoning = message.get("reasoning_content")
            if not isinstance(reasoning, str | None):
                raise UsageError(f"{where}: reasoning_content is a {type(reasoning).__name__}, expected a string.")
            result["reasoning_content"] = reasoning or ""
            calls = message.get("tool_calls")
            if calls is not None:
                result["tool_calls"] = _check_calls(calls, where)
            called = bool(calls)
        checked.append(result)
    return checked


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Tool] | None:
    """The tools as {"type": "function", "function": {...}}; None if there are none."""
    checked = []
    for index, tool in enumerate(tools or ()):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UsageError(
                f"Tool {index} has no name.", 'Give {"type": "function", "function": {"name": ..., "parameters": ...}}.'
            )
        try:
            Schema(function.get("parameters"))
        except SchemaError as error:
            where = f"Tool {index} ({function['name']!r})"
            raise UsageError(
                f"{where}: its schema {error}.", "Put all of it under $defs; nothing is fetched."
            ) from None
        checked.append({"type": "function", "function": dict(function)})
    return checked or None


def to_json(context: Mapping[str, Any]) -> str:
    """The values for a template as JSON; raises UsageError for what JSON cannot say."""
    try:
        text = json.dumps(context, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"The messages cannot be written as JSON ({error}).") from None
    check_text(text)
    return text


def _check_content(content: object, where: str, keep_parts: bool) -> str | list[dict[str, str]]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise UsageError(f"{where}: content is a {type(content).__name__}, expected a string or a list of text parts.")
    texts: list[str] = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UsageError(f"{where}: part {index} is of type {kind!r}; the model reads text only.")
        texts.append(text)
    return [{"type": "text", "text": text} for text in texts] if keep_parts else "".join(texts)


def _check_calls(calls: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise UsageError(f"{where}: tool_calls is a {type(calls).__name__}, expected a list.")
    checked = []
    for index, call in enumerate(calls):
        here = f"{where}, tool call {index}"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UsageError(f"{here} has no name.", 'Give {"function": {"name": ..., "arguments": {...}}}.')
        arguments = _check_arguments(function.get("arguments"), here)
        named = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        checked.append(named | ({"id": call["id"]} if call.get("id") is not None else {}))
    return checked


def _check_arguments(arguments: object, here: str) -> dict[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{here}: its arguments are no JSON ({error}).") from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise UsageError(f"{here}: its arguments are a {type(arguments).__name__}, expected an object.")
    return dict(arguments)
