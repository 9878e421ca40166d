"""A body of OpenAI's responses as one of chat completions: items become messages. Renders nothing, sends nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from m2lite.errors import UsageError
from m2lite.serve.normal import MOST_MESSAGES, shortened, usable_tools

# Fields that are brought to others here.
_OWN = frozenset({"input", "instructions", "tools", "tool_choice", "max_output_tokens", "text", "top_logprobs"})
# Fields that cannot change the answer: nobody is told that they are ignored.
_SILENT = frozenset({"stream", "stream_options", "include", "client_metadata", "background", "prompt_cache_options"})
# What would have to be kept here.
_STORED = ("previous_response_id", "conversation", "prompt")
_UNSEEN = "[{}, which this model cannot read]"  # in place of a part of a tool's result
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_ROLES = ("system", "developer", "user", "assistant")


@dataclass
class Names:
    """Functions of namespaces by the names that the model calls them."""

    inner: dict[str, tuple[str, str]] = field(default_factory=dict)  # ours -> (namespace, name there)

    def ours(self, namespace: Any, name: Any) -> Any:
        return next((ours for ours, theirs in self.inner.items() if theirs == (namespace, name)), name)

    def theirs(self, name: str) -> dict[str, str]:
        """The fields of a call that say which function it calls."""
        if name not in self.inner:
            return {"name": name}
        namespace, inner = self.inner[name]
        return {"name": inner, "namespace": namespace}


def chat_body(body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], Names]:
    """The same as a body of chat completions, and what of it is ignored, a sentence each."""
    for name in _STORED:
        if body.get(name) is not None:
            raise UsageError(f"{name} was given, but nothing is kept here.", "Send the whole conversation as input.")
    if body.get("background"):
        raise UsageError("background is true, which is not supported.", "Use false or leave it out.")
    told = list[str]()
    asked = {name: value for name, value in body.items() if name not in _OWN and name not in _SILENT}
    if asked.get("truncation") == "disabled":
        del asked["truncation"]
    tools, names = _tools(body.get("tools"))
    asked |= {"tools": tools, "messages": _messages(body, names, told)}
    asked["max_completion_tokens"] = body.get("max_output_tokens")
    asked["tool_choice"] = _tool_choice(body.get("tool_choice"), names)
    asked |= _format(body.get("text")) | _logprobs(body)
    return asked, shortened(told), names


def _logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    include, n = body.get("include") or [], body.get("top_logprobs")
    if not isinstance(include, Sequence) or isinstance(include, str):
        raise UsageError("include is no list of names.", "Correct it.")
    if "message.output_text.logprobs" not in include and not n:
        return {}
    return {"logprobs": True} | ({} if n is None else {"top_logprobs": n})


def _format(text: Any) -> dict[str, Any]:
    found = text.get("format") if isinstance(text, Mapping) else text
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise UsageError(f"text.format is a {type(found).__name__}, expected an object.")
    if found.get("type") != "json_schema":
        return {"response_format": dict(found)}
    return {"response_format": {"type": "json_schema", "json_schema": dict(found)}}


# Tools


def _tools(tools: Any) -> tuple[list[Any], Names]:
    """Functions, those of namespaces too, under names of their own; what cannot be called stays as it is."""
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        return usable_tools(tools)[0], Names()
    grouped = [(_namespace(tool), inner) for tool in tools for inner in _inner(tool)]
    counts = dict[Any, int]()
    for _, tool in grouped:
        counts[_name(tool)] = counts.get(_name(tool), 0) + 1
    names, found = Names(), list[Any]()
    for namespace, tool in grouped:
        name = _name(tool)
        if namespace is not None and name is not None:
            ours = name if counts[name] == 1 else f"{namespace.rstrip('_')}__{name}"
            names.inner[ours] = (namespace, name)
            name = ours
        found.append(_function(tool, name))
    return found, names


def _namespace(tool: Any) -> str | None:
    is_one = isinstance(tool, Mapping) and tool.get("type") == "namespace" and isinstance(tool.get("name"), str)
    return tool["name"] if is_one else None


def _inner(tool: Any) -> list[Any]:
    if _namespace(tool) is None:
        return [tool]
    found, skipped = usable_tools([tool])
    return [*found, *({"type": kind} for kind in skipped)]


def _name(tool: Any) -> str | None:
    name = tool.get("name") if isinstance(tool, Mapping) else None
    return name if isinstance(name, str) else None


def _function(tool: Any, name: str | None) -> Any:
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or name is None:
        return tool
    function = {"name": name} | {key: tool[key] for key in ("description", "parameters") if tool.get(key) is not None}
    return {"type": "function", "function": function | ({"strict": True} if tool.get("strict") is True else {})}


def _tool_choice(value: Any, names: Names) -> Any:
    if not isinstance(value, Mapping) or value.get("type") != "function":
        return value
    return {"type": "function", "function": {"name": names.ours(value.get("namespace"), value.get("name"))}}


# Items


def _messages(body: Mapping[str, Any], names: Names, told: list[str]) -> list[Any]:
    """What an assistant did between two others is one message."""
    items, instructions = body.get("input"), body.get("instructions")
    if isinstance(items, str) or items is None:
        items = [{"role": "user", "content": items or ""}]
    if not isinstance(items, Sequence):
        raise UsageError(f"input is a {type(items).__name__}, expected a string or a list of items.")
    if len(items) > MOST_MESSAGES:
        raise UsageError(f"There are {len(items):,} items, limit {MOST_MESSAGES:,}.", "Send fewer.")
    if not isinstance(instructions, str | None):
        raise UsageError(f"instructions is a {type(instructions).__name__}, expected a string.")
    found = list[dict[str, Any]]()
    if instructions:
        found.append({"role": "system", "content": instructions})
    for number, item in enumerate(items):
        message = _message(item, f"Item {number}", names, told)
        if message is None:
            continue
        if found and message["role"] == found[-1]["role"] == "assistant":
            for name, value in message.items():
                if name != "role":
                    found[-1][name] = found[-1].get(name, type(value)()) + value
        else:
            found.append(message)
    if all(message["role"] in ("system", "developer") for message in found):  # a client that only tries
        found.append({"role": "user", "content": ""})
    return found


def _message(item: Any, where: str, names: Names, told: list[str]) -> dict[str, Any] | None:
    """One message, or a piece of an assistant's; None for what is left out."""
    if not isinstance(item, Mapping):
        raise UsageError(f"{where} is a {type(item).__name__}, expected an object.")
    match item.get("type", "message"):
        case "message":
            role = item.get("role")
            if role not in _ROLES:
                raise UsageError(f"{where} has role {role!r}.", f"Use one of {', '.join(_ROLES)}.")
            return {"role": role, "content": _text(item.get("content"), where)}
        case "reasoning":
            return _reasoning(item, where)
        case "function_call":
            name = names.ours(item.get("namespace"), item.get("name"))
            function = {"name": name, "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            return {"role": "assistant", "tool_calls": [call]}
        case "function_call_output":
            text = _text(item.get("output"), where, told)
            return {"role": "tool", "tool_call_id": item.get("call_id"), "content": text}
        case kind:
            told.append(f"Items of type {kind!r} cannot be read here and were left out.")
            return None


def _reasoning(item: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """What was thought, or its summary where only that is there; what is encrypted nobody else can read."""
    for name in ("content", "summary"):
        parts = item.get(name) or []
        if not isinstance(parts, Sequence) or isinstance(parts, str):
            raise UsageError(f"{where}: {name} is a {type(parts).__name__}, expected a list.")
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise UsageError(f"{where}: {name} has a part without a text.", "Correct it.")
        if any(texts):
            return {"role": "assistant", "reasoning_content": "".join(f"{text}" for text in texts)}
    return None


def _text(content: Any, where: str, told: list[str] | None = None) -> str:
    """The text of all parts. With `told`, what is no text is left out and told: an agent would end at an error."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise UsageError(f"{where}: content is a {type(content).__name__}, expected a string or a list of parts.")
    texts = list[str]()
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get(_TEXTS.get(kind, "")) if isinstance(part, Mapping) and isinstance(kind, str) else None
        if isinstance(text, str):
            texts.append(text)
        elif told is None:
            raise UsageError(f"{where} has a part of type {kind!r}; the model reads text only.", "Leave it out.")
        else:
            told.append(f"{where} has a part of type {kind!r}, which was left out.")
            texts.append(_UNSEEN.format(kind))
    return "\n".join(texts)
