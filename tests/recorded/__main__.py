"""`python -m tests.recorded`: writes what is not recorded yet, of runs and of logits; `--again NAME`: runs, anew."""

from __future__ import annotations

import argparse
import fnmatch
import os
import subprocess
import sys
import tempfile
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

from m2lite import UsageError
from tests.recorded import doors
from tests.recorded.cases import FOUND, make_cases
from tests.recorded.logits import hash_all
from tests.recorded.models import hash_weights, write_models
from tests.recorded.record import LOGITS, RUNS, Case, Runs, Said, options_of, read_json, write_logits, write_runs


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.recorded", description=__doc__)
    parser.add_argument("--again", nargs="*", default=[], metavar="NAME", help="names of runs (* and ? count)")
    again = parser.parse_args().again
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_models(folder)
        record_logits(paths)
        record_runs(paths, folder, again)


def record_logits(paths: dict[str, Path]) -> None:
    from m2lite.model.numerics import NUMERICS_VERSION

    table = read_json(LOGITS)
    if str(NUMERICS_VERSION) not in table:
        write_logits(table | {str(NUMERICS_VERSION): hash_all(paths)})


def record_runs(paths: dict[str, Path], folder: Path, again: list[str]) -> None:
    record: Runs = read_json(RUNS) or {"models": {}, "runs": {}}  # type: ignore[assignment]
    for model, path in paths.items():
        weights = hash_weights(path)
        if record["models"].get(model, weights) != weights and "*" not in again:
            sys.exit(f"{model} is another than the one that was recorded. Record everything again: --again '*'.")
        record["models"][model] = weights
    for name in make_cases():
        if name in record["runs"] and not any(fnmatch.fnmatch(name, pattern) for pattern in again):
            continue
        known = [record["runs"][name]["case"]] if name in record["runs"] else []
        case, said, happened = find(name, known, paths, folder)
        if is_cut(case):
            happened -= {"drafts right"}
        record["runs"][name] = {"case": case, "said": said, "happened": sorted(happened)}
        print(f"{name}: {sum(len(each.get('ids', ())) for each in said)} ids", *sorted(happened), sep=", ", flush=True)
    write_runs(record)


def find(name: str, known: list[Case], paths: dict[str, Path], folder: Path) -> tuple[Case, list[Said], set[str]]:
    """The case as it is known, else with the first values of its factors with which it can be recorded."""
    for case in chain(known, (make_cases(n)[name] for n in range(40))):
        try:
            case = resolve(case, paths, folder)
            said, happened = run(case, paths, folder)
        except (UsageError, NothingToStopAt) as error:  # what was to be continued is complete; there is no text
            why: list[object] = [error]
        else:
            why = [found for found in map(why_not, options_of(case), said) if found]
            if not why:
                return case, said, happened
        print(f"{name}: not with these values: {why[0]}")
    raise SystemExit(f"{name} cannot be recorded.")


def is_cut(case: Case) -> bool:
    """Whether a chat ends an answer from outside: how many drafts were verified past that end is the clock's to say."""
    is_chat = case["door"] in ("chat", "generate")
    cuts = ("stop_texts", "think_tokens", "stop_after")
    return is_chat and any(
        cut in place for step in case["steps"] for place in (step, step.get("options", {})) for cut in cuts
    )


def why_not(options: dict[str, Any], said: Said) -> str | None:
    """Why an answer cannot be recorded: it shows a fault of today's, or does not do what the case is for."""
    n = said["usage"][1] if "usage" in said else len(said["ids"])
    most = options.get("max_tokens")
    if most is not None and (n > most or (options.get("think_tokens") is not None and n > most - 8)):
        return "max_tokens behind thinking that was closed"
    if "stop_texts" in options and said["finish"] != "stop":
        return "its stop text did not come"
    return None


def run(case: Case, paths: dict[str, Path], folder: Path) -> tuple[list[Said], set[str]]:
    with tempfile.TemporaryDirectory(dir=folder) as own:
        return doors.run(case, paths[case["model"]], Path(own), command)


def command(*arguments: Any) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("M2LITE_") or "CACHE" in name}
    env |= {"M2LITE_HEAT": "off", "XDG_CONFIG_HOME": os.devnull}
    done = subprocess.run(
        [sys.executable, "-m", "m2lite", *map(str, arguments)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def resolve(case: Case, paths: dict[str, Path], folder: Path) -> Case:
    """The case with stop texts that it really says, taken one after the other: a later answer follows an earlier."""
    case = deepcopy(case)
    for n, options in enumerate(options_of(case)):
        if options.get("stop_texts") == FOUND:
            probe = deepcopy(case)
            for other in options_of(probe)[n:]:
                if other.pop("stop_texts", None):
                    other["max_tokens"] = 60
            options["stop_texts"] = [choose_stop_text(run(probe, paths, folder)[0][n]["text"][1])]
    return case


def choose_stop_text(content: str) -> str:
    """Printable characters of the content, whole ones, and not those that it begins with."""
    most = max(1, len(content) * 2 // 3)
    for length in (3, 2, 1):
        for at in range(most - length, length - 1, -1):
            text = content[at : at + length]
            is_whole = text.isprintable() and text.strip() == text and "\ufffd" not in text
            if is_whole and content.index(text) >= 3:
                return text
    raise NothingToStopAt(f"there is nothing to stop at in {content!r}")


class NothingToStopAt(Exception):
    """The content is too short, or has no character that can be typed."""


main()
