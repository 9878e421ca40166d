"""Clients from PyPI: how each is asked, and how the model writes a file with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.clients.checks import MADE, Client, Place
from tests.clients.documented import documented
from tests.clients.started import MODEL, call

_PROGRAMS = Path(__file__).resolve().parent / "programs"
_FENCE = "```"
_FUNCTION = '''
def write_file(path: str, content: str) -> str:
    """Write a text file."""
    import pathlib
    pathlib.Path(path).write_text(content)
    return f"{path} has {len(content)} characters."
'''


_QUIET = {"AIDER_GIT": "false", "AIDER_CHECK_UPDATE": "false", "AIDER_ANALYTICS_DISABLE": "true"}


def _ask_aider(place: Place, text: str, is_more: bool) -> list[str]:
    return ["aider", "--yes-always", *(["--restore-chat-history"] if is_more else []), "--message", text]


def _ask_llm(place: Place, text: str, is_more: bool) -> list[str]:
    return ["llm", "prompt", "--model", "m2", "--functions", _FUNCTION, *(["--continue"] if is_more else []), text]


def _program(name: str, kind: str, path: str = "") -> Callable[[Place, str, bool], list[str]]:
    """One of ours, which asks by way of the library."""
    return lambda place, text, is_more: ["python", str(_PROGRAMS / name), place.url + path, MODEL, kind, text]


def _llm(place: Place) -> dict[str, str]:
    return documented("llm")(place) | {"LLM_USER_PATH": str(place.home)}


def _nothing(place: Place) -> dict[str, str]:
    return {}


def _write_file(place: Place) -> str:
    return call("write_file", {"path": MADE, "content": "ok"})


_AGENTS, _PYDANTIC = "openai-agents==0.24.0", "pydantic-ai-slim[openai,anthropic]==2.62.0"

PACKAGES = [
    Client(
        "aider", "aider-chat==0.86.2", documented("aider", _QUIET), _ask_aider,
        lambda place: f"{MADE}\n{_FENCE}\nok\n{_FENCE}\n",
        has_results=False, changes="a reminder and the files stand behind what was said, and thinking is not sent",
    ),
    Client("llm", "llm==0.36", _llm, _ask_llm, _write_file, sends_thinking=False),
    Client(
        "openai-agents", _AGENTS, _nothing, _program("ask_openai_agents.py", "responses", "/v1"), _write_file,
    ),
    Client(
        "openai-agents chat", _AGENTS, _nothing, _program("ask_openai_agents.py", "chat", "/v1"), _write_file,
        sends_thinking=False,
    ),
    Client("pydantic-ai", _PYDANTIC, _nothing, _program("ask_pydantic_ai.py", "chat"), _write_file),
    Client("pydantic-ai messages", _PYDANTIC, _nothing, _program("ask_pydantic_ai.py", "messages"), _write_file),
]  # fmt: skip
