"""Every text that a command reads may come from a pipe, and packed."""

from __future__ import annotations

import gzip
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run

Models = dict[str, Path]
TEXT = b"One day a fox met an owl by the river. They looked for the lantern until it was dark. " * 8
SCHEMA = json.dumps({"type": "object"}).encode()
TOOLS = json.dumps([{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]).encode()
REQUEST = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).encode()


@pytest.fixture(params=["fifo", "gzip", "packed fifo"])
def given(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[bytes], Path]]:
    """Bytes as a FIFO, as a packed file, or as both."""
    writers = list[threading.Thread]()

    def give(data: bytes) -> Path:
        data = gzip.compress(data) if request.param != "fifo" else data
        path = tmp_path / "given"
        if request.param == "gzip":
            path.write_bytes(data)
        else:
            os.mkfifo(path)
            writers.append(threading.Thread(target=path.write_bytes, args=(data,)))
            writers[-1].start()
        return path

    yield give
    for writer in writers:
        writer.join(10)


@pytest.mark.parametrize(
    ("arguments", "data"),
    [
        (("generate", "MODEL", "-p", "Hi", "-f", "GIVEN"), TEXT[:80]),
        (("generate", "MODEL", "--request", "GIVEN"), REQUEST),
        (("perplexity", "MODEL", "GIVEN", "-c", "64", "--chunks", "1"), TEXT),
        (("imatrix", "MODEL", "GIVEN", "-c", "64", "--chunks", "1", "-o", "OUT.gguf"), TEXT),
    ],
)  # fmt: skip
def test_texts(
    run_inline: Run,
    model_files: Models,
    tmp_path: Path,
    given: Callable[[bytes], Path],
    arguments: tuple[str, ...],
    data: bytes,
) -> None:
    path = given(data)
    names: dict[str, Any] = {"MODEL": model_files["reply"], "GIVEN": path, "OUT.gguf": tmp_path / "out.gguf"}
    done = run_inline(*(names.get(each, each) for each in arguments))
    assert done.returncode == 0 and done.stdout, done.stderr


def test_schemas_and_tools(given: Callable[[bytes], Path], tmp_path: Path) -> None:
    from m2lite.chat.tools import Limits, load_tools

    assert load_tools([str(given(TOOLS))], Limits(tmp_path)).schemas[0]["function"]["name"] == "look"


def test_a_schema(given: Callable[[bytes], Path]) -> None:
    from m2lite.commands.options import answer_defaults
    from m2lite.settings import resolve_settings

    assert answer_defaults(resolve_settings({}, {}), None, str(given(SCHEMA))).schema == {"type": "object"}


@pytest.mark.parametrize("name", ["nowhere", "~nosuchuser/x", "."])
def test_what_cannot_be_read_is_told(run_inline: Run, model_files: Models, tmp_path: Path, name: str) -> None:
    for arguments in (
        ("generate", model_files["reply"], "-p", "Hi", "-f", name),
        ("generate", model_files["reply"], "--request", name),
        ("generate", model_files["reply"], "-p", "Hi", "--json-schema", name),
        ("perplexity", model_files["reply"], name),
        ("batch", name, "-o", tmp_path / "out.jsonl"),
    ):
        done = run_inline(*arguments)
        told = "no such home directory" if name.startswith("~") else "cannot be read"
        assert done.returncode == 2 and told in done.stderr, done.stderr


def test_a_model_in_nobodys_home(run_inline: Run) -> None:
    done = run_inline("inspect", "~nosuchuser/m.gguf")
    assert done.returncode == 2 and "no such home directory" in done.stderr


def test_a_request_that_json_can_carry_and_utf8_cannot(run_inline: Run, model_files: Models, tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    path.write_bytes(b'{"messages": [{"role": "user", "content": "\\ud800"}]}')
    done = run_inline("generate", model_files["reply"], "--request", path)
    assert done.returncode == 2 and "holds U+D800, half of a character" in done.stderr
