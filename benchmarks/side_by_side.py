"""m2lite and llama.cpp on the same file, in turns: one process of each is a pair. Judges nothing, keeps every figure.

    python benchmarks/side_by_side.py slice.gguf --llama-bench PATH/llama-bench --label slice4 \\
        [-p 512] [-n 64] [-d 0,4096] [-t 2] [--pairs 7] [--llama-args "-fa 1"] [--ours-args "--kv q8_0"]

A pair is a row of the JSONL file, written when it is complete; which side goes first changes from pair to pair, and a
warm-up of each side is not counted. Started again with the same arguments, the script makes the pairs that are missing
and prints the summary: medians, and the median of the ratios within pairs with its interval (intervals.py). Pairs
during which other programs used more than a tenth of a core are kept, marked, and made again.
"""

from __future__ import annotations

from pairs import SIDES, Bench, Runs, main, parse_arguments, say_ratio
from runs import Json, figures

BENCH = "side_by_side"


def make_pair(bench: Bench, number: int) -> Runs:
    """Both runs, the second side first in every other pair."""
    runs: Runs = {}
    for side in SIDES if number % 2 == 0 else SIDES[::-1]:
        bench.wait()
        runs[side] = bench.run(side, f"pair {number + 1}, {side}")
    return runs


def summary(rows: list[Json]) -> str:
    """One line per test that both sides made."""
    ours, llama = figures(rows, "ours"), figures(rows, "llama")
    return "\n".join(say_ratio(t, "ours", ours[t], "llama.cpp", llama[t]) for t in ours if t in llama)


if __name__ == "__main__":
    main(BENCH, *parse_arguments(__doc__, prompts="512", decodes="64"), make_pair, summary)
