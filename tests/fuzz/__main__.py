"""`python -m tests.fuzz TARGET --seconds N --state DIR`: atheris on one target. Needs the extra `fuzz`.

DIR keeps what was found: corpus/, and a file for every finding with its traceback beside it; `running` is the last
input of a process that ended early. Findings of one place
count once, and the run goes on behind them. `--minimise` ends with a small set that covers the same in DIR/small.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import resource
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris  # type: ignore[import-not-found, unused-ignore]

from tests.fuzz.mutate import JSON, SIZED, mutate_json, mutate_sized

KEPT = Path(__file__).parent / "corpus"
_MEMORY_BYTES = 6 << 30
_SECONDS = 20  # of one input; a hang is a finding


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--minimise", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("error")  # as in the tests: a user would see them
    # Kernels are compiled from their own byte code: it stays as it is.
    with atheris.instrument_imports(
        include=["m2lite"],
        exclude=["m2lite.kernels", "m2lite.formats.kernels", "m2lite.quant.encoders", "m2lite.simd"],
    ):
        from tests.fuzz.seeds import SEEDS
        from tests.fuzz.targets import TARGETS

        function, seeds = TARGETS[options.target], SEEDS[options.target]()
        for seed in seeds:
            function(seed)  # imports what it needs
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    state = options.state / options.target
    corpus = state / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    kept = [str(KEPT / options.target)] if (KEPT / options.target).is_dir() else []
    arguments = [
        sys.argv[0],
        f"-timeout={_SECONDS}",
        "-rss_limit_mb=3000",
        "-max_len=100000",
        f"-artifact_prefix={state}/",
    ]
    if options.minimise:
        (state / "small").mkdir(exist_ok=True)
        arguments += ["-merge=1", str(state / "small"), str(corpus), *kept]
    else:
        arguments += [f"-max_total_time={options.seconds}", str(corpus), *kept]
    atheris.Setup(arguments, collecting(function, state), custom_mutator=mutator(options.target))
    atheris.Fuzz()


def collecting(function: Callable[[bytes], None], state: Path) -> Callable[[bytes], None]:
    """The target, whose findings are written down once for each place instead of ending the run."""
    known, running = set[str](), state / "running"

    def run(data: bytes) -> None:
        running.write_bytes(data)  # what ended the process, should it end
        try:
            function(data)
        except Exception as error:
            frames = [
                f for f in traceback.extract_tb(error.__traceback__) if "m2lite" in f.filename or "fuzz" in f.filename
            ]
            place = f"{type(error).__name__} {Path(frames[-1].filename).name}:{frames[-1].lineno}"
            if place in known:
                return
            known.add(place)
            name = "finding-" + hashlib.sha1(place.encode()).hexdigest()[:12]
            (state / name).write_bytes(data)
            (state / f"{name}.txt").write_text(place + "\n\n" + traceback.format_exc())
            print(f"FINDING {place}: {error!r:.200} -> {state / name}", flush=True)

    return run


def mutator(target: str) -> Callable[[bytes, int, int], bytes]:
    """Keeps the form of an input two times of three; else libFuzzer's own."""
    keep = mutate_json if target in JSON else mutate_sized if target in SIZED else None

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if keep is not None and rng.randrange(3):
            changed = data
            for _ in range(rng.choice([1, 1, 2, 4])):
                changed = keep(changed, rng) or changed
            if changed != data and len(changed) <= max_size:
                return changed
        return bytes(atheris.Mutate(data, len(data) + 1 + rng.randrange(64)))[:max_size]

    return mutate


main()
