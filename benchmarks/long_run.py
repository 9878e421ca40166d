"""Memory over a long chat and a long answer: python benchmarks/long_run.py [MODEL.gguf] [--turns 200] [--tokens 5000]

Of this process after each tenth: what the system counts as resident, and what Python's objects hold. The context
is filled once before, so that what grows is what should not. Without a model: the bundled one.
"""

from __future__ import annotations

import argparse
import gc
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from m2lite import Model, Sampling
from m2lite.dialogue.conversation import Conversation

GREEDY = Sampling(0, seed=0)


@dataclass(frozen=True)
class Point:
    """Memory after so many turns or tokens, in bytes."""

    n: int
    resident: int
    objects: int


def point(n: int) -> Point:
    gc.collect()
    return Point(n, psutil.Process().memory_info().rss, tracemalloc.get_traced_memory()[0])


def grown(points: list[Point], warm: int = 3) -> tuple[int, int]:
    """Bytes, resident and of objects, by which the last point is above the highest of the first `warm`."""
    first = points[:warm]
    return (
        points[-1].resident - max(p.resident for p in first),
        points[-1].objects - max(p.objects for p in first),
    )


def warm_up(model: Model, n_tokens: int) -> None:
    """What a context of so many tokens takes is memory now: pages, angles, buffers."""
    with model.session() as session:
        for _ in session.generate("Once upon a time\n", max_tokens=n_tokens, sampling=GREEDY, ignore_stop=True):
            pass


def chat(model: Model, n_turns: int) -> Iterator[Point]:
    """Turns of one chat; where the context is full, it begins anew."""
    with model.session() as session:
        conversation = Conversation(session, "Be brief.")
        for n in range(1, n_turns + 1):
            if session.n_free < 200:
                conversation.messages = conversation.messages[:1]
            list(conversation.ask(f"Hello, for the {n}th time", sampling=Sampling(seed=n), max_tokens=50))
            if n % max(1, n_turns // 10) == 0:
                yield point(n)


def answer(model: Model, n_tokens: int) -> Iterator[Point]:
    """One answer, or several where the context is shorter."""
    n = 0
    with model.session() as session:
        while n < n_tokens:
            session.set_tokens([])
            options: Any = {"max_tokens": n_tokens - n, "sampling": Sampling(seed=1), "ignore_stop": True}
            for _ in session.generate("Once upon a time\n", **options):
                n += 1
                if n % max(1, n_tokens // 10) == 0:
                    yield point(n)


def measure(run: Callable[[Model, int], Iterator[Point]], model: Model, n: int) -> list[Point]:
    warm_up(model, model.ctx - 32)
    tracemalloc.start()
    try:
        return list(run(model, n))
    finally:
        tracemalloc.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=5000)
    args = parser.parse_args()
    with Model.open(args.model) as model:
        for name, run, n in (("turns", chat, args.turns), ("tokens", answer, args.tokens)):
            points = measure(run, model, n)
            for p in points:
                print(f"{p.n:>6,} {name}: {p.resident / 1e6:8.2f} MB resident, {p.objects / 1e6:6.2f} MB of objects")
            resident, objects = grown(points)
            print(f"grown after the third: {resident / 1e3:,.0f} kB resident, {objects / 1e3:,.0f} kB of objects")


if __name__ == "__main__":
    main()
