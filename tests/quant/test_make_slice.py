"""benchmarks/make_slice.py, at M2's widths but with two experts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from m2lite.storage.blocks import unpack_rows
from m2lite.storage.gguf_reader import open_gguf

ROOT = Path(__file__).parents[2]


def make(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [
        sys.executable,
        ROOT / "benchmarks" / "make_slice.py",
        "-o",
        path,
        "--layers",
        "1",
        *options,
    ]
    environment = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_a_slice_is_a_valid_model_of_finite_weights(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "slice.gguf"
    done = make(path, "--experts", "2", "--vocab", "900", "--type", kind)
    assert done.returncode == 0, done.stderr
    with open_gguf(path) as model:
        assert len(model.tensors) == 16 and len(set(model.array("tokenizer.ggml.tokens", str))) == 900
        assert model.tensors["blk.0.ffn_down_exps.weight"].shape == (2, 3072, 1536)
        expected_std = {
            "token_embd.weight": 1,
            "output.weight": 2.6 * 3072**-0.5,
            "blk.0.ffn_down_exps.weight": 1536**-0.5,
        }
        for name, tensor in model.tensors.items():
            rows = model.view(name)[: 64 * tensor.format.row_bytes(tensor.shape[-1])]
            values = unpack_rows(
                tensor.format, rows, (rows.size // tensor.format.row_bytes(tensor.shape[-1]), tensor.shape[-1])
            )
            assert np.isfinite(values).all() and np.abs(values).max() < 10
            if name in expected_std:
                assert values.std() == pytest.approx(expected_std[name], rel=0.05)
        assert model.view("blk.0.attn_norm.weight").view("<f4").mean() == pytest.approx(1, abs=0.02)
    again = make(path, "--experts", "2", "--vocab", "900", "--type", kind)
    assert again.returncode == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr
