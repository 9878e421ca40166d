"""Tokens a second of answers side by side, by their number: m2lite's batch beside llama-batched-bench on one file.

    python benchmarks/batch_decode.py SLICE [--llama llama-batched-bench] [-b 1,4,8,16,32,64] [-p 64] [-n 32] [-r 3]
        [--ram 5400m] [--output benchmarks/batch.jsonl] [--since "2026-11-28"] [--plot benchmarks/batch.png]

Prompts of random ids, none of which begins as another. One program at a time, in turn for each number, `-r` times;
figures are medians, of the ratios too.
With --since, runs with the same prompts and answers that --output has from that time on are counted, too.
Plain reading of the mapped file is timed before each of m2lite's turns: the memory of a shared machine is not always as
fast, and it is what bounds m2lite's steps.
Of m2lite, decoding is timed from the first step in which every answer draws to the last; of llama-batched-bench its own
S_TG. Prompts are timed from the first call to the last that reads one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from m2lite import Model
from m2lite.batch.measure import measure_speeds
from m2lite.bench import read_mapped
from m2lite.settings import parse_count

Results = dict[str, dict[int, list[dict[str, float]]]]  # by program and answers at once: turns


def ours(model: Model, n_at_once: int, n_prompt: int, n_tokens: int, seed: int) -> dict[str, float]:
    memory = 0.0 if model.runner.stream is not None else read_mapped(model)["read_mapped_bytes_per_s"]
    speeds = measure_speeds(model, n_at_once, n_prompt, n_tokens, seed)
    return {
        "tg": speeds.drawing, "pp": speeds.reading, "experts": speeds.experts, "read": speeds.read_bytes,
        "memory": memory,
    }  # fmt: skip


def theirs(command: str, path: Path, n: int, n_prompt: int, n_tokens: int) -> dict[str, float]:
    done = subprocess.run(
        [
            command, "-m", str(path), "-npp", str(n_prompt), "-ntg", str(n_tokens), "-npl", str(n),
            "-c", str(n * (n_prompt + n_tokens) + 256), "-t", "2", "-tb", "2", "--output-format", "jsonl",
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    row = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return {"tg": row["speed_tg"], "pp": row["speed_pp"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama", metavar="llama-batched-bench")
    parser.add_argument("-b", default="1,4,8,16,32,64")
    parser.add_argument("-p", type=int, default=64)
    parser.add_argument("-n", type=int, default=32)
    parser.add_argument("-r", type=int, default=3)
    parser.add_argument("--ram", type=parse_count, help="stream the model within so much memory, such as 5400m")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--since", metavar="TIME", help="report with the runs that --output has since then")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    counts = [int(n) for n in options.b.split(",")]
    results: Results = {"m2lite": {n: [] for n in counts}}
    if options.llama:
        results["llama.cpp"] = {n: [] for n in counts}
    # Room for what the first answers draw until the last prompt is read.
    ctx = -(-(options.p + options.n + 64 + max(counts) * options.p // 128) // 64) * 64
    pool = max(counts) * ctx
    with Model.open(options.model, draft="off", ctx=ctx, pool=pool, ram=options.ram, tuning=False) as model:
        model.wait_mapped()
        ours(model, 4, options.p, 4, 99)
        for repeat in range(options.r):
            for n in counts:  # one after the other, since the machine drifts
                results["m2lite"][n].append(ours(model, n, options.p, options.n, repeat))
                if options.llama:
                    row = theirs(options.llama, options.model, n, options.p, options.n)
                    results["llama.cpp"][n].append(row)
            report(results, counts)
    if options.output:
        row = {"model": options.model.name, "prompt": options.p, "tokens": options.n, "results": results}
        with options.output.open("a") as file:
            file.write(json.dumps(row | {"time": time.strftime("%Y-%m-%d %H:%M")}) + "\n")
        if options.since:
            results = gathered(options.output, row, options.since)
            counts = sorted(results["m2lite"])
            report(results, counts)
    if options.plot:
        plot(results, counts, options.plot)


def gathered(path: Path, like: dict[str, Any], since: str) -> Results:
    """The turns of all runs beside llama.cpp since then that were as `like` is."""
    out: Results = {"m2lite": {}, "llama.cpp": {}}
    for row in map(json.loads, path.read_text().splitlines()):
        is_alike = all(row[key] == like[key] for key in ("model", "prompt", "tokens"))
        if row["time"] < since or not is_alike or "llama.cpp" not in row["results"]:
            continue
        for name, turns in row["results"].items():
            for n, each in turns.items():
                out[name].setdefault(int(n), []).extend(each)
    return out


def median(rows: list[dict[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def report(results: Results, counts: list[int]) -> None:
    print(
        "| at once | turns | m2lite, tok/s | experts a token | llama.cpp, tok/s | ratio (from - to) | prompts: m2lite "
        "| llama.cpp | plain reading, GB/s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for n in counts:
        us, them = results["m2lite"][n], results.get("llama.cpp", {}).get(n)
        cells = [str(n), str(len(us)), f"{median(us, 'tg'):.1f}", f"{median(us, 'experts'):.2f}"]
        if them:
            ratios = [a["tg"] / b["tg"] for a, b in zip(us, them, strict=True)]
            cells += [
                f"{median(them, 'tg'):.1f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})",
                f"{median(us, 'pp'):.0f}",
                f"{median(them, 'pp'):.0f}",
            ]
        else:
            cells += ["", "", f"{median(us, 'pp'):.0f}", ""]
        speeds = [row["memory"] / 1e9 for row in us]
        cells.append(f"{min(speeds):.0f} - {max(speeds):.0f}" if max(speeds) else "")
        if median(us, "read"):
            cells.append(f"{median(us, 'read') / 1e6:.0f} MB read a token")
        print(f"| {' | '.join(cells)} |", flush=True)


def plot(results: Results, counts: list[int], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, rows in results.items():
        axes.plot(counts, [median(rows[n], "tg") for n in counts], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("answers at once")
    axes.set_ylabel("tokens/s in all")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
