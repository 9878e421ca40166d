"""The prediction modules along many sequences: they follow what was computed, then say what may come. Chooses nothing.

Module k needs at each position the token there and g_k of the position before (g_0: the trunk's state). Both are kept
until a module is asked: what nobody asks for costs nothing. Modules of all sequences run in one call.

Memory is bounded. States that were dropped, or that an earlier process had, are a gap: the modules behind it have
no K and V there, so they draft no more for that sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m2lite.model.buffers import Buffers
from m2lite.model.cache import KVPool, Timeline
from m2lite.model.forward import head_of
from m2lite.model.mtp import ModuleScratch, Mtp, run_module, trunk_states
from m2lite.model.observer import Observer
from m2lite.sampling.draw import Sampling, foresee

F32 = npt.NDArray[np.float32]
_FEW = 8  # rows of a level's states for which there is always room


class LevelStates:
    """g of one level at consecutive positions, float32 [n_embd] each: those that its module has not used.

    A row that was not kept, as the one before a gap or before position 0, is zeros.
    """

    def __init__(self, n_embd: int) -> None:
        self.rows: F32 = np.empty((_FEW, n_embd), np.float32)
        self._first, self.end = 0, 0  # position of rows[0]; how many positions are known, kept or not
        self.begin(0)

    def begin(self, position: int) -> None:
        """Nothing is kept, and `position` is the next."""
        self._first, self.end = position - 1, position
        if len(self.rows) > _FEW:
            self.rows = np.empty((_FEW, self.rows.shape[1]), np.float32)
        self.rows[0] = 0

    def append(self, new: F32) -> None:
        """g of [n] positions from `end` on."""
        at, n = self.end - self._first, len(new)
        if at + n > len(self.rows):
            self._resize(max(at + n, min(2 * at, at + 1024)), 0, at)
        self.rows[at : at + n] = new
        self.end += n

    def get(self, position: int, n: int) -> F32:
        """g [n, n_embd] from `position` on; a view."""
        at = position - self._first
        assert at >= 0 and position + n <= self.end, (self._first, position, n, self.end)
        return self.rows[at : at + n]

    def forget_before(self, position: int) -> None:
        """The module needs none before `position` any more."""
        n_kept, at = self.end - position, position - self._first
        if at < max(n_kept, 1):  # else what is kept would be copied again and again
            return
        if len(self.rows) > 4 * (n_kept + _FEW):
            self._resize(n_kept + _FEW, at, n_kept)
        else:
            self.rows[:n_kept] = self.rows[at : at + n_kept]
        self._first = position

    def rewind(self, length: int) -> None:
        """Positions from `length` on are to be computed again."""
        if length - 1 < self._first:
            self.begin(length)
        else:
            self.end = min(self.end, length)

    def _resize(self, n_rows: int, at: int, n_kept: int) -> None:
        rows = np.empty((n_rows, self.rows.shape[1]), np.float32)
        rows[:n_kept] = self.rows[at : at + n_kept]
        self.rows = rows


class ModuleState:
    """What the modules know of one sequence."""

    def __init__(self, n_modules: int, n_embd: int) -> None:
        self.tops = [0] * n_modules  # positions whose K and V module k has written; from some on for drafts
        self.states = [LevelStates(n_embd) for _ in range(n_modules)]  # level k, for module k
        self.n_usable = n_modules  # the modules from this on have a gap
        self._n_there = 0  # positions that had all modules' K and V from the start

    def begin(self, n_cached: int, followed: Sequence[int]) -> None:
        """The sequence begins with n_cached positions that are there; up to followed[k] there are module k's K and V.

        Module k needs the state before its first row, which comes of a row of module k - 1 (of the trunk): so where
        followed[k] lies n_modules positions behind n_cached, each goes on as if it had computed all.
        """
        n_modules = len(self.tops)
        followed = [*followed, *[0] * (n_modules - len(followed))]
        self.n_usable = next((k for k in range(n_modules) if followed[k] < n_cached), n_modules)
        self._n_there = min(followed[: self.n_usable], default=0)
        first = n_cached
        for k, states in enumerate(self.states):
            states.begin(first)
            first = min(followed[k], first + 1)
            self.tops[k] = first

    @property
    def n_computed(self) -> int:
        """Positions that the trunk has computed, as far as is known here."""
        return self.states[0].end

    @property
    def n_bytes(self) -> int:
        return sum([states.rows.nbytes for states in self.states])

    def n_behind(self, n_modules: int) -> int:
        """Rows that the first n_modules have to read before they can draft, of all of them."""
        return sum([self.states[0].end - top for top in self.tops[:n_modules]])

    def keep(self, start: int, seen: int, new: F32) -> None:
        """The trunk's states of rows from `start` on, which stand. Modules have seen what stands up to `seen`."""
        trunk, seen = self.states[0], max(seen, self._n_there)
        if start == trunk.end and max(self.tops) <= seen and self.n_usable:  # as nearly always
            trunk.append(new)
            return
        if start > trunk.end:
            self.drop(start)
        trunk.rewind(start)
        for k, top in enumerate(self.tops):
            if top > seen:
                self.tops[k] = seen
                if k + 1 < self.n_usable:
                    self.states[k + 1].rewind(seen)
        if self.n_usable:
            trunk.append(new)
        else:
            trunk.begin(start + len(new))

    def forget_drafts(self) -> None:
        """What modules have seen behind the computed positions was not to be."""
        self.keep(self.n_computed, self.n_computed, self.states[0].rows[:0])

    def drop(self, start: int) -> None:
        """What came before `start` will not be followed: modules that are not there yet stay behind for good."""
        self.n_usable = next((k for k in range(self.n_usable) if self.tops[k] < start), self.n_usable)
        for states in self.states[self.n_usable :]:
            states.begin(start)


class Draft(NamedTuple):
    """What a module expects."""

    token: int
    share: float  # how sure it is


class Todo(NamedTuple):
    """Rows of a module: `ids` from position `first` on. With `draw` it says what follows the last of them."""

    state: ModuleState
    timeline: Timeline
    first: int
    ids: Sequence[int]
    draw: tuple[Sampling, int] | None = None  # and rng_stream


class Modules:
    """The prediction modules of a model, and the memory in which they compute."""

    def __init__(self, mtp: Mtp, n_used: int, pool: KVPool, buffers: Buffers) -> None:
        self._mtp, self.n_used, self._pool, self._buffers = mtp, n_used, pool, buffers
        self._scratch = ModuleScratch(buffers)
        self._previous: F32 = np.empty((0, buffers.config.n_embd), np.float32)
        self._x: F32 = buffers.array("x")
        self.observers: Sequence[Observer] = ()

    def new(self, n_most: int) -> ModuleState:
        """Of a sequence for which n_most of the modules may draft."""
        return ModuleState(min(self.n_used, n_most), self._x.shape[1])

    def trunk_states(self, n_rows: int) -> F32:
        """g_0 [n_rows, n_embd] of the call that was just computed; a view, valid until the next."""
        if not self._mtp.is_post_norm:
            return self._x
        trunk_states(self._mtp, self._buffers, n_rows)
        return self._buffers.array("h")

    def run(self, k: int, todo: Sequence[Todo]) -> list[Draft | None]:
        """Module k computes the rows of all; for those that draw, what it expects behind their last."""
        n_free = self._buffers.n_rows
        found: list[Draft | None] = [None] * len(todo)
        parts, ends = list[Todo](), list[int]()  # of one call; ends[j]: which of todo part j ends, -1 if it goes on
        for i, each in enumerate(todo):
            at = 0
            while at < len(each.ids):
                ids = each.ids[at : at + n_free]
                parts.append(each._replace(first=each.first + at, ids=ids))
                at += len(ids)
                n_free -= len(ids)
                ends.append(i if at == len(each.ids) else -1)
                if not n_free:
                    self._call(k, parts, ends, found)
                    parts, ends, n_free = [], [], self._buffers.n_rows
        if parts:
            self._call(k, parts, ends, found)
        return found

    def _call(self, k: int, parts: Sequence[Todo], ends: Sequence[int], found: list[Draft | None]) -> None:
        previous = self._gather(k, parts)
        rows = self._pool.rows_at([(part.timeline, part.first, part.ids) for part in parts])
        run_module(
            self._mtp, k, self._pool, self._buffers, self._scratch, rows, int(previous.ctypes.data), self.observers
        )
        for part, last in zip(parts, rows.last, strict=True):
            own, n = part.state, len(part.ids)
            if k + 1 < own.n_usable:
                own.states[k + 1].append(self._x[last + 1 - n : last + 1])
            own.tops[k] = part.first + n
            own.states[k].forget_before(min(own.tops[k], own.n_computed) - 1)  # behind that are drafts, maybe wrong
        asked = [(part, last, i) for part, last, i in zip(parts, rows.last, ends, strict=True) if i >= 0 and part.draw]
        chosen = [last for _, last, _ in asked]
        logits = head_of(self._mtp.trunk, self._buffers, chosen, self._mtp.modules[k].norm)
        for own_logits, (part, _, i) in zip(logits, asked, strict=True):
            assert part.draw is not None
            found[i] = Draft(*foresee(own_logits, *part.draw, part.first + len(part.ids)))

    def _gather(self, k: int, parts: Sequence[Todo]) -> F32:
        """g_k [T, n_embd] of the positions before the rows."""
        pieces = [part.state.states[k].get(part.first - 1, len(part.ids)) for part in parts]
        if len(pieces) == 1:
            return pieces[0]
        n = sum(map(len, pieces))
        if n > len(self._previous):
            self._previous = np.empty((max(n, 2 * len(self._previous)), self._x.shape[1]), np.float32)
        return np.concatenate(pieces, out=self._previous[:n])
