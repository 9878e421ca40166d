"""Where the time of one decoded token, and of one prompt, goes: kernel by kernel, next to the bytes and products.

    python benchmarks/profile_token.py MODEL.gguf [-d 0] [-p 512] [-n 16] [-t 2] [--json]

Every kernel that the forward call makes is timed, for a product with the tensors that it reads, found by their
addresses; a first pass, not timed, counts their weights. `between kernels` is the rest of the call: Python, NumPy, the
check of the logits. `draw` is sampling. Figures are medians over the tokens (or prompts); the timers cost what the last
line says. Bytes are those of weights, and for attention those of the KV cache in decode.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from m2lite import Model
from m2lite.bench import fill, random_ids
from m2lite.engine.context import kv_bytes_per_position
from m2lite.engine.thread import compute_thread
from m2lite.kernels.layer import interpreted
from m2lite.model.observer import Observer
from m2lite.model.weights import Matrix
from m2lite.sampling.draw import Sampling, draw

REST = "between kernels"


@dataclass
class Line:
    """One kernel, or one kernel with certain tensors, in one forward call."""

    calls: int = 0
    seconds: float = 0.0
    n_bytes: int = 0
    macs: int = 0


@dataclass
class Pass:
    """What one forward call did."""

    lines: dict[str, Line] = field(default_factory=lambda: defaultdict(Line))
    seconds: float = 0.0


class TimedKernels:
    """The names of the kernels, each call timed. The model's code cannot tell the difference.

    A layer's steps, which are compiled as wholes, run call by call here, which adds to `between kernels`.
    """

    def __init__(self, kernels: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], float]] = []  # name, arguments, seconds
        self.after: Callable[[str, tuple[Any, ...]], None] | None = None  # hears of every call
        for name in dir(kernels):
            call = getattr(kernels, name)
            if not name.startswith("_"):
                setattr(self, name, self._timed(name, call) if callable(call) else call)
        self.steps = interpreted(self)

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        clock = time.perf_counter

        def timed(*args: Any) -> Any:
            started = clock()
            result = call(*args)
            self.calls.append((name, args, clock() - started))
            if self.after is not None:
                self.after(name, args)
            return result

        return timed


def matrices_of(model: Model) -> dict[int, tuple[str, Matrix]]:
    """Address -> (GGUF's name without layer and ending, matrix)."""
    weights = model.weights
    found = {weights.output.address: ("output", weights.output)}
    for layer in weights.layers:
        named = ((name, value) for name, value in vars(layer).items() if isinstance(value, Matrix))
        found |= {matrix.address: (name, matrix) for name, matrix in named}
    return found


class Chosen(Observer):
    """Remembers the experts of the layer that is being computed."""

    ids = np.empty((0, 0), np.int32)

    def chosen(self, layer: int, start: int, ids: Any) -> None:
        self.ids = ids


class Profiler:
    """Runs forward calls of a model behind `depth` positions and takes them apart."""

    def __init__(self, model: Model, depth: int) -> None:
        self.model, self.depth = model, depth
        self.plain = model.runner.kernels
        self.timed = TimedKernels(self.plain)
        self.matrices = matrices_of(model)
        self.stacks = {
            m.address for la in model.weights.layers for m in (la.ffn_gate_exps, la.ffn_up_exps, la.ffn_down_exps)
        }
        self.chosen = Chosen()
        model.wait_mapped()
        ids = fill(model, depth)
        self.timeline, _ = compute_thread().run(lambda: model.loop.prefix_cache.fork(ids, depth))

    def close(self) -> None:
        """Its pages are the model's again."""
        compute_thread().run(self.timeline.release)

    def run(self, ids: Sequence[int], start: int, *, timed: bool, counted: bool = False) -> Pass:
        """`ids` from position `start` on, in as many calls as the engine makes of them, and one draw."""
        runner, n_rows = self.model.runner, self.model.n_rows
        chunks = [list(ids[i : i + n_rows]) for i in range(0, len(ids), n_rows)]
        done = Pass()
        self.timed.calls = []

        def call() -> tuple[float, float]:
            runner.kernels = self.timed if timed else self.plain
            logits: Any = None
            at, took = start, 0.0
            try:
                for chunk in chunks:
                    self.timed.after = self._counter(done, len(chunk)) if counted else None
                    started = time.perf_counter()
                    logits = runner.evaluate(self.timeline, at, chunk, observers=[self.chosen] if counted else [])
                    took += time.perf_counter() - started
                    at += len(chunk)
            finally:
                runner.kernels = self.plain
            started = time.perf_counter()
            draw(logits[-1], Sampling(seed=0), 0, at)
            return took, time.perf_counter() - started

        took, drawing = compute_thread().run(call)
        if timed:
            self._add_times(done, took)
            done.lines["draw"] = Line(1, drawing)
        done.seconds = took + drawing
        return done

    def _found(self, args: tuple[Any, ...]) -> list[tuple[str, Matrix]]:
        """The tensors among a kernel's arguments."""
        return [self.matrices[a] for a in args if type(a) is int and a in self.matrices]

    def _name(self, kernel: str, args: tuple[Any, ...]) -> str:
        return " ".join([kernel, *(tensor for tensor, _ in self._found(args))])

    def _add_times(self, done: Pass, took: float) -> None:
        for kernel, args, seconds in self.timed.calls:
            line = done.lines[self._name(kernel, args)]
            line.calls += 1
            line.seconds += seconds
        done.lines[REST].seconds = took - sum(seconds for _, _, seconds in self.timed.calls)

    def _counter(self, done: Pass, n: int) -> Callable[[str, tuple[Any, ...]], None]:
        """Adds up weights and products of a call with n rows; of a stack, the experts that the rows chose."""
        model = self.model

        def count(kernel: str, args: tuple[Any, ...]) -> None:
            line = done.lines[self._name(kernel, args)]
            for _, matrix in self._found(args):
                is_stack = matrix.address in self.stacks
                n_read = len(np.unique(self.chosen.ids)) if is_stack else 1
                n_products = n * model.config.n_experts_used if is_stack else n
                if matrix is model.weights.output:
                    n_products = 1  # only the last row's logits are asked for
                line.n_bytes += n_read * matrix.slice_bytes
                line.macs += n_products * matrix.n_out * matrix.n_in

        return count


def profile(profiler: Profiler, n: int, n_passes: int, n_ids: int) -> dict[str, Any]:
    """The medians of `n_passes` calls of `n_ids` ids each: tokens one after another, or the same prompt again."""
    is_decode, depth = n_ids == 1, profiler.depth
    ids = random_ids(profiler.model, n_passes if is_decode else n_ids, seed=2)

    def each(i: int, *, timed: bool, counted: bool = False) -> Pass:
        part, start = (ids[i : i + 1], depth + i) if is_decode else (ids, depth)
        return profiler.run(part, start, timed=timed, counted=counted)

    counts = [each(i, timed=True, counted=True) for i in range(n_passes if is_decode else 1)]
    pairs = [(each(i, timed=False), each(i, timed=True)) for i in range(n_passes)]  # in turns: machines drift
    passes = [timed for _, timed in pairs]
    rows = {name: _row(name, passes, counts) for name in passes[0].lines}
    attended = depth * n_ids + n_ids * (n_ids + 1) // 2 if not is_decode else depth + (n_passes + 1) / 2
    _add_attention(profiler.model, rows, attended, is_decode)
    return {
        "what": "decode" if is_decode else "prefill",
        "n": n,
        "depth": depth,
        "passes": n_passes,
        "ms": _median_ms(passes),
        "ms_without_timers": _median_ms([plain for plain, _ in pairs]),
        "lines": sorted(rows.values(), key=lambda row: -row["ms"]),
    }


def _row(name: str, passes: list[Pass], counts: list[Pass]) -> dict[str, Any]:
    return {
        "name": name,
        "calls": passes[0].lines[name].calls,
        "ms": statistics.median(p.lines[name].seconds for p in passes) * 1e3,
        "bytes": statistics.median(p.lines[name].n_bytes for p in counts),
        "macs": statistics.median(p.lines[name].macs for p in counts),
    }


def _median_ms(passes: list[Pass]) -> float:
    return statistics.median(p.seconds for p in passes) * 1e3


def _add_attention(model: Model, rows: dict[str, dict[str, Any]], attended: float, is_decode: bool) -> None:
    """Both products of a query with every position before it, and in decode the pages that are read once."""
    if "attend" in rows:
        rows["attend"]["macs"] = 2 * attended * model.config.n_q * model.config.n_layers
        if is_decode:
            rows["attend"]["bytes"] = attended * kv_bytes_per_position(model.config, model.kv)


def format_profile(found: dict[str, Any]) -> str:
    """A table, the largest first; rates where bytes or products are known."""
    total = found["ms"]
    lines = [
        f"{found['what']} of {found['n']} at depth {found['depth']:,}: {total:.2f} ms (median of {found['passes']})",
        f"{'kernel':<44}{'calls':>6}{'ms':>10}{'%':>7}{'MB':>9}{'GB/s':>7}{'GMAC':>9}{'GMAC/s':>8}",
    ]
    for row in found["lines"]:
        seconds, n_bytes, macs = row["ms"] / 1e3, row["bytes"], row["macs"]
        known = f"{n_bytes / 1e6:9.1f}{n_bytes / 1e9 / seconds:7.1f}" if n_bytes else " " * 16
        known += f"{macs / 1e9:9.3f}{macs / 1e9 / seconds:8.1f}" if macs else ""
        lines.append(f"{row['name']:<44}{row['calls']:>6}{row['ms']:>10.3f}{row['ms'] / total:>7.1%}{known}".rstrip())
    lines.append(f"without the timers: {found['ms_without_timers']:.2f} ms")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-d", type=int, default=0, metavar="N", help="positions in the KV cache before")
    parser.add_argument("-p", type=int, default=512, metavar="N", help="prompt tokens; 0: no prompt")
    parser.add_argument("-n", type=int, default=16, metavar="N", help="decoded tokens to take the median of; 0: none")
    parser.add_argument("--prompts", type=int, default=3, metavar="N", help="prompts to take the median of")
    parser.add_argument("-t", type=int, default=None, metavar="N", help="threads")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    wanted = [(1, args.n, 1)] * (args.n > 0) + [(args.p, args.prompts, args.p)] * (args.p > 0)
    found = []
    ctx = args.d + max(args.n, args.p) + 64
    with Model.open(args.model, threads=args.t, ctx=ctx, draft="off", tuning=False) as model:
        profiler = Profiler(model, args.d)
        for n, n_passes, n_ids in wanted:
            found.append(profile(profiler, n, n_passes, n_ids))
            if not args.json:
                print(format_profile(found[-1]), end="\n\n", flush=True)
        profiler.close()
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
