"""m2lite and llama.cpp on a file that is larger than the memory they may use, in turns. The rest is pairs.py's.

    python benchmarks/beyond_ram.py slice.gguf --llama-bench PATH/llama-bench --limit 5.85e9 --label beyond \\
        (--start PATH/llama-completion | -p 512 | -n 64 -d 64) [-r 2] [--pairs 5] [--ours-args "--load direct"]

Both run in a memory cgroup of that limit (which root can make; without --limit, in the machine's memory), and before
each run the page cache forgets the file. With --start a run is from the start of the process to the end of one that
writes 32 tokens behind a few: loading, the first token and the reads of a cold start are in it. Else the programs'
own figures count, which begin when a model is loaded and warm. llama.cpp gets `--repack 0 -lm mmap`: by default it
refuses. What the disk delivered while a test ran is read from the system, for both sides alike.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from pairs import SIDES, Bench, main, parse_arguments, say_ratio
from runs import Json, RunError, Work, drop, figures, run, wait_for_quiet
from side_by_side import make_pair

BENCH = "beyond_ram"
N_START = 32
PROMPT = "Hello there, my friend"
SAMPLE_S = 0.1
JOIN = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.execvp(sys.argv[2], sys.argv[2:])"


class BeyondBench(Bench):
    """Runs in a group with a limit, each with the file out of the page cache."""

    def __init__(self, name: str, args: argparse.Namespace, work: Work) -> None:
        super().__init__(name, args, work)
        self.identity["work"] |= {"limit": args.limit, "start": args.start is not None}

    def side(self, side: str, work: Work) -> tuple[list[str], Callable[[str], object]]:
        if self.args.start is not None:
            return [*self._joined(), *self._start_argv(side, work)], lambda text: ([], {})
        argv, parse = super().side(side, work)
        fixed = ["--repack", "0", "-lm", "mmap"] if side == "llama" else ["--rotating"]
        return [*self._joined(), *argv, *fixed], parse

    def _start_argv(self, side: str, work: Work) -> list[str]:
        if side == "ours":
            fixed = ["-p", PROMPT, "--no-template", "--json", "--seed", "1", "--tuning", "off", *work.ours_args]
            sizes = ["--ctx", "1024", "-n", str(N_START), "-t", str(work.threads)]
            return [sys.executable, "-m", "m2lite", "generate", str(work.model), *sizes, *fixed]
        fixed = ["-p", PROMPT, "-no-cnv", "--simple-io", "--ignore-eos", "--seed", "1", "--no-repack", "-lm", "mmap"]
        sizes = ["-c", "1024", "-n", str(N_START), "-t", str(work.threads)]
        return [str(self.args.start.resolve()), "-m", str(work.model), *sizes, *fixed, *work.llama_args]

    def _joined(self) -> list[str]:
        """What puts a command into the group with the limit."""
        if self.args.limit is None:
            return []
        group = Path("/sys/fs/cgroup/memory/m2lite-bench")  # version 1
        name, limit = "memory.limit_in_bytes", str(int(self.args.limit))
        if not group.parent.is_dir():
            group, name = Path("/sys/fs/cgroup/m2lite-bench"), "memory.max"
        try:
            group.mkdir(exist_ok=True)
            (group / name).write_text(limit)
        except OSError as error:
            raise RunError(f"{group}: no limit can be set: {error.strerror}.") from None
        return [sys.executable, "-c", JOIN, str(group / "cgroup.procs")]

    def wait(self) -> None:
        """Until the file is out of the page cache, and others are quiet."""
        drop([self.work.model])
        wait_for_quiet(self.args.patience)

    def warm_up(self) -> None:
        """Every run begins cold."""

    def run(self, side: str, title: str, spared: Sequence[psutil.Process] = ()) -> Json:
        argv, parse = self.side(side, self.work)
        with disk_reads(self.work.model) as reads:
            found = run(argv, parse, spared)
        found["argv"] = found["argv"][3 if self.args.limit is None else 4 :]
        if self.args.start is not None:
            speed = N_START / found["seconds"]
            found["tests"] = [{"kind": "start", "n": N_START, "depth": 0, "samples": [speed], "tokens_per_s": speed}]
            n_bytes = reads[-1][1] - reads[0][1]
            found["about"] = {"read_bytes": n_bytes}
        else:
            [test] = found["tests"]
            window = sum(test["n"] / speed for speed in test["samples"])
            since = next(n for at, n in reads if at >= reads[-1][0] - window)
            test["disk_bytes_per_token"] = (reads[-1][1] - since) / test["n"] / len(test["samples"])
        shown = ", ".join(
            f"{t['kind']} {t['n']} at {t['depth']}: {t['tokens_per_s']:.2f} tok/s" for t in found["tests"]
        )
        print(f"{title}: {shown} in {found['seconds']:.1f} s", flush=True)
        return found


@contextmanager
def disk_reads(path: Path) -> Iterator[list[tuple[float, int]]]:
    """(time, bytes that the file's disk has delivered), ten times a second."""
    device = path.stat().st_dev
    stat = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    found: list[tuple[float, int]] = []
    ended = threading.Event()

    def sample() -> None:
        while True:
            found.append((time.perf_counter(), 512 * int(stat.read_text().split()[2])))
            if ended.wait(SAMPLE_S):
                return

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        found.append((time.perf_counter(), 512 * int(stat.read_text().split()[2])))


def summary(rows: list[Json]) -> str:
    """One line per test, and what either side read for it."""
    ours, llama = figures(rows, "ours"), figures(rows, "llama")
    lines = [say_ratio(t, "ours", ours[t], "llama.cpp", llama[t]) for t in ours if t in llama]
    for side in SIDES:
        tests = [row["runs"][side]["tests"][0] for row in rows]
        if all("disk_bytes_per_token" in test for test in tests):
            mean = sum(test["disk_bytes_per_token"] for test in tests) / len(tests)
            lines.append(f"{side}: the disk delivered {mean / 1e6:,.0f} MB a token")
        if all("hit_rate" in test for test in tests):
            hits, read, stall, disk = (
                sum(test.get(name, 0) for test in tests) / len(tests)
                for name in ("hit_rate", "read_bytes_per_token", "stall_s_per_token", "disk_bytes_per_s")
            )
            lines.append(
                f"{side}: {hits:.0%} hits, {read / 1e6:,.0f} MB of experts a token at "
                f"{read / max(stall, 1e-9) / 1e9:.2f} GB/s of waiting; the disk gives {disk / 1e9:.2f}"
            )
    return "\n".join(lines)


def more_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=float, metavar="BYTES", help="of memory, for either side")
    parser.add_argument("--start", type=Path, metavar="PATH", help="measure the start, against this llama-completion")


if __name__ == "__main__":
    main(
        BENCH,
        *parse_arguments(__doc__, prompts="0", decodes="64", more=more_arguments),
        make_pair,
        summary,
        BeyondBench,
    )
