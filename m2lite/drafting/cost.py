"""What a call of the model costs, and what a prediction module's does. Knows rows, experts and seconds, no token.

A call of n rows that goes through B bytes of weights is expected to take

    level x ratio[n] x (B + row_share x R x n) / (R x (1 + row_share)),      R: bytes that one row alone goes through

so one row costs about 1 in the units of all decisions, and `level` makes seconds of them. `ratio` is measured for each
number of rows (for many: in steps of a twelfth), and is interpolated where nothing was; `row_share`, what a row
computes in the time of its bytes, is fitted to all. The level follows the number of rows that is most frequent, and
only that: a machine that slows down, or a context that grows, moves all costs alike, and what was measured long ago
keeps its ratio to the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from m2lite.model.mtp import Mtp
from m2lite.model.weights import Weights

_ROW_SHARE, _ROW_RANGE = 0.1, 0.3  # expected, and by how much that may be wrong
_NOISE = 0.05  # of a call's time
_FAR_OFF, _OFF = 3.0, 1.5  # times what is expected: more of one call counts as this; the second where it is well known
_FOLLOW = 0.1  # of a change in speed, with each call
_EACH = 16  # rows up to which each number has its own ratio
_ALIKE = 0.2  # numbers of rows whose logarithms (base 2) differ by less are the same kind of call
_LEAST_S = 1e-6  # of a call
_FEW = 8  # times as many rows without drafts as drafts: from there on the drafts' share of experts is not measured
_CATCH_UP = 16  # rows from which on a module's call is one that catches up
_MANY = 0.2  # expected: what a row costs among many, of what it does alone
_EXPECTED = 2  # measurements for which what is expected counts
_KEPT = 3  # measurements for which what an earlier process measured counts: it may have been a busy hour
_FIRST = 4  # measurements, up to which one may be far off
_CERTAIN = 12  # measurements that count: a machine that changes is believed soon


@dataclass(slots=True)
class Estimate:
    """A mean that forgets: the first values count alike, later ones `rate` at least."""

    value: float
    n: float = 0.0
    rate: float = 0.05

    def add(self, x: float) -> None:
        self.n += 1
        self.value += max(1 / self.n, self.rate) * (x - self.value)


@dataclass(slots=True)
class Kind:
    """Calls of about the same number of rows."""

    ratio: Estimate
    rows: Estimate
    reads: Estimate
    use: float = 0.0  # how often, lately
    is_usual: bool = False  # about the most frequent


@dataclass(frozen=True)
class Sizes:
    """Bytes of what a call goes through, and how many experts it chooses from."""

    dense_bytes: int
    expert_bytes: int
    n_layers: int
    n_experts: int
    n_used: int
    head_bytes: int = 0  # where it is not among the dense ones: each row that wants it asks for it

    @classmethod
    def of(cls, weights: Weights) -> Sizes:
        c = weights.config
        return cls(weights.dense_bytes, weights.expert_bytes, c.n_layers, c.n_experts, c.n_experts_used)

    @classmethod
    def of_module(cls, mtp: Mtp) -> Sizes:
        c, module, head = mtp.trunk.config, mtp.modules[0], mtp.trunk.output
        la = module.layer
        dense = (module.eh_proj, la.attn_q, la.attn_k, la.attn_v, la.attn_output, la.ffn_gate_inp)
        experts = sum(m.slice_bytes for m in (la.ffn_gate_exps, la.ffn_up_exps, la.ffn_down_exps))
        return cls(sum(m.slice_bytes for m in dense), experts, 1, c.n_experts, c.n_experts_used, head.slice_bytes)

    @property
    def row_bytes(self) -> int:
        """That one row alone goes through, without a head of its own."""
        return self.dense_bytes + self.n_layers * self.n_used * self.expert_bytes

    def reads_by_lot(self, n_rows: int) -> float:
        """Experts that rows go through together which choose by lot."""
        return self.n_layers * self.n_experts * (1 - (1 - self.n_used / self.n_experts) ** n_rows)


class CallCost:
    """Of one model on this machine; shared by all sequences."""

    def __init__(self, sizes: Sizes, module: Sizes | None = None) -> None:
        self._sizes, self._module = sizes, module
        self.level = 0.0  # seconds of a cost of 1; 0 until something was measured
        self._row_share = _ROW_SHARE
        self._kinds = dict[int, Kind]()
        self._usual = 1
        self._sharing = Estimate(1.0)  # experts gone through, in those by lot
        self._drafts_sharing = Estimate(1.0, n=4)  # of those that drafts add; they stand behind a token like them
        self._draft_ratio = Estimate(1.0)  # of a module's calls that draft
        self._catch_up = Estimate(
            _MANY * module.row_bytes / sizes.row_bytes if module else 0.0
        )  # of a row, in the others
        self._fit()

    # What was seen

    def saw(self, n_rows: int, n_drafts: int, n_expert_reads: int, seconds: float) -> None:
        """A call of n_rows, drafts among them, went through so many experts, of all layers, and took so long."""
        seconds = max(seconds, _LEAST_S)
        if n_rows > 1:
            self._saw_reads(n_rows, n_drafts, n_expert_reads)
        key = _key(n_rows)
        kind = self._kinds.get(key)
        if kind is None:
            ratio = Estimate(self._ratio(key), _EXPECTED)
            kind = self._kinds[key] = Kind(ratio, Estimate(n_rows), Estimate(n_expert_reads))
            kind.is_usual = n_rows == self._usual
        ratio = kind.ratio
        expected = ratio.value * self._plain(n_rows, n_expert_reads)
        self.level = self.level or seconds / expected
        off = min(seconds / (self.level * expected), _FAR_OFF if ratio.n < _FIRST else _OFF)
        if kind.is_usual:
            self.level *= 1 + _FOLLOW * (off - 1)
            ratio.n += 1
        else:
            ratio.add(off * ratio.value)
        if n_rows > _EACH:
            kind.rows.add(n_rows)
        if n_rows > 1:
            kind.reads.add(n_expert_reads)
        kind.use += 1

    def _saw_reads(self, n_rows: int, n_drafts: int, n_expert_reads: int) -> None:
        sizes, n_plain = self._sizes, n_rows - n_drafts
        if n_drafts == 0:
            self._sharing.add(n_expert_reads / sizes.reads_by_lot(n_rows))
        elif n_drafts >= n_plain / _FEW:
            plain = sizes.reads_by_lot(n_plain)
            by_lot = self._sharing.value * (sizes.reads_by_lot(n_rows) - plain)
            more = n_expert_reads - self._sharing.value * plain
            self._drafts_sharing.add(min(max(more / by_lot, 0.0), 1.5) if by_lot else 1.0)

    def saw_module(self, n_rows: int, n_heads: int, seconds: float) -> None:
        """A module's call of n_rows, n_heads of which drafted."""
        if not self.level:
            return
        cost = max(seconds, _LEAST_S) / self.level
        if n_rows >= _CATCH_UP * max(n_heads, 1):
            self._catch_up.add(min(cost / n_rows, _OFF * self._catch_up.value))
            return
        ratio = self._draft_ratio
        off = cost / (ratio.value * self._module_cost(n_rows, n_heads))
        ratio.add(ratio.value * min(off, _FAR_OFF if ratio.n < _FIRST else _OFF))

    # What is expected, in calls of one row

    def call(self, n_rows: int, n_drafts: int = 0) -> float:
        """Of a call of n_rows without drafts, and so many drafts beside them."""
        sizes = self._sizes
        plain = sizes.reads_by_lot(n_rows)
        more = sizes.reads_by_lot(n_rows + n_drafts) - plain
        reads = self._sharing.value * (plain + self._drafts_sharing.value * more)
        return self._ratio(_key(n_rows + n_drafts)) * self._plain(n_rows + n_drafts, reads)

    def draft(self, n_rows: int, n_heads: int) -> float:
        """Of a module's call of n_rows, n_heads of which draft."""
        return self._draft_ratio.value * self._module_cost(n_rows, n_heads)

    def catch_up(self, n_rows: int) -> float:
        """Of a module's calls that read n_rows."""
        return self._catch_up.value * n_rows

    @property
    def plain_s(self) -> float | None:
        """Seconds of a call of one row, as far as one was measured."""
        kind = self._kinds.get(1)
        return None if kind is None or not self.level else self.level * self._cost_of(kind)

    def _plain(self, n_rows: int, reads: float) -> float:
        sizes = self._sizes
        n_bytes = sizes.dense_bytes + reads * sizes.expert_bytes
        return (n_bytes / sizes.row_bytes + self._row_share * n_rows) / (1 + self._row_share)

    def _module_cost(self, n_rows: int, n_heads: int) -> float:
        sizes, trunk = self._module, self._sizes
        assert sizes is not None
        n_bytes = sizes.dense_bytes + sizes.reads_by_lot(n_rows) * sizes.expert_bytes
        n_bytes += sizes.row_bytes * self._row_share * n_rows
        n_bytes += sizes.head_bytes * (bool(n_heads) + self._row_share * n_heads)
        return n_bytes / trunk.row_bytes / (1 + self._row_share)

    def _ratio(self, key: int) -> float:
        """Measured, or between those of the neighbours that were."""
        ratio = self._ratios.get(key)
        if ratio is None:
            below = max((k for k in self._known if k < key), default=None)
            above = min((k for k in self._known if k > key), default=None)
            if below is None or above is None:
                end = above if below is None else below
                ratio = 1.0 if end is None else self._kinds[end].ratio.value
            else:
                a, b, t = (
                    self._kinds[below].ratio.value,
                    self._kinds[above].ratio.value,
                    (key - below) / (above - below),
                )
                ratio = a + t * (b - a)
            self._ratios[key] = ratio
        return ratio

    # What follows

    def refresh(self) -> None:
        """Now and then: which kind is the usual one, and what all of them say of a row."""
        for kind in self._kinds.values():
            kind.use *= 0.9
            kind.ratio.n = min(kind.ratio.n, _CERTAIN)
        most = max(self._kinds.values(), key=lambda kind: kind.use, default=None)
        if most is not None and most.use:
            self._usual = round(most.rows.value)
        for kind in self._kinds.values():
            kind.is_usual = abs(math.log2(kind.rows.value / self._usual)) < _ALIKE
        self._fit()

    def _fit(self) -> None:
        """Choose the row's share, by least squares of relative errors; costs stay as they are."""
        kinds = list(self._kinds.values())
        costs = [self._cost_of(kind) for kind in kinds]
        if len(kinds) > 1:
            points = []
            for kind, cost in zip(kinds, costs, strict=True):
                n_bytes = self._sizes.dense_bytes + kind.reads.value * self._sizes.expert_bytes
                weight = min(kind.ratio.n, _CERTAIN) ** 0.5 / _NOISE
                points.append((n_bytes / self._sizes.row_bytes / cost, kind.rows.value / cost, weight))
            a = sum(u + self._row_share * v for u, v, _ in points) / len(points)  # 1 / a: what a byte takes, about
            points.append((-_ROW_SHARE * a, a, 1 / _ROW_RANGE))
            goals = [1.0] * len(kinds) + [0.0]
            self._row_share = _slope(points, goals)
        for kind, cost in zip(kinds, costs, strict=True):
            kind.ratio.value = cost / self._plain(round(kind.rows.value), kind.reads.value)
        self._known = sorted(self._kinds)
        self._ratios = {key: self._kinds[key].ratio.value for key in self._known}

    # What is kept for the next process: all but the level, which is of this hour

    def estimates(self) -> list[Estimate]:
        return [self._draft_ratio, self._catch_up, self._sharing, self._drafts_sharing]

    def divisors(self, estimates: Sequence[Sequence[float]]) -> list[float]:
        """The values of such `estimates` that are divided by."""
        return [value for value, _ in estimates[:3]]

    def kinds(self) -> list[list[float]]:
        """[rows, cost, measurements, experts gone through] of each kind."""
        return [[k.rows.value, self._cost_of(k), k.ratio.n, k.reads.value] for k in self._kinds.values()]

    def restore_kinds(self, kinds: Sequence[Sequence[float]]) -> None:
        """Begin with these."""
        self._kinds = {}
        for rows, cost, n, reads in kinds:
            kind = Kind(Estimate(1.0, min(n, _KEPT)), Estimate(rows, n), Estimate(reads, n))
            kind.ratio.value = cost / self._cost_of(kind)
            self._kinds[_key(round(rows))] = kind
        self.refresh()

    def _cost_of(self, kind: Kind) -> float:
        return kind.ratio.value * self._plain(round(kind.rows.value), kind.reads.value)


def _key(n_rows: int) -> int:
    return n_rows if n_rows <= _EACH else _EACH + round(8 * math.log2(n_rows / _EACH))


def _slope(points: list[tuple[float, float, float]], goals: list[float]) -> float:
    """y / x of the least squares solution of u x + v y = goal, for points (u, v, weight); within 0 and 10."""
    uu = sum((w * u) ** 2 for u, _, w in points)
    uv = sum(w * u * w * v for u, v, w in points)
    vv = sum((w * v) ** 2 for _, v, w in points)
    ug = sum(w * u * w * g for (u, _, w), g in zip(points, goals, strict=True))
    vg = sum(w * v * w * g for (_, v, w), g in zip(points, goals, strict=True))
    x, y = ug * vv - vg * uv, vg * uu - ug * uv  # both times the determinant, which is positive
    return min(max(y / x, 0.0), 10.0) if x > 0 else 10.0
