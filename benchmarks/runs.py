"""One measured process of m2lite or llama-bench, what the machine did meanwhile, and the file of such runs.

Knows how both are called and what they print. A run is a dictionary as it goes into the JSONL file:
{"argv", "started", "seconds", "load_before", "foreign_cores", "stolen_cores", "tests": [{"kind", "n", "depth",
"tokens_per_s", "samples"}], "about": {...}}.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from m2lite import __version__, machine

ROOT = Path(__file__).resolve().parent.parent
QUIET_CORES = 0.1  # others may use that much of a core before a run counts as disturbed
PAGE = 64
_READ_BYTES = 16 << 20
_FLAGS = ("avx2", "avx512", "avx_vnni", "amx", "fma", "f16c", "asimddp", "i8mm", "sve")
_NOT_BUSY = ("idle", "iowait", "guest", "guest_nice")  # guests are counted within user

Json = dict[str, Any]


class RunError(Exception):
    """A program failed or printed something else than figures."""


@dataclass(frozen=True)
class Work:
    """What both programs do: every prompt and every number of decoded tokens at every depth, `repeats` times."""

    model: Path
    prompts: tuple[int, ...]
    decodes: tuple[int, ...]
    depths: tuple[int, ...]
    threads: int
    repeats: int
    ours_args: tuple[str, ...] = ()
    llama_args: tuple[str, ...] = ()
    ik_args: tuple[str, ...] = ()

    def as_json(self) -> Json:
        """Without the folder: the file is known by its name and size."""
        return asdict(self) | {"model": self.model.name, "model_bytes": self.model.stat().st_size}

    @property
    def ctx(self) -> int:
        """Positions that the longest test needs, in whole pages."""
        most = max(self.depths) + max([*self.prompts, *(n + 1 for n in self.decodes)])
        return -(-most // PAGE) * PAGE


def ours_argv(work: Work) -> list[str]:
    sizes = _sizes(work)
    fixed = ["-t", str(work.threads), "--ctx", str(work.ctx), "--tuning", "off", "--json", *work.ours_args]
    return [sys.executable, "-m", "m2lite", "bench", str(work.model), *sizes, *fixed]


def llama_argv(work: Work, llama_bench: Path) -> list[str]:
    return _bench_argv(work, llama_bench, work.llama_args)


def ik_argv(work: Work, llama_bench: Path) -> list[str]:
    """Of ik_llama.cpp, whose llama-bench fills no depth."""
    if work.depths != (0,):
        raise RunError("ik_llama.cpp's llama-bench has no -d: measure it at depth 0.")
    argv = _bench_argv(work, llama_bench, work.ik_args)
    at = argv.index("-d")
    return argv[:at] + argv[at + 2 :]


def _bench_argv(work: Work, program: Path, more: Sequence[str]) -> list[str]:
    return [str(program), "-m", str(work.model), *_sizes(work), "-t", str(work.threads), "-o", "json", *more]


def _sizes(work: Work) -> list[str]:
    lists = {"-p": work.prompts or (0,), "-n": work.decodes or (0,), "-d": work.depths, "-r": (work.repeats,)}
    return [part for flag, counts in lists.items() for part in (flag, ",".join(map(str, counts)))]


def parse_ours(text: str) -> tuple[list[Json], Json]:
    """(tests, what else is said) from `m2lite bench --json`."""
    found = _load(text, dict)
    found.pop("model", None)  # a path
    tests = [test for test in found.pop("tests", []) if test["samples"]]
    for test in tests:
        test["tokens_per_s"] = statistics.median(test["samples"])
    return tests, found


def parse_llama(text: str) -> tuple[list[Json], Json]:
    """The same from `llama-bench -o json`, whose tests are named by which of n_prompt and n_gen is not 0."""
    rows = _load(text, list)
    tests = []
    for row in rows:
        n_prompt, n_gen = row["n_prompt"], row["n_gen"]
        if bool(n_prompt) == bool(n_gen):
            raise RunError(f"llama-bench measured prompt and generation together: -pg has no counterpart ({row}).")
        kind, n = ("prefill", n_prompt) if n_prompt else ("decode", n_gen)
        samples = row["samples_ts"]
        found = {"kind": kind, "n": n, "depth": row.get("n_depth", 0), "samples": samples}
        tests.append(found | {"tokens_per_s": statistics.median(samples)})
    kept = ("build_commit", "build_number", "cpu_info", "backends", "model_type", "n_batch", "n_ubatch", "type_k",
            "type_v", "flash_attn", "load_mode", "repack")  # fmt: skip
    return tests, {name: rows[0][name] for name in kept if rows and name in rows[0]}


def _load(text: str, kind: type) -> Any:
    try:
        found = json.loads(text)
    except ValueError:
        raise RunError(f"Not JSON: {text[-300:]!r}") from None
    if not isinstance(found, kind) or not found:
        raise RunError(f"Not what was expected: {text[:300]!r}")
    return found


def run(argv: Sequence[str], parse: Any, spared: Iterable[psutil.Process] = ()) -> Json:
    """One process, its figures, and how much processor time others than it and `spared` took meanwhile."""
    spared = list(spared)
    started, load = datetime.now(UTC).isoformat(timespec="seconds"), os.getloadavg()[0]
    before = _times(spared)
    done = subprocess.run(
        argv, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, cwd=ROOT, check=False
    )
    after = _times(spared)
    if done.returncode:
        raise RunError(f"{shlex.join(argv)} ended with {done.returncode}: {done.stderr[-2000:].strip()}")
    tests, about = parse(done.stdout)
    wall, busy, own, stolen = (b - a for a, b in zip(before, after, strict=True))
    return {
        "argv": named(argv),
        "started": started,
        "seconds": round(wall, 3),
        "load_before": round(load, 2),
        "foreign_cores": round(max(0.0, busy - own) / wall, 3),
        "stolen_cores": round(stolen / wall, 3),
        "tests": tests,
        "about": about,
    }


def named(argv: Sequence[str]) -> list[str]:
    """The command as one types it: programs and files without the folders that only this machine has."""
    shown = ["m2lite", *argv[3:]] if list(argv[1:3]) == ["-m", "m2lite"] else argv
    return [Path(part).name if part.startswith("/") else part for part in shown]


def _times(spared: Sequence[psutil.Process]) -> tuple[float, float, float, float]:
    """(now, the machine's busy seconds, those of finished children and of `spared`, seconds stolen by other guests)."""
    times, own = psutil.cpu_times()._asdict(), os.times()
    stolen = times.pop("steal", 0.0)
    busy = sum(seconds for name, seconds in times.items() if name not in _NOT_BUSY)
    known = own.user + own.system + own.children_user + own.children_system
    known += sum(t.user + t.system for t in (p.cpu_times() for p in spared))
    return time.monotonic(), busy, known, stolen


def busy_cores(seconds: float = 1.0) -> float:
    """Cores that are busy now, while this process sleeps."""
    before = _times(())
    time.sleep(seconds)
    wall, busy, own, _ = (b - a for a, b in zip(before, _times(()), strict=True))
    return max(0.0, busy - own) / wall


def wait_for_quiet(patience_s: float) -> bool:
    """Whether others used less than QUIET_CORES at last, within `patience_s`."""
    deadline = time.monotonic() + patience_s
    while (busy := busy_cores()) > QUIET_CORES:
        if time.monotonic() > deadline:
            return False
        print(f"waiting: others use {busy:.2f} cores", file=sys.stderr)
        time.sleep(2)
    return True


def is_noisy(runs: Iterable[Json]) -> bool:
    return any(found["foreign_cores"] > QUIET_CORES for found in runs)


def read_through(path: Path) -> float:
    """Read the file once, so that the page cache holds what fits of it; GB/s."""
    started, n_bytes = time.perf_counter(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_READ_BYTES):
            n_bytes += len(chunk)
    return n_bytes / 1e9 / (time.perf_counter() - started)


def describe_machine() -> Json:
    return {
        "processor": machine.processor_name(),
        "flags": sorted(_processor_flags()),
        "cores": machine.n_usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    listed = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return {flag for flag in listed if flag.startswith(_FLAGS)}


def describe_versions(program: Path) -> Json:
    """`tree` names the code that is measured: it stays while only documents or benchmarks change."""
    changed = _git("status", "--porcelain", "--", "m2lite")
    return {
        "m2lite": __version__,
        "commit": _git("rev-parse", "HEAD"),
        "tree": _git("rev-parse", "HEAD:m2lite") + (" with changes" if changed else ""),
        "python": platform.python_version(),
        "numba": importlib.metadata.version("numba"),
        "numpy": importlib.metadata.version("numpy"),
        "llama.cpp": _llama_version(program),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _llama_version(program: Path) -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise RunError(f"{program} does not run: {error.strerror}.") from None
    lines = (done.stdout + done.stderr).splitlines()
    return next((line.removeprefix("version: ") for line in lines if line.startswith("version")), "unknown")


def identity(bench: str, label: str, work: Json, versions: Json, computer: Json) -> Json:
    """What rows must share to be of one series: the same work by the same code on the same machine."""
    found = {"bench": bench, "label": label, "work": work}
    found |= {name: versions[name] for name in ("tree", "python", "numba", "llama.cpp")}
    found |= {name: computer[name] for name in ("processor", "cores")}
    read_back: Json = json.loads(json.dumps(found))  # as it compares with what a file holds
    return read_back


def read_rows(path: Path) -> Iterator[Json]:
    """The rows of a JSONL file; a last line that a crash cut short is not one."""
    if not path.exists():
        return
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            yield json.loads(line)
        except ValueError:
            if number < len(lines):
                raise RunError(f"{path}, line {number} is not JSON.") from None


def drop(files: Sequence[Path]) -> None:
    """Out of the page cache."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # what is not on disk yet cannot be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def append_row(path: Path, row: Json) -> None:
    """On disk when this returns. A last line that a crash cut short is dropped first."""
    with path.open("a+b") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def series(rows: Iterable[Json], wanted: Json, *, noisy: bool = False) -> list[Json]:
    """The rows of one identity; disturbed ones only if asked for."""
    return [row for row in rows if row["identity"] == wanted and (noisy or not row["noisy"])]


def key_of(test: Json) -> tuple[str, int, int]:
    return test["kind"], test["depth"], test["n"]


def figures(rows: Sequence[Json], name: str) -> dict[tuple[str, int, int], list[float]]:
    """Tokens a second of every test, row by row, of the runs of that name."""
    found: dict[tuple[str, int, int], list[float]] = {}
    for row in rows:
        for test in row["runs"][name]["tests"]:
            found.setdefault(key_of(test), []).append(test["tokens_per_s"])
    return found
