"""A clock that is set back or forward: nothing waits, is ordered or is answered by it."""

from __future__ import annotations

import ast
import itertools
import json
import time
from pathlib import Path

import pytest

import m2lite
from tests.conftest import Run

# Where the time of day may be asked for: to show it, in what OpenAI's format calls `created`, for templates that ask.
SHOWN = {
    "batch/progress.py": 1, "batch/runner.py": 1, "commands/generate.py": 1, "commands/measures.py": 1,
    "engine/idle_tuning.py": 1, "serve/answering.py": 1, "serve/server.py": 1, "text/jinja.py": 1, "tune.py": 1,
}  # fmt: skip


def test_only_what_is_shown_asks_for_the_time_of_day() -> None:
    root, found = Path(m2lite.__file__).parent, dict[str, int]()
    for path in root.glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if (node.value.id, node.attr) in {("time", "time"), ("time", "time_ns"), ("datetime", "now")}:
                    name = str(path.relative_to(root))
                    found[name] = found.get(name, 0) + 1
    assert found == SHOWN


@pytest.mark.slow
def test_a_batch_while_the_clock_jumps(
    run_inline: Run, bundled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(
        "".join(json.dumps({"custom_id": f"{n}", "prompt": "Hi", "max_tokens": 9}) + "\n" for n in range(6))
    )

    def texts(name: str) -> list[object]:
        out = tmp_path / name
        done = run_inline("batch", source, "-o", out, "--model", bundled_model, "--seed", "1")
        assert done.returncode == 0, done.stderr
        lines = sorted(map(json.loads, out.read_text().splitlines()), key=lambda line: line["custom_id"])
        return [line["response"]["body"]["choices"] for line in lines]

    expected = texts("a.jsonl")
    jumps = itertools.cycle([2e9, 0.0, 1.7e9, 1.0])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    assert texts("b.jsonl") == expected
