"""A library that fails inside ends a request, not the process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m2lite.errors import UsageError
from m2lite.system.panics import is_panic, panics_as
from tests.conftest import Run

# llguidance 1.9 cuts its own message in the middle of a character.
SCHEMA = {"required": "é" * 50}


def test_a_schema_on_which_llguidance_fails(run_inline: Run, model_files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    done = run_inline("generate", model_files["reply"], "-p", "x", "--json-schema", path)
    assert done.returncode == 2 and "The JSON schema cannot be used: " in done.stderr
    lines = [{"prompt": "a"}, {"prompt": "b"}]
    lines[1]["response_format"] = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}  # type: ignore[assignment]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run_inline("batch", source, "-o", out, "--model", model_files["reply"], "--on-bad-line", "record")
    assert done.returncode == 3 and "1 of 2 lines are done, 1 failed" in done.stderr


class PanicException(BaseException):
    """As PyO3's is made."""


def test_only_panics_are_caught() -> None:
    assert is_panic(PanicException()) and not is_panic(KeyboardInterrupt())
    with pytest.raises(UsageError, match="told"), panics_as(UsageError("told")):
        raise PanicException
    for kind in (KeyboardInterrupt, ValueError):
        with pytest.raises(kind), panics_as(UsageError("told")):
            raise kind
