"""What one core that another program keeps busy costs m2lite and llama.cpp in decoding. The rest is pairs.py's.

    python benchmarks/busy_core.py slice.gguf --llama-bench PATH/llama-bench --label busy [-n 64] [-t 2] [--pairs 7]

A round is four runs: both programs alone, and both while a loop of ordinary priority takes a core, which no affinity
ties down. Their order turns from round to round. The summary is the speed alone divided by the speed beside the loop,
within rounds.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil

from pairs import SIDES, Bench, Runs, main, parse_arguments, say_ratio
from runs import Json, figures

BENCH = "busy_core"
ROUND = ("ours quiet", "ours busy", "llama quiet", "llama busy")


@contextmanager
def busy_loop() -> Iterator[psutil.Process]:
    """A process that computes until it is ended."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


def order(number: int) -> Sequence[str]:
    """The runs of a round; every one is first in every fourth."""
    first = number % len(ROUND)
    return ROUND[first:] + ROUND[:first]


def make_round(bench: Bench, number: int) -> Runs:
    runs: Runs = {}
    for name in order(number):
        side, state = name.split()
        title = f"round {number + 1}, {name}"
        bench.wait()
        if state == "busy":
            with busy_loop() as process:
                runs[name] = bench.run(side, title, [process])
        else:
            runs[name] = bench.run(side, title)
    return runs


def summary(rows: list[Json]) -> str:
    lines = []
    for side in SIDES:
        quiet, busy = figures(rows, f"{side} quiet"), figures(rows, f"{side} busy")
        for test, alone in quiet.items():
            lines.append(f"{side:<6}{say_ratio(test, 'alone', alone, 'beside the loop', busy[test])}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(BENCH, *parse_arguments(__doc__, prompts="0", decodes="64"), make_round, summary)
