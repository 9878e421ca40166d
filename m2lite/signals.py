"""SIGINT, SIGTERM and SIGHUP as a flag that is read between kernel calls. Knows no command."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from m2lite.system.streams import finish

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
_TERMINATING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_SECOND_WITHIN_S = 2.0


class SecondInterrupt(KeyboardInterrupt):
    """Ctrl-C twice within two seconds: the user wants to leave, not only to stop."""


class StopFlag:
    """Set by the first signal; a second Ctrl-C within two seconds leaves at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._at = 0.0

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def terminated(self) -> bool:
        """Asked to end by the system, not to stop by the user."""
        return self.signal in _TERMINATING

    @property
    def exit_code(self) -> int:
        if self.signal is None:
            return 0
        return EXIT_TERMINATED if self.terminated else EXIT_INTERRUPTED

    def handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.signal == signal.SIGINT and now - self._at < _SECOND_WITHIN_S:
            raise SecondInterrupt
        if self.signal not in _TERMINATING:
            self.signal, self._at = number, now


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Inside, signals set the flag instead of raising. On a thread other than the main one, the flag stays unset."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    with _handled((signal.SIGINT, *_TERMINATING), flag.handle):
        yield flag


def is_heeded(number: int) -> bool:
    """Whether we act on it. What was ignored when we started stays so, as with nohup; SIGTERM always counts."""
    return number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN


@contextmanager
def _handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before: list[tuple[int, Any]] = [(n, signal.signal(n, handler)) for n in numbers if is_heeded(n)]
    try:
        yield
    finally:
        for number, earlier in before:
            signal.signal(number, earlier)


def exit_on_terminate() -> None:
    """SIGTERM and SIGHUP raise SystemExit(143), so that `finally` blocks restore the terminal."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(EXIT_TERMINATED)

    for number in filter(is_heeded, _TERMINATING):
        signal.signal(number, leave)


@contextmanager
def leave_afterwards(ask: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM and SIGHUP only call `ask`, which must raise nothing; SystemExit(143) follows at the end.

    For an event loop, which tells an exception that a handler raises in one of its callbacks as an error. What is
    yielded says whether such a signal has come.
    """
    came: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        ask()

    try:
        with _handled(_TERMINATING, handle):
            yield lambda: bool(came)
    finally:
        if came:
            raise SystemExit(EXIT_TERMINATED)


def leave_now(code: int) -> NoReturn:
    """End the process while a kernel or the compiler may still be running on the compute thread."""
    finish()
    os._exit(code)
