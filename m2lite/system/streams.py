"""The three standard streams: all that is written to a person or a pipe goes through here. Knows no command.

Others' text reaches a terminal through `shown` or `shown_lines`; escape codes of our own are `Styled`.
Losing stderr loses messages and nothing else. Losing stdout ends the command: with OutputError, or quietly where the
reader has gone. A closed stdin is an empty one.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import IO, TYPE_CHECKING, Any, TextIO

from m2lite.errors import UsageError
from m2lite.shown import shown, shown_json, shown_lines

if TYPE_CHECKING:
    from rich.console import Console

_WHOLE_LINE = "\r\033[K"  # back to the line's beginning, and nothing stands there any more
_closed: set[int] = set()  # standard descriptors that were closed when the process started
_results: _Results | None = None


class OutputError(Exception):
    """stdout cannot take what belongs there. No M2liteError: a chat goes on after those, and not after this."""


class ReaderGone(BrokenPipeError):
    """Whoever read our stdout has left, `| head` for one: nothing is wrong."""


class Styled(str):
    """Text with escape codes that we wrote; what others wrote in it went through `shown` or `shown_lines`."""

    __slots__ = ()


class _Raw(io.FileIO):
    """A standard descriptor; a write waits where somebody else made it non-blocking."""

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.name = name

    def write(self, data: Any, /) -> int:
        while (n := super().write(data)) is None:
            poll = select.poll()
            poll.register(self.fileno(), select.POLLOUT)
            poll.poll()
        return n


class _Messages(_Raw):
    """stderr: what cannot be written there is lost, and nobody hears of it."""

    def write(self, data: Any, /) -> int:
        with suppress(OSError):
            return super().write(data)
        return len(data)


class _Results(_Raw):
    """stdout: the first failure is raised, what comes after it goes nowhere, so that the way out is free."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        if self.error is not None:
            return len(data)
        try:
            if self.fileno() in _closed:
                raise OSError(errno.EBADF, "it is closed")
            return super().write(data)
        except OSError as error:
            self.error = error
            if error.errno == errno.EPIPE:
                raise ReaderGone(error.errno, error.strerror) from None
            raise _lost(error) from None


def _lost(error: OSError) -> OutputError:
    return OutputError(f"The result cannot be written to stdout: {error.strerror}.")


def claim() -> None:
    """Take the streams over, before anything else opens a file: its number could be that of a closed one."""
    global _results
    _closed.clear()
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _closed.add(descriptor)
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets this number: the lower ones are taken
    if 0 in _closed or sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
    _results = _Results(1, "<stdout>")
    sys.stdout = _text(_results, sys.stdout, _results.isatty())
    sys.stderr = _text(_Messages(2, "<stderr>"), sys.stderr, True)


def _text(raw: _Raw, before: TextIO | None, by_lines: bool) -> TextIO:
    """A character that the encoding does not have is written as its escape: a terminal's lack is no reason to stop."""
    encoding = getattr(before, "encoding", None) or "utf-8"
    with suppress(OSError, ValueError):
        if before is not None:
            before.flush()
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=by_lines)


def require_stdout() -> None:
    """OutputError if there is no stdout: said before an hour of work, not after it."""
    if 1 in _closed:
        raise OutputError("stdout is closed, and the result belongs there. Leave `>&-` out, or write it to a file.")


def finish() -> OutputError | None:
    """Write what is still held; what went wrong with stdout, now or earlier, but for a reader that has gone."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, OutputError):
            stream.flush()
    error = None if _results is None else _results.error
    return None if error is None or error.errno == errno.EPIPE else _lost(error)


class Out:
    """stdout or stderr, whatever `sys` holds at the moment."""

    def __init__(self, stream: Callable[[], TextIO]) -> None:
        self._stream = stream

    @property
    def is_terminal(self) -> bool:
        return self._stream().isatty()

    @property
    def is_styled(self) -> bool:
        """Whether escape codes may be written."""
        return self.is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def lines(self, *lines: str) -> None:
        """Each is one line, whatever it quotes."""
        stream = self._stream()
        stream.write("".join(f"{line if isinstance(line, Styled) else shown(line)}\n" for line in lines))
        stream.flush()

    def json(self, value: Any) -> None:
        """One line of JSON. Numbers that it does not have are null."""
        stream = self._stream()
        is_unicode = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")
        try:
            text = json.dumps(value, ensure_ascii=not is_unicode, allow_nan=False)
        except ValueError:
            text = json.dumps(_finite(value), ensure_ascii=not is_unicode, allow_nan=False)
        stream.write(shown_json(text) + "\n")
        stream.flush()

    def write(self, text: str) -> None:
        """Running text: as it is in a pipe, harmless on a terminal. The caller flushes."""
        is_plain = isinstance(text, Styled) or not self.is_terminal
        self._stream().write(text if is_plain else shown_lines(text))

    def flush(self) -> None:
        self._stream().flush()

    def rewrite(self, text: str = "") -> None:
        """Put the text in place of the line that the cursor is in; only on a terminal."""
        if self.is_terminal:
            self._stream().write(_WHOLE_LINE + (text if isinstance(text, Styled) else shown(text)))
            self.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


STDOUT = Out(lambda: sys.stdout)
STDERR = Out(lambda: sys.stderr)
say = STDOUT.lines
say_json = STDOUT.json
note = STDERR.lines


def tell(text: str, dim: bool = False) -> None:
    """Running text on stderr that is no part of an answer; logs have no control characters either."""
    text = shown_lines(text)
    STDERR.write(Styled(f"\033[2m{text}\033[0m\n" if dim and STDERR.is_styled else f"{text}\n"))
    STDERR.flush()


def console() -> Console:
    """Rich's, for bars on stderr; texts that it is given are `shown`."""
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def others_to_stderr() -> Iterator[Out]:
    """Inside, what libraries print goes to stderr; what is yielded still writes to stdout."""
    stream = sys.stdout
    with redirect_stdout(sys.stderr):
        yield Out(lambda: stream)


def stdin_is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def stdin_descriptor() -> int:
    """Its number, for what only terminals can do."""
    try:
        return 0 if sys.stdin is None else sys.stdin.fileno()
    except ValueError:  # a test's
        return 0


def stdin_bytes() -> IO[bytes]:
    """What stdin gives; of a closed one nothing, which is told."""
    if 0 in _closed:
        note("stdin is closed: it is taken as empty")
    return sys.stdin.buffer


def stdin_lines() -> Iterator[bytes]:
    """The lines of stdin as they come. UsageError if it cannot be read."""
    file = stdin_bytes()
    try:
        while line := file.readline():
            yield line
    except OSError as error:
        raise UsageError(f"stdin cannot be read: {error.strerror}.") from None
