"""How long a prompt will still be read, from what was read."""

from __future__ import annotations

import pytest

from m2lite.serve.progress import ReadingSpeed, ReadProgress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_rest_takes_what_the_beginning_took(clock: Clock) -> None:
    speed = ReadingSpeed(clock)
    found = ReadProgress(1000, speed)
    assert found.seconds_left is None
    clock.now += 30  # it waited for 20 of them
    found.saw(300, 200, computed_s=10)
    assert found.seconds_left == pytest.approx(700 * 0.1)
    clock.now += 7
    assert found.seconds_left == pytest.approx(63)
    found.saw(400, 200, computed_s=17)
    assert found.seconds_left == pytest.approx(600 * 17 / 200)
    assert found.told() == {"total": 1000, "cache": 200, "processed": 400, "time_ms": 37_000, "seconds_left": 51.0}
    clock.now += 1000
    assert found.seconds_left == 0


def test_who_waits_is_told_what_others_took(clock: Clock) -> None:
    """Until its own is begun: the rest of those before it, and its own as if nothing of it were known."""
    speed = ReadingSpeed(clock)
    first, second, third = (ReadProgress(n, speed) for n in (1000, 50, 10))
    clock.now += 10
    first.saw(100, 0, computed_s=10)
    assert second.seconds_left == pytest.approx((900 + 50) * 0.1)
    assert third.seconds_left == pytest.approx((900 + 50 + 10) * 0.1)
    first.end()
    first.end()
    assert second.seconds_left == pytest.approx(5)
    second.end()
    third.saw(10, 10, computed_s=0)
    assert third.seconds_left == 0
    third.end()
    assert not speed.under_way
    assert ReadProgress(20, speed).seconds_left == pytest.approx(2)
