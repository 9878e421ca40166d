"""Checks messages and tools, and brings them to the one form that templates expect. Renders nothing.

A message may have fields that cannot change the prompt; one with content that the prompt would lack is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from m2lite.errors import UsageError
from m2lite.system.json_text import JsonError, parse_json
from m2lite.text.reply import Said
from m2lite.text.schema import Schema, SchemaError
from m2lite.text.tokenizer import check_text
from m2lite.text.values import closed

ROLES = ("system", "user", "assistant", "tool")

Message = dict[str, Any]
Tool = dict[str, Any]

# Where clients put an assistant's thinking; the first that is not empty counts, and the others must say the same.
_THINKING: Final = ("reasoning_content", "reasoning", "thinking")
_DETAILS: Final = ("reasoning_details", "thinking_blocks")  # lists of its parts, in place of those or beside them
# What answers carry besides what was said; only the first two are read, by templates of other models.
_IGNORED: Final = frozenset(
    {
        "name", "id",
        "annotations", "cache_control", "caller", "citations", "container", "created", "diagnostics", "extra_content",
        "finish_reason", "index", "logprobs", "matched_stop", "metadata", "model", "object", "phase",
        "prompt_cache_breakpoint", "provider_specific_fields", "refusal", "service_tier", "signature", "status",
        "stop_details", "stop_reason", "stop_sequence", "strict", "system_fingerprint", "thought_signature",
        "timestamp", "token_ids", "type", "usage", "weight",
    }
)  # fmt: skip
_FIELDS: Final = {
    "system": frozenset({"current_date", "current_location"}),  # of M2's own template
    "user": frozenset[str](),
    "assistant": frozenset({*_THINKING, *_DETAILS, "tool_calls"}),
    "tool": frozenset({"tool_call_id"}),
}
# Parts of content, and of lists of thoughts, with the field that is their text.
_TEXT_PARTS: Final = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_THOUGHTS: Final = {
    "thinking": "thinking", "reasoning": "text", "reasoning_text": "text", "reasoning.text": "text",
    "reasoning.summary": "summary",
}  # fmt: skip
_SEALED: Final = ("reasoning.encrypted", "redacted_thinking")
# As the model writes it, whose opening tag the prompt has already: the line breaks are of the format.
_THOUGHT: Final = re.compile(r"\s*<think>\n?(?P<thinking>.*?)\n?</think>\n{0,2}", re.DOTALL)


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages in canonical form: content is a string (for a tool also a list of results), never None; tool calls
    are {"type": "function", "function": {"name", "arguments": object}}; every assistant message has its thinking as
    reasoning_content, so that a `</think>` in its content is never taken for the end of one."""
    checked: list[Message] = []
    called = False  # the last assistant message called tools
    for index, message in enumerate(messages):
        where = f"Message {index}"
        if not isinstance(message, Mapping):
            raise UsageError(f"{where} is a {type(message).__name__}, expected an object with role and content.")
        message = _without_function(message, where)
        role = message.get("role")
        if role not in ROLES:
            raise UsageError(f"{where} has role {role!r}.", f"Use one of {', '.join(ROLES)}.")
        if role == "system" and index:
            raise UsageError(
                f"{where} is a system message; MiniMax-M2 has only one, in front.", "Put its text into message 0."
            )
        if role == "tool" and not called:
            raise UsageError(f"{where} is a tool result, but no assistant message before it called a tool.")
        _check_fields(message, {"role", "content", *_FIELDS[role]}, where)
        if role == "assistant":
            result = _check_assistant(message, where)
            called = bool(result.get("tool_calls"))
        else:
            result = _without_ignored(message)
            texts = _texts(message.get("content"), where, None)
            is_list = role == "tool" and isinstance(texts, list)
            result["content"] = [{"type": "text", "text": text} for text in texts] if is_list else "".join(texts)
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
    """The values for a template as JSON; UsageError, which names the value, for what JSON cannot say."""
    try:
        text = json.dumps(context, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"The messages cannot be written as JSON ({error}).") from None
    try:
        text.encode()
    except UnicodeEncodeError:
        for place, string in _strings("", context):
            check_text(string, place)
    return text


def _strings(place: str, value: object) -> Iterator[tuple[str, str]]:
    """Every string of a JSON value with its place, such as messages[0].content."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"A name in {place}", str(key)
            yield from _strings(f"{place}.{key}" if place else str(key), item)
    elif isinstance(value, list | tuple):
        for n, item in enumerate(value):
            yield from _strings(f"{place}[{n}]", item)


def _is_empty(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | Sequence | Mapping) and not value)


def _without_ignored(message: Mapping[str, Any]) -> Message:
    kept = {name: value for name, value in message.items() if name in ("name", "id") or name not in _IGNORED}
    return {name: value for name, value in kept.items() if not _is_empty(value)}


def _check_fields(found: Mapping[str, Any], known: set[str], where: str) -> None:
    """What is not known must be empty: the model would not read it."""
    for name, value in found.items():
        if name not in known and name not in _IGNORED and not _is_empty(value):
            raise UsageError(
                f"{where}: the field {name!r} is not supported.", "The model reads text only: leave it out."
            )


def _without_function(message: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The message with `function_call` and the role `function`, which are deprecated, as a call and its result."""
    if message.get("role") == "function":
        return {**message, "role": "tool"}
    if message.get("role") != "assistant" or _is_empty(message.get("function_call")):
        return message
    if not _is_empty(message.get("tool_calls")):
        raise UsageError(f"{where} has both tool_calls and function_call.", "Leave function_call out.")
    rest = {name: value for name, value in message.items() if name != "function_call"}
    return rest | {"tool_calls": [message["function_call"]]}


def _check_assistant(message: Mapping[str, Any], where: str) -> Message:
    result = _without_ignored(message)
    for name in (*_THINKING, *_DETAILS):
        result.pop(name, None)
    thoughts: list[object] = []
    content = "".join(_texts(message.get("content"), where, thoughts))
    thinking = _thinking(message, _joined(thoughts, f"{where}, content"), where)
    while not thinking and not isinstance(message, Said) and (found := _THOUGHT.match(content)):
        thinking, content = found["thinking"], content[found.end() :]  # what was said here has its thinking apart
    result["content"], result["reasoning_content"] = content, thinking
    calls = message.get("tool_calls")
    if not _is_empty(calls):
        result["tool_calls"] = _check_calls(calls, where)
    return result


def _texts(content: object, where: str, thoughts: list[object] | None) -> str | list[str]:
    """The text, or the texts of its parts; parts that are thinking are added to `thoughts`, where they may be."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise UsageError(f"{where}: content is a {type(content).__name__}, expected a string or a list of text parts.")
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part_kind(part, "text")
        if thoughts is not None and (kind in _THOUGHTS or kind in _SEALED):
            thoughts.append(part)
            continue
        text = part.get(_TEXT_PARTS.get(kind, "")) if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise UsageError(f"{where}: part {index} is of type {kind!r}; the model reads text only.")
        if isinstance(part, Mapping):
            _check_fields(part, {_TEXT_PARTS[kind]}, f"{where}, part {index}")
        texts.append(text)
    return texts


def part_kind(part: object, default: str = "") -> str:
    """What the part says that it is; for what is no object, what it is."""
    kind = part.get("type", default) if isinstance(part, Mapping) else type(part).__name__
    return kind if isinstance(kind, str) else repr(kind)


def _thinking(message: Mapping[str, Any], in_content: str, where: str) -> str:
    """The thinking of an assistant's message, wherever its client put it."""
    said = {"content": in_content} | {name: message[name] for name in _THINKING if not _is_empty(message.get(name))}
    for name, text in said.items():
        if not isinstance(text, str):
            raise UsageError(f"{where}: {name} is a {type(text).__name__}, expected a string.")
    said = {name: text for name, text in said.items() if text}
    if not said:  # the lists repeat the strings, or stand in their place
        said = {name: _joined(message.get(name) or [], f"{where}, {name}") for name in _DETAILS}
        said = {name: text for name, text in said.items() if text}
    first = next(iter(said), None)
    for name, text in said.items():
        if text.strip() != said[first or ""].strip():
            raise UsageError(f"{where}: {first} and {name} are two different thoughts.", "Leave one of them out.")
    return said[first] if first is not None else ""


def _joined(items: object, where: str) -> str:
    """The text of a list of thoughts. What is encrypted repeats them for its maker; alone it would be lost."""
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise UsageError(f"{where} is a {type(items).__name__}, expected a list.")
    texts, is_sealed, before = list[str](), False, None
    for index, item in enumerate(items):
        kind = part_kind(item)
        if kind in _SEALED:
            is_sealed = True
            continue
        text = item.get(_THOUGHTS[kind]) if isinstance(item, Mapping) and kind in _THOUGHTS else 0
        if isinstance(text, list):  # of text parts
            text = "".join(_texts(text, f"{where}, item {index}", None))
        if not isinstance(text, str | None):
            raise UsageError(f"{where}: item {index} is of type {kind!r}; the model reads text only.")
        place = item.get("index", before)
        texts += ["\n"] if texts and place != before else []  # items of one index are pieces of one thought
        texts.append(text or "")
        before = place
    if is_sealed and not any(texts):
        raise UsageError(f"{where} is encrypted: nobody but its maker can read it.", "Leave it out.")
    return "".join(texts)


def _check_calls(calls: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise UsageError(f"{where}: tool_calls is a {type(calls).__name__}, expected a list.")
    checked = []
    for index, call in enumerate(calls):
        here = f"{where}, tool call {index}"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            kind = part_kind(call, "function")
            what = "has no name" if kind == "function" else f"is of type {kind!r}"
            raise UsageError(f"{here} {what}.", 'Give {"function": {"name": ..., "arguments": {...}}}.')
        _check_fields(call, {"function", "call_id", *(function if function is call else ())}, here)
        _check_fields(function, {"name", "arguments"}, here)
        arguments = _check_arguments(function.get("arguments"), here)
        named = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        checked.append(named | ({"id": call["id"]} if call.get("id") is not None else {}))
    return checked


def _check_arguments(arguments: object, here: str) -> dict[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = _arguments_of(arguments)
        except JsonError as error:
            raise UsageError(f"{here}: its arguments are no JSON ({error}).", "Correct it.") from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise UsageError(f"{here}: its arguments are a {type(arguments).__name__}, expected an object.")
    return dict(arguments)


def _arguments_of(text: str) -> Any:
    """JSON, or nothing; of a call that was cut off what came of it, as the server gave it."""
    try:
        return parse_json(text) if text.strip() else {}
    except JsonError:
        if (more := closed(text)) == text:
            raise
        return parse_json(more)
