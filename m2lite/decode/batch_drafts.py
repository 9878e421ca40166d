"""Drafts in a batch: tokens that earlier ones foretell, verified beside other answers where that pays. Knows no row.

A call in lock-step reads each expert once for all rows that chose it, so one row more costs what it computes and those
experts that nobody else chose: little where many answers are under way, much where few are. What calls cost is measured
as they go, as is how often a match of some length is right (`Gate`, which sessions share).
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from m2lite.decode.gate import MOST_DRAFTS, Estimate

if TYPE_CHECKING:  # these import Numba
    from m2lite.decode.batch_modules import BatchModule, Followed, Settled
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
_TRIAL, _PAUSE = 16, 512  # steps after which the module has to have paid; before it is tried again


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
        self._drafts_sharing = Estimate(1.0, n=_FIRST)  # of those that drafts add; they stand behind a row like them
        self._byte_s = self._extra_s = 0.0  # a, and what d is more than a x _row_bytes
        self._uu = self._uv = self._vv = self._u = self._v = self._n = 0.0

    @classmethod
    def of(cls, weights: Weights) -> CallCost:
        c = weights.config
        return cls(weights.dense_bytes, weights.expert_bytes, c.n_layers, c.n_experts, c.n_experts_used)

    @property
    def is_known(self) -> bool:
        return self._n >= 1 and self._byte_s > 0

    def saw(self, n_rows: int, n_drafts: int, n_expert_reads: int, seconds: float) -> None:
        """A call of n_rows, drafts among them, went through so many experts, of all layers, and took so long."""
        n_plain = n_rows - n_drafts
        if n_drafts == 0:
            self._sharing.add(n_expert_reads / self._reads_by_lot(n_rows))
        elif n_drafts >= n_plain / _FEW:
            more = n_expert_reads - self._sharing.value * self._reads_by_lot(n_plain)
            by_lot = self._sharing.value * (self._reads_by_lot(n_rows) - self._reads_by_lot(n_plain))
            self._drafts_sharing.add(min(max(more / by_lot, 0.0), 1.5))
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
        """Seconds expected of a call of n_rows, none of them drafts."""
        n_bytes = self._dense + self._sharing.value * self._reads_by_lot(n_rows) * self._expert
        return self._byte_s * (n_bytes + n_rows * self._row_bytes) + self._extra_s * n_rows

    def draft(self, n_rows: int) -> float:
        """What a draft more takes than a call of n_rows."""
        n_experts = self._reads_by_lot(n_rows + 1) - self._reads_by_lot(n_rows)
        n_bytes = self._drafts_sharing.value * self._sharing.value * n_experts * self._expert
        return self._byte_s * (n_bytes + self._row_bytes) + self._extra_s


class BatchDrafts:
    """Chooses drafts for the answers of a batch, and learns from the steps."""

    def __init__(self, gate: Gate, cost: CallCost, n_most: int | None, mode: str, module: BatchModule | None) -> None:
        """`n_most`: drafts of an answer in a step; but for mode "auto" so many are verified wherever there are any."""
        self._gate, self.cost, self._module = gate, cost, module
        self._is_auto, self._looks_up = mode == "auto", mode != "mtp"
        self._n_most = n_most or MOST_DRAFTS
        self._n_seen = 0
        self._gain_s, self._module_s = Estimate(0.0), Estimate(0.0)  # what the module's drafts bring a step; its time
        self._plan_at, self._is_on = _TRIAL, True

    def saw_step(self, n_rows: int, n_drafts: int, n_expert_reads: int, seconds: float) -> None:
        """A call of n_rows, drafts among them; 0 seconds if it was not one of answers alone."""
        if not seconds:
            return
        self._n_seen += 1
        if self._n_seen > _FIRST // 2:  # the first ones find cold caches
            self.cost.saw(n_rows, n_drafts, n_expert_reads, seconds)
        if self._module is not None and self._is_auto and self._n_seen >= self._plan_at:
            self._is_on = not self._is_on or self._gain_s.value > self._module_s.value
            self._plan_at = self._n_seen + (_TRIAL if self._is_on else _PAUSE)

    @property
    def follows(self) -> bool:
        """Whether the prediction module is to follow what is settled."""
        return self._module is not None and self._is_on

    def follow(self, n_computed: int, rows: Sequence[Settled], is_measure: bool) -> None:
        """The prediction module follows; `is_measure` where nobody read a prompt."""
        assert self._module is not None
        began = time.perf_counter()
        self._module.follow(n_computed, rows)
        if is_measure:
            self._module_s.add(time.perf_counter() - began)

    def saw_foreseen(self, followed: Followed, token: int) -> None:
        """The row went on with `token`, whether a draft of it was verified or not."""
        if followed.token >= 0:
            self._gate.saw_draft(0, followed.share, followed.token == token)
            followed.token = -1

    def lookup(self, row: Sequence[int], n_most: int) -> Lookup | None:
        """Of an answer whose row has these tokens, and may have n_most."""
        if not self._looks_up:
            return None
        from m2lite.decode.lookup import Lookup

        lookup = Lookup(n_most)
        lookup.follow(row)
        return lookup

    def push(self, lookup: Lookup, new: Sequence[int]) -> None:
        """An answer goes on."""
        for told in lookup.push(new):
            self._gate.saw_match(abs(told), told > 0)

    def choose(
        self, known: Sequence[tuple[Lookup | None, Followed]], rooms: Sequence[int], n_rows: int
    ) -> list[tuple[list[int], bool]]:
        """Drafts for each answer, at most its room, in a call that has n_rows without them: (ids, if the module's)."""
        nothing: tuple[list[int], bool] = [], False
        found = [i for i, (lookup, followed) in enumerate(known) if rooms[i] > 0 and _may_draft(lookup, followed)]
        if not found or (self._is_auto and self._n_seen < _FIRST):
            self._gain_s.add(0.0)
            return [nothing] * len(known)
        chances = {i: self._chances(*known[i], rooms[i]) for i in found}
        counts = self._worth(chances, len(known), n_rows) if self._is_auto else _all(chances, max(len(known), _FEW))
        return [_drafts(*known[i], counts[i], chances[i][1]) if i in counts else nothing for i in range(len(known))]

    def _chances(self, lookup: Lookup | None, followed: Followed, room: int) -> tuple[list[float], bool]:
        """Of drafts, that each is right if those before it are; and whether they are the module's."""
        n_most = min(room, self._n_most)
        looked_up = self._gate.lookup_chances(lookup.length)[:n_most] if lookup is not None and lookup.length else []
        foreseen = self._gate.chance(followed.share) if followed.token >= 0 else 0.0
        if foreseen and not (looked_up and looked_up[0] >= foreseen):
            return [foreseen], True
        return looked_up, False

    def _worth(self, chances: dict[int, tuple[list[float], bool]], n_answers: int, n_rows: int) -> dict[int, int]:
        """How many drafts of which answers: the likeliest first, as long as each brings more time than it takes."""
        cost, counts, gain_s = self.cost, dict[int, int](), 0.0
        seconds, tokens = cost.call(n_answers), float(n_answers)
        waiting = [(-each[0], i) for i, (each, _) in chances.items()]  # chance that it and those before it are right
        heapq.heapify(waiting)
        for n_more in range(max(n_answers, _FEW)):
            if not waiting:
                break
            right, i = heapq.heappop(waiting)
            price, worth = cost.draft(n_rows + n_more), -right * seconds / tokens
            if worth < _MARGIN * price:
                break
            own, is_foreseen = chances[i]
            gain_s += (worth - price) * is_foreseen
            seconds, tokens, counts[i] = seconds + price, tokens - right, counts.get(i, 0) + 1
            if counts[i] < len(own):
                heapq.heappush(waiting, (right * own[counts[i]], i))
        self._gain_s.add(gain_s)
        return counts


def _may_draft(lookup: Lookup | None, followed: Followed) -> bool:
    return followed.token >= 0 or (lookup is not None and lookup.length > 0)


def _all(chances: dict[int, tuple[list[float], bool]], n_most: int) -> dict[int, int]:
    """Every draft that there is, up to n_most: all answers' first ones, then their second ones."""
    counts = dict[int, int]()
    for n in range(1, MOST_DRAFTS + 1):
        for i, (each, _) in chances.items():
            if len(each) >= n and n_most:
                counts[i] = n
                n_most -= 1
    return counts


def _drafts(lookup: Lookup | None, followed: Followed, n: int, is_foreseen: bool) -> tuple[list[int], bool]:
    if is_foreseen:
        return [followed.token], True
    assert lookup is not None
    return lookup.guess(n), False
