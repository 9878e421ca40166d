"""Clients from PyPI: how each is told where the server is, and how it is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.clients.checks import MADE, Client, Place
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


def _llm(place: Place) -> dict[str, str]:
    model = {"model_id": "m2", "model_name": MODEL, "api_base": f"{place.url}/v1", "supports_tools": "true"}
    lines = "\n  ".join(f"{name}: {value}" for name, value in model.items())
    place.write("llm/extra-openai-models.yaml", f"- {lines}\n")
    return {"LLM_USER_PATH": str(place.home / "llm"), "OPENAI_API_KEY": "none"}


def _aider(place: Place) -> dict[str, str]:
    place.write(
        ".aider.conf.yml",
        f"""model: openai/{MODEL}
openai-api-base: {place.url}/v1
openai-api-key: none
edit-format: whole
timeout: 3600
map-tokens: 0
git: false
check-update: false
analytics-disable: true
show-model-warnings: false
""",
    )
    place.write(".aider.model.settings.yml", "")
    return {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}


def _ask_aider(place: Place, text: str, is_more: bool) -> list[str]:
    return ["aider", "--yes-always", *(["--restore-chat-history"] if is_more else []), "--message", text]


def _ask_llm(place: Place, text: str, is_more: bool) -> list[str]:
    return ["llm", "prompt", "--model", "m2", "--functions", _FUNCTION, *(["--continue"] if is_more else []), text]


def _program(name: str, kind: str, path: str = "") -> Callable[[Place, str, bool], list[str]]:
    """One of ours, which asks by way of the library."""
    return lambda place, text, is_more: ["python", str(_PROGRAMS / name), place.url + path, MODEL, kind, text]


def _nothing(place: Place) -> dict[str, str]:
    return {}


def _write_file(place: Place) -> str:
    return call("write_file", {"path": MADE, "content": "ok"})


_AGENTS, _PYDANTIC = "openai-agents==0.24.0", "pydantic-ai-slim[openai,anthropic]==2.62.0"

PACKAGES = [
    Client(
        "aider", "aider-chat==0.86.2", _aider, _ask_aider, lambda place: f"{MADE}\n{_FENCE}\nok\n{_FENCE}\n",
        has_results=False, changes="a reminder and the files stand behind what was said, and thinking is not sent",
    ),
    Client("llm", "llm==0.36", _llm, _ask_llm, _write_file),
    Client(
        "openai-agents", _AGENTS, _nothing, _program("ask_openai_agents.py", "responses", "/v1"), _write_file,
    ),
    Client(
        "openai-agents chat", _AGENTS, _nothing, _program("ask_openai_agents.py", "chat", "/v1"), _write_file,
    ),
    Client("pydantic-ai", _PYDANTIC, _nothing, _program("ask_pydantic_ai.py", "chat"), _write_file),
    Client("pydantic-ai messages", _PYDANTIC, _nothing, _program("ask_pydantic_ai.py", "messages"), _write_file),
]  # fmt: skip
