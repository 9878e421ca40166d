"""benchmarks/make_slice.py, at M2's widths but with two experts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from m2lite import Model
from m2lite.formats.table import unpack_rows
from m2lite.storage.gguf_reader import open_gguf

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long

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


# What llama-quantize's mix of that name gives a model of one layer: embedding, head, v, gate, down.
TYPES = {
    "q4_0": "Q8_0 Q8_0 Q4_0 Q4_0 Q4_0",  # but for its first two
    "q8_0": "Q8_0 Q8_0 Q8_0 Q8_0 Q8_0",
    "q4_k_m": "Q4_K Q6_K Q6_K Q4_K Q6_K",
    "q5_k_m": "Q5_K Q6_K Q6_K Q5_K Q6_K",
    "q6_k": "Q6_K Q6_K Q6_K Q6_K Q6_K",
    "iq4_nl": "IQ4_NL Q6_K Q5_K IQ4_NL IQ4_NL",
    "mxfp4": "Q8_0 Q8_0 Q8_0 MXFP4 MXFP4",
}
NAMES = (
    "token_embd.weight", "output.weight", "blk.0.attn_v.weight", "blk.0.ffn_gate_exps.weight",
    "blk.0.ffn_down_exps.weight",
)  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
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
            "blk.0.attn_output.weight": 0.25 * 6144**-0.5,  # so that depth does not make tokens alike
        }
        assert " ".join(model.tensors[name].format.name for name in NAMES) == TYPES[kind]
        for name, tensor in model.tensors.items():
            rows = model.view(name)[: 64 * tensor.format.row_bytes(tensor.shape[-1])]
            values = unpack_rows(
                tensor.format, rows, (rows.size // tensor.format.row_bytes(tensor.shape[-1]), tensor.shape[-1])
            )
            assert np.isfinite(values).all() and np.abs(values).max() < 10
            if name in expected_std:
                # A common offset would grow from layer to layer until every token chose the same experts.
                assert abs(values.mean()) < 0.02 * values.std()
                assert values.std() == pytest.approx(expected_std[name], rel=0.05)
        assert model.view("blk.0.attn_norm.weight").view("<f4").mean() == pytest.approx(1, abs=0.02)


def test_a_slice_runs_and_its_tokens_choose_different_experts(tmp_path: Path) -> None:
    path = tmp_path / "slice.gguf"
    assert make(path, "--experts", "32", "--vocab", "900", "--layers", "2").returncode == 0
    with Model.open(path, ctx=64) as model:
        assert np.isfinite(model.logits(range(300, 364))).all()
        experts = model.runner.buffers.array("ids")[:64]  # of the last layer
        assert len(np.unique(experts)) > 24 and np.bincount(experts.ravel()).max() < 48


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "slice.gguf"
    path.write_bytes(b"")
    again = make(path, "--experts", "2", "--vocab", "900")
    assert again.returncode == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr
