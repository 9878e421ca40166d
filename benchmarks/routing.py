"""Which experts a text chooses, and how many of them a cache of a given size would have held, by policy.

    python benchmarks/routing.py MODEL.gguf [--text FILE] [-n 4096] [--plot PNG] [--json]

The text (random ids without one) goes through the model; every token's experts in every layer are kept. The trace is
then played to the ledger that the engine uses (storage/ledger.py) with several half-lives, from one near LRU to one
near LFU, and to Belady's rule, which knows the future and cannot be beaten. The first fifth of the tokens fills the
cache and is not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m2lite import Model
from m2lite.bench import random_ids
from m2lite.engine.thread import compute_thread
from m2lite.errors import M2liteError
from m2lite.model.observer import Observer
from m2lite.storage.ledger import Ledger

Trace = npt.NDArray[np.int32]  # [n_tokens, n_layers, n_used]

HALF_LIVES = {"LRU (half-life 1)": 1.0, "8": 8.0, "32": 32.0, "128": 128.0, "512": 512.0, "LFU (half-life 1e6)": 1e6}
SIZES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of all experts
WARM_SHARE = 0.2
CHUNK = 256


class Recorder(Observer):
    """Keeps the experts of the rows of each layer."""

    def __init__(self) -> None:
        self.found: list[npt.NDArray[np.int32]] = []

    def chosen(self, layer: int, start: int, ids: npt.NDArray[np.int32]) -> None:
        self.found.append(ids.copy())


def record(model: Model, tokens: Sequence[int]) -> Trace:
    """The experts of every token, from one pass in chunks: they do not depend on how the text is cut."""
    windows = [tokens[at : at + model.ctx] for at in range(0, len(tokens), model.ctx)]  # a longer text begins anew
    return np.concatenate([compute_thread().run(partial(_record_window, model, window)) for window in windows])


def _record_window(model: Model, tokens: Sequence[int]) -> Trace:
    timeline, found = model.runner.pool.timeline(), list[Trace]()
    try:
        for at in range(0, len(tokens), CHUNK):
            recorder = Recorder()
            model.runner.evaluate(timeline, at, tokens[at : at + CHUNK], observers=[recorder])
            found.append(np.stack(recorder.found, axis=1))
    finally:
        timeline.release()
    return np.concatenate(found)


def hit_rate(trace: Trace, n_experts: int, size: float, half_life: float) -> float:
    """Share of the experts that a cache of size x all experts held when they were chosen."""
    n_tokens, n_layers, n_used = trace.shape
    n_units = n_layers * n_experts
    ledger = Ledger(np.ones(n_units, np.int64), max(n_used, round(size * n_units)), half_life)
    n_hits = n_counted = 0
    for t, layers in enumerate(trace.tolist()):
        for layer, experts in enumerate(layers):
            units = [layer * n_experts + e for e in experts]
            for unit in units:
                ledger.use(unit)
                is_hit = ledger.has(unit)
                ledger.pin(unit)
                if not is_hit:
                    ledger.make_room(1)
                    ledger.add(unit)
                if t >= WARM_SHARE * n_tokens:
                    n_hits += is_hit
                    n_counted += 1
            for unit in units:
                ledger.unpin(unit)
        ledger.advance()
    return n_hits / max(1, n_counted)


def best_hit_rate(trace: Trace, n_experts: int, size: float) -> float:
    """The same with Belady's rule: what is used again last leaves first."""
    n_layers, n_used = trace.shape[1:]
    n_units = n_layers * n_experts
    capacity = max(n_used, round(size * n_units))
    units = (trace + (np.arange(n_layers) * n_experts)[None, :, None]).reshape(-1)
    following = np.full(len(units), np.inf)
    seen = np.full(n_units, np.inf)
    for i in range(len(units) - 1, -1, -1):
        following[i], seen[units[i]] = seen[units[i]], i
    due = np.full(n_units, -np.inf)  # next use of what is in the cache
    n_resident = n_hits = n_counted = 0
    for i, unit in enumerate(units.tolist()):
        is_hit = due[unit] > -np.inf
        if not is_hit:
            if n_resident == capacity:
                due[int(np.argmax(due))] = -np.inf
            else:
                n_resident += 1
        due[unit] = min(following[i], 1e18)
        if i >= WARM_SHARE * len(units):
            n_hits += is_hit
            n_counted += 1
    return n_hits / max(1, n_counted)


def compare(trace: Trace, n_experts: int) -> dict[str, Any]:
    """Hit rate by policy and size, and how uneven and how repetitive the choices are."""
    rates = {name: [hit_rate(trace, n_experts, s, half) for s in SIZES] for name, half in HALF_LIVES.items()}
    rates["Belady"] = [best_hit_rate(trace, n_experts, s) for s in SIZES]
    counts = np.sort(np.stack([np.bincount(trace[:, i].ravel(), minlength=n_experts) for i in range(trace.shape[1])]))
    top = counts[:, -n_experts // 10 :].sum() / counts.sum()
    repeated = np.mean(
        [np.isin(a, b).mean() for t in range(1, len(trace)) for a, b in zip(trace[t], trace[t - 1], strict=True)]
    )
    return {
        "tokens": len(trace), "layers": trace.shape[1], "experts": n_experts, "used": trace.shape[2], "sizes": SIZES,
        "hit_rates": rates, "share_of_busiest_tenth": float(top), "shared_with_last_token": float(repeated),
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['tokens']:,} tokens, {found['layers']} layers, {found['used']} of {found['experts']} experts; the "
        f"busiest tenth takes {found['share_of_busiest_tenth']:.0%}, "
        f"{found['shared_with_last_token']:.0%} are the last token's",
        f"{'cache, of all experts':<24}" + "".join(f"{s:>7.0%}" for s in found["sizes"]),
    ]
    lines += [f"{name:<24}" + "".join(f"{r:>7.1%}" for r in rates) for name, rates in found["hit_rates"].items()]
    return "\n".join(lines)


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(6 * len(found), 4.5), squeeze=False, sharey=True)
    for axis, (name, one) in zip(axes[0], found.items(), strict=True):
        for policy, rates in one["hit_rates"].items():
            style = {"color": "black", "linestyle": "--"} if policy == "Belady" else {}
            axis.plot(one["sizes"], rates, marker=".", label=policy, **style)
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
        axis.set(title=name, xlabel="cache, share of all experts", xlim=(0, 1), ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("hit rate")
    axes[0][-1].legend(title="half-life, tokens", loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, help="for models whose tokenizer makes sense; others get random ids")
    parser.add_argument("-n", type=int, default=4096, help="tokens")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    try:
        for path in args.models:
            with Model.open(path) as model:
                is_random = args.text is None or "slice" in str(model.gguf.metadata.get("general.name", ""))
                tokens = (
                    random_ids(model, args.n) if is_random else model.tokenizer.encode(args.text.read_text())[: args.n]
                )
                found[path.stem] = compare(record(model, tokens), model.config.n_experts)
            print(f"{path.name}\n{table(found[path.stem])}", flush=True)
    except M2liteError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    if args.json is not None:
        args.json.write_text(json.dumps(found))
    if args.plot is not None:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
