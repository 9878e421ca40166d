"""Styles around text that comes in pieces: nothing is lost, and the pieces do not show."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2lite.chat.markdown import Markdown, first_code_block

TEXT = """# A title
Some **bold**, *slanted*, `code` and 2 * 3 ** 4, snake_case_name and **open
> quoted `a*b` text

```python
def f(x):
    '''doc
    more'''
    return x + 1  # why
```
* a list
- **b**: c
~~~
plain ``` code
~~~
``a ` b`` and ***both***
"""


def plain(text: str) -> str:
    return re.sub(r"\033\[[\d;]*m", "", text)


def styled(text: str, size: int = 0) -> str:
    markdown = Markdown()
    pieces = [text] if not size else [text[i : i + size] for i in range(0, len(text), size)]
    return "".join(map(markdown.push, pieces)) + markdown.end()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_pieces_do_not_show(size: int) -> None:
    assert styled(TEXT, size) == styled(TEXT)
    assert plain(styled(TEXT)) == TEXT


def test_styles() -> None:
    shown = styled(TEXT)
    for expected in (
        "\033[1;4m# A title\033[0m\n",
        "\033[1m**bold**\033[0m, \033[3m*slanted*\033[0m, \033[36m`code`\033[0m and 2 * 3 ** 4, snake_case_name and",
        "\033[1m**open\033[0m\n",
        "\033[2m> quoted \033[36m`a*b`\033[0m\033[2m text\033[0m\n",
        "\033[2m```python\033[0m\n",
        "\033[2m```\033[0m\n* a list\n",
        "\033[2m~~~\033[0m\nplain ``` code\n\033[2m~~~\033[0m\n",
        "\033[36m``a ` b``\033[0m",
    ):
        assert expected in shown, expected
    code = shown[shown.index("python") : shown.index("a list")]
    assert "\033[94mdef\033[39;49;00m" in code
    assert re.search(r"\033\[\d+m    more'''", code), code  # within a string that began a line before


@given(st.text("ab `*_~#>\n\t", max_size=60), st.integers(1, 9))
def test_nothing_is_lost(text: str, size: int) -> None:
    assert plain(styled(text, size)) == text
    assert styled(text, size) == styled(text)


@given(st.text(max_size=80))
def test_any_text(text: str) -> None:
    text = text.replace("\033", "")
    block = f"```python\n{text}\n```\n{text}"
    assert plain(styled(block, 5)) == block


def test_only_what_must_be_is_held_back() -> None:
    markdown = Markdown()
    assert markdown.push("Hello wor") == "Hello wor" and markdown.push("ld *") == "ld "
    assert markdown.push(" x") == "* x"
    assert markdown.push("\n``") == "\n" and markdown.push("`py\nx =") == "\033[2m```py\033[0m\n"
    assert plain(markdown.push(" 1\n")) == "x = 1\n"


def test_a_language_that_nobody_knows_and_a_long_line() -> None:
    for text in ("```klingon\nx = 1\n```\n", "```python\n" + "x = 1; " * 1000 + "\n```\n"):
        assert styled(text).count("\033") == 4


def test_first_code_block() -> None:
    assert first_code_block(TEXT) == "def f(x):\n    '''doc\n    more'''\n    return x + 1  # why\n"
    assert first_code_block("none `x`") is None
    assert first_code_block("a\n````\n```\nx\n```\n````\n") == "```\nx\n```\n"
    assert first_code_block("a\n```\ncut") == "cut\n"
    assert first_code_block("```\n```") == ""
