"""The line that tells how far the prompt is read."""

from __future__ import annotations

import io
import sys

import pytest

from m2lite.chat.progress import PromptProgress
from m2lite.text.reply import Piece


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_slow_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    progress = PromptProgress()
    progress(512, 4000)
    assert terminal.getvalue() == ""  # it may be over in a moment
    progress._started -= 10
    progress(512, 4000)
    assert terminal.getvalue() == "\r\033[Kreading 512 of 4,000 tokens, 51 tok/s, 68 s left"
    assert list(progress.until_read(iter([Piece("content", "a")]))) == [Piece("content", "a")]
    assert terminal.getvalue().endswith("left\r\033[K")


def test_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    progress = PromptProgress()
    progress._started -= 10
    progress(512, 4000)
    progress.end()
    assert pipe.getvalue() == ""
