"""What stays and what leaves, by use, pins and sweeps."""

from __future__ import annotations

import numpy as np
import pytest

from m2lite.storage.ledger import Ledger


def ledger_of(n_units: int, n_fit: int, half_life: float = 1e6) -> Ledger:
    """All units are of 10 bytes."""
    return Ledger(np.full(n_units, 10, np.int64), 10 * n_fit, half_life)


def visit(ledger: Ledger, unit: int) -> list[int]:
    """Use a unit, and bring it if it is not there; what leaves for it."""
    ledger.use(unit)
    left: list[int] = []
    if not ledger.has(unit):
        made = ledger.make_room(10)
        assert made is not None
        left = made
        ledger.add(unit)
    ledger.advance()
    return left


def test_short_half_life_is_lru_and_a_long_one_lfu() -> None:
    visits = [0, 0, 0, 1, 2]
    lru, lfu = ledger_of(4, 3, half_life=0.5), ledger_of(4, 3)
    for unit in visits:
        visit(lru, unit)
        visit(lfu, unit)
    assert visit(lru, 3) == [0]  # used longest ago
    assert visit(lfu, 3) == [1]  # used least, and longer ago than 2


def test_pinned_units_stay() -> None:
    ledger = ledger_of(4, 2)
    visit(ledger, 0)
    visit(ledger, 1)
    ledger.pin(0)
    assert ledger.make_room(20) is None
    assert ledger.has(0) and ledger.has(1) and ledger.resident_bytes == 20  # nothing was forgotten on the way
    assert visit(ledger, 2) == [1]
    ledger.unpin(0)
    assert visit(ledger, 3) in ([0], [2])


def test_units_of_different_sizes() -> None:
    ledger = Ledger(np.array([30, 10, 10, 25], np.int64), 50)
    for unit in (1, 2, 0):
        ledger.use(unit)
        assert ledger.make_room(int(ledger.sizes[unit])) == []
        ledger.add(unit)
        ledger.advance()
    assert ledger.make_room(25) == [1, 2, 0]
    assert ledger.resident_bytes == 0


def test_a_sweep_hits_as_much_as_fits() -> None:
    """Round and round over all units LRU holds nothing; here the cache's share is found every time."""
    n, fit = 40, 24
    ledger = ledger_of(n, fit)
    hits = []
    for _ in range(5):
        found = 0
        for unit in range(n):
            ledger.sweep(unit)
            ledger.use(unit)
            if ledger.has(unit):
                found += 1
            else:
                assert ledger.make_room(10) is not None
                ledger.add(unit)
            ledger.pass_by(unit)
        hits.append(found)
    assert hits[1:] == [fit - 1] * 4  # one place is the unit's that is visited
    ledger.sweep(None)
    assert ledger.make_room(10) is not None


def test_heat_goes_on_in_another_run() -> None:
    first = ledger_of(6, 3, half_life=2)
    for unit in (0, 1, 1, 2, 3, 3, 3):
        visit(first, unit)
    second = ledger_of(6, 3, half_life=2)
    second.warm(first.heat)
    found = []
    while (unit := second.hottest()) is not None:
        found.append(unit)
        second.add(unit)
    assert found == sorted(range(4), key=lambda u: -first.heat[u])


def test_weights_do_not_overflow() -> None:
    ledger = ledger_of(3, 2, half_life=0.01)
    for unit in [0, 1, 2] * 200:
        visit(ledger, unit)
    assert np.isfinite(ledger.heat).all()
    assert ledger.has(2) and ledger.has(1) and not ledger.has(0)


@pytest.mark.parametrize("seed", range(20))
def test_never_more_than_the_capacity(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 50, 30)
    ledger = Ledger(sizes, 120, half_life=float(rng.uniform(0.5, 50)))
    pinned: list[int] = []
    for _ in range(500):
        unit = int(rng.integers(30))
        ledger.use(unit)
        if not ledger.has(unit) and ledger.make_room(int(sizes[unit])) is not None:
            ledger.add(unit)
            if rng.random() < 0.3:
                ledger.pin(unit)
                pinned.append(unit)
        while len(pinned) > 2 or (pinned and rng.random() < 0.3):
            ledger.unpin(pinned.pop())
        ledger.advance()
        assert ledger.resident_bytes == sum(int(sizes[u]) for u in range(30) if ledger.has(u)) <= 120
        assert all(ledger.has(u) for u in pinned)
