"""The chat without a terminal, and the parts of it that need none."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from m2lite.chat.render import Renderer
from m2lite.system.streams import Out
from m2lite.text.reply import Piece

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_lines_from_a_pipe(run_m2lite: Run, model_files: dict[str, Path]) -> None:
    done = run_m2lite("chat", model_files["reply"], stdin="Hello\n\n/stats\n/nothing\nAgain\n")
    assert (done.returncode, done.stdout) == (0, "Fine é\nFine é\n")
    assert done.stderr.count("thinking: hm") == 2
    assert "turns 1" in done.stderr
    assert "error: There is no command /nothing." in done.stderr
    assert "\033" not in done.stderr + done.stdout


def test_exit_ends_the_input(run_m2lite: Run, model_files: dict[str, Path]) -> None:
    done = run_m2lite("chat", model_files["reply"], stdin="/exit\nHello\n")
    assert (done.returncode, done.stdout) == (0, "")


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [False, True])
def test_renderer(terminal: bool) -> None:
    screen = FakeTerminal() if terminal else io.StringIO()
    out = Out(lambda: screen)
    renderer = Renderer(style=terminal, show_thinking=True, out=out, err=out)
    for kind, text in [
        ("thinking", "a"),
        ("thinking", "\033b"),
        ("content", "\n\nc\n"),
        ("content", "d"),
        ("tool_call", "x"),
    ]:
        renderer.show(Piece(kind, text))  # type: ignore[arg-type]
    renderer.end()
    if terminal:
        assert screen.getvalue() == "\033[2ma␛b\033[0m\n\nc\nd\nx\n"
    else:
        assert screen.getvalue() == "thinking: a\033b\nc\nd\nx\n"


def test_renderer_with_nothing_to_show() -> None:
    out, err = io.StringIO(), io.StringIO()
    renderer = Renderer(style=False, show_thinking=False, out=Out(lambda: out), err=Out(lambda: err))
    renderer.show(Piece("thinking", "a"))
    renderer.end()
    assert (out.getvalue(), err.getvalue()) == ("", "")
