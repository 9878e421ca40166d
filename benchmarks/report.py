"""The table of RESULTS.md, from the JSONL files alone. Measures nothing; prose is left as it is.

    python benchmarks/report.py results.jsonl [more.jsonl] [--into RESULTS.md]

Only what stands between the two markers in RESULTS.md is replaced. Of every label the newest series counts (the same
work by the same code on the same machine), without the pairs that others disturbed. Targets are in targets.toml.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tomllib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from intervals import Median, median_interval, paired_ratio
from runs import Json, RunError, figures, key_of, read_rows

FOLDER = Path(__file__).resolve().parent
BEGIN, END = "<!-- table: written by report.py -->", "<!-- end of table -->"
Test = tuple[str, int, int]  # kind, depth, tokens
FLAGS = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp")  # of a processor, that decide which form is used
OTHERS = {"ratio": "llama", "ik": "ik"}  # what targets.toml calls the ratio, and the runs it is made with


def newest_series(rows: Iterable[Json]) -> dict[tuple[str, str], list[Json]]:
    """(bench, label) -> undisturbed rows of the identity whose last row is the newest."""
    groups: dict[str, list[Json]] = {}
    for row in rows:
        if not row["noisy"]:
            groups.setdefault(repr(sorted(row["identity"].items())), []).append(row)
    found: dict[tuple[str, str], list[Json]] = {}
    for group in sorted(groups.values(), key=lambda group: max(row["date"] for row in group)):
        found[group[0]["identity"]["bench"], group[0]["identity"]["label"]] = group
    return found


def find_target(targets: Sequence[Json], measure: str, label: str, test: Test) -> float | None:
    """What `measure` is held against, if anything."""
    kind, depth, n = test
    for target in targets:
        named = {"kind": kind, "depth": depth, "n": n}
        fits = all(target.get(name, value) == value for name, value in named.items())
        if measure in target and fits and fnmatchcase(label, target.get("label", "*")):
            return float(target[measure])
    return None


def verdict(found: Median, target: float | None, at_most: bool = False) -> str:
    """Met when the whole interval is on the right side, and is an exact one; open when only the median is."""
    if target is None:
        return ""
    sign = -1 if at_most else 1
    worst = found.high if at_most else found.low
    if found.method.startswith("exact") and sign * worst >= sign * target:
        return "yes"
    return "open" if sign * found.value >= sign * target else "no"


def say_test(test: Test) -> str:
    kind, depth, n = test
    what = f"prompt of {n:,}" if kind == "prefill" else f"decode of {n:,}"
    return f"{what} at depth {depth:,}" if depth else what


def commands(rows: Sequence[Json]) -> str:
    """What was run, ours first."""
    found = {f"`{shlex.join(run['argv'])}`" for run in rows[-1]["runs"].values()}
    return ", ".join(sorted(found, reverse=True))


def speed_table(label: str, rows: Sequence[Json], targets: Sequence[Json]) -> list[str]:
    """A row per test of one series, against both programs where both ran."""
    ours, lines = figures(rows, "ours"), []
    others = {measure: figures(rows, side) if side in rows[0]["runs"] else {} for measure, side in OTHERS.items()}
    for test in ours:
        cells = [label, say_test(test), f"{median_interval(ours[test]).value:.2f}"]
        for measure, speeds in others.items():
            if len(speeds.get(test, ())) != len(ours[test]):
                cells += [""] * 4
                continue
            ratio, target = paired_ratio(ours[test], speeds[test]), find_target(targets, measure, label, test)
            asked = f"{target:g}" if target is not None else ""
            cells += [f"{median_interval(speeds[test]).value:.2f}", str(ratio), asked, verdict(ratio, target)]
        if any(cells[3:]):
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def mapped_shares(rows: Sequence[Json]) -> dict[Test, list[float]]:
    """Bytes that our decode reads a second / what plain reading of the mapped file reaches in the same process."""
    found: dict[Test, list[float]] = {}
    for row in rows:
        run = row["runs"]["ours"]
        plain = run["about"].get("read_mapped_bytes_per_s")
        for test in run["tests"]:
            if plain and "bytes_per_token" in test:
                share = test["bytes_per_token"] * test["tokens_per_s"] / plain
                found.setdefault(key_of(test), []).append(share)
    return found


def mapped_table(label: str, rows: Sequence[Json], targets: Sequence[Json]) -> list[str]:
    lines = []
    for test, shares in mapped_shares(rows).items():
        found, target = median_interval(shares), find_target(targets, "mapped", label, test)
        asked = f"at least {target:g}" if target is not None else ""
        lines.append(f"| {label} | {say_test(test)} | {found} | {asked} | {verdict(found, target)} |")
    return lines


def busy_table(label: str, rows: Sequence[Json], targets: Sequence[Json]) -> list[str]:
    """What a foreign busy core costs each side."""
    lines = []
    names = (("m2lite", "ours"), ("llama.cpp", "llama"))
    for program, side in names:
        quiet, busy = figures(rows, f"{side} quiet"), figures(rows, f"{side} busy")
        for test in quiet:
            found = paired_ratio(quiet[test], busy[test])
            target = find_target(targets, "busy", label, test) if side == "ours" else None
            asked = f"at most {target:g}" if target is not None else ""
            speeds = [f"{median_interval(values[test]).value:.2f}" for values in (quiet, busy)]
            cells = (label, say_test(test), program, *speeds, str(found), asked,
                     verdict(found, target, at_most=True))  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return lines


TABLES = (
    (
        "side_by_side", speed_table, "Beside llama.cpp and ik_llama.cpp, tokens a second (medians)",
        "series | work | m2lite | llama.cpp | ratio, 95 % | target | met | ik_llama.cpp | ratio, 95 % | target | met",
    ),
    (
        "side_by_side", mapped_table, "What decoding reads, of plain reading of the mapped file",
        "series | work | share, 95 % | target | met",
    ),
    (
        "busy_core", busy_table, "With one core taken by another program, tokens a second (medians)",
        "series | work | program | quiet | busy | quiet / busy, 95 % | target | met",
    ),
)  # fmt: skip


def tables(found: dict[tuple[str, str], list[Json]], targets: Sequence[Json]) -> str:
    """Everything between the markers."""
    parts = []
    for bench, make, title, header in TABLES:
        lines = [line for (b, label), rows in found.items() if b == bench for line in make(label, rows, targets)]
        if lines:
            rule = "|".join("---" for _ in header.split("|"))
            parts.append("\n".join([f"### {title}", "", f"| {header} |", f"|{rule}|", *lines]))
    parts.append("\n".join(["### Machines and versions", "", *(say_series(rows) for rows in found.values())]))
    return "\n\n".join(parts)


def say_series(rows: Sequence[Json]) -> str:
    """Where the rows of one series come from."""
    versions, computer = rows[-1]["versions"], rows[-1]["machine"]
    dates = sorted({row["date"][:10] for row in rows})
    flags = " ".join(flag for flag in FLAGS if flag in computer["flags"])
    parts = [
        f"{len(rows)} pairs, {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}",
        f"{computer['processor']}, {computer['cores']} cores, {flags}",
        f"m2lite {versions['m2lite']} ({versions['commit'][:10]})",
        f"Python {versions['python']}, Numba {versions['numba']}",
        f"llama.cpp {versions['llama.cpp']}",
    ]
    ik = rows[-1]["runs"].get("ik")
    if ik is not None:
        parts.append(f"ik_llama.cpp {ik['about']['build_commit']}")
    parts.append(commands(rows))
    return f"* {rows[0]['identity']['label']}: {'; '.join(parts)}"


def replace_table(text: str, table: str, path: Path) -> str:
    """`text` with another table between its markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise RunError(f"{path} needs the lines {BEGIN!r} and {END!r}, once each, around the table.")
    head, tail = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, default=FOLDER / "RESULTS.md")
    parser.add_argument("--targets", type=Path, default=FOLDER / "targets.toml")
    args = parser.parse_args()
    try:
        found = newest_series(row for path in args.results for row in read_rows(path))
        if not found:
            raise RunError("The files hold no undisturbed pair.")
        targets = tomllib.loads(args.targets.read_text()).get("target", [])
        text = replace_table(args.into.read_text(), tables(found, targets), args.into)
        args.into.write_text(text)
    except (RunError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
