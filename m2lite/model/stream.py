"""A model larger than its memory: what a layer needs is read before it is used, and the ledger says what stays.

Dense weights come once, a layer ahead of their first use, and stay. Of the experts those that a layer chose are asked
for all at once; those in memory are computed while the others come. Rows of a prompt choose nearly all experts, so for
many rows the next layer's are read ahead in the order in which they will be computed. Knows layers and experts, not
how an expert is read (storage/units.py) nor what leaves (storage/ledger.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from m2lite.model.config import Config
from m2lite.storage.gguf_reader import GGUFFile
from m2lite.storage.ledger import Ledger
from m2lite.storage.reads import Range, Reads
from m2lite.storage.syscalls import PAGE
from m2lite.storage.units import Units

WINDOW_BYTES = 256 * 1024**2  # of experts on their way: 0.2 s of a fast disk, for which no layer computes longer alone
AHEAD_FROM = 0.9  # share of a layer's experts that the rows will choose if they choose independently

STACKS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


class Stretch(NamedTuple):
    """Places first to end - 1 among a layer's active experts."""

    first: int
    end: int


class Warming(NamedTuple):
    """A unit that is read because earlier runs used it; None is nothing yet."""

    unit: int | None
    flight: Future[int]


@dataclass
class Traffic:
    """What was asked for and what had to be read, since the model was opened."""

    wanted_bytes: int = 0  # of experts
    read_bytes: int = 0  # of these; the rest was in memory
    dense_bytes: int = 0  # read of dense weights
    ahead_bytes: int = 0  # read and not wanted
    stall_s: float = 0.0  # for which computing waited

    def since(self, before: Traffic) -> Traffic:
        return Traffic(*(getattr(self, name) - getattr(before, name) for name in vars(self)))

    def plus(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    def as_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return {
            "hit_rate": self.hit_rate,
            "bytes_wanted": self.wanted_bytes,
            "bytes_read": self.read_bytes,
            "bytes_read_dense": self.dense_bytes,
            "bytes_read_in_vain": self.ahead_bytes,
            "stall_s": self.stall_s,
        }

    @property
    def hit_rate(self) -> float | None:
        """Share of the wanted bytes that were in memory."""
        return 1 - self.read_bytes / self.wanted_bytes if self.wanted_bytes else None


class Stream:
    """The experts of all layers as units of a ledger, and the reads under way. Used by the compute thread only."""

    def __init__(self, gguf: GGUFFile, config: Config, experts: Units, dense: Reads) -> None:
        c = self._config = config
        self._experts, self._dense = experts, dense
        self._stacks = stacks_of(gguf, c)
        self._sizes = [sum(r.n_bytes for r in stacks) for stacks in self._stacks]
        self.ledger = Ledger(np.repeat(np.array(self._sizes, np.int64), c.n_experts), 0)
        self._window = 0  # bytes of experts that may be on their way
        self._flights: dict[int, list[Future[int]]] = {}  # units whose reads were begun, until they are computed with
        self._n_flying = 0  # bytes of these
        self._queue: deque[int] = deque()  # units to be read, in the order of their use
        self._layer, self._is_last, self._active = 0, False, list[int]()
        self._is_sweep = False  # the rows choose nearly all experts
        self._dense_ranges = dense_ranges(gguf, c)
        self._dense_flights: dict[int, list[Future[int]]] = {}
        self._n_adopted = 0  # units
        self._has_dense: set[int] = set()  # layers (the head is the last) whose dense weights are in memory
        self.traffic = Traffic()
        self.log: list[Range] | None = None  # for measurements: what was read

    @property
    def least_bytes(self) -> int:
        """Of a capacity with which it can run: a unit that is computed with, and one that comes."""
        return 2 * max(self._sizes)

    @property
    def edge_bytes(self) -> int:
        """At most: pages that two slices share stay when one of them leaves, where slices are not whole pages."""
        odd = [r for stacks in self._stacks for r in stacks if r.offset % PAGE or r.n_bytes % PAGE]
        return len(odd) * self._config.n_experts * PAGE

    def resize(self, capacity_bytes: int) -> None:
        """Experts may take so many bytes from now on."""
        self.ledger.capacity = capacity_bytes
        self._window = min(WINDOW_BYTES, capacity_bytes // 2)
        for unit in self.ledger.make_room(0) or ():
            self._experts.drop(unit)

    def enter(self, layer: int, n_rows: int, is_last: bool) -> None:
        """Wait until a layer's dense weights are in memory, and begin to read the next one's; many rows' experts, too.

        `n_layers` stands for the head. After the last layer nothing is read ahead.
        """
        n = self._config.n_experts
        self._layer, self._is_last = layer, is_last
        if layer == 0:
            self._queue.clear()  # of a call that was stopped
        self._is_sweep = 1 - (1 - self._config.n_experts_used / n) ** n_rows >= AHEAD_FROM
        units = range(layer * n, (layer + 1) * n) if layer < self._config.n_layers else range(0)
        if layer not in self._has_dense:
            self._adopt(min(layer + 2, self._config.n_layers))
            self._load_dense(layer)
        if self._is_sweep and units:
            self.ledger.sweep(units[0])
            if not self._queue:
                self._queue.extend(units)
            self._top_up()

    def _adopt(self, n_layers: int) -> None:
        """What an earlier run left of the experts of the first layers counts, as far as there is room for it.

        Before anything of a layer is read; and a layer at a time, since to ask takes 15 ms for one of M2's.
        """
        for unit in range(self._n_adopted, n_layers * self._config.n_experts):
            if self._experts.adopt(unit):
                if self.ledger.resident_bytes + self._size(unit) <= self.ledger.capacity:
                    self.ledger.add(unit)
                else:
                    self._experts.drop(unit)
            self._n_adopted = unit + 1

    def _load_dense(self, layer: int) -> None:
        for i in range(layer, min(layer + 2, len(self._dense_ranges))):
            if i not in self._dense_flights and i not in self._has_dense:
                self._dense_flights[i] = [self._dense.submit(r) for r in self._dense_ranges[i]]
        self.traffic.dense_bytes += self._await(self._dense_flights.pop(layer))
        self._has_dense.add(layer)

    def absent(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Those of a layer's experts that would have to be read."""
        first = layer * self._config.n_experts
        return [e for e in experts if not self.ledger.has(first + e)]

    def expert_bytes(self, layer: int) -> int:
        return self._sizes[layer]

    def begin(self, active: Sequence[int], counts: Sequence[int], n_rows: int) -> None:
        """The rows have chosen the experts `active` of the layer, ascending; counts[i] rows active[i]."""
        n, ledger, layer = self._config.n_experts, self.ledger, self._layer
        first = layer * n
        self._active = [first + e for e in active]
        for unit, count in zip(self._active, counts, strict=True):
            ledger.use(unit, count)
            if ledger.has(unit) and unit not in self._flights and self._experts.is_damaged(unit):
                ledger.forget(unit)
        if self._is_last:
            ledger.advance(n_rows)
        self._drop_flights()
        self._queue = deque(u for u in self._active if not ledger.has(u))
        if not self._is_sweep:
            ledger.sweep(None)
        elif not self._is_last:
            self._queue.extend(range(first + n, first + 2 * n))
        self.traffic.wanted_bytes += len(active) * self._sizes[layer]

    def arrive(self, first: int, end: int) -> Iterator[Stretch]:
        """Runs of active[first:end] as they are in memory: first what is there, then the others in their order.

        A run must be computed with before the next is asked for.
        """
        units, ledger = self._active, self.ledger
        there = [i for i in range(first, end) if ledger.has(units[i]) and units[i] not in self._flights]
        coming = deque(sorted(set(range(first, end)) - set(there)))
        for i in there:
            ledger.pin(units[i])
        try:
            self._top_up()
            yield from runs(there)
        finally:
            for i in there:
                ledger.unpin(units[i])
                ledger.pass_by(units[i])
        while coming:
            landed = self._land_some(coming)
            try:
                yield landed
            finally:
                for i in range(*landed):
                    ledger.unpin(units[i])
                    ledger.pass_by(units[i])
            self._top_up()

    def _land_some(self, coming: deque[int]) -> Stretch:
        """Wait for the first of the places, and take with it what is there of those behind it; all are pinned."""
        first = coming.popleft()
        self._land(self._active[first])
        end = first + 1
        while coming and coming[0] == end and self._has_landed(self._active[end]):
            self._land(self._active[coming.popleft()])
            end += 1
        return Stretch(first, end)

    def _has_landed(self, unit: int) -> bool:
        flight = self._flights.get(unit)
        return flight is not None and all(f.done() and f.exception() is None for f in flight)

    def _land(self, unit: int) -> None:
        """Wait for a unit, which is pinned afterwards."""
        if unit not in self._flights:  # the window was full, or it left memory while others came
            self._queue = deque(u for u in self._queue if u != unit)
            if self.ledger.has(unit):
                self.ledger.pin(unit)
                return
            started = self._take_off(unit)
            assert started, "the window leaves room for one unit"
        self._n_flying -= self._size(unit)
        try:
            self.traffic.read_bytes += self._await(self._flights.pop(unit))
        except BaseException:
            self.ledger.unpin(unit)
            self._lose(unit)
            raise

    def _lose(self, unit: int) -> None:
        """It is not whole in memory: what there is of it goes."""
        self.ledger.forget(unit)
        self._experts.drop(unit)

    def _await(self, futures: list[Future[int]]) -> int:
        """The sum of what they return; the time is counted."""
        started = time.perf_counter()
        try:
            wait(futures)
            return sum(f.result() for f in futures)
        finally:
            self.traffic.stall_s += time.perf_counter() - started

    def _top_up(self) -> None:
        """Begin reads in the order of the queue while the window and the memory allow it."""
        while self._queue and self._n_flying < self._window:
            unit = self._queue[0]
            if not self.ledger.has(unit) and not self._take_off(unit):
                return
            self._queue.popleft()

    def _take_off(self, unit: int) -> bool:
        """Begin to read a unit, where memory can be had for it."""
        leaving = self.ledger.make_room(self._size(unit))
        if leaving is None:
            return False
        self._claim(unit)
        self._flights[unit] = self._experts.fetch(unit, leaving)
        if self.log is not None:
            self.log += self.ranges(unit)
        return True

    def _claim(self, unit: int) -> None:
        """The memory of a unit that is to be read is its own, and stays so until it is computed with."""
        self.ledger.add(unit)
        self.ledger.pin(unit)
        self._n_flying += self._size(unit)

    def _drop_flights(self) -> None:
        """Reads that an earlier call began and that are not wanted, or that failed: those are tried again.

        What is there stays as long as the ledger likes.
        """
        wanted = set(self._active)
        for unit in [u for u, flight in self._flights.items() if u not in wanted or any(map(_has_failed, flight))]:
            futures = self._flights.pop(unit)
            self._n_flying -= self._size(unit)
            self.ledger.unpin(unit)
            is_broken = self._experts.cancel(futures)
            done = [f for f in futures if not f.cancelled()]
            self.traffic.ahead_bytes += sum(f.result() for f in done if f.exception() is None)
            if is_broken or any(map(_has_failed, done)):
                self._lose(unit)

    def drop(self) -> None:
        """Everything that was read leaves memory, the dense weights, too: for measurements of a cold start."""
        self._active = []
        self._drop_flights()
        for unit in range(len(self.ledger.sizes)):
            if self.ledger.has(unit):
                self._lose(unit)
        for layer, ranges in enumerate(self._dense_ranges):
            wait(self._dense_flights.pop(layer, []))
            for r in ranges:
                self._dense.release(r)
        self._has_dense.clear()
        self.traffic.dense_bytes = 0

    def begin_warming(self) -> Warming | None:
        """The hottest unit that is not in memory, if it fits; None when none is left that does.

        Whoever gets it reads it, sets the result of its flight, and calls `end_warming`.
        """
        n, nothing = self._config.n_experts, Warming(None, Future())
        if self._n_adopted < n * self._config.n_layers:  # first see what is there: a layer at a time
            self._adopt(self._n_adopted // n + 1)
            return nothing
        unit = self.ledger.hottest()
        if unit is None or self.ledger.resident_bytes + self._size(unit) > self.ledger.capacity:
            return None
        self._claim(unit)
        self._experts.reserve(unit)
        warming = Warming(unit, Future())
        warming.flight.set_running_or_notify_cancel()  # it can be waited for, but not called off
        self._flights[unit] = [warming.flight]
        return warming

    def end_warming(self, warming: Warming) -> None:
        """What was read stays until it is used or has to leave; who wanted it meanwhile has landed it."""
        if warming.unit is not None and self._flights.get(warming.unit) == [warming.flight]:
            del self._flights[warming.unit]
            self._n_flying -= self._size(warming.unit)
            self.ledger.unpin(warming.unit)
            if _has_failed(warming.flight):
                self._lose(warming.unit)

    def fill(self, unit: int) -> int:
        """Read a unit that is warmed, on the caller's thread; returns how many bytes were read."""
        return self._experts.fill(unit)

    def places(self, run: Stretch) -> list[int]:
        """Where the run's experts lie from their matrices' addresses on, counted in experts."""
        n = self._config.n_experts
        return [self._experts.place(unit, unit % n) for unit in self._active[run.first : run.end]]

    def _size(self, unit: int) -> int:
        return self._sizes[unit // self._config.n_experts]

    def ranges(self, unit: int) -> list[Range]:
        """A unit's three slices."""
        return slices(self._stacks, self._config.n_experts, unit)


def _has_failed(future: Future[int]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is not None


def runs(places: Sequence[int]) -> Iterator[Stretch]:
    """Ascending numbers as runs of neighbours."""
    first = 0
    for i in range(1, len(places) + 1):
        if i == len(places) or places[i] != places[i - 1] + 1:
            yield Stretch(places[first], places[i - 1] + 1)
            first = i


def stacks_of(gguf: GGUFFile, config: Config) -> list[list[Range]]:
    """Of every layer, the first expert's slice of each stack."""

    def base(name: str) -> Range:
        tensor = gguf.tensors[name]
        return Range(tensor.part, tensor.offset, tensor.n_bytes // config.n_experts)

    return [[base(f"blk.{i}.{name}.weight") for name in STACKS] for i in range(config.n_layers)]


def slices(stacks: list[list[Range]], n_experts: int, unit: int) -> list[Range]:
    """The slices of unit layer x n_experts + expert."""
    layer, e = divmod(unit, n_experts)
    return [Range(r.part, r.offset + e * r.n_bytes, r.n_bytes) for r in stacks[layer]]


def dense_ranges(gguf: GGUFFile, config: Config) -> list[list[Range]]:
    """Of every layer, and of the head behind them: the matrices that every token needs.

    Not the experts, not the embedding (a row at a time), not the small vectors.
    """
    found: list[list[Range]] = [[] for _ in range(config.n_layers + 1)]
    for tensor in gguf.tensors.values():
        if len(tensor.shape) == 2 and tensor.name != "token_embd.weight":
            prefix, _, rest = tensor.name.removeprefix("blk.").partition(".")
            layer = int(prefix) if tensor.name.startswith("blk.") and rest else config.n_layers
            found[layer].append(Range(tensor.part, tensor.offset, tensor.n_bytes))
    return found
