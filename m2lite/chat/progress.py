"""How far the prompt is read, on a terminal. Knows numbers only."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator

from m2lite.system.streams import STDERR
from m2lite.text.reply import Piece

_SLOW_S = 0.5  # from here on, reading the prompt is worth a line


class PromptProgress:
    """`reading 512 of 4,000 tokens`, rewritten in place, only on a terminal and only when it takes a while."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        seconds = time.monotonic() - self._started
        if done < total and STDERR.is_terminal and seconds > _SLOW_S:
            speed = done / seconds
            text = f"reading {done:,} of {total:,} tokens, {speed:,.0f} tok/s, {(total - done) / speed:,.0f} s left"
            STDERR.rewrite(text)
            self._shown = True

    def end(self) -> None:
        if self._shown:
            STDERR.rewrite()
            self._shown = False

    def until_read(self, pieces: Iterator[Piece]) -> Generator[Piece, None, None]:
        """The pieces of an answer; the line is gone before the first, and in any case at the end."""
        try:
            for piece in pieces:
                self.end()
                yield piece
        finally:
            self.end()
