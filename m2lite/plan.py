"""What a model will cost on this machine before it is asked anything: memory, then tokens a second by hit rate.

    memory  = own memory (program, buffers, KV cache) + dense weights + experts
    decode  = dense / stream + max(experts / stream, experts (1 - hit) / disk)          seconds a token
    prefill = max(products / kernels, pool x chosen (1 - hit) / disk, all that is read / stream)    seconds a chunk

A token's dense weights and KV are read from memory; its experts' reads overlap with computing those that are there. A
chunk of a prompt reads each chosen expert once. `stream`, `kernels` and `disk` are measured here, on the file's own
bytes; the rest is in the header. What a run then showed next to this: benchmarks/BEYOND_RAM.md.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from m2lite.api import Model
from m2lite.engine.thread import compute_thread
from m2lite.model.stream import slices, stacks_of
from m2lite.shown import shown
from m2lite.storage.reads import measure_disk
from m2lite.system.byte_units import format_bytes, format_speed

HIT_RATES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
PROMPTS = (512, 2048)
_PROBE_S = 1.0
_N_PROBES = 4096  # experts, which the probe does not read through
# Hit rate by share of the experts that memory holds, of m2-tiny's text, with the engine's rule: benchmarks/routing.py.
_TRAINED = ((0.0, 0.0), (0.05, 0.10), (0.1, 0.23), (0.2, 0.40), (0.3, 0.54), (0.4, 0.64), (0.5, 0.74), (0.6, 0.82),
            (0.7, 0.89), (0.8, 0.94), (0.9, 0.98), (1.0, 1.0))  # fmt: skip
_OVERHEAD = 1.3  # of a prompt's time over that of its products alone: norms, packing, attention, what reading costs


@dataclass(frozen=True)
class Costs:
    """What a model is made of, and what this machine does in a second."""

    n_layers: int
    n_experts: int
    n_used: int
    expert_bytes: int  # one expert of one layer
    dense_bytes: int
    kv_bytes: int  # of the positions that are attended to
    macs_per_token: int
    expert_memory: int  # bytes that experts may take
    n_rows: int  # of a prompt that go through the layers together
    disk: float  # bytes a second
    stream: float  # bytes of weights a second through the kernels, one row
    kernels: float  # multiply-adds a second, many rows

    @property
    def pool_bytes(self) -> int:
        return self.n_layers * self.n_experts * self.expert_bytes

    @property
    def cycle_bytes(self) -> int:
        """The experts of one token."""
        return self.n_layers * self.n_used * self.expert_bytes

    @property
    def share(self) -> float:
        """Of the experts that memory holds."""
        return min(1.0, self.expert_memory / self.pool_bytes)

    def decode(self, hit_rate: float) -> tuple[float, str]:
        """Seconds of a token, and what binds them."""
        dense, experts = (self.dense_bytes + self.kv_bytes) / self.stream, self.cycle_bytes / self.stream
        disk = self.cycle_bytes * (1 - hit_rate) / self.disk
        return dense + max(experts, disk), "disk" if disk > experts + dense else "memory"

    def prefill(self, n: int, hit_rate: float) -> tuple[float, str]:
        """Seconds of a prompt of n tokens, and what binds them."""
        seconds, binds = 0.0, "kernels"
        for first in range(0, n, self.n_rows):
            rows = min(self.n_rows, n - first)
            chosen = 1 - (1 - self.n_used / self.n_experts) ** rows
            disk = self.pool_bytes * chosen * (1 - hit_rate) / self.disk
            products = _OVERHEAD * rows * self.macs_per_token / self.kernels
            memory = (self.dense_bytes + self.pool_bytes * chosen) / self.stream
            seconds += max(disk, products, memory)
            binds = max((disk, "disk"), (products, "kernels"), (memory, "memory"))[1]
        return seconds, binds


def trained_hit_rate(share: float) -> float:
    """Of routing with favourites as in trained text, where memory holds this share of the experts."""
    shares, rates = zip(*_TRAINED, strict=True)
    return float(np.interp(share, shares, rates))


def make_plan(model: Model, disk: float | None = None) -> dict[str, Any]:
    """Everything that `plan` prints; `disk` is assumed instead of measured."""
    costs = measure(model, disk)
    low, high = costs.share, trained_hit_rate(costs.share)
    rows = [_row(costs, rate) for rate in sorted({*HIT_RATES, round(low, 3), round(high, 3)})]
    stream, residency = model.runner.stream, model.runner.residency
    return {
        "model": str(model.path),
        "size_bytes": model.gguf.size_bytes,
        "costs": asdict(costs),
        "disk_is_assumed": disk is not None,
        "pool_bytes": costs.pool_bytes,
        "cycle_bytes": costs.cycle_bytes,
        "streamed": stream is not None,
        "budget_bytes": None if residency is None else residency.budget_bytes,
        "dense_is": "mapped" if residency is None else residency.keeps_dense,
        "ctx": model.ctx,
        "kv": model.kv,
        "kv_cache_bytes": model.kv_bytes,
        "hit_rate_low": low,
        "hit_rate_high": high,
        "rows": rows,
    }


def _row(costs: Costs, hit_rate: float) -> dict[str, Any]:
    seconds, binds = costs.decode(hit_rate)
    row: dict[str, Any] = {"hit_rate": hit_rate, "tokens_per_s": 1 / seconds, "binds": binds}
    for n in PROMPTS:
        seconds, binds = costs.prefill(n, hit_rate)
        row |= {f"prompt_{n}_tokens_per_s": n / seconds, f"prompt_{n}_s": seconds, f"prompt_{n}_binds": binds}
    return row


def measure(model: Model, disk: float | None = None) -> Costs:
    """The costs, with probes of about three seconds; a streamed model's dense weights of one layer are read."""
    c, weights, stream = model.config, model.weights, model.runner.stream
    streamed, macs = compute_thread().run(lambda: _measure_kernels(model))
    attention = 2 * c.n_embd * (c.n_q + c.n_kv) + c.n_embd * c.n_experts
    return Costs(
        n_layers=c.n_layers,
        n_experts=c.n_experts,
        n_used=c.n_experts_used,
        expert_bytes=weights.expert_bytes,
        dense_bytes=weights.dense_bytes,
        kv_bytes=model.kv_bytes_per_position * min(model.ctx, 512),
        macs_per_token=c.n_layers * (attention + 3 * c.n_experts_used * c.n_embd * c.n_ff),
        expert_memory=weights.expert_bytes * c.n_layers * c.n_experts if stream is None else stream.ledger.capacity,
        n_rows=model.n_rows,
        disk=_measure_disk(model) if disk is None else disk,
        stream=streamed,
        kernels=macs,
    )


def _measure_disk(model: Model) -> float:
    c, rng = model.config, random.Random()  # other places every time: what was read lately is faster on some disks
    stacks = stacks_of(model.gguf, c)
    part, n_units = stacks[0][0].part, c.n_layers * c.n_experts
    units = [slices(stacks, c.n_experts, rng.randrange(n_units)) for _ in range(_N_PROBES)]
    ranges = [r for unit in units for r in unit if r.part == part]
    return measure_disk(model.gguf.files()[part], ranges, _PROBE_S)


def _measure_kernels(model: Model) -> tuple[float, float]:
    """(bytes of the head's weights a second for one row, multiply-adds a second for a prompt's rows of an expert)."""
    c, runner, experts = model.config, model.runner, model.weights.layers[0].ffn_gate_exps
    stream, head = runner.stream, model.weights.output
    if stream is not None:
        stream.enter(0, 1, is_last=True)
        stream.begin([0], [0], 0)
        list(stream.arrive(0, 1))
        stream.enter(c.n_layers, 1, is_last=True)
    n = max(1, min(model.n_rows, 512 * c.n_experts_used // c.n_experts))
    one, many = _best(runner.product(head, 1)), _best(runner.product(experts, n))
    return head.n_out * head.row_bytes / one, n * c.n_embd * c.n_ff / many


def _best(call: Callable[[], None]) -> float:
    """Seconds of a call, the best of many within a quarter of a second."""
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < 0.25:
        at = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - at)
    return best


def format_plan(plan: dict[str, Any]) -> str:
    c, costs = format_bytes, plan["costs"]
    lines = [f"{shown(plan['model'])}  {c(plan['size_bytes'])}"]
    lines.append(
        f"experts {c(plan['pool_bytes'])}, of which a token needs {c(plan['cycle_bytes'])}; dense weights "
        f"{c(costs['dense_bytes'])}; KV cache {c(plan['kv_cache_bytes'])} (ctx {plan['ctx']:,}, {plan['kv']})"
    )
    low, high, room = plan["hit_rate_low"], plan["hit_rate_high"], costs["expert_memory"]
    if not plan["streamed"]:
        lines.append("memory: all of it fits")
    else:
        lines.append(
            f"memory: budget {c(plan['budget_bytes'])}, dense weights {plan['dense_is']}, experts {c(room)}: "
            f"{min(1, room / plan['pool_bytes']):.0%} of them; expect hits of {low:.0%} (no favourites) to {high:.0%} "
            "(favourites as in m2-tiny's text)"
        )
        if room < plan["cycle_bytes"]:
            lines.append(
                "below one token's experts memory holds none until they are needed again: more --ram helps first"
            )
    assumed = " (assumed)" if plan["disk_is_assumed"] else ""
    lines.append(
        f"measured: disk {format_speed(costs['disk'])}{assumed}, weights through the kernels "
        f"{format_speed(costs['stream'])}, products {costs['kernels'] / 1e9:.0f} G/s"
    )
    lines.append("hits      tok/s  bound by " + "".join(f"  prompt of {n:,}: tok/s, first token" for n in PROMPTS))
    for row in plan["rows"]:
        mark = "*" if plan["streamed"] and low - 5e-4 <= row["hit_rate"] <= high + 5e-4 else " "
        prompts = "".join(
            f"{row[f'prompt_{n}_tokens_per_s']:>19.1f}{row[f'prompt_{n}_s']:>11,.0f} s   " for n in PROMPTS
        )
        lines.append(f"{row['hit_rate']:>4.0%} {mark}{row['tokens_per_s']:>9.2f}  {row['binds']:<9}" + prompts.rstrip())
    return "\n".join(lines)
