"""Messages and tools of any client in the forms that the model has. Knows no dialect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from m2lite.errors import UsageError

MOST_MESSAGES = 10_000
MOST_TOOLS = 1_000
_MOST_TOLD = 20  # of what was ignored
_MOST_SHOWN = 200  # characters of each


def merge_system(messages: object) -> list[Any]:
    """`messages` with at most one system message, in front; `developer` is another word for it.

    Later ones that stand before the first answer are added to it. Behind an answer one is a question's text: in front
    it would change the beginning of a conversation whose beginning is computed already.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UsageError("messages is no list of messages.", 'Give [{"role": "user", "content": ...}].')
    if len(messages) > MOST_MESSAGES:
        raise UsageError(f"There are {len(messages):,} messages, limit {MOST_MESSAGES:,}.", "Send fewer.")
    system, others, is_answered = list[Mapping[str, Any]](), list[Any](), False
    for message in messages:
        role = message.get("role") if isinstance(message, Mapping) else None
        is_answered = is_answered or role == "assistant"
        if role not in ("system", "developer"):
            others.append(message)
        elif is_answered:
            others.append({**message, "role": "user"})
        else:
            system.append(message)
    if not system:
        return others
    parts = list[Any]()
    for message in system:
        content = message.get("content")
        texts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        if not isinstance(texts, Sequence):
            raise UsageError(f"A system message's content is a {type(texts).__name__}.", "Give a text.")
        parts += [{"type": "text", "text": "\n\n"}, *texts] if parts and texts else texts
    return [{**system[0], "role": "system", "content": parts}, *others]


def join_answers(messages: Sequence[Any]) -> list[Any]:
    """`messages` where an answer's text and its calls are one message: some clients send two."""
    found = list[Any]()
    for message in messages:
        before: Any = found[-1] if found else None
        if _is_answer(before) and _is_answer(message) and not before.get("tool_calls"):
            said = {name: value for name, value in message.items() if value not in (None, "", [])}
            if said.keys() == {"role", "tool_calls"}:
                found[-1] = {**before, **said}
                continue
        found.append(message)
    return found


def _is_answer(message: object) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "assistant"


def usable_tools(tools: object) -> tuple[list[Any], list[str]]:
    """The functions among `tools`, those of namespaces too, and the types of what cannot be called here."""
    if tools is None:
        return [], []
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise UsageError("tools is no list of tools.")
    found, skipped = list[Any](), list[str]()
    _gather(tools, found, skipped)
    if len(found) > MOST_TOOLS:
        raise UsageError(f"There are {len(found):,} tools, limit {MOST_TOOLS:,}.", "Send fewer.")
    return found, skipped


def _gather(tools: Iterable[Any], found: list[Any], skipped: list[str]) -> None:
    for tool in tools:
        kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
        inner = tool.get("tools") if kind == "namespace" else None
        if isinstance(inner, Sequence) and not isinstance(inner, str):
            _gather(inner, found, skipped)
        elif kind in ("function", None):  # who checks it says what is wrong with one that is no object
            found.append(tool)
        else:
            skipped.append(str(kind))


def shortened(told: Iterable[str]) -> list[str]:
    """What is told of a body, each thing once, and not the whole of it."""
    return [each[:_MOST_SHOWN] for each in dict.fromkeys(told)][:_MOST_TOLD]
