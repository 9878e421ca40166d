"""Coding agents from npm: how each is asked, and how the model calls its tool that writes a file."""

from __future__ import annotations

from tests.clients.checks import MADE, Client, Place
from tests.clients.documented import documented
from tests.clients.started import call


def _ask_codex(place: Place, text: str, is_more: bool) -> list[str]:
    options = ["--skip-git-repo-check", "--sandbox", "workspace-write"]
    return ["codex", "exec", *options, *(["resume", "--last"] if is_more else []), text]


AGENTS = [
    Client(
        "pi", "@mariozechner/pi-coding-agent@0.73.1", documented("pi", {"PI_OFFLINE": "1"}),
        lambda place, text, is_more: ["pi", "--print", *(["--continue"] if is_more else []), text],
        lambda place: call("write", {"path": MADE, "content": "ok"}),
    ),
    Client(
        "Codex", "@openai/codex@0.171.0", documented("Codex"), _ask_codex,
        lambda place: call("exec_command", {"cmd": f"echo ok > {MADE}"}),
    ),
    Client(
        "Claude Code", "@anthropic-ai/claude-code@2.1.197", documented("Claude Code"),
        lambda place, text, is_more: [
            "claude", "--print", "--permission-mode", "acceptEdits", *(["--continue"] if is_more else []), text,
        ],
        lambda place: call("Write", {"file_path": str(place.project / MADE), "content": "ok"}),
    ),
    Client(
        "opencode", "opencode-ai@1.18.33", documented("opencode"),
        lambda place, text, is_more: ["opencode", "run", *(["--continue"] if is_more else []), text],
        lambda place: call("write", {"filePath": str(place.project / MADE), "content": "ok"}),
    ),
    Client(
        "Qwen Code", "@qwen-code/qwen-code@0.15.10", documented("Qwen Code"),
        lambda place, text, is_more: [
            "qwen", "--approval-mode", "auto-edit", *(["--continue"] if is_more else []), text,
        ],
        lambda place: call("write_file", {"file_path": str(place.project / MADE), "content": "ok"}),
        changes="its first message lists the project's files as they are now",
    ),
]  # fmt: skip
