"""Prints the vector form, a hash of logits, and ids, for the processor that the environment names. A child process."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from m2lite import Model, Sampling
from m2lite.simd import emit
from tests.model.engine import Engine


def hash_logits(path: Path) -> str:
    """SHA-256 of the logits of 40 tokens in one call and of 3 single steps behind them."""
    engine = Engine(path)
    timeline = engine.pool.timeline()
    digest = hashlib.sha256(engine.run(timeline, [i * 7 % 250 for i in range(40)]).tobytes())
    for token in (1, 2, 3):
        digest.update(engine.run(timeline, [token]).tobytes())
    return digest.hexdigest()


def drawn_ids(path: Path) -> str:
    """Ids of an answer, with a seed."""
    with Model.open(path, draft="off", ctx=256, threads=2) as model, model.session() as session:
        return repr(list(session.generate("Once upon a time", max_tokens=20, sampling=Sampling(seed=3))))


if __name__ == "__main__":
    print(emit.FORM, hash_logits(Path(sys.argv[1])), drawn_ids(Path(sys.argv[1])), sep="\n")
