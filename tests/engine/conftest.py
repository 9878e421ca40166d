"""What tests of the engine share."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2lite.simd import jit


@pytest.fixture
def cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Pages on disk lie in a folder of the test's own."""
    assert jit.CACHE_DIR  # compiled kernels stay where they are
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path
