"""The golden files: what transformers computes for the random models of models.py. See make_golden.py for how."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m2lite.quant.convert import convert
from m2lite.quant.recipes import parse_overrides
from tests.golden.models import CASES, F32, Case, hf_weights, write_checkpoint

DIRECTORY = Path(__file__).parent
TYPES = ("f32", "q8_0", "q4_0")


class Golden(NamedTuple):
    """`logits[type]` is [tokens, vocabulary] in float32, from the weights that a file of that type holds.

    `positions` are the RoPE positions of the tokens, which see each other and nothing else: for "d-far" they start at
    190,000 and there are still only as many tokens as there are rows.
    """

    case: Case
    tokens: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    logits: Mapping[str, F32]


def load(name: str) -> Golden:
    """The golden logits of one case; AssertionError if models.py no longer makes the weights they belong to."""
    case = CASES[name]
    with np.load(DIRECTORY / f"{name}.npz", allow_pickle=False) as stored:
        assert str(stored["weights_sha256"]) == weights_sha256(case), f"{name}: other weights than make_golden.py had"
        assert (stored["tokens"] == case.tokens).all() and (stored["positions"] == case.positions).all()
        logits = {kind: stored[f"logits_{kind}"] for kind in TYPES}
    return Golden(case, case.tokens, case.positions, logits)


# What the golden logits were made with: 4 bits for attention and experts only.
MIX: Mapping[str, list[str]] = {"f32": [], "q8_0": [], "q4_0": ["^(token_embd|output)=q8_0"]}


def gguf_path(name: str, type_name: str, directory: Path) -> Path:
    """The case as a GGUF of that type in `directory`, converted there on first use."""
    path = directory / f"{name}-{type_name}.gguf"
    if not path.exists():
        source = directory / f"{name}-hf"
        if not source.exists():
            write_checkpoint(source, CASES[name])
        convert(source, path, type_name, overrides=parse_overrides(MIX[type_name]))
    return path


def weights_sha256(case: Case) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(hf_weights(case).items()):
        digest.update(f"{name} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value, "<f4").tobytes())
    return digest.hexdigest()
