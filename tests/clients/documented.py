"""Configurations as docs/agents.md shows them: what a reader copies is what is tried."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping

from tests.clients.checks import Place
from tests.clients.started import ROOT

_ADDRESS = "http://127.0.0.1:8080"
_FILE = re.compile(r"^`(?:~/)?([\w./-]+\.(?:json|toml|yml|yaml))`")


def documented(title: str, more: Mapping[str, str] | None = None) -> Callable[[Place], dict[str, str]]:
    """Writes a section's files into the home; returns the variables that it exports, and `more`."""

    def configure(place: Place) -> dict[str, str]:
        found = dict(more or {})
        for name, text in _blocks(title):
            text = text.replace(_ADDRESS, place.url)
            if text.startswith("export "):
                found |= dict(word.split("=", 1) for word in shlex.split(text)[1:])
            elif name:
                place.write(name, text)
        return found

    return configure


def _blocks(title: str) -> list[tuple[str, str]]:
    """Each indented block, with the file that the paragraph before it begins with."""
    section = (ROOT / "docs" / "agents.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    found, name, is_open = list[tuple[str, str]](), "", False
    for paragraph in section.strip("\n").split("\n\n"):
        if paragraph.startswith("    "):
            text = re.sub(r"^    ", "", paragraph, flags=re.MULTILINE) + "\n"
            found.append((name, f"{found.pop()[1]}\n{text}" if is_open else text))
        else:
            file = _FILE.match(paragraph)
            name = file[1] if file else ""
        is_open = paragraph.startswith("    ")
    return found
