"""Models in formats without an integer tile, end to end: compiled kernels against the twins, prefill = decode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tinymodel
from m2lite.kernels import reference
from tests.model.engine import Engine

MIXES = {
    "k": {
        "token_embd.weight": "Q4_K", "output.weight": "Q6_K", "attn_v.weight": "Q5_K", "attn_q.weight": "Q3_K",
        "ffn_down_exps.weight": "Q6_K", "dense": "Q4_K", "experts": "Q4_K",
    },
    "iq": {
        "token_embd.weight": "IQ4_XS", "output.weight": "Q5_K", "dense": "IQ4_XS", "experts": "IQ2_XS",
        "ffn_down_exps.weight": "IQ3_S",
    },
    "32": {"token_embd.weight": "Q5_1", "dense": "Q5_0", "experts": "MXFP4", "ffn_down_exps.weight": "Q4_1"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
def test_generic_formats_run_to_the_same_bits(tmp_path: Path, mix: str) -> None:
    path = tinymodel.write_model(tmp_path / "model.gguf", shape=tinymodel.WIDE, formats=MIXES[mix])
    tokens = np.random.default_rng(1).integers(0, 256, 9).tolist()
    engine = Engine(path, n_positions=128)
    assert set(MIXES[mix].values()) <= {t.format.name for t in engine.gguf.tensors.values()}
    whole = engine.logits(tokens)
    assert np.isfinite(whole).all() and whole.std() > 0.01
    timeline = engine.pool.timeline()
    steps = np.concatenate([engine.run(timeline, [t]) for t in tokens])
    assert steps.tobytes() == whole.tobytes()
    twin = Engine(path, n_positions=128, kernels=reference).logits(tokens)
    assert twin.tobytes() == whole.tobytes()
