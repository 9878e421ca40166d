"""What drafts cost at MiniMax-M2's widths, and whether `auto` finds what pays: a slice with random weights.

    python benchmarks/draft_costs.py SLICE.gguf [--overlap 0,0.25,0.4] [-d 0,8192] [--right 1,0.75] [-n 48] [-r 3]
    python benchmarks/draft_costs.py SLICE.gguf --ram 5400m [--draft auto|mtp] [--overlap 0.25] [-n 48] [-r 3]

SLICE.gguf comes from make_slice.py --modules 3. Its weights are random, so three things are set, and the output says
so: the tokens are given; module k's draft is right where a trace of m2-tiny's modules says so (real answers to
held-out questions; `--right` 0.75 makes a quarter of those wrong); and experts are chosen by lot, such that a token
shares a given part of them with the one before. Everything is computed: trunk, modules, attention, head, draws.

With `--ram SIZE` the slice is streamed in so much memory, and prompt lookup or (--draft mtp) the modules, which take
memory from the experts, are compared on given tokens of which half repeat what stood before.

Costs are seconds of a step with K drafts, over one without. Break-even is the acceptance, the same at each position,
from which on K drafts are no slower than none. Every setting runs in turn within each repeat.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m2lite import Model
from m2lite.bench import fill, random_ids
from m2lite.bench_drafts import Setting
from m2lite.drafting.drafted import Drafted
from m2lite.drafting.sequence import Ask, Call, Computed
from m2lite.engine.thread import compute_thread
from m2lite.model.observer import Observer
from m2lite.sampling.draw import Sampling
from m2lite.settings import parse_count
from m2lite.text.template import encode_chat
from m2lite.workloads import WORKLOADS

PERIOD = 1024  # positions after which the lots repeat
WARM_TOKENS = 320  # in which `auto` learns, before anything is counted
SET = "tokens given; drafts right by m2-tiny's trace; experts by lot"

Trace = list[list[tuple[float, bool]]]  # of each token: (share, is right) of every module's draft behind it


def record_trace(model: Model, n_modules: int = 3) -> Trace:
    """What the modules of a trained model say at every token of answers to questions, drawn at temperature 1."""
    trace: Trace = []
    questions = [q for w in WORKLOADS if not w.replies and w.temperature == 1 for q in w.questions]
    for i, question in enumerate(questions):
        row = encode_chat(model.tokenizer, model.template, [{"role": "user", "content": question}])
        sampling = Sampling(seed=i)
        with model.session("off") as session:
            answer = list(session.generate(row, max_tokens=200, sampling=sampling))
        trace += compute_thread().run(partial(_trace_of, model, row, answer, sampling, n_modules))
    return trace


def _trace_of(model: Model, prompt: list[int], answer: list[int], sampling: Sampling, n_modules: int) -> Trace:
    """Tokens are computed one by one, as if no draft were verified: the modules follow, and say what they expect."""
    runner, found, ids = model.runner, Trace(), [*prompt, *answer]
    timeline, own = runner.pool.timeline(), runner.drafter.open("mtp", n_modules)
    assert own is not None
    own.begin(prompt)
    start = 0
    for end in range(len(prompt), len(ids) - n_modules):
        runner.evaluate(timeline, start, ids[start:end])
        part = Computed(own, timeline, 0, start, end - start, ids[: end + 1])
        runner.drafter.computed([part], Call(end - start, 0, 0, 0.0, is_measure=False))
        runner.drafter.propose([Ask(own, timeline, ids[: end + 1], n_modules, sampling, 0)], 1)
        found.append([(d.share, d.token == ids[end + 1 + k]) for k, d in enumerate(own.foreseen)])
        start = end
    timeline.release()
    return found


def thinned(trace: Trace, share: float) -> Trace:
    """A part of the right drafts made wrong, by lot."""
    dice = np.random.default_rng(5)
    return [[(s, right and bool(dice.random() < share)) for s, right in said] for said in trace]


class Lots(Observer):
    """Experts by lot: a token shares a part of them, on average, with the one before."""

    def __init__(self, n_layers: int, n_experts: int, n_used: int, overlap: float) -> None:
        dice = np.random.default_rng(7)
        self._ids = np.empty((n_layers, PERIOD, n_used), np.int32)
        for layer in range(n_layers):
            before = dice.permutation(n_experts)[:n_used]
            for at in range(PERIOD):
                kept = before[dice.random(n_used) < overlap]
                others = np.setdiff1d(np.arange(n_experts), before)
                before = np.concatenate([kept, dice.permutation(others)[: n_used - len(kept)]])
                self._ids[layer, at] = np.sort(before)

    def chosen(self, layer: int, start: int, ids: npt.NDArray[np.int32]) -> None:
        ids[:] = self._ids[layer, np.arange(start, start + len(ids)) % PERIOD]

    def measured_overlap(self) -> float:
        a, b = self._ids[:, :-1, :, None], self._ids[:, 1:, None, :]
        return float((a == b).any(axis=-1).mean())


@dataclass
class Point:
    """One context, overlap and trace, on which settings are tried."""

    model: Model
    context: list[int]
    script: list[int]
    trace: Trace
    shift: int = 0  # of the trace

    def run(self, setting: Setting, n: int, seed: int) -> tuple[float, Drafted | None]:
        """Seconds a token, of n tokens behind the context."""
        self.shift, [first, *script] = 131 * seed, self.script[: n + 2]
        options: Any = {"sampling": Sampling(seed=seed), "ignore_stop": True, "script": script, "keep": False}
        with self.model.session(*setting) as session:
            for _ in session.generate([*self.context, first], **options):
                pass
            assert session.stats.n_reused >= len(self.context) - 8  # some again, for the modules
            return session.stats.decode_s / (session.stats.n_generated - 1), session.stats.drafted

    def oracle(self, ask: Ask, k: int) -> tuple[int, float]:
        """What module k shall have said behind so many ids, and how sure it is."""
        n = len(ask.ids)
        share, is_right = self.trace[(n + self.shift) % len(self.trace)][k]
        at = n + k - len(self.context)
        said = self.script[at] if at < len(self.script) else 0
        return said if is_right else (said + 1) % self.model.config.n_vocab, share


def quoting(ids: Sequence[int], n: int) -> list[int]:
    """n ids of which about half repeat runs of 4 to 16 before them."""
    dice, new = np.random.default_rng(11), iter(ids)
    row = [next(new) for _ in range(24)]
    while len(row) < n:
        at, length = int(dice.integers(0, len(row) - 20)), int(dice.integers(4, 17))
        row += row[at : at + length]
        row += [next(new) for _ in range(int(dice.integers(1, 12)))]
    return row[:n]


def measure_point(
    model: Model,
    depth: int,
    trace: Trace,
    settings: Sequence[Setting],
    n: int,
    repeats: int,
    script: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Every setting's speeds and drafts. `auto` has learnt WARM_TOKENS more than it had when the model came."""
    script = list(script or random_ids(model, max(n, WARM_TOKENS) + 2, seed=3))
    point, auto = Point(model, fill(model, depth), script, trace), Setting("auto")
    seconds: dict[Setting, list[float]] = {s: [] for s in settings}
    drafted = {s: Drafted() for s in settings}
    model.runner.drafter.oracle = point.oracle
    if auto in settings:
        point.run(auto, WARM_TOKENS, 0)
    for r in range(repeats):
        for setting in settings:
            found, drafts = point.run(setting, n, r)
            seconds[setting].append(found)
            if drafts is not None:
                drafted[setting].include(drafts)
    model.runner.drafter.oracle = None
    return _summary(seconds, drafted)


def _summary(seconds: dict[Setting, list[float]], drafted: dict[Setting, Drafted]) -> dict[str, Any]:
    off = seconds[Setting("off")]
    rows = {}
    for setting, samples in seconds.items():
        found = drafted[setting]
        per_step = found.tokens_per_step or 1.0
        step = statistics.median(per_step * s / o for s, o in zip(samples, off, strict=True))
        rows[str(setting)] = {
            "tokens_per_s": 1 / statistics.median(samples),
            "speedup": statistics.median(o / s for s, o in zip(samples, off, strict=True)),
            "step_cost": step,
            "tokens_per_step": per_step,
            "acceptance": found.acceptance,
            "break_even": break_even(step, setting.n_tokens) if setting.n_tokens else None,
        }
    return rows


def break_even(cost: float, n_drafts: int) -> float | None:
    """The acceptance a with 1 + a + ... + a**n = cost; None where even 1 does not do."""
    if cost >= n_drafts + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(middle**j for j in range(n_drafts + 1)) > cost else (middle, high)
    return high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slice", type=Path)
    parser.add_argument("--overlap", default="0,0.25,0.4")
    parser.add_argument("-d", "--depth", default="0,8192")
    parser.add_argument("--right", default="1,0.75", help="part of the trace's right drafts that stays right")
    parser.add_argument("-n", type=int, default=48)
    parser.add_argument("-r", "--repeats", type=int, default=3)
    parser.add_argument("--ram", help="stream the slice in so much memory")
    parser.add_argument("--draft", choices=("auto", "mtp"), default="auto", help="with --ram: what is compared")
    parser.add_argument("--output", type=Path, help="append one JSON object a point")
    args = parser.parse_args()
    with Model.open(ctx=1024) as tiny:
        whole = record_trace(tiny)
    settings = [Setting("off"), *(Setting("mtp", k) for k in (1, 2, 3)), Setting("auto")]
    depths = [int(d) for d in args.depth.split(",")]
    print(f"{args.slice.name}: {SET}", flush=True)
    overlaps, rights = [float(x) for x in args.overlap.split(",")], [float(x) for x in args.right.split(",")]
    ctx = max(depths) + WARM_TOKENS + args.n + 128
    if args.ram:
        points = streamed(args, whole, overlaps)
    else:
        points = in_memory(args, whole, overlaps, depths, rights, settings, ctx)
    for point in points:
        point |= {"slice": args.slice.name, "set": SET}
        _show(point)
        if args.output:
            with args.output.open("a") as out:
                out.write(json.dumps(point) + "\n")


def in_memory(
    args: argparse.Namespace,
    trace: Trace,
    overlaps: Sequence[float],
    depths: Sequence[int],
    rights: Sequence[float],
    settings: Sequence[Setting],
    ctx: int,
) -> Iterator[dict[str, Any]]:
    for overlap, depth, right in product(overlaps, depths, rights):
        # Anew: `auto` has learnt nothing of other points.
        with Model.open(args.slice, ctx=ctx, heat=False, tuning=False) as model:
            model.wait_mapped()
            measured = set_lots(model, overlap)
            rows = measure_point(model, depth, thinned(trace, right), settings, args.n, args.repeats)
            point = {"overlap": overlap, "overlap_measured": measured, "depth": depth, "right": right}
            yield point | {"settings": rows}


def streamed(args: argparse.Namespace, trace: Trace, overlaps: Sequence[float]) -> Iterator[dict[str, Any]]:
    settings = {
        "auto": [Setting("off"), Setting("ngram", 3), Setting("ngram", 7), Setting("auto")],
        "mtp": [Setting("off"), Setting("mtp", 1), Setting("mtp", 3)],
    }[args.draft]
    ram = parse_count(args.ram)
    for overlap in overlaps:
        with Model.open(args.slice, ctx=4096, ram=ram, draft=args.draft, heat=False, tuning=False) as model:
            measured = set_lots(model, overlap)
            script = quoting(random_ids(model, 4096, seed=3), max(args.n, WARM_TOKENS) + 2)
            rows = measure_point(model, 0, trace, settings, args.n, args.repeats, script)
            point = {"overlap": overlap, "overlap_measured": measured, "depth": 0, "right": 1.0}
            yield point | {"ram": args.ram, "settings": rows}


def set_lots(model: Model, overlap: float) -> float:
    """Experts by lot from now on; the overlap that the lots have."""
    c = model.config
    lots = Lots(c.n_layers + 3, c.n_experts, c.n_experts_used, overlap)
    model.runner.reroute(lots)
    return lots.measured_overlap()


def _show(point: dict[str, Any]) -> None:
    print(
        f"\noverlap {point['overlap']:g}, context {point['depth']:,}, {point['right']:.0%} of the trace's right drafts"
    )
    for name, row in point["settings"].items():
        line = f"  {name:<6} {row['tokens_per_s']:7.2f} tok/s  x{row['speedup']:.3f}"
        line += f"  {row['tokens_per_step']:.2f} tok/step"
        if row["acceptance"]:
            right = " ".join(f"{a:.0%}" for a in row["acceptance"] if a is not None)
            line += f"  step x{row['step_cost']:.2f}  right {right}"
        if name.startswith("mtp"):
            even = row["break_even"]
            line += "  break-even " + ("none" if even is None else f"{even:.0%}")
        print(line, flush=True)
    if "auto" not in point["settings"]:
        return
    best = max(r["speedup"] for n, r in point["settings"].items() if n != "auto")
    print(f"  auto reaches {point['settings']['auto']['speedup'] / best:.3f} of the best", flush=True)


if __name__ == "__main__":
    main()
