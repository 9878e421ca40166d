"""What prefill and decode cost on this machine, next to its read bandwidth. Measures, decides nothing."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from m2lite import __version__, machine
from m2lite.decode.compute import compute_thread
from m2lite.decode.sampling import Sampling
from m2lite.decode.session import Model, Stats, Stop
from m2lite.describe import format_bytes

_READ_BYTES = 512 * 1024**2


def run_bench(
    model: Model, n_prompt: int, n_decode: int, repeats: int, *, note: Callable[[str], None], stop: Stop
) -> dict[str, Any]:
    """Every repetition reads the same `n_prompt` ids and decodes `n_decode` more; ends early when `stop` says so.

    Stop tokens are decoded through, and tokens are sampled, so that the routing is as varied as that of text.
    """
    ids = np.random.default_rng(0).integers(0, min(256, model.config.n_vocab), n_prompt).tolist()
    prefill: list[float] = []
    decode: list[float] = []
    _measure(model, ids, 1, stop)  # not counted: fills caches, compiles what is not compiled
    for n in range(repeats):
        note(f"run {n + 1} of {repeats}")
        stats = _measure(model, ids, n_decode, stop)
        if stats.prompt_tokens_per_s is None or stats.n_generated <= n_decode:
            break
        prefill.append(stats.prompt_tokens_per_s)
        decode.append(n_decode / stats.decode_s)
    weight_bytes = bytes_per_token(model)
    decode_summary = summarise(decode)
    return {
        "model": str(model.path),
        "size_bytes": model.gguf.size_bytes,
        "n_prompt": n_prompt,
        "n_decode": n_decode,
        "repeats": repeats,
        "prefill_tokens_per_s": summarise(prefill),
        "decode_tokens_per_s": decode_summary,
        "weight_bytes_per_token": weight_bytes,
        "decode_bytes_per_s": weight_bytes * decode_summary.get("median", 0.0),
        "read_bytes_per_s": read_bandwidth(model.n_threads),
        "threads": model.n_threads,
        "layer": model.engine.layer,
        "processor": machine.processor_name(),
        "cores": machine.n_usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "version": __version__,
    }


def _measure(model: Model, ids: list[int], n_decode: int, stop: Stop) -> Stats:
    """One prompt and `n_decode` steps after the first token."""
    sampling = Sampling(seed=0)
    with model.session() as session:
        session.check_room(len(ids) + n_decode)
        for _ in session.generate(ids, max_tokens=n_decode + 1, sampling=sampling, stop=stop, ignore_stop=True):
            pass
        return session.stats


def bytes_per_token(model: Model) -> int:
    """Weight bytes that one decoded token reads: everything dense, and the routed experts of every layer."""
    weights = model.weights
    experts = model.config.n_experts_used * model.config.n_layers * weights.expert_bytes
    return int(weights.dense_bytes + experts)


def read_bandwidth(n_threads: int) -> float:
    """Bytes a second of loading plain memory with that many threads and the widest vectors, the best of five."""
    memory, sums = np.ones(_READ_BYTES // 8, np.uint64), np.zeros(n_threads, np.float32)

    def measure() -> float:
        from m2lite.kernels.elementwise import read_memory

        best = float("inf")
        for _ in range(6):  # the first one compiles or loads the kernel
            started = time.perf_counter()
            read_memory(_READ_BYTES, memory.ctypes.data, _READ_BYTES, sums.ctypes.data)
            best = min(best, time.perf_counter() - started)
        return best

    best = compute_thread().run(measure)
    return _READ_BYTES / best


def summarise(values: list[float]) -> dict[str, float]:
    """Median and the extremes, which say more of five runs than a deviation does."""
    if not values:
        return {}
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def format_result(result: dict[str, Any]) -> str:
    """For people; the JSON object holds the same numbers."""
    lines = [f"{result['model']}  {format_bytes(result['size_bytes'])}"]
    lines.append(f"{result['processor']}, {result['threads']} threads ({result['layer']})")
    for name, n in (("prefill", result["n_prompt"]), ("decode", result["n_decode"])):
        found = result[f"{name}_tokens_per_s"]
        lines.append(
            f"{name:<8}{n:>6} tokens  {found['median']:>9.1f} tok/s  ({found['min']:.1f} to {found['max']:.1f}, "
            f"{result['repeats']} runs)"
        )
    used, plain = result["decode_bytes_per_s"] / 1e9, result["read_bytes_per_s"] / 1e9
    lines.append(
        f"weights {format_bytes(result['weight_bytes_per_token'])} a token, so {used:.1f} GB/s; "
        f"plain reading {plain:.1f} GB/s ({used / plain:.0%})"
    )
    return "\n".join(lines)
