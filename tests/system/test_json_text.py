"""JSON from strangers: what another reader might take otherwise is refused, within bounds on memory and time."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2lite.system.json_text import JsonError, parse_json, parse_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES, st.booleans())
def test_reads_what_json_writes(value: object, is_ascii: bool) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii)
    assert parse_json(text) == value
    assert parse_json(text.encode()) == value


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'[{"b": {"a": 1, "c": 0, "a": 1}}]', "'a' is given twice"),
        (b'"\\ud83d"', "U+D83D, half of a character"),
        (b'{"x": ["\\uDC00"]}', "U+DC00, half of a character"),
        (b'{"\\udfff": 1}', "U+DFFF, half of a character"),
        ('"\ud800"', "U+D800, half of a character"),
        (b"[1e999]", "1e999 is out of range"),
        (b"[NaN]", "NaN is no JSON"),
        (b"-Infinity", "-Infinity is no JSON"),
        (b"\xff\xfe1", "byte 0 is 0xff"),
        (b"[" * 101 + b"]" * 101, "more than 100 levels"),
        (b"[" * 100_000, "more than 100 levels"),
        (b'{"a":' * 100_000, "more than 100 levels"),
        (b"1" * 5000, "thousands of digits"),
        (b"", "Expecting value"),
        (b"[1,]", "Illegal trailing comma|Expecting value"),
        (b"{} {}", "Extra data"),
    ],
)
def test_refused(data: bytes | str, why: str) -> None:
    with pytest.raises(JsonError) as error:
        parse_json(data)
    assert any(each in str(error.value) for each in why.split("|"))


def test_pairs_of_halves_are_characters() -> None:
    assert parse_json(b'"\\ud83d\\ude00"') == "\U0001f600"
    assert parse_json(b'"\\\\ud83d"') == "\\ud83d"
    assert parse_json(b'\xef\xbb\xbf{"brackets in a string": "[[[[,,,,"}', most_items=1) != {}


def test_bounds() -> None:
    assert parse_json(b"[1,2,3]", most_bytes=7, most_items=3) == [1, 2, 3]
    with pytest.raises(JsonError, match="more than 6 bytes"):
        parse_json(b"[1,2,3]", most_bytes=6)
    with pytest.raises(JsonError, match="more than 2 items"):
        parse_json(b"[1,2,3]", most_items=2)
    with pytest.raises(JsonError, match="an array where an object"):
        parse_object(b"[]")


def test_items_are_counted_before_they_take_memory() -> None:
    data = b"[" + b"[]," * 1_000_000 + b"[]]"
    tracemalloc.start()
    with pytest.raises(JsonError, match="items"):
        parse_json(data, most_items=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * len(data)


def test_a_key_given_twice_is_found_among_many() -> None:
    """Comparing each with each would take hours."""
    data = json.dumps({f"key {i}": i for i in range(500_000)}).encode().rstrip(b"}") + b', "key 499999": 1}'
    with pytest.raises(JsonError, match="'key 499999' is given twice"):
        parse_json(data)
