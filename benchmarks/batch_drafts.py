"""What drafts bring in a batch: tokens a second with prompt lookup, with modules, and as `auto` chooses, in turn.

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
from dataclasses import replace
from pathlib import Path

from m2lite import Model, Sampling
from m2lite.drafting.sequence import Ask
from m2lite.engine.batch import Batch
from m2lite.engine.request import Request
from m2lite.engine.scheduler import Counts


def requests_of(n_vocab: int, kind: str, n: int, n_prompt: int, n_tokens: int, every: int) -> list[Request]:
    """n answers of n_tokens each, to prompts of random ids of which no two are alike."""
    made = []
    for i in range(n):
        lot = random.Random(i)
        prompt = lot.choices(range(n_vocab), k=n_prompt)
        script = lot.choices(range(n_vocab), k=n_tokens)
        if kind == "copy":
            script = [script[j] if j % every == 0 else prompt[j % n_prompt] for j in range(n_tokens)]
        made.append(Request(
            prompt=prompt, script=script, rng_stream=i, sampling=Sampling(0, seed=0), max_tokens=n_tokens,
            ignore_stop=True, keep="nothing",
        ))  # fmt: skip
    return made


class Oracle:
    """What a module says: the script's next token, or another, by lot."""

    def __init__(self, requests: Sequence[Request], right: float) -> None:
        self._scripts = {each.rng_stream: [*each.prompt, *(each.script or ())] for each in requests}
        self._right = right

    def __call__(self, ask: Ask, k: int) -> tuple[int, float]:
        at, ids = len(ask.ids) + k, self._scripts[ask.rng_stream]
        is_right = at < len(ids) and random.Random(f"{ask.rng_stream} {k} {at}").random() < self._right
        return (ids[at] if is_right else 0), 0.9


def run(model: Model, mode: str, requests: Sequence[Request], right: float) -> tuple[float, Counts]:
    """Tokens a second, and what was done."""
    batch, times = Batch(model, len(requests)), list[tuple[float, int]]()
    model.runner.drafter.oracle = Oracle(requests, right)
    n_prompts = sum(len(each.prompt) for each in requests)

    def after_step() -> None:
        counts = batch.counts
        if counts.n_prompt + counts.n_cached == n_prompts and counts.n_running == len(requests):
            times.append((time.perf_counter(), counts.n_drawn))

    list(batch.run([replace(each, draft=mode) for each in requests], after_step))
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
    with Model.open(options.model, draft="auto", ctx=ctx, sequences=max(sizes), heat=False, tuning=False) as model:
        model.wait_mapped()
        modes = ["off", "ngram", *(["mtp"] if model.runner.drafting.n_modules else []), "auto"]
        print(f"| work | at once | off, tok/s | {' | '.join(modes[1:])} | auto's drafts a step | right |")
        print("|---|---|---|" + "---|" * (len(modes) + 1))
        for kind in ("copy", "new"):
            for n in sizes:
                requests = requests_of(model.config.n_vocab, kind, n, options.p, options.n, options.every)
                done: dict[str, list[tuple[float, Counts]]] = {mode: [] for mode in modes}
                for _ in range(options.r):
                    for mode in modes:  # one after the other, since the machine drifts
                        done[mode].append(run(model, mode, requests, options.right))
                report(kind, n, done, options.output)


def report(kind: str, n: int, done: dict[str, list[tuple[float, Counts]]], output: Path | None) -> None:
    off = [speed for speed, _ in done["off"]]
    ratios = {m: statistics.median(s / o for (s, _), o in zip(rows, off, strict=True)) for m, rows in done.items()}
    auto = [counts for _, counts in done["auto"]]
    n_drafts, n_right, n_steps = (sum(getattr(c, name) for c in auto) for name in ("n_drafts", "n_accepted", "n_steps"))
    cells = [kind, str(n), f"{statistics.median(off):.1f}", *(f"{ratios[m]:.2f}" for m in done if m != "off")]
    cells += [f"{n_drafts / n_steps:.1f}", f"{n_right / max(1, n_drafts):.0%}"]
    print(f"| {' | '.join(cells)} |", flush=True)
    if output:
        row = {"work": kind, "at_once": n, "speeds": {m: [s for s, _ in rows] for m, rows in done.items()}}
        with output.open("a") as file:
            file.write(json.dumps(row | {"time": time.strftime("%Y-%m-%d %H:%M")}) + "\n")


if __name__ == "__main__":
    main()
