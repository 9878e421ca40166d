"""The gate against a machine whose costs are known: it finds what pays, and follows when that changes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from m2lite.decode.gate import MOST_DRAFTS, QUIET, Gate


@dataclass
class Machine:
    """Steps of a gate whose costs (seconds of n rows, of a module) and acceptance are given."""

    gate: Gate
    rows: Sequence[float]  # index: rows - 1
    module: float
    right: float
    noise: float = 0.1
    seconds: float = 0.0
    tokens: int = 0
    used: list[int] = field(default_factory=list)
    dice: random.Random = field(default_factory=lambda: random.Random(1))

    def run(self, n_steps: int) -> float:
        """Seconds a token."""
        self.seconds, self.tokens, self.used = 0.0, 0, []
        for _ in range(n_steps):
            self._step()
        return self.seconds / self.tokens

    def _step(self) -> None:
        gate, drafted, behind_right = self.gate, 0, 1.0
        if gate.n_steps >= gate.next_plan:
            gate.plan(0, 1000)
        for k in range(gate.n_modules_now):
            if k and not gate.goes_on(k, behind_right):
                break
            self._time(self.module, lambda s, k=k: gate.saw_module(k, 2, s))  # type: ignore[misc]
            behind_right *= gate.chance(0.9)
            drafted += 1
        verified = gate.verified([gate.chance(0.9)] * drafted)
        n_right = 0
        while n_right < verified and self.dice.random() < self.right:
            n_right += 1
        for k in range(min(n_right + 1, verified)):
            gate.saw_draft(k, 0.9, k < n_right)
        self._time(self.rows[verified], lambda s: gate.saw_step(1 + verified, drafted, s))
        self.tokens += 1 + n_right
        self.used.append(verified)

    def _time(self, seconds: float, tell: object) -> None:
        taken = seconds * self.dice.lognormvariate(0, self.noise)
        self.seconds += taken
        tell(taken)  # type: ignore[operator]

    def fixed(self, n: int) -> float:
        """Seconds a token with n drafts in every step."""
        tokens = sum(self.right**k for k in range(n + 1))
        return (self.rows[n] + n * self.module) / tokens


CHEAP, DEAR, FLAT = [1.0, 1.1, 1.2, 1.3], [1.0, 2.0, 3.0, 4.0], [1.0, 1.6, 1.65, 1.7]


@pytest.mark.parametrize("rows", [CHEAP, DEAR, FLAT, [1.0, 1.4, 1.8, 2.2], [1.0, 1.6, 2.1, 2.5]])
@pytest.mark.parametrize("right", [0.0, 0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("module", [0.05, 0.3])
def test_it_is_near_the_best_number_of_drafts(rows: list[float], right: float, module: float) -> None:
    machine = Machine(Gate(3), rows, module, right)
    machine.run(300)
    taken = machine.run(3000)
    best = min(machine.fixed(n) for n in range(4))
    # Each step's time is off by a tenth, so numbers that are some per cent apart are taken for each other.
    assert taken <= 1.06 * best, (taken, [machine.fixed(n) for n in range(4)], machine.used[-50:])


@pytest.mark.parametrize(("first", "then", "within"), [(CHEAP, DEAR, 1.05), (DEAR, CHEAP, 1.2)])
def test_it_follows_a_machine_that_changes(first: list[float], then: list[float], within: float) -> None:
    """What did pay is seen at once; what was hopeless is tried seldom, so that it pays is seen late and bit by bit."""
    machine = Machine(Gate(3), first, 0.05, 0.8)
    machine.run(1000)
    machine.rows = then
    machine.run(2000 if then is DEAR else 20_000)
    assert machine.run(1000) <= within * min(machine.fixed(n) for n in range(4))


def test_it_follows_a_text_that_changes() -> None:
    machine = Machine(Gate(3), CHEAP, 0.05, 0.9)
    machine.run(500)
    machine.right = 0.02
    machine.run(300)
    assert machine.run(500) <= 1.03 * machine.fixed(0)
    assert sum(machine.used) < 100


def test_a_machine_that_slows_down_as_a_whole_changes_nothing() -> None:
    """Seconds that were measured long ago keep their ratio to those of now."""
    machine = Machine(Gate(3), CHEAP, 0.05, 0.8, noise=0.05)
    machine.run(500)
    for factor in (3.0, 0.3, 2.0):
        machine.rows = [factor * x for x in CHEAP]
        machine.module = factor * 0.05
        assert machine.run(400) <= 1.08 * min(machine.fixed(n) for n in range(4)), factor


def test_what_is_spent_on_trying() -> None:
    machine = Machine(Gate(3), DEAR, 1.0, 0.1)
    machine.run(200)
    taken = machine.run(20_000)
    assert 0 < sum(machine.used) / 20_000 < 0.01 and taken < 1.02 * machine.fixed(0)


def test_outliers_are_cut() -> None:
    gate = Gate(0)
    for _ in range(50):
        gate.saw_step(1, 0, 0.1)
        gate.saw_step(4, 0, 0.2)
    before = gate.plain_s
    gate.saw_step(4, 0, 100.0)
    gate.saw_step(1, 0, 100.0)
    assert before is not None and gate.plain_s is not None and gate.plain_s < 2 * before


def test_short_answers_do_not_cut_the_trial_without_modules() -> None:
    """On a small model it is longer than they are; cut each time, what everything is compared with stays unknown."""
    quick = [x * 3e-4 for x in CHEAP]
    machine = Machine(Gate(3), quick, 1e-5, 0.9)
    for _ in range(200):
        machine.gate.saw_answer(20)
        machine.run(20)
    assert machine.gate.is_quick and machine.gate._rows[1].n > 50


def test_catching_up_must_pay_within_the_answer() -> None:
    """A long prompt behind, a short answer ahead: the modules are left alone; for a long one they are not."""
    machine = Machine(Gate(3), CHEAP, 0.05, 0.9)
    machine.run(500)
    gate = machine.gate

    def modules(n_behind: int, n_left: int) -> int:
        gate._tried = [gate.n_steps] * 4  # nothing is to be tried now
        gate.plan(n_behind, n_left)
        return gate.n_modules_now

    assert modules(0, 1000) > 0
    assert modules(8000, 20) == 0
    assert modules(300, 100_000) > 0
    for _ in range(30):
        gate.saw_answer(5)
    assert modules(300, 100_000) == 0


def test_lookup_verifies_more_the_longer_the_match() -> None:
    gate = Gate(0)
    for n in range(1, MOST_DRAFTS + 2):
        for _ in range(10):
            gate.saw_step(n, 0, 1 + 0.3 * (n - 1))
    dice = random.Random(2)
    for _ in range(2000):
        length = dice.choice([3, 5, 8, 12, 18, 30])
        gate.saw_match(length, dice.random() < {3: 0.1, 5: 0.2, 8: 0.5, 12: 0.8, 18: 0.9, 30: 0.99}[length])
    gate.plan(0, 100)
    found = [gate.lookup_drafts(length) for length in (3, 5, 8, 12, 18, 30)]
    assert found == sorted(found) and found[0] == 0 and found[-1] == MOST_DRAFTS


def test_nothing_is_measured_while_the_model_is_being_mapped() -> None:
    """Its first steps wait for pages: what they take says nothing of the later ones."""
    machine = Machine(Gate(3), [8.0, 2.0, 2.5, 3.0], 0.05, 0.75, noise=0.02)
    is_mapping = True
    machine.gate.settling = lambda: is_mapping
    machine.run(60)
    assert machine.gate.plain_s is None
    is_mapping, machine.rows = False, [1.0, 1.7, 2.4, 3.1]
    machine.run(60)
    assert machine.run(300) <= 1.05 * min(machine.fixed(n) for n in range(4))


def test_one_step_in_some_of_a_small_model_is_looked_at() -> None:
    gate = Gate(0)
    assert gate.rest() == 0  # nothing is known yet
    for _ in range(40):
        gate.plan(0, 100)
        gate.saw_step(1, 0, 3e-4)
    n_passed = 0
    while rest := gate.rest():
        n_passed += rest
        gate.pass_by(rest)
        if gate.n_steps >= gate.next_plan:
            gate.plan(0, 100)
    assert 1 < n_passed <= QUIET
    gate.saw_step(1, 0, 0.0)  # one that was not measured is not enough
    assert gate.rest() == 0
    gate.saw_step(1, 0, 3e-4)
    assert gate.rest() > 1
    slow = Gate(0)
    for _ in range(40):
        slow.plan(0, 100)
        slow.saw_step(1, 0, 0.1)
    assert slow.rest() == 0
