"""The small model, converted once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2lite.quant.convert import Conversion, convert
from tests.quant import checkpoints


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("hf"), checkpoints.small())


@pytest.fixture(scope="session")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Conversion]:
    folder = tmp_path_factory.mktemp("gguf")
    return {kind: convert(source, folder / f"m-{kind}.gguf", kind) for kind in checkpoints.QUANTIZED}
