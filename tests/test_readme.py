"""What README.md shows works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_python_example(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102
    out = capsys.readouterr().out
    assert len(out) > 20
    names["model"].close()  # type: ignore[attr-defined]


def test_commands_exist() -> None:
    from m2lite.cli import app

    text = (ROOT / "README.md").read_text()
    shown = set(re.findall(r"^    m2lite (\w+)", text, re.MULTILINE))
    registered = {c.callback.__name__.rstrip("_") for c in app.registered_commands if c.callback is not None}
    registered |= {str(group.name) for group in app.registered_groups}
    assert shown == registered
