"""What prefill and decode cost on this machine, next to its read bandwidth. Measures, decides nothing."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from m2lite import __version__, machine
from m2lite.engine.model import Engine
from m2lite.engine.runner import Stop
from m2lite.engine.session import Session
from m2lite.engine.thread import compute_thread
from m2lite.model.cache import PAGE
from m2lite.model.stream import Traffic
from m2lite.sampling.draw import Sampling
from m2lite.shown import shown
from m2lite.storage.reads import Range, measure_disk
from m2lite.system.byte_units import format_bytes, format_speed

_READ_BYTES = 512 * 1024**2
_MAPPED_BYTES = 2 * 1024**3
_DISK_S = 3.0  # for which the disk is measured
_WARM_ROWS = 512  # of a prompt, before it is timed
_N_COMPUTED = 4 * PAGE  # positions of a depth that are really computed; the rest are copies of their pages
FILLED = f"the first {_N_COMPUTED} positions of a depth are computed, the others are copies of their pages"


@dataclass(frozen=True)
class Test:
    """`n` tokens in as few calls as the engine makes of a prompt, or one by one, behind `depth` cached positions."""

    kind: str  # "prefill" or "decode"
    n: int
    depth: int

    @property
    def n_positions(self) -> int:
        return self.depth + self.n + int(self.kind == "decode")  # decoding starts from a token that is not counted


def plan_tests(prompts: Sequence[int], decodes: Sequence[int], depths: Sequence[int]) -> list[Test]:
    """Every prompt and every number of decoded tokens at every depth; 0 tokens are no test."""
    return [
        Test(kind, n, depth)
        for depth in depths
        for kind, counts in (("prefill", prompts), ("decode", decodes))
        for n in counts
        if n
    ]


def run_bench(
    model: Engine,
    tests: Sequence[Test],
    repeats: int,
    *,
    note: Callable[[str], None],
    stop: Stop,
    cold: bool = False,
    rotating: bool = False,
) -> dict[str, Any]:
    """What every test reached in `repeats` runs, or in fewer when `stop` says so.

    Stop tokens are decoded through, and tokens are sampled, so that the routing is as varied as that of text; what
    sampling costs is in the figures. Every test runs once before it is timed. The file's pages are mapped before, as
    they are in any process that has run for a while. `cold` drops the file from memory before every timed run;
    `rotating` gives every run other tokens, so that a model larger than its memory meets other experts.
    """
    model.wait_mapped(stop)
    with model.session() as session:
        session.check_room(max(test.n_positions for test in tests))
    results = []
    for depth in dict.fromkeys(test.depth for test in tests):
        with model.session() as session:
            session.set_tokens(fill(model, depth))
            for test in (test for test in tests if test.depth == depth):
                with _logged(model) as log:
                    samples, traffic = _run(session, test, repeats, cold, rotating, note, stop)
                results.append(_result(model, test, samples) | _traffic(model, traffic, test, log))
    return {
        "model": str(model.path),
        "size_bytes": model.gguf.size_bytes,
        "repeats": repeats,
        "tests": results,
        "filled": FILLED,
        "cold": cold,
        "rotating": rotating,
        "weight_bytes_per_token": bytes_per_token(model),
        "kv_bytes_per_position": model.kv_bytes_per_position,
        **_read_speeds(model),
        "kv": model.kv,
        "threads": model.n_threads,
        "layer": model.runner.layer,
        "processor": machine.processor_name(),
        "cores": machine.n_usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "version": __version__,
    }


def random_ids(model: Engine, n: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, model.config.n_vocab, n)]


def fill(model: Engine, depth: int) -> list[int]:
    """Ids of which `depth` positions are in the prefix cache: FILLED says how.

    Copies, not shared pages: attention has to read as many distinct bytes as in a real context of that length.
    """
    ids = random_ids(model, depth, seed=1)
    if depth:
        compute_thread().run(partial(model.loop.fill, ids, _N_COMPUTED))
    return ids


def _run(
    session: Session, test: Test, repeats: int, cold: bool, rotating: bool, note: Callable[[str], None], stop: Stop
) -> tuple[list[float], list[Traffic]]:
    """Tokens a second, and what was read, of every timed run."""
    warm, samples, traffic = min(test.n, _WARM_ROWS) if test.kind == "prefill" else 1, list[float](), list[Traffic]()
    time_run(session, Test(test.kind, warm, test.depth), 0, 0, stop)
    for n in range(repeats):
        note(f"{test.kind} of {test.n:,} at depth {test.depth:,}: run {n + 1} of {repeats}")
        if cold:
            compute_thread().run(partial(_drop, session.model))
        seconds = time_run(session, test, n, n + 1 if rotating else 0, stop)
        if seconds is None:
            break
        samples.append(test.n / seconds)
        if session.stats.traffic is not None:
            traffic.append(session.stats.traffic)
    return samples, traffic


def _drop(model: Engine) -> None:
    if model.runner.stream is not None:
        model.runner.stream.drop()
    model.gguf.drop_cache()


@contextmanager
def _logged(model: Engine) -> Iterator[list[Range]]:
    """What a streamed model reads of its experts meanwhile."""
    log: list[Range] = []
    if model.runner.stream is not None:
        model.runner.stream.log = log
    yield log
    if model.runner.stream is not None:
        model.runner.stream.log = None


def _traffic(model: Engine, traffic: list[Traffic], test: Test, log: list[Range]) -> dict[str, Any]:
    """Of all runs, what a streamed model read for a token, for how long that was waited for, and what the disk can do.

    The disk is measured with the same ranges in the same order, past the page cache.
    """
    if not traffic:
        return {}
    found: dict[str, Any] = {}
    ranges = [r for r in log if r.part == 0]
    if ranges:
        found["disk_bytes_per_s"] = measure_disk(model.gguf.files()[0], ranges, _DISK_S)
    wanted, read, stall = (sum(getattr(t, name) for t in traffic) for name in ("wanted_bytes", "read_bytes", "stall_s"))
    n = len(traffic) * (test.n + int(test.kind == "decode"))
    found |= {"hit_rate": 1 - read / max(1, wanted), "read_bytes_per_token": read / n, "stall_s_per_token": stall / n}
    return found


def time_run(session: Session, test: Test, seed: int, ids_seed: int, stop: Stop) -> float | None:
    """Seconds of one run, or None when it was stopped. Seeds: of what is drawn, and of the ids that are asked."""
    session.rewind(test.depth)
    is_prefill = test.kind == "prefill"
    ids, n_answer = random_ids(session.model, test.n if is_prefill else 1, ids_seed), 1 if is_prefill else test.n + 1
    options: Any = {"max_tokens": n_answer, "sampling": Sampling(seed=seed), "stop": stop}
    for _ in session.generate(ids, **options, ignore_stop=True, keep=False):
        pass
    stats = session.stats
    if stats.n_generated < n_answer:
        return None
    return stats.prompt_s if is_prefill else stats.decode_s


def _result(model: Engine, test: Test, samples: list[float]) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": test.kind, "n": test.n, "depth": test.depth}
    found |= {"tokens_per_s": summarise(samples), "samples": samples}
    if test.kind == "decode" and samples:
        mean_depth = test.depth + 1 + test.n / 2
        n_bytes = bytes_per_token(model) + int(model.kv_bytes_per_position * mean_depth)
        found |= {"bytes_per_token": n_bytes, "bytes_per_s": n_bytes * found["tokens_per_s"]["median"]}
    return found


def bytes_per_token(model: Engine) -> int:
    """Weight bytes that one decoded token reads: everything dense, and the routed experts of every layer."""
    weights = model.weights
    experts = model.config.n_experts_used * model.config.n_layers * weights.expert_bytes
    return int(weights.dense_bytes + experts)


def _read_speeds(model: Engine) -> dict[str, float]:
    """Of plain memory and of the mapped file; of a streamed model, which is let go first, of memory only."""
    stream = model.runner.stream
    if stream is not None:
        compute_thread().run(stream.drop)
    plain = {"read_bytes_per_s": read_plain(model.n_threads)}
    return plain if stream is not None else plain | read_mapped(model)


def read_plain(n_threads: int) -> float:
    """Bytes a second of reading memory."""
    memory = np.ones(_READ_BYTES // 8, np.uint64)
    return _read_speed([(memory.ctypes.data, _READ_BYTES)], n_threads)


def read_mapped(model: Engine) -> dict[str, float]:
    """Of the mapped file: its largest tensors, up to 2 GB of them, which are in memory after a first pass."""
    parts, left = [], _MAPPED_BYTES
    for tensor in sorted(model.gguf.tensors.values(), key=lambda t: t.n_bytes, reverse=True):
        n_bytes = min(left, tensor.n_bytes)
        parts.append((model.gguf.address(tensor.name), n_bytes))
        left -= n_bytes
        if not left:
            break
    speed = _read_speed(parts, model.n_threads)
    return {"read_mapped_bytes_per_s": speed, "read_mapped_bytes": _MAPPED_BYTES - left}


def _read_speed(parts: Sequence[tuple[int, int]], n_threads: int) -> float:
    """Bytes a second of loading (address, bytes) after (address, bytes) with the widest vectors, the best of five."""
    sums = np.zeros(n_threads, np.float32)

    def measure() -> float:
        from m2lite.kernels.elementwise import read_memory
        from m2lite.simd import jit

        best = float("inf")
        for _ in range(6):  # the first one compiles or loads the kernel and takes the page faults
            started = time.perf_counter()
            for address, n_bytes in parts:
                read_memory(jit.n_parts(n_bytes), address, n_bytes, sums.ctypes.data)
            best = min(best, time.perf_counter() - started)
        return sum(n_bytes for _, n_bytes in parts) / best

    return compute_thread().run(measure)


def summarise(values: list[float]) -> dict[str, float]:
    """Median and the extremes, which say more of five runs than a deviation does."""
    if not values:
        return {}
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def format_result(result: dict[str, Any]) -> str:
    lines = [f"{shown(result['model'])}  {format_bytes(result['size_bytes'])}"]
    lines.append(f"{result['processor']}, {result['threads']} threads ({result['layer']})")
    lines += [_format_test(test) for test in result["tests"]]
    plain, mapped = result["read_bytes_per_s"], result.get("read_mapped_bytes_per_s")
    weights, kv = format_bytes(result["weight_bytes_per_token"]), format_bytes(result["kv_bytes_per_position"])
    lines.append(
        f"weights {weights} a token, KV {kv} a position; plain reading {format_speed(plain)}"
        + (f", of the mapped file {format_speed(mapped)}" if mapped else "")
    )
    for test in result["tests"]:
        if "bytes_per_s" in test and mapped:
            used = test["bytes_per_s"]
            lines.append(
                f"decode at depth {test['depth']:,} reads {format_speed(used)}: {used / plain:.0%} of plain reading, "
                f"{used / mapped:.0%} of the mapped file's"
            )
    if any(test["depth"] > _N_COMPUTED for test in result["tests"]):
        lines.append(f"({FILLED})")
    return "\n".join(lines)


def _format_test(test: dict[str, Any]) -> str:
    found, n = test["tokens_per_s"], len(test["samples"])
    where = f"at depth {test['depth']:,}" if test["depth"] else ""
    digits = 1 if found["median"] >= 10 else 2
    line = (
        f"{test['kind']:<8}{test['n']:>7,} tokens {where:<18}{found['median']:>9.{digits}f} tok/s  "
        f"({found['min']:.{digits}f} to {found['max']:.{digits}f}, {n} run{'s' if n > 1 else ''})"
    )
    if "hit_rate" in test:
        read, stall = test["read_bytes_per_token"], test["stall_s_per_token"]
        line += f"\n{'':<8}{test['hit_rate']:.0%} hits; a token read {format_bytes(int(read))} and waited {stall:.3f} s"
    if "disk_bytes_per_s" in test and stall:
        disk = test["disk_bytes_per_s"]
        line += f": {format_speed(read / stall)}; the disk gives {format_speed(disk)} for the same reads, 8 at once"
    return line
