"""Markdown on a terminal while it is written: every character as it comes, with styles around them. Append-only.

Nothing is left out, moved or wrapped, so what is on the screen can be copied, and a screen that is too small spoils
nothing. Text is held back only where its style is not known yet: a mark's next character, and a line of code.
"""

from __future__ import annotations

import re
from functools import lru_cache
from io import StringIO
from typing import Any

_RESET, _BOLD, _DIM, _ITALIC, _CODE, _HEAD = "\033[0m", "\033[1m", "\033[2m", "\033[3m", "\033[36m", "\033[1;4m"
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)")
_HEADING, _QUOTE = re.compile(r" {0,3}#{1,6} "), re.compile(r" {0,3}> ?")
_UNDECIDED = re.compile(r" {0,3}(`{1,2}|~{1,2}|#{1,6})?")  # the beginning of a line that may yet become any of these
_MOST_LEXED = 100  # lines of a block of code that are looked at to colour the next
_LONG_LINE = 2000  # characters of a line of code that are not worth colouring


class Markdown:
    """Styles for text that comes in pieces; the pieces do not show. `end` gives what was held back."""

    def __init__(self) -> None:
        self._held = ""
        self._line: str | None = None  # None: at a line's beginning; else the style of the line's text
        self._inline: list[str] = []  # marks that are open: `, *, **, _
        self._before = "\n"  # the character before
        self._fence = ""  # that opened the block of code
        self._language = ""
        self._block: list[str] = []  # its lines

    def push(self, text: str) -> str:
        """What can be shown now."""
        self._held += text
        shown = []
        while piece := self._next():
            shown.append(piece)
        return "".join(shown)

    def end(self) -> str:
        """What was held back; the style is plain again."""
        rest, self._held = self._held, ""
        if self._line is None and self._fence:
            rest = self._code(rest)
        styled = self._style() or (self._line or "")
        self.__init__()  # type: ignore[misc]
        return rest + (_RESET if styled else "")

    def _next(self) -> str:
        """The next piece of what is held that can be shown; "" if more must come first."""
        if not self._held:
            return ""
        if self._line is None:
            return self._code_line() if self._fence else self._begin_line()
        return self._text()

    def _code_line(self) -> str:
        line, newline, rest = self._held.partition("\n")
        if not newline:
            return ""
        self._held = rest
        if _closes(line, self._fence):
            self._fence, self._block = "", []
            return f"{_DIM}{line}{_RESET}\n"
        shown = self._code(line)
        self._block.append(line)
        return shown + "\n"

    def _code(self, line: str) -> str:
        if not line.strip() or len(line) > _LONG_LINE:
            return line
        return _coloured("\n".join([*self._block[-_MOST_LEXED:], line]), self._language)

    def _begin_line(self) -> str:
        if _UNDECIDED.fullmatch(self._held):
            return ""
        line, newline, rest = self._held.partition("\n")
        if found := _FENCE.match(line):
            if not newline:
                return ""
            self._held, self._fence, self._language, self._before = rest, found[1], found[2], "\n"
            return f"{_DIM}{line}{_RESET}\n"
        self._line = _HEAD if _HEADING.match(self._held) else _DIM if _QUOTE.match(self._held) else ""
        return self._line or self._text()

    def _text(self) -> str:
        """Up to the next mark or the line's end."""
        plain = re.match(r"[^\n`*_]+", self._held)
        if plain:
            self._held, self._before = self._held[plain.end() :], plain[0][-1]
            return plain[0]
        if self._held[0] == "\n":
            self._held, self._before = self._held[1:], "\n"
            is_styled = self._style() or self._line
            self._line, self._inline = None, []
            return (_RESET if is_styled else "") + "\n"
        run = re.match(r"`+|\*+|_+", self._held)
        assert run is not None
        if run.end() == len(self._held):  # what follows decides
            return ""
        mark, after, before = run[0], self._held[run.end()], self._before
        self._held, self._before = self._held[run.end() :], mark[-1]
        return self._mark(mark, before, after)

    def _mark(self, mark: str, before: str, after: str) -> str:
        """The mark, which ends a style or begins one, if it does."""
        in_code = bool(self._inline) and self._inline[-1][0] == "`"
        if self._inline and mark == self._inline[-1] and (in_code or not before.isspace()):
            self._inline.pop()
            return mark + _RESET + (self._line or "") + self._style()
        is_code = mark[0] == "`"
        opens = is_code or (not after.isspace() and not before.isalnum() and len(mark) <= 3)
        if in_code or not opens or mark in self._inline:
            return mark
        self._inline.append(mark)
        return self._style() + mark

    def _style(self) -> str:
        styles = {"`": _CODE, "*": _ITALIC, "_": _ITALIC, "**": _BOLD, "__": _BOLD}
        return "".join(styles.get(mark, _CODE if mark[0] == "`" else _BOLD + _ITALIC) for mark in self._inline)


def _closes(line: str, fence: str) -> bool:
    """Whether the line ends the block of code that `fence` began."""
    found = _FENCE.match(line)
    return found is not None and found[1].startswith(fence) and not line[found.end(1) :].strip()


def first_code_block(text: str) -> str | None:
    """The lines of the first block of code, each with its newline; None without one. A block that is cut off counts."""
    fence, block = "", list[str]()
    for line in text.splitlines():
        found = _FENCE.match(line)
        if fence and _closes(line, fence):
            break
        if fence:
            block.append(line + "\n")
        elif found:
            fence = found[1]
    return "".join(block) if fence else None


def _coloured(text: str, language: str) -> str:
    """The last line of the code, coloured."""
    line = text.rpartition("\n")[2]
    lexer = _lexer(language)
    if lexer is None:
        return line
    from pygments.formatters import TerminalFormatter

    tokens: list[tuple[Any, str]] = []
    for kind, value in lexer.get_tokens(text):
        *ended, last = value.split("\n")
        if ended:
            tokens.clear()
        if last:
            tokens.append((kind, last))
    out = StringIO()
    TerminalFormatter(bg="dark").format(iter(tokens), out)
    shown = out.getvalue()
    return shown if re.sub(r"\033\[[\d;]*m", "", shown) == line else line


@lru_cache(maxsize=16)
def _lexer(language: str) -> Any:
    """Pygments' for that language; None if it knows none."""
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    if not language:
        return None
    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None
