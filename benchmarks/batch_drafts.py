"""What drafts bring in a batch: tokens a second with prompt lookup, without, and as the gate chooses, in turn.

    python benchmarks/batch_drafts.py MODEL [-b 4,16,32,64] [-n 96] [-r 3] [--output benchmarks/batch_drafts.jsonl]

Three kinds of work. "edit" and "JSON": the replies of `m2lite bench --draft` to these, which repeat much of the prompt,
each answer with other words; "story": an answer that repeats nothing. Replies are given, whatever the model would say,
since slices have random weights; the model computes them and verifies drafts against them. Slices choose experts by
lot, so drafts share none with their neighbours: what is worst for drafts.
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
from m2lite.decode.batch_rows import Counts
from m2lite.decode.sampling import Sampling
from m2lite.decode.writer import Wish
from m2lite.workloads import WORKLOADS

MODES = ("off", "ngram", "auto")


def texts(kind: str) -> tuple[str, str]:
    """A question, and its reply."""
    if kind == "story":
        return "Tell me a story.", ""
    work = next(w for w in WORKLOADS if w.name == {"edit": "code edit"}.get(kind, kind))
    return work.questions[0], work.replies[0]


def wishes_of(model: Model, kind: str, n: int, n_tokens: int) -> list[Wish]:
    """n answers of n_tokens each; ids are exchanged in each by another order, so no two begin alike."""
    question, reply = (model.tokenizer.encode(text) for text in texts(kind))
    made = []
    for i in range(n):
        lot = random.Random(i)
        ids = list(range(model.config.n_vocab))
        lot.shuffle(ids)
        said = [ids[t] for t in reply] if reply else lot.choices(ids, k=n_tokens)
        prompt = [ids[t] for t in question]
        script = prompt + (said * (n_tokens // len(said) + 1))[:n_tokens]
        options: Any = {"sampling": Sampling(0, seed=0), "max_tokens": n_tokens}
        made.append(Wish(str(i), prompt, i, options, ends=False, script=script))
    return made


def run(model: Model, mode: str, wishes: Sequence[Wish]) -> tuple[float, Counts]:
    """Tokens a second from the step in which the last answer has begun to the first that ends, and what was done."""
    model.engine.drafting.mode = mode
    batch, times = Batch(model, len(wishes)), list[tuple[float, int, int]]()

    def after_step() -> None:
        times.append((time.perf_counter(), batch.counts.n_drawn, batch.counts.n_now))

    list(batch.run(wishes, after_step))
    first = next(i for i, each in enumerate(times) if each[1] >= len(wishes))
    last = max(i for i, each in enumerate(times) if each[2] == len(wishes))
    (began, a, _), (ended, b, _) = times[first], times[last]
    return (b - a) / (ended - began), batch.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-b", default="4,16,32,64")
    parser.add_argument("-n", type=int, default=96)
    parser.add_argument("-r", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    sizes, ctx = [int(n) for n in options.b.split(",")], 1024
    print("| work | at once | off, tok/s | ngram: ratio | auto: ratio | drafts right: ngram | auto | auto's, a step |")
    print("|---|---|---|---|---|---|---|---|")
    with Model.open(options.model, draft="auto", ctx=ctx, sequences=max(sizes)) as model:
        model.wait_mapped()
        for kind in ("edit", "JSON", "story"):
            for n in sizes:
                wishes = wishes_of(model, kind, n, options.n)
                done: dict[str, list[tuple[float, Counts]]] = {mode: [] for mode in MODES}
                for _ in range(options.r):
                    for mode in MODES:  # one after the other, since the machine drifts
                        done[mode].append(run(model, mode, wishes))
                report(kind, n, done, options.output)


def report(kind: str, n: int, done: dict[str, list[tuple[float, Counts]]], output: Path | None) -> None:
    off = [speed for speed, _ in done["off"]]
    ratios = {m: statistics.median(s / o for (s, _), o in zip(done[m], off, strict=True)) for m in MODES}
    right = {m: sum(c.n_right for _, c in done[m]) / max(1, sum(c.n_drafts for _, c in done[m])) for m in MODES}
    a_step = sum(c.n_drafts for _, c in done["auto"]) / sum(c.n_steps for _, c in done["auto"])
    cells = [kind, str(n), f"{statistics.median(off):.1f}", f"{ratios['ngram']:.2f}", f"{ratios['auto']:.2f}"]
    cells += [f"{right['ngram']:.0%}", f"{right['auto']:.0%}", f"{a_step:.1f}"]
    print(f"| {' | '.join(cells)} |", flush=True)
    if output:
        row = {"work": kind, "at_once": n, "speeds": {m: [s for s, _ in done[m]] for m in MODES}, "right": right}
        with output.open("a") as file:
            file.write(json.dumps(row | {"time": time.strftime("%Y-%m-%d %H:%M")}) + "\n")


if __name__ == "__main__":
    main()
