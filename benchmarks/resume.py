"""What it takes to compute a row, to keep its KV cache on disk, and to read it back in a new session.

    python benchmarks/resume.py MODEL.gguf [-n 8192]

Tokens are by lot. Pages go to a directory that is deleted afterwards; as root, the page cache is dropped before they
are read. The tokens that follow must be the same.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import tempfile
import time
from pathlib import Path

from m2lite import Model, Sampling
from m2lite.decode.session import Session
from m2lite.decode.snapshots import Snapshots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-n", type=int, default=8192, help="tokens")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        os.environ["XDG_CACHE_HOME"] = directory
        with Model.open(options.model, ctx=options.n + 64, draft="off") as model:
            measure(model, options.n)


def measure(model: Model, n: int) -> None:
    dice = random.Random(1)
    row = [dice.randrange(model.config.n_vocab // 2) for _ in range(n)]
    snapshots = Snapshots(model)
    with model.session() as session:
        session.set_tokens(row)
        computed, seconds = answer(session)
        print(f"computed in {seconds:.1f} s")
        began = time.perf_counter()
        n_bytes = snapshots.save(session) * snapshots.store.page_bytes
        print(f"kept {n_bytes / 1e6:,.0f} MB in {time.perf_counter() - began:.2f} s")
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")
    with model.session() as session:
        session.set_tokens(row)
        began = time.perf_counter()
        n_read = snapshots.restore(session)
        print(f"{n_read:,} of {n:,} tokens read in {time.perf_counter() - began:.2f} s")
        read, seconds = answer(session)
        print(f"the rest computed in {seconds:.1f} s; the same tokens: {read == computed}")


def answer(session: Session) -> tuple[list[int], float]:
    """Four tokens behind the row, and the seconds that they took."""
    began = time.perf_counter()
    tokens = list(session.generate((), max_tokens=4, sampling=Sampling(seed=1), ignore_stop=True))
    return tokens, time.perf_counter() - began


if __name__ == "__main__":
    main()
