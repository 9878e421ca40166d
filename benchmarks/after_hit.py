"""What a streamed model reads for the first tokens behind a beginning whose pages come from disk, in a new process.

    python benchmarks/after_hit.py [SLICE.gguf] [--share 0.3,0.5,0.7] [--tail 1,24] [-n 32] [--texts 12]

The experts of each text's beginning were chosen in another process: pages know them. Memory begins empty, or (the usual
case, "other") filled with the experts that another text used last, as the heat that is kept for the next start has it.
Then TAIL tokens are computed behind the beginning, and N are decoded. "without" is the same with what the pages know
left aside. m2-tiny reads its held-out text. A slice, whose random weights choose by lot, must have m2-tiny's number of
experts and is routed as m2-tiny is on these texts: bytes and waiting are those of true widths. Tokens are given.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m2lite import Model, Sampling
from m2lite.bench import random_ids
from m2lite.engine.request import Request
from m2lite.engine.thread import compute_thread
from m2lite.model.observer import Observer
from m2lite.model.stream import Traffic
from routing import Trace, record

TEXT = Path(__file__).parent.parent / "models" / "m2-tiny" / "heldout.txt"
N_BEFORE = 384  # tokens of a beginning: six pages
APART = 3000  # tokens from one text to the next


class Routed(Observer):
    """Chooses what a trace did."""

    def __init__(self, traces: Sequence[Trace]) -> None:
        self._traces, self.text = traces, 0

    def chosen(self, layer: int, start: int, ids: npt.NDArray[np.int32]) -> None:
        trace = self._traces[self.text]
        ids[:] = np.sort(trace[start : start + len(ids), layer % trace.shape[1]])


class Bench(NamedTuple):
    """A model that is streamed, texts as ids, and what routes it where the router does not."""

    model: Model
    texts: list[list[int]]
    routed: Routed | None

    def say(self, text: int, n_prompt: int, n: int) -> tuple[Traffic, Traffic]:
        """What the prompt reads, and what n tokens behind it do."""
        ids, stream = self.texts[text], self.model.runner.stream
        assert stream is not None
        if self.routed is not None:
            self.routed.text = text
        script, before, begun = ids[n_prompt : n_prompt + n], replace(stream.traffic), replace(stream.traffic)
        handle = self.model.submit(
            Request(prompt=ids[:n_prompt], script=script, max_tokens=n, sampling=Sampling(0, seed=0), draft="off")
        )
        for i, _ in enumerate(handle.events()):
            begun = replace(stream.traffic) if not i else begun
        return begun.since(before), stream.traffic.since(begun)

    def start(self, share: float, heat: npt.NDArray[np.float64] | None) -> None:
        """As a new process, with room for a share of the experts; those of `heat` have been read while it was idle."""
        stream, warmer = self.model.runner.stream, self.model._warmer
        assert stream is not None and warmer is not None
        warmer.wait()
        compute_thread().run(stream.drop)
        stream.traffic.dense_bytes = 0
        stream.ledger.warm(np.zeros(len(stream.ledger.sizes)) if heat is None else heat)
        compute_thread().run(partial(stream.resize, int(share * stream.ledger.sizes.sum())))
        if heat is not None:
            warmer.wake()
            warmer.wait()


def heat_of(bench: Bench, text: int) -> npt.NDArray[np.float64]:
    """What a process keeps that has computed the text's beginning, a third of it as an answer."""
    bench.start(1, None)
    bench.model.loop.forget()
    bench.say(text, N_BEFORE // 3 * 2, N_BEFORE // 3)
    stream = bench.model.runner.stream
    assert stream is not None
    return stream.ledger.heat


def measure(bench: Bench, share: float, tail: int, n: int, heats: Sequence[npt.NDArray[np.float64]] | None) -> str:
    loop, found = bench.model.loop, dict[str, tuple[Traffic, Traffic]]()
    loaded = loop.prefix_cache.loaded
    for text, name in product(range(len(bench.texts)), ("without", "with")):
        bench.start(1, None)
        bench.say(text, N_BEFORE + 1, 1)
        loop.save(bench.texts[text][:N_BEFORE])
        loop.forget()
        bench.start(share, None if heats is None else heats[(text + 1) % len(heats)])
        loop.prefix_cache.loaded = loaded if name == "with" else lambda timeline: None
        prompt, decoded = bench.say(text, N_BEFORE + tail, n)
        loop.prefix_cache.loaded = loaded
        sums = found.get(name, (Traffic(), Traffic()))
        found[name] = sums[0].plus(prompt), sums[1].plus(decoded)
    lines = []
    for name, (prompt, decoded) in found.items():
        lines.append(
            f"{share:>5.0%} {'nothing' if heats is None else 'other':<8}{tail:>5}  {name:<8}"
            f"{prompt.read_bytes / len(bench.texts) / 1e6:>11.2f}{decoded.read_bytes / len(bench.texts) / 1e6:>11.2f}"
            f"{decoded.hit_rate or 0:>8.1%}{(prompt.stall_s + decoded.stall_s) / len(bench.texts):>9.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slice", type=Path, nargs="?")
    parser.add_argument("--share", default="0.3,0.5,0.7", help="of the experts that there is room for")
    parser.add_argument("--tail", default="1,24")
    parser.add_argument("-n", type=int, default=32)
    parser.add_argument("--texts", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="after-hit-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # for pages and heat
        compare(args)


def compare(args: argparse.Namespace) -> None:
    tails = [int(x) for x in args.tail.split(",")]
    n_all = N_BEFORE + max(tails) + args.n + 1
    with Model.open(ctx=1024, load="direct", draft="off") as tiny:
        ids = tiny.encode_prompt(TEXT.read_text())
        texts = [ids[at : at + n_all] for at in range(0, args.texts * APART, APART)]
        traces = [record(tiny, text) for text in texts] if args.slice else []
    with Model.open(args.slice, ctx=1024, load="direct", draft="off", tuning=False) as model:
        assert model.runner.residency is not None and model.runner.pool.routing is not None
        model.runner.residency.fit = lambda: None  # type: ignore[method-assign]  # the share is given
        routed = Routed(traces) if args.slice else None
        if routed is not None:
            texts = [random_ids(model, n_all, seed=seed) for seed in range(args.texts)]
            model.runner.reroute(routed)
        model.use_disk()
        bench = Bench(model, texts, routed)
        heats = [heat_of(bench, text) for text in range(len(texts))]
        print(f"{len(texts)} texts; {args.n} tokens behind {N_BEFORE} and TAIL; MB read, and seconds waited, per text")
        print(" room memory   tail            prompt's   decoded's    hits   waited")
        for share, known, tail in product(args.share.split(","), (heats, None), tails):
            print(measure(bench, float(share), tail, args.n, known), flush=True)


if __name__ == "__main__":
    main()
