"""Drafts in a batch: tokens that earlier ones foretell, verified beside other answers where that pays. Knows no row.

A call in lock-step reads each expert once for all rows that chose it, so one row more costs what it computes and those
experts that nobody else chose: little where many answers are under way, much where few are. What calls cost is measured
as they go, as is how often a match of some length is right (`Gate`, which sessions share).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING

from m2lite.decode.gate import MOST_DRAFTS, Estimate

if TYPE_CHECKING:  # these import Numba
    from m2lite.decode.gate import Gate
    from m2lite.decode.lookup import Lookup
    from m2lite.model.weights import Weights

_MARGIN = 1.1  # times what drafts cost they must bring: what looks best among estimates rarely is as good
_KEEP = 0.96  # of what was seen, with each step
_ROW = 0.1  # expected: of a step of one row, what another row takes with no bytes of its own
_ROW_RANGE = 0.3  # by which that may be wrong
_NOISE = 0.05  # of a step's time
_FAR_OFF = 4.0  # times what is expected: more of one step counts as this
_FIRST = 4  # steps that are measured before anything is drafted
_FEW = 8  # drafts of a step, at least, that there is room for: else as many as answers


class CallCost:
    """What a call of n rows takes: seconds = a x (bytes of weights that it goes through) + d x n, both fitted.

    Each step counts by its relative error. Steps of one size tell a and d apart as little as bytes and rows differ,
    and d is as expected then.
    """

    def __init__(self, dense_bytes: int, expert_bytes: int, n_layers: int, n_experts: int, n_used: int) -> None:
        """`expert_bytes`: of one expert of one layer; `dense_bytes`: what every call goes through."""
        self._dense, self._expert = dense_bytes, expert_bytes
        self._n_stacked, self._n_chosen = n_layers * n_experts, n_layers * n_used
        self._others = 1 - n_used / n_experts  # chance that a row has not chosen an expert
        self._row_bytes = _ROW * (dense_bytes + self._n_chosen * expert_bytes)  # as which a row's computing counts
        self._sharing = Estimate(1.0)  # experts gone through, in those that rows would choose by lot
        self._byte_s = self._extra_s = 0.0  # a, and what d is more than a x _row_bytes
        self._uu = self._uv = self._vv = self._u = self._v = self._n = 0.0

    @classmethod
    def of(cls, weights: Weights) -> CallCost:
        c = weights.config
        return cls(weights.dense_bytes, weights.expert_bytes, c.n_layers, c.n_experts, c.n_experts_used)

    @property
    def is_known(self) -> bool:
        return self._n >= 1 and self._byte_s > 0

    def saw(self, n_rows: int, n_expert_reads: int, seconds: float) -> None:
        """A call of n_rows went through so many experts, of all layers, and took so long."""
        self._sharing.add(n_expert_reads / self._reads_by_lot(n_rows))
        n_bytes = self._dense + n_expert_reads * self._expert + n_rows * self._row_bytes
        if self.is_known:
            seconds = min(seconds, _FAR_OFF * (self._byte_s * n_bytes + self._extra_s * n_rows))
        u, v = n_bytes / seconds, n_rows / seconds
        self._uu, self._uv, self._vv = (_KEEP * old + new for old, new in zip(
            (self._uu, self._uv, self._vv), (u * u, u * v, v * v), strict=True
        ))  # fmt: skip
        self._u, self._v, self._n = _KEEP * self._u + u, _KEEP * self._v + v, _KEEP * self._n + 1
        one_row_s = seconds / n_bytes * self._row_bytes / _ROW
        vv = self._vv + (_NOISE / (_ROW_RANGE * one_row_s)) ** 2
        determinant = self._uu * vv - self._uv * self._uv
        self._byte_s = max(0.0, (self._u * vv - self._v * self._uv) / determinant)
        self._extra_s = max(-self._byte_s * self._row_bytes, (self._v * self._uu - self._u * self._uv) / determinant)

    def _reads_by_lot(self, n_rows: int) -> float:
        return self._n_stacked * (1 - self._others**n_rows)

    def call(self, n_rows: int) -> float:
        """Seconds expected of a call of n_rows."""
        n_bytes = self._dense + self._sharing.value * self._reads_by_lot(n_rows) * self._expert
        return self._byte_s * (n_bytes + n_rows * self._row_bytes) + self._extra_s * n_rows

    def another(self, n_rows: int) -> float:
        """What one row more takes than a call of n_rows."""
        return self.call(n_rows + 1) - self.call(n_rows)


class BatchDrafts:
    """Chooses drafts for the answers of a batch, and learns from the steps."""

    def __init__(self, gate: Gate, cost: CallCost, n_most: int | None, is_auto: bool) -> None:
        """`n_most`: drafts of an answer in a step; without `is_auto` so many are verified wherever anything matches."""
        self._gate, self.cost, self._is_auto = gate, cost, is_auto
        self._n_most = n_most or MOST_DRAFTS
        self._n_seen = 0

    def saw_step(self, n_rows: int, n_expert_reads: int, seconds: float) -> None:
        """A call of n_rows, all of them of answers."""
        self._n_seen += 1
        if self._n_seen > _FIRST // 2:  # the first ones find cold caches
            self.cost.saw(n_rows, n_expert_reads, seconds)

    def lookup(self, row: Sequence[int], n_most: int) -> Lookup:
        """Of an answer whose row has these tokens, and may have n_most."""
        from m2lite.decode.lookup import Lookup

        lookup = Lookup(n_most)
        lookup.follow(row)
        return lookup

    def push(self, lookup: Lookup, new: Sequence[int]) -> None:
        """An answer goes on."""
        for told in lookup.push(new):
            self._gate.saw_match(abs(told), told > 0)

    def choose(self, lookups: Sequence[Lookup], rooms: Sequence[int], n_rows: int) -> list[list[int]]:
        """Drafts for each answer, at most its room, in a call that has n_rows without them."""
        n = len(lookups)
        found = [i for i in range(n) if rooms[i] > 0 and lookups[i].length]
        if not found or (self._is_auto and self._n_seen < _FIRST):
            return [[] for _ in lookups]
        if self._is_auto:
            counts = self._worth({i: self._chances(lookups[i], rooms[i]) for i in found}, n, n_rows)
        else:
            n_left, counts = max(n, _FEW), dict[int, int]()
            for i in found:
                counts[i] = min(rooms[i], self._n_most, n_left)
                n_left -= counts[i]
        return [lookups[i].guess(counts[i]) if counts.get(i) else [] for i in range(n)]

    def _chances(self, lookup: Lookup, room: int) -> list[float]:
        return self._gate.lookup_chances(lookup.length)[: min(room, self._n_most)]

    def _worth(self, chances: dict[int, list[float]], n_answers: int, n_rows: int) -> dict[int, int]:
        """How many drafts of which answers: the likeliest first, as long as each brings more time than it takes."""
        cost, counts = self.cost, dict[int, int]()
        seconds, tokens = cost.call(n_answers), float(n_answers)
        waiting = [(-each[0], i) for i, each in chances.items()]  # chance that a draft and those before it are right
        heapq.heapify(waiting)
        for n_more in range(max(n_answers, _FEW)):
            if not waiting:
                break
            right, i = heapq.heappop(waiting)
            price = cost.another(n_rows + n_more)
            if -right * seconds / tokens < _MARGIN * price:
                break
            seconds, tokens, counts[i] = seconds + price, tokens - right, counts.get(i, 0) + 1
            if counts[i] < len(chances[i]):
                heapq.heappush(waiting, (right * chances[i][counts[i]], i))
        return counts
