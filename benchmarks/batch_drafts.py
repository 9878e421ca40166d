"""What drafts bring in a batch: tokens a second with prompt lookup, with a module, and as the gate chooses, in turn.

    python benchmarks/batch_drafts.py MODEL [-b 4,16,32] [-p 96] [-n 64] [-r 3] [--every 12] [--right 0.8]
        [--output benchmarks/batch_drafts.jsonl]

Answers are given, whatever the model would say, since slices have random weights; the model computes them and verifies
drafts against them. "copy": the answer repeats the prompt, but that every 12th token is another; "new": it repeats
nothing. A module's draft is right by lot, at `--right`. Experts are chosen by the slices' random weights, so drafts
share none with their neighbours: what is worst for drafts. Modules are compared if the file has any (make_slice.py
--modules); the share of a slice's few layers that one of them is, is larger than M2's.

Each speed is that of the steps in which all answers are under way and no prompt is read.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2lite import Model
from m2lite.decode.batch import Batch
from m2lite.decode.batch_modules import BatchModule, Settled
from m2lite.decode.batch_rows import Counts
from m2lite.decode.sampling import Sampling
from m2lite.decode.writer import Wish


def wishes_of(n_vocab: int, kind: str, n: int, n_prompt: int, n_tokens: int, every: int) -> list[Wish]:
    """n answers of n_tokens each, to prompts of random ids of which no two are alike."""
    made = []
    for i in range(n):
        lot = random.Random(i)
        prompt = lot.choices(range(n_vocab), k=n_prompt)
        said = lot.choices(range(n_vocab), k=n_tokens)
        if kind == "copy":
            said = [said[j] if j % every == 0 else prompt[j % n_prompt] for j in range(n_tokens)]
        options: Any = {"sampling": Sampling(0, seed=0), "max_tokens": n_tokens}
        made.append(Wish(str(i), prompt, i, options, ends=False, script=prompt + said))
    return made


class Oracle:
    """Sets what the module says: the script's next token, or another, by lot."""

    def __init__(self, module: BatchModule, wishes: Sequence[Wish], right: float) -> None:
        self._follow, self._right = module.follow, right
        self._scripts = [wish.script or () for wish in wishes]

    def __call__(self, n_computed: int, rows: Sequence[Settled]) -> None:
        self._follow(n_computed, rows)
        for row in rows:
            if row.followed.token < 0 or row.draws is None:
                continue
            at, script = row.followed.top, self._scripts[row.draws[1]]
            if at < len(script):
                is_right = random.Random(f"{row.draws[1]} {at}").random() < self._right
                row.followed.token, row.followed.share = script[at] if is_right else 0, 0.9


def run(model: Model, mode: str, wishes: Sequence[Wish], right: float) -> tuple[float, Counts]:
    """Tokens a second, and what was done."""
    model.engine.drafting.mode = mode
    batch, times = Batch(model, len(wishes)), list[tuple[float, int]]()
    module = getattr(batch._drafts, "_module", None)
    if module is not None:
        module.follow = Oracle(module, wishes, right)
    n_prompts = sum(len(wish.row) for wish in wishes)

    def after_step() -> None:
        counts = batch.counts
        if counts.n_read + counts.n_shared == n_prompts and counts.n_now == len(wishes):
            times.append((time.perf_counter(), counts.n_drawn))

    list(batch.run(wishes, after_step))
    (began, a), (ended, b) = times[0], times[-1]
    return (b - a) / (ended - began), batch.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-b", default="4,16,32")
    parser.add_argument("-p", type=int, default=96)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("-r", type=int, default=3)
    parser.add_argument("--every", type=int, default=12)
    parser.add_argument("--right", type=float, default=0.8)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    sizes, ctx = [int(n) for n in options.b.split(",")], options.p + options.n + 64
    with Model.open(options.model, draft="auto", ctx=ctx, sequences=max(sizes)) as model:
        model.wait_mapped()
        modes = ["off", "ngram", *(["mtp"] if model.engine.modules else []), "auto"]
        print(f"| work | at once | off, tok/s | {' | '.join(modes[1:])} | auto's drafts a step | right |")
        print("|---|---|---|" + "---|" * (len(modes) + 1))
        for kind in ("copy", "new"):
            for n in sizes:
                wishes = wishes_of(model.config.n_vocab, kind, n, options.p, options.n, options.every)
                done: dict[str, list[tuple[float, Counts]]] = {mode: [] for mode in modes}
                for _ in range(options.r):
                    for mode in modes:  # one after the other, since the machine drifts
                        done[mode].append(run(model, mode, wishes, options.right))
                report(kind, n, done, options.output)


def report(kind: str, n: int, done: dict[str, list[tuple[float, Counts]]], output: Path | None) -> None:
    off = [speed for speed, _ in done["off"]]
    ratios = {m: statistics.median(s / o for (s, _), o in zip(rows, off, strict=True)) for m, rows in done.items()}
    auto = [counts for _, counts in done["auto"]]
    n_drafts, n_right, n_steps = (sum(getattr(c, name) for c in auto) for name in ("n_drafts", "n_right", "n_steps"))
    cells = [kind, str(n), f"{statistics.median(off):.1f}", *(f"{ratios[m]:.2f}" for m in done if m != "off")]
    cells += [f"{n_drafts / n_steps:.1f}", f"{n_right / max(1, n_drafts):.0%}"]
    print(f"| {' | '.join(cells)} |", flush=True)
    if output:
        row = {"work": kind, "at_once": n, "speeds": {m: [s for s, _ in rows] for m, rows in done.items()}}
        with output.open("a") as file:
            file.write(json.dumps(row | {"time": time.strftime("%Y-%m-%d %H:%M")}) + "\n")


if __name__ == "__main__":
    main()
