"""What a person waits for, in seconds: python benchmarks/latency.py [-r 5] [--only NAME ...] [--json]

`at most` is what is aimed at on a machine with nothing else to do. The smallest of the repeats counts; of Ctrl-C the
largest, since every stop should be quick. Tests hold what makes these figures small: modules, calls, bytes, and order.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m2lite.drafting.ngram import PromptLookup
from m2lite.sampling.draw import Sampling, draw

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "m2lite"]
ANSWER = ["generate", "-p", "Hello", "--temp", "0", "--no-template"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "M2LITE_HEAT": "off", "M2LITE_TUNING": "off"}


def help_seconds() -> float:
    """Processor time of `m2lite --help`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*COMMAND, "--help"], env=environment(), check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_token_seconds() -> float:
    """From the start of the command to the first token of m2-tiny, with compiled kernels, and to its end."""
    began = time.perf_counter()
    subprocess.run([*COMMAND, *ANSWER, "-n", "1"], env=environment(), check=True, capture_output=True)
    return time.perf_counter() - began


def stop_seconds() -> float:
    """From SIGINT while m2-tiny answers to the end of the process, which takes its interpreter 0.2 s and more."""
    command = [*COMMAND, *ANSWER[:-1], "--think-budget", "100000", "-n", "100000"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        while b"loaded in" not in process.stderr.readline():
            pass
        time.sleep(random.uniform(0.0, 0.05))
        began = time.perf_counter()
        process.send_signal(signal.SIGINT)
        process.communicate()
        return time.perf_counter() - began


def draw_seconds() -> float:
    """A draw from 200,064 logits."""
    logits = np.random.default_rng(0).standard_normal(200_064).astype(np.float32) * 3
    draw(logits, Sampling(seed=0))
    took = []
    for position in range(20):
        began = time.perf_counter()
        draw(logits, Sampling(seed=0), 0, position)
        took.append(time.perf_counter() - began)
    return min(took)


def prompt_lookup_seconds() -> float:
    """Prompt lookup reads a prompt of 100,000 tokens."""
    tokens = np.random.default_rng(1).integers(0, 5000, 100_000).tolist()
    lookup = PromptLookup(110_000)
    began = time.perf_counter()
    lookup.follow(tokens)
    return time.perf_counter() - began


def lookup_step_seconds() -> float:
    """A token and its guesses, where tokens often repeat."""
    lookup, tokens = PromptLookup(6000), np.random.default_rng(1).integers(0, 40, 5000).tolist()
    began = time.perf_counter()
    for token in tokens:
        lookup.push([token])
        lookup.guess(7)
    return (time.perf_counter() - began) / len(tokens)


@dataclass(frozen=True)
class Figure:
    """One thing that is waited for."""

    name: str
    measure: Callable[[], float]
    most: float
    best: Callable[[list[float]], float] = min


FIGURES = (
    Figure("help", help_seconds, 0.3),
    Figure("first token of m2-tiny", first_token_seconds, 2.0),
    Figure("Ctrl-C while it answers", stop_seconds, 1.0, max),
    Figure("draw", draw_seconds, 0.002),
    Figure("lookup of a prompt", prompt_lookup_seconds, 0.5),
    Figure("lookup of a token", lookup_step_seconds, 50e-6),
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-r", "--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[f.name for f in FIGURES])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    found = {}
    for figure in FIGURES:
        if args.only is None or figure.name in args.only:
            took = [figure.measure() for _ in range(args.repeats)]
            found[figure.name] = {
                "seconds": figure.best(took), "median": statistics.median(took), "at_most": figure.most
            }  # fmt: skip
    if args.json:
        print(json.dumps(found))
        return
    for name, row in found.items():
        too_slow = "" if row["seconds"] <= row["at_most"] else "  slower than it should be"
        print(f"{name:<24} {row['seconds'] * 1000:10.3f} ms   at most {row['at_most'] * 1000:8.2f} ms{too_slow}")


if __name__ == "__main__":
    main()
