"""How far prompts are read and how long the rest takes, learnt from prompts that were read. Knows no requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

_RATE = 0.25  # of what was seen last
LONG_S = 10.0  # of waiting, from which on it is told


class ReadingSpeed:
    """What a token of a prompt takes, and whose prompts are read or wait, the oldest first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.token_s = 0.0  # 0: not known
        self.clock = clock
        self.under_way = list[ReadProgress]()

    def saw(self, n_tokens: int, seconds: float) -> None:
        if n_tokens > 0:
            self.token_s += (_RATE if self.token_s else 1.0) * (seconds / n_tokens - self.token_s)


class ReadProgress:
    """Of one prompt. Until it is begun, it waits for those that were asked before it."""

    def __init__(self, n_total: int, speed: ReadingSpeed) -> None:
        self.n_total, self.n_done, self.n_cached = n_total, 0, 0
        self._speed, self._asked = speed, speed.clock()
        self._begun = self._seen = self._asked  # when its first call began, and its last ended
        self.is_over = False
        speed.under_way.append(self)

    def saw(self, n_done: int, n_cached: int, computed_s: float) -> None:
        """A call has ended that reads the prompt up to `n_done` tokens; `computed_s`: of its calls so far."""
        now, before = self._speed.clock(), self._seen
        if not self.n_done:
            before = self._begun = max(self._asked, now - computed_s)
        self._speed.saw(n_done - max(self.n_done, n_cached), now - before)
        self.n_done, self.n_cached, self._seen = n_done, n_cached, now

    def end(self) -> None:
        """It is read, or nobody waits. Done again, nothing happens."""
        if not self.is_over:
            self.is_over = True
            self._speed.under_way.remove(self)

    @property
    def seconds_left(self) -> float | None:
        """From now on; None where nothing is known."""
        n_new, now = self.n_done - self.n_cached, self._speed.clock()
        if n_new > 0:
            token_s = (self._seen - self._begun) / n_new
            return max(0.0, (self.n_total - self.n_done) * token_s - (now - self._seen))
        if not self._speed.token_s:
            return None
        under_way = self._speed.under_way
        ahead = under_way[: under_way.index(self) + 1] if not self.is_over else []
        return self._speed.token_s * sum(each.n_total - each.n_done for each in ahead)

    def told(self) -> dict[str, Any]:
        """For clients that ask, under llama-server's names; and what only m2lite tells."""
        left = self.seconds_left
        return {
            "total": self.n_total,
            "cache": self.n_cached,
            "processed": self.n_done,
            "time_ms": round(1000 * (self._speed.clock() - self._asked)),
            "seconds_left": None if left is None else round(left, 1),
        }
