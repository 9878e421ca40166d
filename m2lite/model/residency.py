"""Where the weights of a model larger than its memory are kept, and how much of it the experts may take.

Experts lie in memory of our own, read past the page cache; with load "mmap" in the page cache, which costs a processor
of two cores half its time, but is there for the next run. Dense weights, which every token needs, must never be pushed
out by them: they are an owned copy, or with "mmap" pages that are locked, where the limit on locked memory allows that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from numpy.typing import NDArray

from m2lite import machine
from m2lite.errors import ResourceError, UsageError
from m2lite.model.config import Config
from m2lite.model.stream import STACKS, Stream, dense_ranges, slices, stacks_of
from m2lite.storage import syscalls
from m2lite.storage.gguf_reader import GGUFFile
from m2lite.storage.reads import DirectReads, MappedReads, Range, Reads
from m2lite.storage.units import MappedUnits, SlotUnits, Units
from m2lite.system.byte_units import format_bytes

Memory = NDArray[Any]  # of our own
LOADS = ("auto", "mmap", "direct")
RESERVE_BYTES = 64 * 1024**2  # for what is not known yet: logits, rows of the embedding, the file's header
_KEPT = 0.1  # of free memory, where no budget is given: others need some, too


def check_load(load: str, ram: int | None) -> None:
    """Raises UsageError for what cannot be meant here."""
    if load not in LOADS:
        raise UsageError(f"Load mode {load!r} does not exist.", f"Use one of: {', '.join(LOADS)}.")
    if not syscalls.AVAILABLE and (load == "direct" or ram is not None):
        raise UsageError("--load and --ram need Linux.", "Leave them out.")


@dataclass(frozen=True)
class Budget:
    """Bytes that this process may take, in its own memory and in the file's pages in the page cache."""

    given: int | None  # by the user; else what is free and what we have already, less `kept` for others
    kept: int = 0
    beside: int = 0  # of a file that stays in the page cache

    @property
    def total(self) -> int:
        if self.given is not None:
            return self.given - self.beside
        return machine.free_memory_bytes() + machine.anonymous_bytes() - self.kept - self.beside


def choose_budget(
    gguf: GGUFFile, load: str, ram: int | None, buffers: Sequence[Memory], n_beside: int = 0
) -> Budget | None:
    """For a model whose weights are to come and go: one that is larger than `ram`, or than free memory, or "direct".

    n_beside: bytes of a file that is used beside it, and stays.
    """
    if not syscalls.AVAILABLE:
        return None
    budget = Budget(ram, int(machine.free_memory_bytes() * _KEPT), n_beside)
    is_larger = own_bytes(buffers) + gguf.size_bytes > budget.total
    return budget if is_larger or load == "direct" else None


def own_bytes(buffers: Sequence[Memory]) -> int:
    """Memory that no file stands behind: what is touched, what of the buffers will be, and what is not known yet."""
    to_come = sum(b.nbytes - syscalls.resident_bytes(b) for b in buffers)
    return machine.anonymous_bytes() + to_come + RESERVE_BYTES


class Residency:
    """The reads of a model that is streamed, and where they put its matrices."""

    def __init__(self, gguf: GGUFFile, config: Config, load: str, budget: Budget, buffers: Sequence[Memory]) -> None:
        self._gguf, self._config, self._budget, self._buffers = gguf, config, budget, buffers
        files, dense = gguf.files(), [r for ranges in dense_ranges(gguf, config) for r in ranges]
        self.dense_bytes = sum(r.n_bytes for r in dense)
        ranges = partial(slices, stacks_of(gguf, config), config.n_experts)
        if load != "mmap":
            direct = DirectReads(files, is_alone=True)
            units: Units = SlotUnits(direct, ranges, config.n_layers * config.n_experts)
            self.dense: Reads = direct
            self._reads: list[Reads] = [direct]
        else:
            mapped = MappedReads(files)
            units = MappedUnits(mapped, ranges)
            locked = all(_lock(mapped, r) for r in dense)
            self.dense = mapped if locked else DirectReads(files)
            self._reads = [mapped] if locked else [mapped, self.dense]
            if not locked:
                for r in dense:
                    self.dense.adopt(r)  # not in the page cache as well
        self.keeps_dense = "locked" if isinstance(self.dense, MappedReads) else "owned"
        self._units = units
        self._expect_small()
        self.stream = Stream(gguf, config, units, self.dense)
        self.fit()

    def _expect_small(self) -> None:
        """The vectors will be read at once, rows of the embedding here and there: say so, else each reads megabytes."""
        for tensor in self._gguf.tensors.values():
            is_vector = len(tensor.shape) == 1
            if is_vector or tensor.name == "token_embd.weight":
                start, size = syscalls.whole_pages(self._gguf.address(tensor.name), tensor.n_bytes)
                syscalls.madvise(start, size, syscalls.WILLNEED if is_vector else syscalls.RANDOM)

    def address(self, name: str) -> int:
        """Where a matrix is, or will be when it was read."""
        if name == "token_embd.weight":
            return self._gguf.address(name)
        tensor, units = self._gguf.tensors[name], self._units
        if "_exps." not in name:
            return self.dense.address(tensor.part, tensor.offset)
        if isinstance(units, SlotUnits):
            _, layer, stack, _ = name.split(".")
            return units.base(int(layer) * self._config.n_experts, STACKS.index(stack))
        return self._gguf.address(name)

    @property
    def budget_bytes(self) -> int:
        return self._budget.total

    def describe(self) -> str:
        """For the start line."""
        ledger = self.stream.ledger
        total = int(ledger.sizes.sum())
        where = "own memory" if isinstance(self._units, SlotUnits) else "the page cache"
        dense = "locked in the page cache" if self.keeps_dense == "locked" else "copied to own memory"
        return (
            f"{format_bytes(min(ledger.capacity, total))} of {format_bytes(total)} of experts fit into {where}; "
            f"what every token needs, {format_bytes(self.dense_bytes)}, is {dense}"
        )

    def fit(self) -> None:
        """The experts get what the budget leaves beside our own memory and the dense weights.

        Our own memory grows, most while kernels are compiled: so this is asked again before every answer.
        """
        stream, budget = self.stream, self._budget
        is_direct = isinstance(self._units, SlotUnits)
        resident = stream.ledger.resident_bytes if is_direct else 0
        owned = resident + (stream.traffic.dense_bytes if self.keeps_dense == "owned" else 0)  # weights in own memory
        own = own_bytes(self._buffers) - owned + (0 if is_direct else stream.edge_bytes)
        least, total = own + self.dense_bytes + stream.least_bytes, budget.total
        if total < least:
            raise ResourceError(
                f"The model needs at least {format_bytes(least)} of memory ({format_bytes(self.dense_bytes)} of them "
                f"for the weights that every token needs, {format_bytes(own)} for program, buffers and KV cache); the "
                f"budget is {format_bytes(total)}.",
                "Use a larger --ram or a smaller --ctx." if budget.given else "Free memory or use a smaller --ctx.",
            )
        stream.resize(total - own - self.dense_bytes)

    def close(self) -> None:
        """Before the file is closed."""
        for reads in self._reads:
            reads.close()


def _lock(reads: Reads, r: Range) -> bool:
    return syscalls.lock_on_fault(*syscalls.whole_pages(reads.address(r.part, r.offset), r.n_bytes))
