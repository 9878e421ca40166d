"""Coding agents from npm: how each is told where the server is, and how it is asked. docs/agents.md says the same."""

from __future__ import annotations

import json
from typing import Any

from tests.clients.checks import MADE, Client, Place
from tests.clients.started import CONTEXT, MODEL, call

_HOUR_MS = 3_600_000
_MOST = 32_768  # tokens of an answer


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2)


def _pi(place: Place) -> dict[str, str]:
    model = {"id": MODEL, "reasoning": True, "contextWindow": CONTEXT, "maxTokens": _MOST}
    provider = {"baseUrl": f"{place.url}/v1", "api": "openai-completions", "apiKey": "none", "models": [model]}
    place.write(".pi/agent/models.json", _dump({"providers": {"m2lite": provider}}))
    retry = {"provider": {"timeoutMs": _HOUR_MS, "maxRetries": 0}}
    settings = {"defaultProvider": "m2lite", "defaultModel": MODEL, "retry": retry}
    place.write(".pi/agent/settings.json", _dump(settings))
    return {"PI_OFFLINE": "1", "PI_TELEMETRY": "0"}


def _codex(place: Place) -> dict[str, str]:
    place.write(
        ".codex/config.toml",
        f"""model = "{MODEL}"
model_provider = "m2lite"
model_context_window = {CONTEXT}
check_for_update_on_startup = false
analytics.enabled = false

[model_providers.m2lite]
name = "m2lite"
base_url = "{place.url}/v1"
wire_api = "responses"
stream_idle_timeout_ms = {_HOUR_MS}
request_max_retries = 0
stream_max_retries = 0
""",
    )
    return {}


def _claude(place: Place) -> dict[str, str]:
    return {
        "ANTHROPIC_BASE_URL": place.url,
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_MODEL": MODEL,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": MODEL,
        "API_TIMEOUT_MS": str(_HOUR_MS),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }


def _opencode(place: Place) -> dict[str, str]:
    model = {
        "name": "MiniMax-M2", "reasoning": True, "tool_call": True, "interleaved": {"field": "reasoning_content"},
        "limit": {"context": CONTEXT, "output": _MOST},
    }  # fmt: skip
    provider = {
        "npm": "@ai-sdk/openai-compatible", "name": "m2lite", "models": {MODEL: model},
        "options": {"baseURL": f"{place.url}/v1", "apiKey": "none", "timeout": False},
    }  # fmt: skip
    name = f"m2lite/{MODEL}"
    config = {"model": name, "small_model": name, "autoupdate": False, "share": "disabled"}
    place.write(".config/opencode/opencode.json", _dump(config | {"provider": {"m2lite": provider}}))
    return {}


def _qwen(place: Place) -> dict[str, str]:
    settings = {
        "security": {"auth": {"selectedType": "openai"}},
        "model": {"name": MODEL, "generationConfig": {"timeout": _HOUR_MS, "maxRetries": 0}},
        "privacy": {"usageStatisticsEnabled": False},
        "telemetry": {"enabled": False},
        "general": {"enableAutoUpdate": False},
    }
    place.write(".qwen/settings.json", _dump(settings))
    return {"OPENAI_BASE_URL": f"{place.url}/v1", "OPENAI_API_KEY": "none", "OPENAI_MODEL": MODEL}


def _ask_codex(place: Place, text: str, is_more: bool) -> list[str]:
    options = ["--skip-git-repo-check", "--sandbox", "workspace-write"]
    return ["codex", "exec", *options, *(["resume", "--last"] if is_more else []), text]


AGENTS = [
    Client(
        "pi", "@mariozechner/pi-coding-agent@0.73.1", _pi,
        lambda place, text, is_more: ["pi", "--print", *(["--continue"] if is_more else []), text],
        lambda place: call("write", {"path": MADE, "content": "ok"}),
    ),
    Client(
        "Codex", "@openai/codex@0.171.0", _codex, _ask_codex,
        lambda place: call("exec_command", {"cmd": f"echo ok > {MADE}"}),
    ),
    Client(
        "Claude Code", "@anthropic-ai/claude-code@2.1.197", _claude,
        lambda place, text, is_more: [
            "claude", "--print", "--permission-mode", "acceptEdits", *(["--continue"] if is_more else []), text,
        ],
        lambda place: call("Write", {"file_path": str(place.project / MADE), "content": "ok"}),
    ),
    Client(
        "opencode", "opencode-ai@1.18.33", _opencode,
        lambda place, text, is_more: ["opencode", "run", *(["--continue"] if is_more else []), text],
        lambda place: call("write", {"filePath": str(place.project / MADE), "content": "ok"}),
    ),
    Client(
        "Qwen Code", "@qwen-code/qwen-code@0.15.10", _qwen,
        lambda place, text, is_more: [
            "qwen", "--approval-mode", "auto-edit", *(["--continue"] if is_more else []), text,
        ],
        lambda place: call("write_file", {"file_path": str(place.project / MADE), "content": "ok"}),
        changes="its first message lists the project's files as they are now",
    ),
]  # fmt: skip
