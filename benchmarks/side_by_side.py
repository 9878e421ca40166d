"""m2lite beside llama.cpp, and ik_llama.cpp where it is named, on the same file, in turns. Keeps every figure.

    python benchmarks/side_by_side.py slice.gguf --llama-bench PATH/llama-bench --label slice4 \\
        [-p 512] [-n 64] [-d 0,4096] [-t 2] [--pairs 7] [--llama-args "-fa 1"] [--ours-args "--kv q8_0"]
        [--ik-bench PATH/llama-bench] [--ik-args "-rtr 1"]

A pair, one process of each, is a row of the JSONL file, written when it is complete; which side goes first changes from
pair to pair, and a warm-up of each side is not counted. Started again with the same arguments, the script makes the
pairs that are missing and prints the summary: medians, and the median of the ratios within pairs with its interval
(intervals.py). Pairs during which other programs used more than a tenth of a core are kept, marked, and made again.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from pairs import Bench, Runs, main, parse_arguments, say_ratio
from runs import Json, figures

BENCH = "side_by_side"
NAMES = {"llama": "llama.cpp", "ik": "ik_llama.cpp"}


def ask_for_ik(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ik-bench", dest="ik_program", type=Path, metavar="PATH", help="llama-bench of ik_llama.cpp")
    parser.add_argument("--ik-args", type=shlex.split, default=["-rtr", "1"], metavar="TEXT")


def make_pair(bench: Bench, number: int) -> Runs:
    """A run of each side; another one is first in the next."""
    runs: Runs = {}
    first = number % len(bench.sides)
    for side in bench.sides[first:] + bench.sides[:first]:
        bench.wait()
        runs[side] = bench.run(side, f"pair {number + 1}, {side}")
    return runs


def summary(rows: list[Json]) -> str:
    """One line per test that both sides made."""
    ours = figures(rows, "ours")
    others = {name: figures(rows, side) for side, name in NAMES.items() if side in rows[0]["runs"]}
    return "\n".join(
        say_ratio(t, "ours", ours[t], name, found[t]) for t in ours for name, found in others.items() if t in found
    )


if __name__ == "__main__":
    args, work = parse_arguments(__doc__, prompts="512", decodes="64", more=ask_for_ik)
    main(BENCH, args, work, make_pair, summary)
