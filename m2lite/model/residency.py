"""Where the weights of a model larger than its memory are kept, and how much of it the experts may take.

Experts lie in the page cache, through the mapping, or with load "direct" in memory of our own. Dense weights, which
every token needs, must never be pushed out by them: their pages are locked where the limit on locked memory allows
that, else they are an owned copy.
"""

from __future__ import annotations

from typing import NamedTuple

from m2lite import machine
from m2lite.errors import ResourceError, UsageError
from m2lite.model.config import Config
from m2lite.model.stream import Stream, dense_ranges
from m2lite.storage import syscalls
from m2lite.storage.gguf_reader import GGUFFile
from m2lite.storage.reads import DirectReads, MappedReads, Range, Reads

LOADS = ("mmap", "direct")
RESERVE_BYTES = 128 * 1024**2  # for what is not known when a model is opened: compiled kernels, logits, page tables
_OF_FREE = 0.95  # is used where no budget is given: others need some, too


def check_load(load: str, ram: int | None) -> None:
    """Raises UsageError for what cannot be meant here."""
    if load not in LOADS:
        raise UsageError(f"Load mode {load!r} does not exist.", f"Use one of: {', '.join(LOADS)}.")
    if not syscalls.AVAILABLE and (load != "mmap" or ram is not None):
        raise UsageError("--load and --ram need Linux.", "Leave them out.")


class Budget(NamedTuple):
    """Bytes that this process may take, in its own memory and in the file's pages in the page cache."""

    total: int
    is_given: bool  # by the user; else what is free
    own: int  # of the total, what is not for weights


def choose_budget(gguf: GGUFFile, load: str, ram: int | None, buffer_bytes: int) -> Budget | None:
    """For a model whose weights are to come and go: one that is larger than `ram`, or than free memory, or "direct".

    buffer_bytes: KV cache and scratch memory, touched or not yet.
    """
    if not syscalls.AVAILABLE:
        return None
    own = machine.anonymous_bytes() + buffer_bytes + RESERVE_BYTES
    total = int(machine.free_memory_bytes() * _OF_FREE) + machine.anonymous_bytes() if ram is None else ram
    return Budget(total, ram is not None, own) if own + gguf.size_bytes > total or load == "direct" else None


class Residency:
    """The reads of a model that is streamed, and where they put its matrices."""

    def __init__(self, gguf: GGUFFile, config: Config, load: str) -> None:
        self._gguf, self._config = gguf, config
        files, dense = gguf.files(), [r for ranges in dense_ranges(gguf, config) for r in ranges]
        self.dense_bytes = sum(r.n_bytes for r in dense)
        if load == "direct":
            self.experts: Reads = DirectReads(files)
            self.dense: Reads = self.experts
            self.keeps_dense = "owned"
        else:
            self.experts = MappedReads(files)
            locked = all(_lock(self.experts, r) for r in dense)
            self.dense = self.experts if locked else DirectReads(files)
            self.keeps_dense = "locked" if locked else "owned"
        self._expect_small()

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
        tensor = self._gguf.tensors[name]
        reads = self.experts if "_exps." in name else self.dense
        return reads.address(tensor.part, tensor.offset)

    def stream(self, budget: Budget) -> Stream:
        """What the budget leaves is for experts."""
        taken = budget.own + self.dense_bytes
        stream = Stream(self._gguf, self._config, self.experts, self.dense, max(0, budget.total - taken))
        least = taken + stream.least_bytes
        if budget.total < least:
            raise ResourceError(
                f"The model needs at least {least:,} bytes of memory ({self.dense_bytes:,} of them for the weights "
                f"that every token needs, {budget.own:,} for KV cache and buffers); the budget is {budget.total:,}.",
                "Use a larger --ram or a smaller --ctx." if budget.is_given else "Free memory or use a smaller --ctx.",
            )
        return stream

    def close(self) -> None:
        """Before the file is closed."""
        self.experts.close()
        self.dense.close()


def _lock(reads: Reads, r: Range) -> bool:
    return syscalls.lock_on_fault(*syscalls.whole_pages(reads.address(r.part, r.offset), r.n_bytes))
