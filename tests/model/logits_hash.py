"""Prints the vector form and a hash of logits, for a file and a processor named in the environment. A child process."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from m2lite.kernels import emit
from tests.model.engine import Engine


def hash_logits(path: Path) -> str:
    """SHA-256 of the logits of 40 tokens in one call and of 3 single steps behind them."""
    engine = Engine(path)
    timeline = engine.pool.timeline()
    digest = hashlib.sha256(engine.run(timeline, [i * 7 % 250 for i in range(40)]).tobytes())
    for token in (1, 2, 3):
        digest.update(engine.run(timeline, [token]).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    print(emit.FORM, hash_logits(Path(sys.argv[1])))
