"""benchmarks/restart.py: every figure can be taken, and the prompt is not computed again; seconds are no test."""

from __future__ import annotations

from pathlib import Path

import pytest

import restart
from m2lite.system.paths import user_dir


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_every_figure(bundled_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("XDG_CACHE_HOME", "M2LITE_CACHE_DIR"):  # it changes them, and they are put back
        monkeypatch.setenv(name, str(restart.kernels() if name == "M2LITE_CACHE_DIR" else user_dir("cache").parent))
    restart.main([str(bundled_model), "-p", "256", "-n", "8", "-r", "1"])
    head, _, row, first, second = capsys.readouterr().out.splitlines()
    assert head.startswith("256 tokens: ") and len(row.split()) == 6
    assert first.startswith("after a restart: ") and second.startswith("second request: ")


def test_files_are_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(3 << 20))
    restart.drop([path])
    assert restart.read_all([path, path]) > 0
