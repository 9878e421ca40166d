"""Prompts that are computed before anybody asks. Knows bodies of chat completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from m2lite.errors import M2liteError, UsageError
from m2lite.serve.answering import AnswerRequest
from m2lite.serve.chat_completions import parse_chat
from m2lite.serve.server import Server
from m2lite.system.inputs import read_input
from m2lite.system.json_text import JsonError, parse_object
from m2lite.system.streams import note

_MOST_BYTES = 64 << 20


def read_bodies(name: str) -> list[dict[str, Any]]:
    """The requests in a file, one a line; - is stdin."""
    try:
        lines = read_input(name, _MOST_BYTES).splitlines()
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}.") from None
    bodies = list[dict[str, Any]]()
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                bodies.append(parse_object(line))
            except JsonError as error:
                raise UsageError(
                    f"{name}, line {number}: no JSON ({error}).", 'Give {"messages": [...]} on each line.'
                ) from None
    return bodies


async def warm(server: Server, bodies: Sequence[dict[str, Any]]) -> None:
    """One after the other; what cannot be computed is told and passed over."""
    server.n_warming = len(bodies)
    for number, body in enumerate(bodies, 1):
        try:
            chat, _ = await server.off_loop(lambda body=body: parse_chat(body, server.defaults()))  # type: ignore[misc]
            once = replace(chat, max_tokens=1, schema=None, logprobs=None, model=None)
            found = await (await server.begin(AnswerRequest(chat=once))).whole()
            assert found.end is not None
            stats = found.end.completion.stats
            note(f"prompt {number} of {len(bodies)}: {stats.n_prompt:,} tokens ({stats.n_reused:,} cached)")
        except M2liteError as error:
            note(f"prompt {number} of {len(bodies)}: {error}")
        finally:
            server.n_warming -= 1
