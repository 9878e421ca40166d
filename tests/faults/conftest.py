"""The small model of all conversions, once for the tests of a disk that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2lite.quant.convert import Conversion, convert
from tests.quant import checkpoints


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("hf"), checkpoints.small())


@pytest.fixture(scope="session")
def f32(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return convert(source, tmp_path_factory.mktemp("f32") / "m.gguf", "f32")
