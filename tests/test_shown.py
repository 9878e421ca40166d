"""Foreign text as people see it: no escape code, no forged line, and readable text stays as it is."""

from __future__ import annotations

import json
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from m2lite.errors import M2liteError, UsageError
from m2lite.shown import shown, shown_json, shown_lines

ANY = st.text(st.characters(codec=None))  # halves of characters, too
OBEYED = {"Cc", "Cf", "Zl", "Zp", "Cs"}


@given(ANY)
def test_one_line(text: str) -> None:
    assert not any(unicodedata.category(c) in OBEYED for c in shown(text))
    assert shown(text).encode().decode() == shown(text)


@given(ANY)
def test_lines(text: str) -> None:
    kept = shown_lines(text)
    assert len(kept) == len(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in kept if c not in "\n\t")
    assert kept.encode().decode() == kept


@given(ANY)
def test_json(text: str) -> None:
    line = shown_json(json.dumps([text], ensure_ascii=False))
    assert json.loads(line) == [text]
    assert line.isprintable() or not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in line)


def test_examples() -> None:
    assert shown("blk.0\x1b[31m\nm2lite: all is well\u202e") == "blk.0\\x1b[31m\\nm2lite: all is well\\u202e"
    assert shown("größe 模型 👩‍🚀"[:7]) == "größe 模"
    assert shown_lines("a\tb\n\x1b]0;title\x07\x9b") == "a\tb\n␛]0;title␇\ufffd"
    family = "👩‍👩‍👧 فارسی‌زبان"  # joiners belong to running text
    assert shown_lines(family) == family


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    error = UsageError("no \x1b[2J\nm2lite: done", "try \r\n", details=["  a: 'x\n' there"])
    assert str(error).split("\n") == ["no \\x1b[2J\\nm2lite: done", "  a: 'x\\n' there", "try \\r\\n"]
    assert "\n" not in str(M2liteError("a\nb").located("line\n1"))
