"""A chat in a pseudo-terminal: everything that it wrote, and the screen that this makes."""

from __future__ import annotations

import re
import sys
import termios
import time
from typing import Any

import pexpect
import pyte

from tests.children import PATIENCE_S, default_signals

CTRL_C, CTRL_D, ENTER, NEWLINE, TAB = "\x03", "\x04", "\r", "\x0a", "\t"


class Terminal:
    """A command in a pseudo-terminal, everything that it wrote, and the screen that this makes."""

    def __init__(self, arguments: list[str], env: dict[str, str], rows: int, columns: int) -> None:
        command = ["-m", "m2lite", *arguments]
        with default_signals():
            self.process: Any = pexpect.spawn(
                sys.executable, command, env=env, dimensions=(rows, columns), timeout=PATIENCE_S
            )
        self.process.delaybeforesend = 0
        self.modes = termios.tcgetattr(self.process.child_fd)
        self.raw = ""
        self._screen = pyte.Screen(columns, rows)
        self._screen.write_process_input = self.process.send  # as a terminal answers when asked for its cursor
        self._stream = pyte.ByteStream(self._screen)
        self._place = 0

    def wait_for(self, text: str, timeout: float = PATIENCE_S) -> None:
        """Read until `text` (a regular expression) comes after what was waited for before."""
        started = time.monotonic()
        while not (found := re.compile(text).search(self.raw, self._place)):
            left = timeout - (time.monotonic() - started)
            assert left > 0, f"no {text!r} in {self.raw[self._place :][-2000:]!r}"
            self._read(left)
        self._place = found.end()

    def _read(self, timeout: float) -> None:
        try:
            data = self.process.read_nonblocking(65536, timeout)
        except pexpect.TIMEOUT:
            return
        self._stream.feed(data)
        self.raw += data.decode(errors="replace")

    def wait_for_text(self, line: str) -> None:
        """The cursor stands in a line that is so."""
        deadline = time.monotonic() + PATIENCE_S
        while self._cursor_line != line:
            assert time.monotonic() < deadline, self.screen
            self._read(0.05)

    def wait_for_prompt(self) -> None:
        """The cursor stands behind an empty prompt, and all that came before has been waited for."""
        deadline = time.monotonic() + PATIENCE_S
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

    def exit_code(self, timeout: float = PATIENCE_S) -> int:
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
