"""What calls of a batch cost, as fitted, and which drafts follow from it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from m2lite.decode.batch_drafts import BatchDrafts, CallCost
from m2lite.decode.batch_modules import Followed
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
            cost.saw(n, 0, round(self.reads(n)), self.call(n) * noise)


@pytest.mark.parametrize("row_s", [0.001, 0.02, 0.1])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_costs_are_found(row_s: float, noise: float) -> None:
    """From a batch that fills, is full for a while, and drafts now and then."""
    machine, cost = Machine(30e9, row_s, noise), CallCost(*M2)
    assert not cost.is_known
    machine.show(cost, [*range(8, 33, 2), *([32, 32, 32, 40, 48] * 20)])
    for n in (16, 32, 48, 64):
        assert cost.call(n) == pytest.approx(machine.call(n), rel=0.03 + noise)
        assert cost.draft(n) == pytest.approx(machine.call(n + 1) - machine.call(n), rel=0.1 + 4 * noise)


def test_one_size_alone_leaves_what_is_expected() -> None:
    machine, cost = Machine(30e9, 0.01), CallCost(*M2)
    machine.show(cost, [32] * 50)
    assert cost.call(32) == pytest.approx(machine.call(32), rel=0.03)
    assert 0 < cost.draft(32) < machine.call(32) / 32


def test_another_machine_is_found_out() -> None:
    """One whose memory became slow, after a step in which it did something else: what counts are the proportions."""
    cost, slow = CallCost(*M2), Machine(3e9, 0.01)
    Machine(30e9, 0.01).show(cost, [30, 32, 34, 40] * 20)
    cost.saw(32, 0, round(slow.reads(32)), 1e6)
    for _ in range(10):
        slow.show(cost, [30, 32, 34, 40] * 6)
        share = (slow.call(33) - slow.call(32)) / slow.call(32)
        assert cost.draft(32) / cost.call(32) == pytest.approx(share, rel=0.25)
    assert cost.call(32) == pytest.approx(slow.call(32), rel=0.05)


def lookups(n: int) -> list[Lookup]:
    """Rows that have said the same three times: what follows is told by long matches."""
    found = []
    for i in range(n):
        lookup = Lookup(200)
        lookup.follow([*range(i, i + 30)] * 3 + [*range(i, i + 25)])
        found.append(lookup)
    return found


def chosen(drafts: BatchDrafts, rooms: Sequence[int], n_rows: int) -> list[list[int]]:
    return [ids for ids, _ in drafts.choose([(each, Followed()) for each in lookups(len(rooms))], rooms, n_rows)]


def drafts_of(machine: Machine, n: int, mode: str = "auto", n_rows: int | None = None) -> list[list[int]]:
    drafts = BatchDrafts(Gate(0), CallCost(*M2), None, mode, None)
    for size in [n, n, n + 4, n, n + 8] * 10:
        drafts.saw_step(size, 0, round(machine.reads(size)), machine.call(size))
    return chosen(drafts, [7] * n, n if n_rows is None else n_rows)


def test_nothing_is_drafted_before_steps_were_seen() -> None:
    drafts = BatchDrafts(Gate(0), CallCost(*M2), None, "auto", None)
    assert chosen(drafts, [7, 7], 2) == [[], []]


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
    drafts = drafts_of(Machine(1e15, 0.1), 4, mode="ngram")
    assert list(map(len, drafts)) == [2, 2, 2, 2]  # what there is room for


def test_rooms_are_kept() -> None:
    for n_most, expected in ((None, [2, 0, 5]), (1, [1, 0, 1])):
        drafts = BatchDrafts(Gate(0), CallCost(*M2), n_most, "ngram", None)
        assert list(map(len, chosen(drafts, [2, 0, 5], 3))) == expected


def test_the_surer_draft_is_taken() -> None:
    """Of a module that is sure, or not, beside a match that is short."""
    drafts = BatchDrafts(Gate(1), CallCost(*M2), None, "ngram", None)
    lookup = Lookup(20)
    lookup.follow([1, 2, 3, 4, 5, 1, 2, 3])
    assert drafts.choose([(lookup, Followed(token=9, share=0.999))], [7], 1) == [([9], True)]
    assert drafts.choose([(lookup, Followed(token=9, share=0.1))], [1], 1) == [([4], False)]
    assert drafts.choose([(None, Followed(token=9, share=0.1))], [1], 1) == [([9], True)]


def test_drafts_that_share_experts_with_their_row_cost_less() -> None:
    machine, by_lot, sharing = Machine(30e9, 0.001), CallCost(*M2), CallCost(*M2)
    for cost, part in ((by_lot, 1.0), (sharing, 0.5)):
        for n_drafts in [0, 8] * 40:
            reads = machine.reads(16) + part * (machine.reads(16 + n_drafts) - machine.reads(16))
            seconds = (M2[0] + reads * M2[1]) / machine.bytes_per_s + (16 + n_drafts) * machine.row_s
            cost.saw(16 + n_drafts, n_drafts, round(reads), seconds)
    assert sharing.draft(16) < 0.7 * by_lot.draft(16)


def test_what_is_followed() -> None:
    followed = Followed(top=10)
    assert followed.shared(10).top == 10 and followed.shared(11).top < 0
    followed.cut(4)
    assert followed.top == 4 and followed.token < 0
