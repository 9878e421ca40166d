"""Rounds of runs in turns, on disk round by round, continued where they stopped; and the arguments that ask for them.

Knows that there are two sides, "ours" and "llama", or three with "ik"; what a round is made of, its caller says.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from intervals import median_interval, paired_ratio
from runs import (
    Json,
    RunError,
    Work,
    append_row,
    describe_machine,
    describe_versions,
    identity,
    ik_argv,
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

SIDES = ("ours", "llama")
Runs = dict[str, Json]  # name of the run -> run, in the order in which they were made


def parse_counts(text: str) -> tuple[int, ...]:
    """0,4096 -> (0, 4096)."""
    try:
        counts = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,4096") from None
    if min(counts) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} holds a negative number")
    return counts


def parse_arguments(
    description: str | None,
    prompts: str,
    decodes: str,
    program: str = "llama-bench",
    more: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> tuple[argparse.Namespace, Work]:
    """What every comparison with a program of llama.cpp's asks, and the work that it means."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument(f"--{program}", dest="program", type=Path, required=True, metavar="PATH")
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
    more(parser)
    args = parser.parse_args()
    work = Work(
        model=args.model.resolve(),
        prompts=tuple(n for n in args.p if n),
        decodes=tuple(n for n in args.n if n),
        depths=args.d,
        threads=args.t,
        repeats=args.r,
        ours_args=tuple(args.ours_args),
        llama_args=tuple(args.llama_args),
        ik_args=tuple(getattr(args, "ik_args", ())),
    )
    if not work.prompts and not work.decodes:
        parser.error("-p or -n must ask for more than 0 tokens")
    if not work.model.is_file():
        parser.error(f"{args.model} is not a file")
    return args, work


class Bench:
    """One series of rounds: `name` of the kind of benchmark, its arguments and its work."""

    def __init__(self, name: str, args: argparse.Namespace, work: Work) -> None:
        self.args, self.work, self.program = args, work, args.program.resolve()
        self.ik_program: Path | None = getattr(args, "ik_program", None)
        self.sides = SIDES if self.ik_program is None else (*SIDES, "ik")
        self.versions, self.computer = describe_versions(self.program), describe_machine()
        self.identity = identity(name, args.label, work.as_json(), self.versions, self.computer)

    def rows(self) -> list[Json]:
        """The rounds that are there and count."""
        return series(read_rows(self.args.output), self.identity, noisy=self.args.allow_noise)

    def run(self, side: str, title: str, spared: Sequence[psutil.Process] = ()) -> Json:
        """One run of one side, when the machine is quiet but for `spared`."""
        argv, parse = self.side(side, self.work)
        found = run(argv, parse, spared)
        shown = ", ".join(f"{t['kind']} {t['n']} at {t['depth']}: {t['tokens_per_s']:.2f}" for t in found["tests"])
        print(f"{title}: {shown} tok/s; others {found['foreign_cores']:.2f} cores", flush=True)
        return found

    def wait(self) -> None:
        """Until the page cache holds the file and others are quiet; refuses when they stay busy.

        Some systems drop a file that nobody reads for a minute, as happens while the other side runs on its own copy.
        """
        read_through(self.work.model)
        if not wait_for_quiet(self.args.patience) and not self.args.allow_noise:
            raise RunError("Other programs are busy. Wait for them, or say --allow-noise.")

    def side(self, side: str, work: Work) -> tuple[list[str], Callable[[str], object]]:
        """A side's command for this work, and what makes figures of its output."""
        if side == "ours":
            return ours_argv(work), parse_ours
        if side == "ik" and self.ik_program is not None:
            return ik_argv(work, self.ik_program.resolve()), parse_llama
        return llama_argv(work, self.program), parse_llama

    def collect(self, make_round: Callable[[int], Runs]) -> list[Json]:
        """The rows of this series, made where they are missing: make_round(how many there are) is one of them."""
        rows, wanted = self.rows(), self.args.pairs
        if len(rows) >= wanted:
            return rows
        print(f"{len(rows)} of {wanted} rounds are there", flush=True)
        self.warm_up()
        for _ in range(2 * wanted):  # as many as wanted may be disturbed
            if len(rows) >= wanted:
                break
            append_row(self.args.output, self._row(make_round(len(rows))))
            rows = self.rows()
        return rows

    def warm_up(self) -> None:
        """A run of each side that is not counted."""
        print(f"read the file at {read_through(self.work.model):.1f} GB/s, warming up", flush=True)
        for side in self.sides:
            run(*self.side(side, replace(self.work, repeats=1)))

    def _row(self, runs: Runs) -> Json:
        return {
            "identity": self.identity,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": self.versions,
            "machine": self.computer,
            "noisy": is_noisy(runs.values()),
            "order": list(runs),
            "runs": runs,
        }


def say_ratio(test: tuple[str, int, int], first: str, a: Sequence[float], second: str, b: Sequence[float]) -> str:
    """One test's speeds under two names: medians, and the median of their ratios within rounds."""
    (kind, depth, n), ratio = test, paired_ratio(a, b)
    speeds = f"{first} {median_interval(a).value:9.2f}, {second} {median_interval(b).value:9.2f} tok/s"
    return f"{kind:<8}{n:>6} at depth {depth:>6,}: {speeds}, ratio {ratio} ({ratio.method})"


def main(
    name: str,
    args: argparse.Namespace,
    work: Work,
    make: Callable[[Bench, int], Runs],
    say: Callable[[list[Json]], str],
    kind: type[Bench] = Bench,
) -> None:
    """Collect, print the summary, and exit with 1 when rounds are missing."""
    try:
        bench = kind(name, args, work)
        rows = bench.collect(lambda number: make(bench, number))
    except (RunError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    if rows:
        n_noisy = sum(row["noisy"] for row in rows)
        print(f"{args.label}: {len(rows)} rounds, {n_noisy} of them disturbed", say(rows), sep="\n")
    if len(rows) < args.pairs:
        print(f"only {len(rows)} of {args.pairs} rounds were undisturbed; start again for the rest", file=sys.stderr)
        raise SystemExit(1)
