"""How far the prompt is read, on a terminal. Knows numbers only."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator

from m2lite.text.reply import Piece

_SLOW_S = 0.5  # from here on, reading the prompt is worth a line


class PromptProgress:
    """`reading 512 of 4,000 tokens`, rewritten in place, only on a terminal and only when it takes a while."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        seconds = time.monotonic() - self._started
        if done < total and sys.stderr.isatty() and seconds > _SLOW_S:
            speed = done / seconds
            text = f"reading {done:,} of {total:,} tokens, {speed:,.0f} tok/s, {(total - done) / speed:,.0f} s left"
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
            self._shown = True

    def end(self) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            self._shown = False

    def until_read(self, pieces: Iterator[Piece]) -> Generator[Piece, None, None]:
        """The pieces of an answer; the line is gone before the first, and in any case at the end."""
        try:
            for piece in pieces:
                self.end()
                yield piece
        finally:
            self.end()
