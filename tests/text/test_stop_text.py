"""Texts that end an answer, wherever the pieces are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2lite import UsageError
from m2lite.text.stop_text import StopTexts, check_stop_texts

LETTERS = st.text("ab\n", max_size=12)


@given(LETTERS, st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.data())
def test_any_cut_gives_the_text_before_the_first(text: str, stops: list[str], data: st.DataObject) -> None:
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(found)[1]] if found else text
    stream, got = StopTexts(stops), ""
    while text:
        n = data.draw(st.integers(1, len(text)))
        got += stream.push(text[:n])
        text = text[n:]
        assert expected.startswith(got)
    assert got + stream.flush() == expected
    assert stream.is_found == bool(found)


def test_nothing_is_held_that_cannot_be_a_beginning() -> None:
    stream = StopTexts(["END"])
    assert stream.push("an END") == "an "
    stream = StopTexts(["END"])
    assert (stream.push("hen E"), stream.push("gg"), stream.flush()) == ("hen ", "Egg", "")


@pytest.mark.parametrize("texts", [7, [1], [""], ["x"] * 17, ["x" * 1001], {"a": 1}])
def test_wrong_texts(texts: object) -> None:
    with pytest.raises(UsageError, match="stop"):
        check_stop_texts(texts)


def test_one_text_or_some() -> None:
    assert check_stop_texts("a") == ("a",)
    assert check_stop_texts(["a", "b"]) == ("a", "b")
