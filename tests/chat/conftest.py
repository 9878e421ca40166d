"""Chats in pseudo-terminals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chat.terminal import Terminal

Start = Callable[..., Terminal]


@pytest.fixture
def start(command_env: dict[str, str]) -> Iterator[Start]:
    terminals: list[Terminal] = []

    def run(
        model: Path, *options: str, rows: int = 24, columns: int = 80, env: dict[str, str] | None = None
    ) -> Terminal:
        merged = {name: value for name, value in (command_env | (env or {})).items() if name != "COLUMNS"}
        terminal = Terminal([str(model), "--seed", "1", *options], merged, rows, columns)
        terminals.append(terminal)
        terminal.wait_for("loaded in")
        terminal.wait_for_prompt()
        return terminal

    yield run
    for terminal in terminals:
        terminal.process.close(force=True)
