"""What the terminal does with keys while no prompt is there. Knows no prompt and no chat."""

from __future__ import annotations

import termios
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from m2lite.system.streams import stdin_descriptor


def forget() -> None:
    """What was typed and not read is gone."""
    with suppress(termios.error):
        termios.tcflush(stdin_descriptor(), termios.TCIFLUSH)


def without_echo() -> AbstractContextManager[None]:
    """Inside, what is typed, Ctrl-C too, is not written into what is shown."""
    return _modes(lflag=termios.ECHO, is_on=False)


def kept() -> AbstractContextManager[None]:
    """Inside, keys wait for the next prompt as they are: to a terminal's own line editor Ctrl-D would be no key."""
    return _modes(iflag=termios.ICRNL, lflag=termios.ICANON | termios.ECHO, is_on=False)


def cooked() -> AbstractContextManager[None]:
    """Inside, another program finds the terminal as it expects it."""
    return _modes(iflag=termios.ICRNL, lflag=termios.ICANON | termios.ECHO, is_on=True)


@contextmanager
def _modes(*, iflag: int = 0, lflag: int = 0, is_on: bool) -> Iterator[None]:
    """Switch flags of the terminal that stdin is; nothing where it is none."""
    stdin = stdin_descriptor()
    try:
        before = termios.tcgetattr(stdin)
    except termios.error:
        yield
        return
    inside = list(before)
    for place, flags in ((0, iflag), (3, lflag)):
        inside[place] = inside[place] | flags if is_on else inside[place] & ~flags
    with suppress(termios.error):
        termios.tcsetattr(stdin, termios.TCSANOW, inside)
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal may have gone
            termios.tcsetattr(stdin, termios.TCSANOW, before)
