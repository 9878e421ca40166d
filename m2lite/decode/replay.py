"""The prediction modules along one timeline: they catch up with what is settled, then say what may follow."""

from __future__ import annotations

from collections.abc import Sequence

from m2lite.decode.sampling import Sampling, foresee
from m2lite.model.cache import KVPool, Timeline
from m2lite.model.forward import Buffers
from m2lite.model.mtp import ModuleScratch, Mtp, States, module_logits, run_module, trunk_states


class Modules:
    """The prediction modules of an engine and the memory in which they compute."""

    def __init__(self, mtp: Mtp, n_used: int, pool: KVPool, buffers: Buffers) -> None:
        self.mtp, self.n_used, self.pool, self.buffers = mtp, n_used, pool, buffers
        self.scratch = ModuleScratch(buffers)


class Replay:
    """What the modules know of one timeline: how far the K and V of each go, and states that the next has not used.

    Modules are run on settled tokens only when they are to draft: what nobody asks for costs nothing.
    """

    def __init__(self, modules: Modules, timeline: Timeline) -> None:
        self._modules, self._timeline = modules, timeline
        self.n_embd = n_embd = modules.buffers.config.n_embd
        self._states = [States(n_embd) for _ in range(modules.n_used)]  # of the trunk and of all modules but the last
        self._trunk, self._mtp = self._states[0], modules.mtp
        self._x = 0 if self._mtp.is_post_norm else modules.buffers.x  # where the trunk leaves its states
        self._tops = [0] * modules.n_used  # positions that module k has seen
        self._top = 0  # the largest of them

    @property
    def n_behind(self) -> int:
        """Positions that the first module has to catch up with."""
        return self._states[0].end - self._tops[0]

    def keep(self, start: int, n_rows: int, n_seen: int) -> None:
        """The trunk has computed n_rows from `start` on; n_seen of them are what the modules have seen there."""
        if self._top > start + n_seen or start != self._trunk.end:
            self._turn(start, start + n_seen)
        self._trunk.append(self._x or trunk_states(self._mtp, self._modules.buffers, n_rows), n_rows)

    @property
    def state(self) -> int:
        """Address of the trunk's state of the only row that was just computed."""
        return self._x or trunk_states(self._mtp, self._modules.buffers, 1)

    def reserve(self, n_rows: int) -> int:
        """Address for the trunk's states of the next n_rows, which the caller puts there as they come."""
        return self._trunk.reserve(n_rows)

    def kept(self, n_rows: int) -> None:
        """So many of them came."""
        self._trunk.end += n_rows

    def _turn(self, start: int, seen: int) -> None:
        """The row goes on at `start`, and what the modules have seen is right up to `seen`."""
        if start > self._states[0].end:  # of positions between, which nobody computed here, K and V are taken as seen
            self._tops = [start] * len(self._tops)
            for states in self._states:
                states.begin(start)
        self._tops = [min(top, seen) for top in self._tops]
        self._top = max(self._tops)
        self._states[0].rewind(start)
        for states in self._states[1:]:
            states.rewind(seen)

    def draft(
        self, k: int, row: Sequence[int], drafts: Sequence[int], sampling: Sampling, stream: int
    ) -> tuple[int, float, int]:
        """(token, share, rows): what module k expects behind `row` and the k drafts before it."""
        m, first, end = self._modules, self._tops[k], len(row) + k
        n_rows = end - first
        while first < end:
            ids = [*row[first : first + m.buffers.n_rows], *drafts[max(0, first - len(row)) :]][: m.buffers.n_rows]
            rows = m.pool.rows_at([(self._timeline, first, ids)])
            previous = self._states[k].address(first - 1)
            state = run_module(m.mtp, k, m.pool, m.buffers, m.scratch, rows, previous)
            if k + 1 < m.n_used:
                self._states[k + 1].append(state, rows.n)
            first += len(ids)
        self._states[k].forget_before(end - 1)
        self._tops[k] = self._top = end
        logits = module_logits(m.mtp, k, m.buffers, len(ids) - 1, 1)
        return *foresee(logits[0], sampling, stream, end), n_rows
