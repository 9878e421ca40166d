"""benchmarks/latency.py: every figure can be taken; how large it is depends on the machine and is no test."""

from __future__ import annotations

import json

import pytest

import latency


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    latency.main(["-r", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {figure.name for figure in latency.FIGURES}
    assert all(row["seconds"] > 0 for row in found.values())
    latency.main(["-r", "1", "--only", "draw"])
    assert capsys.readouterr().out.startswith("draw ")
