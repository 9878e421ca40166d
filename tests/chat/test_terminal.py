"""The chat in a real pseudo-terminal: what is on the screen, what keys and signals do."""

from __future__ import annotations

import re
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pyte
import pytest

import tinymodel

Models = dict[str, Path]
Start = Callable[..., "Terminal"]

CTRL_C, CTRL_D, ENTER, NEWLINE = "\x03", "\x04", "\r", "\x0a"


class Terminal:
    """A chat in a pseudo-terminal, everything that it wrote, and the screen that this makes."""

    def __init__(self, arguments: list[str], env: dict[str, str], rows: int, columns: int) -> None:
        command = ["-m", "m2lite", "chat", *arguments]
        self.process: Any = pexpect.spawn(sys.executable, command, env=env, dimensions=(rows, columns), timeout=20)
        self.process.delaybeforesend = 0
        self.modes = termios.tcgetattr(self.process.child_fd)
        self.raw = ""
        self._screen = pyte.Screen(columns, rows)
        self._screen.write_process_input = self.process.send  # as a terminal answers when asked for its cursor
        self._stream = pyte.ByteStream(self._screen)
        self._place = 0

    def wait_for(self, text: str, timeout: float = 20) -> float:
        """Read until `text` (a regular expression) comes after what was waited for before; seconds that this took."""
        started = time.monotonic()
        while not (found := re.compile(text).search(self.raw, self._place)):
            left = timeout - (time.monotonic() - started)
            assert left > 0, f"no {text!r} in {self.raw[self._place :][-2000:]!r}"
            self._read(left)
        self._place = found.end()
        return time.monotonic() - started

    def _read(self, timeout: float) -> None:
        try:
            data = self.process.read_nonblocking(65536, timeout)
        except pexpect.TIMEOUT:
            return
        self._stream.feed(data)
        self.raw += data.decode(errors="replace")

    def wait_for_prompt(self) -> None:
        """The cursor stands behind an empty prompt, and all that came before has been waited for."""
        deadline = time.monotonic() + 20
        while self._cursor_line != ">" or self._screen.cursor.x != 2 or self._screen.cursor.hidden:
            assert time.monotonic() < deadline, self.screen
            self._read(0.05)
        self._place = len(self.raw)

    @property
    def _cursor_line(self) -> str:
        return str(self._screen.display[self._screen.cursor.y]).rstrip()

    def send(self, keys: str) -> None:
        self.process.send(keys)

    def ask(self, text: str) -> None:
        self.send(text + ENTER)

    @property
    def screen(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display).strip()

    def exit_code(self, timeout: float = 10) -> int:
        """Read to the end and return how the process left."""
        ends = time.monotonic() + timeout
        try:
            while time.monotonic() < ends:
                self._read(0.2)
        except pexpect.EOF:
            pass
        self.process.wait()
        code = self.process.exitstatus
        return -self.process.signalstatus if code is None else int(code)


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


def test_an_answer(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"])
    chat.ask("Hello")
    chat.wait_for(r"10 tok · [\d.]+ tok/s · first [\d.]+ s · prompt [\d,]+ tok/s \(\d+ tok\) · ctx 2 %")
    chat.wait_for_prompt()
    assert "\x1b[2mhm\x1b[0m" in chat.raw  # thinking is dimmed
    assert re.search(r"> Hello\n+hm\n+Fine é\n+10 tok · ", chat.screen), chat.screen
    chat.ask("Again")
    chat.wait_for("10 tok · ")
    chat.wait_for_prompt()
    chat.send(CTRL_D)
    assert chat.exit_code() == 0
    assert chat.screen.count("Fine é") == 2


def test_hidden_thinking(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"], "--think", "hide")
    chat.ask("Hello")
    chat.wait_for("10 tok · ")
    assert "hm" not in chat.screen and "Fine é" in chat.screen


def test_no_colour(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"], env={"NO_COLOR": "1"})
    chat.ask("Hello")
    chat.wait_for("10 tok · ")
    assert "\x1b[2m" not in chat.raw
    assert "thinking: hm" in chat.screen


def test_ctrl_c_stops_and_keeps(start: Start, model_files: Models) -> None:
    chat = start(model_files["answer"])
    chat.ask("Hello")
    chat.wait_for("abcdefgabcdefgabcdefg")
    chat.send(CTRL_C)
    assert chat.wait_for(r"— stopped \(kept (\d+) tokens\)") < 0.5
    chat.wait_for_prompt()
    # the words so far are in the history, and the next turn goes on from there
    chat.ask("/stats")
    chat.wait_for("turns 1")
    chat.wait_for_prompt()
    chat.ask("More")
    chat.wait_for("abcdefg")
    time.sleep(0.1)
    chat.send(CTRL_C)
    assert chat.wait_for(r"— stopped \(kept") < 0.5
    chat.wait_for_prompt()
    chat.ask("/exit")
    assert chat.exit_code() == 0


def test_ctrl_c_while_thinking(start: Start, model_files: Models) -> None:
    chat = start(model_files["endless"])
    chat.ask("Hello")
    chat.wait_for("abcdefghabcdefgh")
    chat.send(CTRL_C)
    assert chat.wait_for(r"— stopped") < 0.5
    assert "\x1b[0m" in chat.raw[chat.raw.rfind("\x1b[2ma") :]  # nothing stays dimmed
    chat.wait_for_prompt()


def test_ctrl_c_while_the_prompt_is_read(start: Start, model_files: Models) -> None:
    chat = start(model_files["answer"], "--max-tokens", "3")
    chat.send("\x1b[200~" + "many words " * 300 + "\x1b[201~" + ENTER)
    chat.send(CTRL_C)
    chat.wait_for(r"— stopped|Ctrl-D or /exit leaves")  # the latter if the three tokens were already out
    chat.wait_for_prompt()
    chat.ask("Hello")
    chat.wait_for(r"3 tok · ")


def test_second_ctrl_c_leaves(start: Start, model_files: Models, command_env: dict[str, str]) -> None:
    """Seen while the answer cannot be stopped in between: here, because both come at once."""
    chat = start(model_files["answer"])
    chat.ask("Hello")
    chat.wait_for("abcdefgabcdefg")
    chat.process.kill(signal.SIGINT)
    chat.process.kill(signal.SIGINT)
    chat.wait_for(r"— stopped|interrupted")
    if "interrupted" in chat.raw:
        assert chat.exit_code() == 130


def test_ctrl_c_at_the_prompt_hints(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"])
    chat.send(CTRL_C)
    chat.wait_for("Ctrl-D or /exit leaves")
    chat.wait_for_prompt()
    chat.send("half a line" + CTRL_C)
    chat.wait_for("Ctrl-D or /exit leaves")
    chat.wait_for_prompt()
    chat.ask("Hello")
    chat.wait_for("Fine é")


def test_commands(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"])
    for line, answer in [
        ("/help", r"/clear +forget the conversation"),
        ("/frobnicate now", r"error: There is no command /frobnicate\."),
        ("/system", r"the template's own system message is used"),
        ("/system Be brief.", r"system message set"),
        ("/system", r"Be brief\."),
        ("//slash", r"Fine é"),
        ("q", r"Fine é"),
        ("/stats", r"turns 2"),
        ("/clear", r"forgot 2 turns"),
        ("/stats", r"turns 0"),
    ]:
        chat.ask(line)
        chat.wait_for(answer)
        chat.wait_for_prompt()
    chat.ask("/exit")
    assert chat.exit_code() == 0


def test_several_lines(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"])
    chat.send("\x1b[200~one\ntwo\x1b[201~")
    chat.send(NEWLINE + "three")
    chat.send("\x1b\r" + "four" + ENTER)
    chat.wait_for("10 tok · ")
    chat.wait_for_prompt()
    chat.ask("/stats")
    chat.wait_for("turns 1")
    assert all(word in chat.screen for word in ("one", "two", "three", "four"))


def test_message_that_does_not_fit(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"], "--ctx", "128")
    chat.ask("x" * 200)
    chat.wait_for(r"error: The prompt needs \d+ tokens; 128 are free of 128\.")
    chat.wait_for_prompt()
    chat.ask("Hello")
    chat.wait_for("Fine é")


def test_answer_that_reaches_the_limit(start: Start, model_files: Models) -> None:
    chat = start(model_files["answer"], "--ctx", "128")
    chat.ask("Hello")
    chat.wait_for("— cut off: the answer reached the limit of tokens")
    chat.wait_for(r"ctx 10\d %")
    chat.wait_for_prompt()
    chat.ask("Hello")
    chat.wait_for(r"error: This message needs \d+ tokens; \d+ are free of 128\.")


def test_escapes_are_harmless(start: Start, tmp_path: Path) -> None:
    script = tinymodel.chain("\n", tinymodel.THOUGHT, b"a\x1b[2Jb\x07c\xc2\x9bd", tinymodel.END)
    chat = start(tinymodel.write_model(tmp_path / "escape.gguf", script))
    chat.ask("Hello")
    chat.wait_for("tok · ")
    assert "a␛[2Jb␇c\ufffdd" in chat.raw
    assert "> Hello" in chat.screen


def test_narrow_terminal(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"], columns=20, rows=10)
    chat.ask("a question that is longer than a line")
    chat.wait_for("Fine é")
    chat.wait_for_prompt()


@pytest.mark.parametrize("where", ["prompt", "answer"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_terminated(start: Start, model_files: Models, number: int, where: str) -> None:
    chat = start(model_files["answer"])
    if where == "answer":
        chat.ask("Hello")
        chat.wait_for("abcdefgabcdefg")
    chat.process.kill(number)
    assert chat.exit_code() == 143
    assert "Traceback" not in chat.raw, chat.raw[-3000:]


def test_terminal_is_restored(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"])
    chat.process.kill(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while termios.tcgetattr(chat.process.child_fd) != chat.modes:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_terminal_that_is_closed(start: Start, model_files: Models) -> None:
    chat = start(model_files["answer"])
    chat.ask("Hello")
    chat.wait_for("abcdefgabcdefg")
    chat.process.close(force=False)
    deadline = time.monotonic() + 10
    while chat.process.isalive():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_history_is_private(start: Start, model_files: Models, tmp_path: Path) -> None:
    chat = start(model_files["reply"], env={"XDG_STATE_HOME": str(tmp_path)})
    chat.ask("my secret")
    chat.wait_for("Fine é")
    chat.wait_for_prompt()
    chat.send(CTRL_D)
    chat.exit_code()
    history = tmp_path / "m2lite" / "history"
    assert "my secret" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
    assert history.parent.stat().st_mode & 0o777 == 0o700
