"""Pieces of an answer on a terminal or a pipe: what is dimmed, and what is made harmless. Append-only."""

from __future__ import annotations

import time

from m2lite.chat.markdown import Markdown
from m2lite.shown import shown_lines
from m2lite.system.streams import STDERR, STDOUT, Out, Styled
from m2lite.text.reply import Piece

_NOTE_S = 0.25  # between two looks at the clock that are shown
_DIM, _PLAIN = "\033[2m", "\033[0m"


class Renderer:
    """Writes content to `out` and thinking, dimmed, to `err`. On a terminal, control characters are shown, not sent."""

    def __init__(
        self, style: bool, show_thinking: bool, markdown: Markdown | None = None, out: Out = STDOUT, err: Out = STDERR
    ) -> None:
        self._out, self._err = out, err
        self._style, self._show_thinking, self._markdown = style, show_thinking, markdown
        self._kind: str | None = None
        self._last = "\n"
        self._folded_at: float | None = None  # since when thinking is not shown
        self._noted_at = 0.0

    def show(self, piece: Piece) -> None:
        if piece.kind == "thinking" and not self._show_thinking:
            self._fold()
            return
        self._unfold()
        text = piece.text
        if piece.kind != self._kind:
            text = text.lstrip("\n")  # the empty lines that the chat format puts between the parts
            if not text:
                return
            self._turn_to(piece.kind)
        stream = self._err if piece.kind == "thinking" else self._out
        if self._markdown is not None and piece.kind == "content":
            text = Styled(self._markdown.push(shown_lines(text)))
        stream.write(text)
        stream.flush()
        self._last = piece.text[-1]

    def _fold(self) -> None:
        """One line on a terminal tells that the model thinks, and since when."""
        now = time.monotonic()
        if self._folded_at is None:
            self._folded_at = now
        if self._style and now - self._noted_at >= _NOTE_S:
            self._err.rewrite(Styled(f"{_DIM}thinking, {now - self._folded_at:.0f} s{_PLAIN}"))
            self._noted_at = now

    def _unfold(self) -> None:
        if self._folded_at is not None and self._style:
            seconds = time.monotonic() - self._folded_at
            self._err.rewrite(Styled(f"{_DIM}thought for {seconds:.1f} s{_PLAIN}\n"))
        self._folded_at = None

    def _turn_to(self, kind: str) -> None:
        """Close the part before, open the part that begins."""
        self.end()
        if kind == "thinking":
            self._err.write(Styled(_DIM) if self._style else "thinking: ")
        elif self._kind == "thinking" and self._err.is_terminal:
            self._err.write("\n")
            self._err.flush()
        self._kind = kind

    def end(self) -> None:
        """Finish the line and the style."""
        self._unfold()
        stream = self._err if self._kind == "thinking" else self._out
        if self._kind == "thinking" and self._style:
            stream.write(Styled(_PLAIN))
        if self._kind == "content" and self._markdown is not None:
            stream.write(Styled(self._markdown.end()))
        if self._last != "\n":
            stream.write("\n")
        stream.flush()
        self._last = "\n"
