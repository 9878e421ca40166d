"""m2lite and llama.cpp on the same file, in turns: one process of each is a pair. Judges nothing, keeps every figure.

    python benchmarks/side_by_side.py slice.gguf --llama-bench PATH/llama-bench --label slice4 \\
        [-p 512] [-n 64] [-d 0,4096] [-t 2] [--pairs 7] [--llama-args "-fa 1"] [--ours-args "--kv q8_0"]

A pair is a row of the JSONL file, written when it is complete; which side goes first changes from pair to pair, and a
warm-up of each side is not counted. Started again with the same arguments, the script makes the pairs that are missing
and prints the summary: medians, and the median of the ratios within pairs with its interval (intervals.py). Pairs
during which other programs used more than a tenth of a core are kept, marked, and made again.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from intervals import median_interval, paired_ratio
from runs import (
    Json,
    RunError,
    Work,
    append_row,
    describe_machine,
    describe_versions,
    figures,
    identity,
    is_noisy,
    llama_argv,
    ours_argv,
    parse_llama,
    parse_ours,
    read_rows,
    read_through,
    run,
    series,
    wait_for_quiet,
)

BENCH = "side_by_side"
SIDES = ("ours", "llama")


def parse_counts(text: str) -> tuple[int, ...]:
    """0,4096 -> (0, 4096)."""
    try:
        counts = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,4096") from None
    if min(counts) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} holds a negative number")
    return counts


def add_arguments(parser: argparse.ArgumentParser, prompts: str, decodes: str) -> None:
    """What every comparison with llama-bench asks."""
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-bench", type=Path, required=True, metavar="PATH")
    parser.add_argument("-p", type=parse_counts, default=parse_counts(prompts), metavar="N,...", help="prompt tokens")
    parser.add_argument("-n", type=parse_counts, default=parse_counts(decodes), metavar="N,...", help="decoded tokens")
    parser.add_argument("-d", type=parse_counts, default=(0,), metavar="N,...", help="cached positions before a test")
    parser.add_argument("-t", type=int, default=2, metavar="N", help="threads of both")
    parser.add_argument("-r", type=int, default=3, metavar="N", help="repetitions within a process")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--llama-args", type=shlex.split, default=[], metavar="TEXT", help='such as "-fa 1"')
    parser.add_argument("--ours-args", type=shlex.split, default=[], metavar="TEXT")
    parser.add_argument("--label", required=True, help="what the rows are called in reports")
    parser.add_argument("--output", type=Path, default=Path("results.jsonl"))
    parser.add_argument("--patience", type=float, default=60.0, metavar="S", help="wait so long for a quiet machine")
    parser.add_argument("--allow-noise", action="store_true", help="measure, and count, while others are busy")


def work_of(args: argparse.Namespace) -> Work:
    return Work(
        model=args.model.resolve(),
        prompts=tuple(n for n in args.p if n),
        decodes=tuple(n for n in args.n if n),
        depths=args.d,
        threads=args.t,
        repeats=args.r,
        ours_args=tuple(args.ours_args),
        llama_args=tuple(args.llama_args),
    )


def runners(work: Work, llama_bench: Path) -> dict[str, Callable[[], Json]]:
    return {
        "ours": lambda: run(ours_argv(work), parse_ours),
        "llama": lambda: run(llama_argv(work, llama_bench), parse_llama),
    }


def make_pair(sides: dict[str, Callable[[], Json]], number: int, args: argparse.Namespace) -> dict[str, Json]:
    """Both runs, the second side first in every other pair."""
    runs: dict[str, Json] = {}
    for side in SIDES if number % 2 == 0 else SIDES[::-1]:
        if not wait_for_quiet(args.patience) and not args.allow_noise:
            raise RunError("Other programs are busy. Wait for them, or say --allow-noise.")
        runs[side] = sides[side]()
        shown = ", ".join(f"{t['kind']} {t['n']} at {t['depth']}: {t['tokens_per_s']:.2f}" for t in runs[side]["tests"])
        print(f"pair {number + 1}, {side}: {shown} tok/s; others {runs[side]['foreign_cores']:.2f} cores", flush=True)
    return runs


def measure(args: argparse.Namespace, work: Work) -> list[Json]:
    """The rows of this series, once there are enough."""
    llama_bench = args.llama_bench.resolve()
    versions, computer = describe_versions(llama_bench), describe_machine()
    wanted = identity(BENCH, args.label, work.as_json(), versions, computer)
    rows = series(read_rows(args.output), wanted, noisy=args.allow_noise)
    if len(rows) >= args.pairs:
        return rows
    print(f"{len(rows)} of {args.pairs} pairs are there; reading the file: {read_through(work.model):.1f} GB/s")
    for warm in runners(replace(work, repeats=1), llama_bench).values():
        warm()
    n_made = 0
    while len(rows) < args.pairs and n_made < 2 * args.pairs:
        runs = make_pair(runners(work, llama_bench), len(rows), args)
        n_made += 1
        row = {
            "identity": wanted,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions,
            "machine": computer,
            "noisy": is_noisy(runs.values()),
            "order": list(runs),
            "runs": runs,
        }
        append_row(args.output, row)
        rows = series(read_rows(args.output), wanted, noisy=args.allow_noise)
    return rows


def summary(rows: list[Json]) -> str:
    """One line per test."""
    ours, llama = figures(rows, "ours"), figures(rows, "llama")
    lines = [
        f"{rows[0]['identity']['label']}: {len(rows)} pairs, {sum(row['noisy'] for row in rows)} of them disturbed"
    ]
    for test in ours:
        if test not in llama:
            continue
        kind, depth, n = test
        ratio = paired_ratio(ours[test], llama[test])
        lines.append(
            f"{kind:<8}{n:>6} at depth {depth:>6,}: ours {median_interval(ours[test]).value:9.2f}, llama.cpp "
            f"{median_interval(llama[test]).value:9.2f} tok/s, ratio {ratio} ({ratio.method})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, prompts="512", decodes="64")
    args = parser.parse_args()
    work = work_of(args)
    if not work.prompts and not work.decodes:
        parser.error("-p or -n must ask for more than 0 tokens")
    try:
        rows = measure(args, work)
        if not rows:
            raise RunError("No pair was undisturbed.")
    except (RunError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    print(summary(rows))
    if len(rows) < args.pairs:
        print(f"only {len(rows)} of {args.pairs} pairs were undisturbed; start again for the rest", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
