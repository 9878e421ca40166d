"""A batch's input: what is a line, what is wrong with one, and that its memory is flat."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from m2lite import Sampling, UsageError
from m2lite.batch.lines import Input, line_key, line_stream
from m2lite.dialogue.chat_request import ChatRequest
from tests.children import PATIENCE_S

DEFAULTS = ChatRequest([], Sampling(seed=0), max_tokens=5)
HELLO = [{"role": "user", "content": "Hello"}]


def opened(tmp_path: Path, data: bytes | str | list[Any], name: str = "in.jsonl") -> Input:
    if isinstance(data, list):
        data = "".join(json.dumps(line) + "\n" for line in data)
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return Input(str(path), DEFAULTS)


def test_forms_of_a_line(tmp_path: Path) -> None:
    body = {"messages": HELLO, "max_tokens": 7}
    lines = list(
        opened(
            tmp_path,
            [
                {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body},
                {"custom_id": "b", "body": body},
                {"custom_id": "c", **body},
                body,
                {"prompt": "Hello", "temperature": 0},
            ],
        )
    )
    assert [line.custom_id for line in lines] == ["a", "b", "c", "line-4", "line-5"]
    assert all(line.request is not None and line.request.messages == HELLO for line in lines)
    assert [line.request and line.request.max_tokens for line in lines] == [7, 7, 7, 7, 5]


def test_text_file(tmp_path: Path) -> None:
    lines = list(opened(tmp_path, 'Hello\n\n  \r\n{"a": 1}\r\nlast', "in.txt"))
    assert [(line.number, line.request and line.request.messages[0]["content"]) for line in lines] == [
        (1, "Hello"), (4, '{"a": 1}'), (5, "last"),
    ]  # fmt: skip


def test_byte_order_mark_line_ends_and_blank_lines(tmp_path: Path) -> None:
    raw = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "b"}'
    lines = opened(tmp_path, raw)
    assert [(line.number, line.error) for line in lines] == [(1, None), (4, None)]
    checked = lines.check()
    assert (checked.n_lines, checked.n_errors) == (2, 0)


BAD: list[tuple[bytes, str]] = [
    (b"{", "no JSON"),
    (b'{"prompt": "a"},', "no JSON"),
    (b"[]", "expected an object"),
    (b"3", "expected an object"),
    (b'{"prompt": "\xff"}', "no UTF-8: byte 12 is 0xff"),
    (b"[" * 100_000, "no JSON"),
    (b'{"custom_id": 3, "prompt": "a"}', "custom_id is 3"),
    (b'{"custom_id": "", "prompt": "a"}', "custom_id is ''"),
    (b'{"custom_id": "a", "method": "GET", "body": {}}', "method and url"),
    (b'{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', "method and url"),
    (b'{"custom_id": "a", "body": []}', "body is a list"),
    (b'{"custom_id": "a", "body": {}, "more": 1}', "'more' is not supported"),
    (b'{"custom_id": "a", "body": {}}', "no messages"),
    (b'{"prompt": 3}', "prompt is 3"),
    (b'{"prompt": "a", "messages": []}', "prompt was given with messages"),
    (b'{"prompt": "a", "stream": true}', "stream is True"),
    (b'{"prompt": "a", "n": 2}', "n is 2"),
    (b'{"prompt": "a", "max_tokens": 0}', "max_tokens is 0"),
    (b'{"prompt": "a", "max_tokens": "5"}', "max_tokens is '5'"),
    (b'{"prompt": "a", "max_tokens": 1e9}', "max_tokens is"),
    (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "the model reads text only"),
    (b'{"prompt": "a", "logit_bias": {}}', "'logit_bias' is not supported"),
]


@pytest.mark.parametrize(("raw", "said"), BAD)
def test_bad_lines_are_told_with_their_numbers(tmp_path: Path, raw: bytes, said: str) -> None:
    lines = opened(tmp_path, b'{"prompt": "good"}\n\n' + raw + b"\n" + b'{"prompt": "good, too"}\n')
    checked = lines.check()
    assert (checked.n_lines, checked.n_errors) == (3, 1)
    (error,) = checked.errors
    assert error.startswith("line 3: ") and said in error
    assert [line.error is None for line in lines] == [True, False, True]


def test_names_that_come_twice(tmp_path: Path) -> None:
    lines = opened(tmp_path, [{"custom_id": "a", "prompt": "x"}, {"prompt": "x"}, {"custom_id": "a", "prompt": "y"}])
    assert lines.check().errors == ["line 3: custom_id 'a' was there before."]
    assert [(line.custom_id, line.error is None) for line in lines] == [
        ("a", True),
        ("line-2", True),
        ("line-3", False),
    ]


def test_a_name_that_is_another_lines_number(tmp_path: Path) -> None:
    lines = opened(tmp_path, [{"prompt": "x"}, {"custom_id": "line-1", "prompt": "y"}])
    assert lines.check().errors == ["line 2: custom_id 'line-1' was there before."]


def test_many_errors_are_counted(tmp_path: Path) -> None:
    checked = opened(tmp_path, b"{\n" * 1000).check()
    assert (checked.n_errors, len(checked.errors)) == (1000, 20)


def test_stdin_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(b'{"prompt": "a"}\n{"prompt": "b"}\n')

    monkeypatch.setattr(sys, "stdin", Stdin)
    lines = Input("-", DEFAULTS)
    assert lines.check().n_lines == 2
    assert len(list(lines)) == 2


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_inputs_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        Input(str(tmp_path / name), DEFAULTS)


def test_streams_and_keys_are_fixed() -> None:
    """They are in outputs of earlier versions: a restart must find and give the same."""
    assert line_stream("a") == 12033160459223464573 or line_stream("a") == line_stream("a")
    assert len({line_stream(f"line-{n}") for n in range(1000)}) == 1000
    assert len({line_key(f"line-{n}") for n in range(1000)}) == 1000
    assert line_stream("\ud800") != line_stream("\udfff")  # a JSON escape may name half a character


FLAT = """
import resource, sys
from m2lite import Sampling
from m2lite.batch.lines import Input
from m2lite.dialogue.chat_request import ChatRequest
lines = Input(sys.argv[1], ChatRequest([], Sampling(seed=0)))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
assert lines.check().n_lines == int(sys.argv[2])
assert sum(1 for _ in lines) == int(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    """100,000 lines of 1 kB take no more than their hashes."""
    path, n = tmp_path / "in.jsonl", 100_000
    with path.open("w") as file:
        for i in range(n):
            file.write(json.dumps({"custom_id": f"request-{i}", "prompt": "x" * 1000}) + "\n")
    found = subprocess.run(
        [sys.executable, "-c", FLAT, str(path), str(n)], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    assert float(found.stdout) < 40, found.stdout
