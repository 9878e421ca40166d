"""What it takes to compute a prompt, to keep its KV cache on disk, and to read it back once it is out of memory.

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
from collections.abc import Sequence
from pathlib import Path

from m2lite import Model, Sampling
from m2lite.engine.stats import Stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-n", type=int, default=8192, help="tokens")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        os.environ["XDG_CACHE_HOME"] = directory
        with Model.open(options.model, ctx=options.n + 64, draft="off", tuning=False) as model:
            measure(model, options.n)


def measure(model: Model, n: int) -> None:
    dice = random.Random(1)
    prompt = [dice.randrange(model.config.n_vocab // 2) for _ in range(n)]
    model.use_disk(1 << 40)
    computed, stats = answer(model, prompt)
    print(f"computed in {stats.prompt_s:.1f} s")
    began = time.perf_counter()
    n_bytes = model.loop.save(prompt) * model.runner.pool.page_bytes
    print(f"kept {n_bytes / 1e6:,.0f} MB in {time.perf_counter() - began:.2f} s")
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")
    model.loop.forget()
    began = time.perf_counter()
    read, stats = answer(model, prompt)
    seconds, rest = time.perf_counter() - began, stats.prompt_s + stats.decode_s
    print(f"{stats.n_reused:,} of {n:,} tokens read in {seconds - rest:.2f} s")
    print(f"the rest computed in {rest:.1f} s; the same tokens: {read == computed}")


def answer(model: Model, prompt: Sequence[int]) -> tuple[list[int], Stats]:
    """Four tokens behind the prompt."""
    with model.session() as session:
        tokens = list(session.generate(prompt, max_tokens=4, sampling=Sampling(seed=1), ignore_stop=True))
        return tokens, session.stats


if __name__ == "__main__":
    main()
