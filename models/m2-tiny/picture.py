"""A chat with m2-tiny as a picture of a terminal: runs it in a pseudo-terminal, types, and draws the screen as SVG.

PYTHONPATH=. python models/m2-tiny/picture.py chat.svg
"""

from __future__ import annotations

import os
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

from tests.chat.terminal import CTRL_C, Terminal

COLUMNS, ROWS = 100, 34


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "XDG_DATA_HOME": home, "XDG_STATE_HOME": home, "TERM": "xterm-256color"}
        for name in ("NO_COLOR", "COLUMNS", "LINES"):
            env.pop(name, None)
        chat = Terminal(["--seed", "3"], env, ROWS, COLUMNS)
        chat.wait_for("loaded in", 120)
        chat.wait_for_prompt()
        for line, answer in (
            ("Hello! Who are you?", r"ctx \d+ %"),
            ("/think hide", "thinking is folded"),
            ("Tell me a short story about a fox and a lantern.", r"thought for [\d.]+ s"),
        ):
            chat.ask(line)
            chat.wait_for(answer)
            if not line.startswith("Tell"):
                chat.wait_for_prompt()
        chat.wait_for(r"\w+ \w+ \w+ ")
        chat.send(CTRL_C)
        for line in ("/continue", "/context"):
            chat.wait_for_prompt()
            chat.ask(line)
        chat.wait_for("free of")
        chat.wait_for_prompt()
        Path(path).write_text(draw(chat.raw))


def draw(written: str) -> str:
    """The last screen of what was written, with its styles, as SVG."""
    screen = pyte.Screen(COLUMNS, ROWS)
    pyte.Stream(screen).feed(written.replace("\033[2m", "\033[90m"))  # pyte does not know dim
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere)
        for y in range(screen.cursor.y + 1):
            line = screen.buffer[y]
            text = Text(no_wrap=True)
            for style, cells in groupby((line[x] for x in range(COLUMNS)), _style):
                text.append("".join(cell.data for cell in cells), style)
            text.rstrip()
            console.print(text)
        return console.export_svg(title="m2lite chat")


def _style(cell: Any) -> Style:
    name = str(cell.fg).replace("bright", "bright_").replace("brown", "yellow")
    is_hex = len(name) == 6 and all(c in "0123456789abcdef" for c in name)
    colour = None if name == "default" else f"#{name}" if is_hex else name
    return Style(color=colour, bold=cell.bold, italic=cell.italics, underline=cell.underscore)


if __name__ == "__main__":
    main(sys.argv[1])
