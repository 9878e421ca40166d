"""Child processes of tests start with the dispositions of signals that a terminal gives, whoever started the tests.

What is ignored here, as under `nohup ... &`, a child would ignore too.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 800  # only what never comes takes that long; pytest ends a test after 900 s
_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def default_signals() -> Iterator[None]:
    """Around the start of a child, on the main thread. SIGINT raises KeyboardInterrupt here, as in any Python."""
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    try:
        for number in _NUMBERS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ignored_signals(*numbers: signal.Signals) -> Iterator[None]:
    """Around the start of a child: as nohup and a shell's `&` leave it."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
