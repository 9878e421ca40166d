"""The planner against machines whose costs are known: it finds what pays, and follows when that changes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from m2lite.drafting.chances import Chances
from m2lite.drafting.cost import CallCost, Sizes
from m2lite.drafting.options import MOST_DRAFTS
from m2lite.drafting.planner import MOST_AT_ONCE, Planner

# M2's widths: bytes of what every token goes through and of an expert, layers, experts, those of a token.
M2 = Sizes(2_080_000_000, 7_963_000, 62, 256, 8)
MODULE = Sizes(60_000_000, 7_963_000, 1, 256, 8, 346_000_000)


def planner_of(n_modules: int) -> Planner:
    return Planner(n_modules, CallCost(M2, MODULE), Chances(n_modules))


@dataclass
class Machine:
    """Calls of S sequences whose costs (seconds of n rows, of a module for one sequence) and acceptance are given."""

    planner: Planner
    rows: Callable[[int], float]
    module: float
    right: float
    n: int = 1
    noise: float = 0.1
    seconds: float = 0.0
    tokens: int = 0
    n_new: int = 1  # of the latest call: what modules have to read in the next
    used: list[int] = field(default_factory=list)
    dice: random.Random = field(default_factory=lambda: random.Random(1))

    def run(self, n_calls: int) -> float:
        """Seconds a token."""
        self.seconds, self.tokens, self.used = 0.0, 0, []
        for _ in range(n_calls):
            self._call()
        return self.seconds / self.tokens

    def _call(self) -> None:
        planner, n, n_levels = self.planner, self.n, 0
        if planner.is_due(n):
            planner.plan(n, [0] * (planner.n_modules + 1))
        share = planner.chances.of_share(0.9)
        while n_levels < planner.depth and planner.goes_on(n_levels, share**n_levels, n, n):
            self._time(self.module * n, lambda s: planner.measures and planner.cost.saw_module(self.n_new, n, s))
            n_levels += 1
        chances = [[planner.chances.of_share(0.9)] * n_levels] * n
        counts = planner.choose(chances, n, MOST_AT_ONCE) if n_levels else [0] * n
        before = self.tokens
        for verified in counts:
            n_right = 0
            while n_right < n_levels and self.dice.random() < self.right:
                n_right += 1
            for k in range(min(n_right + 1, n_levels)):
                planner.chances.saw_draft(k, 0.9, k < n_right)
            self.tokens += 1 + min(n_right, verified)
        self.n_new, n_drafts = self.tokens - before, sum(counts)
        reads = round(M2.reads_by_lot(n + n_drafts))
        self._time(
            self.rows(n + n_drafts), lambda s: planner.measures and planner.cost.saw(n + n_drafts, n_drafts, reads, s)
        )
        planner.saw_call(n_levels, n_drafts)
        self.used.append(n_drafts)

    def _time(self, seconds: float, tell: Callable[[float], object]) -> None:
        taken = seconds * self.dice.lognormvariate(0, self.noise)
        self.seconds += taken
        tell(taken)

    def fixed(self, k: int) -> float:
        """Seconds a token with k drafts for each in every call."""
        tokens = sum(self.right**j for j in range(k + 1))
        return (self.rows(self.n * (k + 1)) + k * self.module * self.n) / (self.n * tokens)

    @property
    def best(self) -> float:
        return min(self.fixed(k) for k in range(self.planner.n_modules + 1) if k < 2 or k * self.n <= MOST_AT_ONCE)


def table(*seconds: float) -> Callable[[int], float]:
    return lambda n: (
        seconds[n - 1] if n <= len(seconds) else seconds[-1] + (n - len(seconds)) * (seconds[-1] - seconds[-2])
    )


CHEAP, DEAR, FLAT = table(1.0, 1.1, 1.2, 1.3), table(1.0, 2.0, 3.0, 4.0), table(1.0, 1.6, 1.65, 1.7)


@pytest.mark.parametrize("rows", [CHEAP, DEAR, FLAT, table(1.0, 1.4, 1.8, 2.2), table(1.0, 1.6, 2.1, 2.5)])
@pytest.mark.parametrize("right", [0.0, 0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("module", [0.05, 0.3])
def test_it_is_near_the_best_number_of_drafts(rows: Callable[[int], float], right: float, module: float) -> None:
    machine = Machine(planner_of(3), rows, module, right)
    machine.run(300)
    taken = machine.run(3000)
    # Each call's time is off by a tenth, so numbers that are some per cent apart are taken for each other.
    assert taken <= 1.06 * machine.best, (taken, [machine.fixed(k) for k in range(4)], machine.used[-50:])


@pytest.mark.parametrize("n", [2, 16, 32])
@pytest.mark.parametrize("right", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("row", [0.01, 0.2, 1.0])
def test_many_sequences(n: int, right: float, row: float) -> None:
    """`row`: what a row computes, in times of what one alone reads."""
    reading = M2.dense_bytes / M2.row_bytes, M2.expert_bytes / M2.row_bytes
    rows: Callable[[int], float] = lambda m: reading[0] + M2.reads_by_lot(m) * reading[1] + m * row  # noqa: E731
    machine = Machine(planner_of(3), rows, 0.02, right, n)
    machine.run(200)
    assert machine.run(600) <= 1.06 * machine.best, ([machine.fixed(k) for k in range(4)], machine.used[-50:])


@pytest.mark.parametrize(("first", "then", "within"), [(CHEAP, DEAR, 1.05), (DEAR, CHEAP, 1.2)])
def test_it_follows_a_machine_that_changes(
    first: Callable[[int], float], then: Callable[[int], float], within: float
) -> None:
    """What did pay is seen at once; what was hopeless is tried seldom, so that it pays is seen late and bit by bit."""
    machine = Machine(planner_of(3), first, 0.05, 0.8)
    machine.run(1000)
    machine.rows = then
    machine.run(2000 if then is DEAR else 20_000)
    assert machine.run(1000) <= within * machine.best


def test_it_follows_a_text_that_changes() -> None:
    machine = Machine(planner_of(3), CHEAP, 0.05, 0.9)
    machine.run(500)
    machine.right = 0.02
    machine.run(300)
    assert machine.run(500) <= 1.03 * machine.fixed(0)
    assert sum(machine.used) < 100


def test_a_machine_that_slows_down_as_a_whole_changes_nothing() -> None:
    """Seconds that were measured long ago keep their ratio to those of now."""
    machine = Machine(planner_of(3), CHEAP, 0.05, 0.8, noise=0.05)
    machine.run(500)
    for factor in (3.0, 0.3, 2.0):
        machine.rows = lambda n, factor=factor: factor * CHEAP(n)  # type: ignore[misc]
        machine.module = factor * 0.05
        assert machine.run(400) <= 1.08 * machine.best, factor


def test_what_is_spent_on_trying() -> None:
    machine = Machine(planner_of(3), DEAR, 1.0, 0.1)
    learning = machine.run(3000)  # each number of modules has its sixteen calls
    assert learning < 1.04 * machine.fixed(0)
    taken = machine.run(20_000)
    assert 0 < sum(machine.used) / 20_000 < 0.01 and taken < 1.02 * machine.fixed(0)


def test_catching_up_must_pay_within_the_answer() -> None:
    """A long prompt behind, a short answer ahead: the modules are left alone; for a long one they are not."""
    machine = Machine(planner_of(3), CHEAP, 0.05, 0.9)
    machine.run(600)
    planner = machine.planner
    for _ in range(20):
        planner.cost.saw_module(1000, 0, 30.0)
    planner._tried = [planner.n_calls] * 4  # nothing is to be tried now
    planner.plan(1, [0, 0, 0, 0])
    assert planner.depth > 0
    assert not planner.is_worth_catching_up(20_000, 20)
    assert planner.is_worth_catching_up(200, 20) and planner.is_worth_catching_up(20_000, 20_000)
    for _ in range(30):
        planner.chances.saw_tokens(1, is_first=True)
    assert not planner.is_worth_catching_up(200, 1)


def test_lookup_verifies_more_the_longer_the_match() -> None:
    planner, right = planner_of(0), {3: 0.1, 5: 0.2, 8: 0.5, 12: 0.8, 18: 0.9, 30: 0.99}
    for n in range(1, MOST_DRAFTS + 2):
        for _ in range(10):
            planner.cost.saw(n, n - 1, round(M2.reads_by_lot(n)), 1 + 0.3 * (n - 1))
    dice = random.Random(2)
    for _ in range(2000):
        length = dice.choice(list(right))
        planner.chances.saw_match(length if dice.random() < right[length] else -length)
    planner.plan(1, [0])
    found = [planner.lookup_drafts(length, 1) for length in right]
    assert found == sorted(found) and found[0] == 0 and found[-1] == MOST_DRAFTS


def choose(chances: Sequence[Sequence[float]], rows: Callable[[int], float], n_most: int = 64) -> list[int]:
    planner, n = planner_of(0), len(chances)
    for size in [n, n, n + 4, n, n + 8] * 10:
        planner.cost.saw(size, size - n, round(M2.reads_by_lot(size)), rows(size))
    planner.plan(n, [0])
    return planner.choose(chances, n, n_most)


def test_the_likeliest_drafts_are_verified() -> None:
    """Where rows cost little all that are likely, up to the room that there is; where they cost a call, none."""
    chances = [[0.95] * 7, [0.9, 0.1], [0.05], []]
    assert choose(chances, table(1.0, 1.0, 1.0, 1.0, 1.01, 1.02)) == [7, 1, 0, 0]
    assert choose(chances, table(1.0, 1.0, 1.0, 1.0, 1.01, 1.02), 3) == [2, 1, 0, 0]
    assert choose(chances, table(1.0, 2.0)) == [0, 0, 0, 0]
