"""Logits against transformers: random models of several shapes, in three precisions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.golden import golden
from tests.golden.compare import compare
from tests.model.engine import Engine


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("name", golden.CASES)
@pytest.mark.parametrize("type_name", golden.TYPES)
def test_logits_agree_with_transformers(name: str, type_name: str, directory: Path) -> None:
    """F32: only the order of sums and the float16 KV differ. Q8_0, Q4_0: activations are rounded to int8 as well.

    That rounding may decide between two experts with nearly the same score, in a row or two of 48: then the row's KL is
    0.01 to 0.03 (row 32 of d-far, whose choice in the last layer turns with the order of attention's sums). So the
    worst row has a bound of its own, and the others one that is closer.
    """
    expected = golden.load(name)
    engine = Engine(golden.gguf_path(name, type_name, directory))
    logits = engine.logits(expected.tokens.tolist(), int(expected.positions[0]))
    found = compare(expected.logits[type_name], logits)
    if type_name == "f32":
        assert found.mean_kl <= 1e-5 and found.max_kl <= 1e-3 and found.top1 >= 0.995, found
    else:
        others = found.mean_kl - found.max_kl / len(logits)
        assert others <= 6e-4 and found.max_kl <= 0.05, found


@pytest.mark.parametrize("name", golden.CASES)
@pytest.mark.parametrize("type_name", ["q8_0", "q4_0"])
def test_generic_kernels_agree_with_transformers(name: str, type_name: str, directory: Path) -> None:
    """Every block format runs through unpack-to-float32 too, without int8 activations: the bound of F32 holds."""
    expected = golden.load(name)
    engine = Engine(golden.gguf_path(name, type_name, directory), generic=True)
    found = compare(expected.logits[type_name], engine.logits(expected.tokens.tolist(), int(expected.positions[0])))
    assert found.mean_kl <= 1e-5 and found.max_kl <= 1e-3 and found.top1 >= 0.995, found


def test_the_comparison_would_see_a_wrong_position(directory: Path) -> None:
    """The bounds above are not so wide that one row of 48 at another position would pass."""
    expected = golden.load("a-rotary")
    engine = Engine(golden.gguf_path("a-rotary", "f32", directory))
    tokens = expected.tokens.tolist()
    wrong = np.concatenate([engine.logits(tokens[:-1]), engine.logits([*tokens[:-2], tokens[-1]])[-1:]])
    found = compare(expected.logits["f32"], wrong)
    assert found.mean_kl > 5e-5 and found.max_kl > 1e-3, found
