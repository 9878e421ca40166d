"""Chats in pseudo-terminals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chat.terminal import Terminal

Start = Callable[..., Terminal]  # returns at the first prompt
StartRaw = Callable[..., Terminal]  # returns at once


@pytest.fixture
def start_raw(command_env: dict[str, str]) -> Iterator[StartRaw]:
    terminals: list[Terminal] = []

    def run(
        model: Path, *options: str, rows: int = 24, columns: int = 80, env: dict[str, str] | None = None
    ) -> Terminal:
        merged = {name: value for name, value in (command_env | (env or {})).items() if name != "COLUMNS"}
        terminal = Terminal(["chat", str(model), "--seed", "1", *options], merged, rows, columns)
        terminals.append(terminal)
        return terminal

    yield run
    for terminal in terminals:
        terminal.process.close(force=True)


@pytest.fixture
def start(start_raw: StartRaw) -> Start:
    def run(*arguments: Any, **options: Any) -> Terminal:
        terminal = start_raw(*arguments, **options)
        terminal.wait_for("loaded in")
        terminal.wait_for_prompt()
        return terminal

    return run
