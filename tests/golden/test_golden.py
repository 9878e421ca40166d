"""The golden files belong to the models, and say something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from m2lite.storage.gguf_reader import open_gguf
from tests.golden import golden
from tests.golden.compare import compare, entropy
from tests.golden.models import CASES


@pytest.mark.parametrize("name", CASES)
def test_golden_files_load_and_are_peaked(name: str, tmp_path: Path) -> None:
    found = golden.load(name)
    assert sorted(found.logits) == sorted(golden.TYPES)
    for logits in found.logits.values():
        assert logits.shape == (len(found.tokens), found.case.n_vocab) and logits.dtype == np.float32
        assert 2 < entropy(logits) < 4
    f32 = found.logits["f32"]
    assert compare(f32, found.logits["q8_0"]).mean_kl < 0.01 < compare(f32, found.logits["q4_0"]).mean_kl < 0.1
    with open_gguf(golden.gguf_path(name, "q4_0", tmp_path)) as model:
        assert model.metadata["minimax-m2.expert_count"] == found.case.n_experts
        assert model.metadata["minimax-m2.rope.dimension_count"] == found.case.rotary_dim


def test_golden_files_are_small() -> None:
    assert sum(path.stat().st_size for path in golden.DIRECTORY.glob("*.npz")) < 3_000_000


def test_compare_knows_equal_from_different() -> None:
    a = np.random.default_rng(0).standard_normal((5, 100))
    assert compare(a, a + 7) == pytest.approx((0, 0, 1), abs=1e-12)
    b = a.copy()
    b[2, 3] += 20
    different = compare(a, b)
    assert different.top1 == 0.8 and different.max_kl == pytest.approx(5 * different.mean_kl)
    assert np.isnan(compare(a, np.full_like(a, np.nan)).mean_kl)
