"""What calls of a batch cost, as fitted, and which drafts follow from it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from m2lite.decode.batch_drafts import BatchDrafts, CallCost
from m2lite.decode.gate import Gate
from m2lite.decode.lookup import Lookup

# M2's widths: bytes of what every token goes through and of an expert, layers, experts, those of a token.
M2 = (3_000_000_000, 8_000_000, 62, 256, 8)


class Machine:
    """Reads so many bytes a second and takes so long to compute a row; experts are chosen by lot."""

    def __init__(self, bytes_per_s: float, row_s: float, noise: float = 0.0) -> None:
        self.bytes_per_s, self.row_s, self._noise = bytes_per_s, row_s, noise
        self._random = random.Random(0)

    def reads(self, n_rows: int) -> float:
        _, _, n_layers, n_experts, n_used = M2
        return n_layers * n_experts * (1 - (1 - n_used / n_experts) ** n_rows)

    def call(self, n_rows: int) -> float:
        return (M2[0] + self.reads(n_rows) * M2[1]) / self.bytes_per_s + n_rows * self.row_s

    def show(self, cost: CallCost, sizes: Sequence[int]) -> None:
        for n in sizes:
            noise = self._random.uniform(1 - self._noise, 1 + self._noise)
            cost.saw(n, round(self.reads(n)), self.call(n) * noise)


@pytest.mark.parametrize("row_s", [0.001, 0.02, 0.1])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_costs_are_found(row_s: float, noise: float) -> None:
    """From a batch that fills, is full for a while, and drafts now and then."""
    machine, cost = Machine(30e9, row_s, noise), CallCost(*M2)
    assert not cost.is_known
    machine.show(cost, [*range(8, 33, 2), *([32, 32, 32, 40, 48] * 20)])
    for n in (16, 32, 48, 64):
        assert cost.call(n) == pytest.approx(machine.call(n), rel=0.03 + noise)
        assert cost.another(n) == pytest.approx(machine.call(n + 1) - machine.call(n), rel=0.1 + 4 * noise)


def test_one_size_alone_leaves_what_is_expected() -> None:
    machine, cost = Machine(30e9, 0.01), CallCost(*M2)
    machine.show(cost, [32] * 50)
    assert cost.call(32) == pytest.approx(machine.call(32), rel=0.03)
    assert 0 < cost.another(32) < machine.call(32) / 32


def test_another_machine_is_found_out() -> None:
    """One whose memory became slow, after a step in which it did something else: what counts are the proportions."""
    cost, slow = CallCost(*M2), Machine(3e9, 0.01)
    Machine(30e9, 0.01).show(cost, [30, 32, 34, 40] * 20)
    cost.saw(32, round(slow.reads(32)), 1e6)
    for _ in range(10):
        slow.show(cost, [30, 32, 34, 40] * 6)
        share = (slow.call(33) - slow.call(32)) / slow.call(32)
        assert cost.another(32) / cost.call(32) == pytest.approx(share, rel=0.25)
    assert cost.call(32) == pytest.approx(slow.call(32), rel=0.05)


def lookups(n: int) -> list[Lookup]:
    """Rows that have said the same three times: what follows is told by long matches."""
    found = []
    for i in range(n):
        lookup = Lookup(200)
        lookup.follow([*range(i, i + 30)] * 3 + [*range(i, i + 25)])
        found.append(lookup)
    return found


def drafts_of(machine: Machine, n: int, is_auto: bool = True, n_rows: int | None = None) -> list[list[int]]:
    drafts = BatchDrafts(Gate(0), CallCost(*M2), None, is_auto)
    for size in [n, n, n + 4, n, n + 8] * 10:
        drafts.saw_step(size, round(machine.reads(size)), machine.call(size))
    return drafts.choose(lookups(n), [7] * n, n if n_rows is None else n_rows)


def test_nothing_is_drafted_before_steps_were_seen() -> None:
    drafts = BatchDrafts(Gate(0), CallCost(*M2), None, True)
    assert drafts.choose(lookups(2), [7, 7], 2) == [[], []]


def test_rows_that_cost_little_are_drafted() -> None:
    """Where reading binds and nearly all experts are read anyway, sure drafts pay; each is what followed before."""
    drafts = drafts_of(Machine(30e9, 0.0001), 64)
    assert sum(map(len, drafts)) == 64  # as many as answers: there is no room for more
    assert all(ids == list(range(i + 25, i + 25 + len(ids))) for i, ids in enumerate(drafts))


def test_rows_that_cost_what_a_step_costs_are_not_drafted() -> None:
    """Where computing binds, a row costs as much in a step as alone."""
    assert drafts_of(Machine(1e15, 0.1), 64) == [[]] * 64


def test_a_prompt_in_the_call_makes_experts_cheaper() -> None:
    machine = Machine(30e9, 0.1)
    alone, beside = (sum(map(len, drafts_of(machine, 8, n_rows=n))) for n in (8, 500))
    assert alone < beside


def test_fixed_drafts_ask_nobody() -> None:
    drafts = drafts_of(Machine(1e15, 0.1), 4, is_auto=False)
    assert list(map(len, drafts)) == [7, 1, 0, 0]  # up to the room that there is


def test_rooms_are_kept() -> None:
    drafts = BatchDrafts(Gate(0), CallCost(*M2), None, False)
    assert list(map(len, drafts.choose(lookups(3), [2, 0, 5], 3))) == [2, 0, 5]
    drafts = BatchDrafts(Gate(0), CallCost(*M2), 1, False)
    assert list(map(len, drafts.choose(lookups(3), [2, 0, 5], 3))) == [1, 0, 1]
