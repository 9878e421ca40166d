"""One pool of KV pages for all layers; a timeline is a list of pages. Knows positions, not tokens.

A page holds 64 positions of every layer, those of prediction modules (`n_extra_layers`) behind the trunk's; per layer
K and V of each kv head in turn, as kernels/pages.py lays them out.
"""

from __future__ import annotations

import errno
import mmap
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from m2lite import machine
from m2lite.errors import ContextError, M2liteError, ResourceError, UsageError
from m2lite.model.config import Config
from m2lite.storage import syscalls
from m2lite.system.byte_units import format_bytes

if TYPE_CHECKING:
    from m2lite.model.routing import Routing

PAGE = 64
_LARGE = 1 << 20  # bytes from which on it is worth asking whether they can be had
BYTES_PER_32 = {"f16": 64, "q8_0": 34}  # q8_0: int8 and a float16 scale


def check_kv(config: Config, kv: str) -> None:
    """Raises UsageError unless the model's K and V can be kept as type `kv`."""
    if kv not in BYTES_PER_32:
        raise UsageError(f"KV type {kv!r} does not exist.", f"Use one of: {', '.join(BYTES_PER_32)}.")
    if kv == "q8_0" and config.head_dim % 32:
        raise UsageError(
            f"KV type q8_0 takes blocks of 32; this model's heads have {config.head_dim} dimensions.", "Use --kv f16."
        )


def kv_layer_bytes(config: Config, kv: str) -> int:
    """K and V of one position in one layer."""
    return 2 * config.n_kv * BYTES_PER_32[kv] // 32


class Part(NamedTuple):
    """Token ids that a timeline gets from place `start` on."""

    timeline: Timeline
    start: int
    ids: list[int]


class Rows:
    """What one forward call computes: T tokens, each of one timeline at one position.

    Made of Python's lists: of one row, as in decode, each call of NumPy would cost more than all of it does.
    """

    def __init__(self, parts: Sequence[Part], lengths: tuple[tuple[Timeline, int], ...]) -> None:
        self.lengths = lengths  # what the timelines' lengths will be
        self.n_positions = max(start + len(ids) for _, start, ids in parts)  # of the longest, these rows included
        self.last: list[int] = []  # each timeline's last row
        self.at_0: list[int] = []  # rows that have nothing before them
        tokens: list[int] = []
        positions: list[int] = []
        indices: list[int] = []
        pages: list[int] = []
        tables: list[int] = []
        for timeline, start, ids in parts:
            index, first, address = range(start, start + len(ids)), timeline.first_position, timeline.pool.page_address
            if start + first == 0:
                self.at_0.append(len(tokens))
            tokens += ids
            positions += range(start + first, start + first + len(ids))
            indices += index
            pages += [address(timeline.pages[i // PAGE]) for i in index]
            tables += [timeline.table_address] * len(ids)
            self.last.append(len(tokens) - 1)
        self.n = len(tokens)
        # int32 [4, T]: ids; positions for the rotation; places in the timeline, from 0, which is what attention sees;
        # indices in the page. int64 [2, T]: addresses of the page that takes the row's K and V, and of its timeline's
        # page addresses. For one row, making NumPy arrays and asking for their addresses would take most of a call.
        self._small = array("i", [*tokens, *positions, *indices, *[i % PAGE for i in indices]])
        self._wide = array("q", [*pages, *tables])
        self.start = indices[0]  # place of the first row in its timeline

    def addresses(self) -> tuple[int, int, int, int, int, int]:
        """Of tokens, positions, indices, slots, pages and tables."""
        at, wide, n = self._small.buffer_info()[0], self._wide.buffer_info()[0], self.n
        return at, at + 4 * n, at + 8 * n, at + 12 * n, wide, wide + 8 * n

    def places(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Addresses of the pages that take the rows' K and V, and indices in them."""
        return np.frombuffer(self._wide, np.int64)[: self.n], np.frombuffer(self._small, np.int32)[3 * self.n :]


class KVPool:
    """Address space for `n_positions`, touched as it fills; pages are shared between timelines until written to."""

    def __init__(self, config: Config, n_positions: int, kv: str = "f16", n_extra_layers: int = 0) -> None:
        check_kv(config, kv)
        if n_positions < 1:
            raise UsageError(f"A KV cache of {n_positions} positions cannot hold anything.", "Use at least 1.")
        self.config = config
        self.kv = kv
        self.n_positions = n_positions
        self.n_pages = (n_positions + PAGE - 1) // PAGE
        self.layer_bytes = PAGE * kv_layer_bytes(config, kv)
        self.trunk_bytes = config.n_layers * self.layer_bytes  # of a page: prediction modules' layers stand behind
        self.page_bytes = self.trunk_bytes + n_extra_layers * self.layer_bytes
        self._memory = mmap.mmap(-1, self.n_pages * self.page_bytes)
        self.memory = np.frombuffer(self._memory, np.uint8)
        self._base = int(self.memory.ctypes.data)
        self._is_touched = bytearray(self.n_pages)
        self._free = list(range(self.n_pages - 1, -1, -1))
        self._users = [0] * self.n_pages
        self.routing: Routing | None = None  # which experts positions chose, where that is kept
        self.reclaim: Callable[[], bool] = lambda: False  # frees a page that is only kept, if there is one
        self._n_angles = self.angles_address = 0
        self._angles = np.empty((0, config.rotary_dim), np.float32)

    @property
    def n_bytes(self) -> int:
        """The whole pool when it is full."""
        return self.n_pages * self.page_bytes

    @property
    def n_free(self) -> int:
        """Positions in pages that no timeline holds."""
        return len(self._free) * PAGE

    def timeline(self, first_position: int = 0) -> Timeline:
        """A new, empty timeline whose first token stands at `first_position`."""
        return Timeline(self, first_position)

    def rows(self, parts: Sequence[tuple[Timeline, npt.ArrayLike]]) -> Rows:
        """The rows that append each part's token ids to its timeline; checks ids and room, and takes the pages.

        Nothing is appended until `forward` has run. Raises ContextError when no page is left.
        """
        checked = [Part(timeline, timeline.length, self._check_ids(ids)) for timeline, ids in parts]
        if not checked:
            raise UsageError("There is no row to compute.", "Give at least one token.")
        self._prepare(checked)
        return Rows(checked, lengths=tuple((t, start + len(ids)) for t, start, ids in checked))

    def rows_at(self, parts: Sequence[tuple[Timeline, int, npt.ArrayLike]]) -> Rows:
        """Rows of each part's token ids from its position on; timelines stay as long as they are.

        For prediction modules, whose K and V stand beside those of the model.
        """
        checked = [Part(timeline, start, self._check_ids(ids)) for timeline, start, ids in parts]
        assert all(part.start >= 0 for part in checked)
        self._prepare(checked)
        return Rows(checked, lengths=())

    def _prepare(self, parts: Sequence[Part]) -> None:
        """Take the pages that the parts need, and compute the angles of their positions."""
        if len(parts) == 1 and parts[0].timeline.has_room(parts[0].start + len(parts[0].ids), self._n_angles):
            return
        counts = [max(0, start + len(ids) - t.length) for t, start, ids in parts]
        needed = sum(part.timeline.pages_needed(n) for part, n in zip(parts, counts, strict=True))
        if not self.has_free(needed):
            raise ContextError(
                f"{sum(counts):,} more tokens need {needed:,} pages of {PAGE} positions; {len(self._free):,} of "
                f"{self.n_pages:,} are free.",
                "Use a larger context.",
                needed=sum(counts),
                free=self.n_free,
                limit=self.n_positions,
            )
        self._touch(self._free[len(self._free) - needed :])
        for part, n in zip(parts, counts, strict=True):
            part.timeline.make_room(n)
        top = max(t.first_position + start + len(ids) for t, start, ids in parts)
        self._extend_angles(self._check_position(top - 1) + 1)

    def _touch(self, pages: Sequence[int]) -> None:
        """Get the memory of pages that will be taken; ResourceError if it is not to be had, before it is needed."""
        new = [page for page in pages if not self._is_touched[page]]
        n_bytes = len(new) * self.page_bytes
        if n_bytes < _LARGE or not syscalls.AVAILABLE:
            return
        free = machine.free_memory_bytes()
        if n_bytes <= free:
            for page in new:
                failure = syscalls.madvise(self.page_address(page), self.page_bytes, syscalls.POPULATE_WRITE)
                if failure == errno.ENOMEM:
                    break
                self._is_touched[page] = True
            else:
                return
        raise ResourceError(
            f"The context grows by {len(new) * PAGE:,} positions, which take {format_bytes(n_bytes)}; "
            f"{format_bytes(free)} of memory are free.",
            "Free memory, or open the model with a smaller --ctx or --kv q8_0.",
        )

    def _check_ids(self, ids: npt.ArrayLike) -> list[int]:
        if isinstance(ids, list) and ids and all(type(i) is int for i in ids):
            values: list[int] = ids  # as nearly always: in a fifth of the time
        else:
            values = self._whole_numbers(ids)
        low, high = min(values), max(values)
        if low < 0 or high >= self.config.n_vocab:
            bad = low if low < 0 else high
            raise UsageError(
                f"Token id {bad} is outside the vocabulary of {self.config.n_vocab:,}.", "Encode with its tokenizer."
            )
        return values

    def _whole_numbers(self, ids: npt.ArrayLike) -> list[int]:
        found = np.asarray(ids)
        if found.ndim > 1 or not found.size or found.dtype.kind not in "iu":
            raise UsageError(f"Token ids must be a list of integers, got {found.dtype} {found.shape}.", "Encode first.")
        values: list[int] = found.reshape(-1).tolist()
        return values

    def _check_position(self, position: int) -> int:
        """`position`, if the model was made for it."""
        limit = self.config.n_ctx_train
        if position >= limit:
            raise ContextError(
                f"Position {position:,} is beyond the model's context of {limit:,}.",
                "Use a shorter prompt.",
                needed=position + 1,
                free=0,
                limit=limit,
            )
        return position

    def _extend_angles(self, n: int) -> None:
        """cos and sin up to position n, in transformers' float32 steps: angle = position x frequency, rounded."""
        if n <= self._n_angles:
            return
        half = self.config.rotary_dim // 2
        if n > len(self._angles):
            n_grown = min(max(n, 2 * len(self._angles), 1024), self.config.n_ctx_train)
            grown = np.empty((n_grown, 2 * half), np.float32)
            grown[: self._n_angles] = self._angles[: self._n_angles]
            self._angles = grown
        exponents = (np.arange(0, 2 * half, 2, dtype=np.float32) / np.float32(2 * half)).astype(np.float64)
        powers = np.power(np.float64(np.float32(self.config.rope_theta)), exponents).astype(np.float32)
        frequencies = (np.float32(1) / powers).astype(np.float32)
        positions = np.arange(self._n_angles, len(self._angles), dtype=np.float32)
        angles = (positions[:, None] * frequencies[None]).astype(np.float32).astype(np.float64)
        self._angles[self._n_angles :, :half] = np.cos(angles)
        self._angles[self._n_angles :, half:] = np.sin(angles)
        self._n_angles, self.angles_address = len(self._angles), int(self._angles.ctypes.data)

    @property
    def angles(self) -> npt.NDArray[np.float32]:
        """[position, rotary_dim]: cosines, then sines."""
        return self._angles

    def page_address(self, page: int) -> int:
        return self._base + page * self.page_bytes

    def has_free(self, n_pages: int) -> bool:
        """Whether so many pages are free, pages that are only kept being given back for them."""
        while len(self._free) < n_pages:
            if not self.reclaim():
                return False
        return True

    def touch_next(self, n: int) -> None:
        """Get the memory of the n free pages that are taken next."""
        self._touch(self._free[-n:])

    def take_page(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def share_page(self, page: int) -> None:
        self._users[page] += 1

    def n_users(self, page: int) -> int:
        return self._users[page]

    def is_shared(self, page: int) -> bool:
        return self._users[page] > 1

    def release_page(self, page: int) -> None:
        self._users[page] -= 1
        assert self._users[page] >= 0
        if self._users[page] == 0:
            self._free.append(page)

    def page_view(self, page: int) -> memoryview:
        """The bytes of a page, of all layers and modules."""
        return memoryview(self._memory)[page * self.page_bytes : (page + 1) * self.page_bytes]

    def copy_page(self, source: int, target: int) -> None:
        view, n = memoryview(self._memory), self.page_bytes
        view[target * n : (target + 1) * n] = view[source * n : (source + 1) * n]
        if self.routing is not None:
            self.routing.copy_page(source, target)


class Timeline:
    """The pages of one sequence of positions. `table` holds their addresses for the kernels."""

    def __init__(self, pool: KVPool, first_position: int) -> None:
        if not 0 <= first_position < 1 << 30:
            raise UsageError(f"A timeline cannot begin at position {first_position}.", "Use 0 or more.")
        self.pool = pool
        self.first_position = first_position
        self.length = 0
        self.pages: list[int] = []
        self.table = np.zeros(pool.n_pages, np.int64)
        self.table_address = int(self.table.ctypes.data)

    def pages_needed(self, n_new: int) -> int:
        """Pages that `n_new` more positions take from the pool, a copy of a shared last page included."""
        at = self.length // PAGE
        copy = int(n_new > 0 and at < len(self.pages) and self.pool.is_shared(self.pages[at]))
        return max(0, (self.length + n_new + PAGE - 1) // PAGE - len(self.pages)) + copy

    def has_room(self, length: int, n_angles: int) -> bool:
        """Whether nothing is to be done for positions up to `length`, as for most tokens."""
        at = self.length // PAGE
        return (
            length <= len(self.pages) * PAGE
            and self.first_position + length <= n_angles
            and not (at < len(self.pages) and self.pool.is_shared(self.pages[at]))
        )

    def make_room(self, n_new: int) -> None:
        """Take the pages for `n_new` more positions; a shared page is copied before it is written to."""
        at = self.length // PAGE
        if n_new and at < len(self.pages) and self.pool.is_shared(self.pages[at]):
            page = self.pool.take_page()
            self.pool.copy_page(self.pages[at], page)
            self.pool.release_page(self.pages[at])
            self._set_page(at, page)
        while len(self.pages) * PAGE < self.length + n_new:
            self.pages.append(-1)
            self._set_page(len(self.pages) - 1, self.pool.take_page())

    def share(self, page: int) -> None:
        """`page`, which somebody else holds too, is the next; the caller says how much of it counts."""
        self.pool.share_page(page)
        self.pages.append(page)
        self._set_page(len(self.pages) - 1, page)

    def replace(self, index: int, page: int) -> None:
        """Page `index` is `page`, which holds the same."""
        self.pool.share_page(page)
        self.pool.release_page(self.pages[index])
        self._set_page(index, page)

    def _set_page(self, index: int, page: int) -> None:
        self.pages[index] = page
        self.table[index] = self.pool.page_address(page)

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on; their pages go back to the pool."""
        if not 0 <= length <= self.length:
            raise M2liteError(f"Cannot rewind to position {length} of {self.length}.", "This is a bug in the caller.")
        self.length = length
        keep = (length + PAGE - 1) // PAGE
        for page in self.pages[keep:]:
            self.pool.release_page(page)
        del self.pages[keep:]

    def fork(self) -> Timeline:
        """A second timeline with the same past; the pages are shared until one of the two writes."""
        other = Timeline(self.pool, self.first_position)
        other.length, other.pages = self.length, list(self.pages)
        other.table[:] = self.table
        for page in self.pages:
            self.pool.share_page(page)
        return other

    def release(self) -> None:
        """Give all pages back. The timeline is empty afterwards and may be used again."""
        self.rewind(0)
