"""How many threads to use beside other programs. Sees processor times that the system counts; knows no kernel."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from m2lite import machine


class Crowd:
    """How many threads a region should use now: as many as others leave cores for.

    A region ends when its last thread does, so a thread that has to share its core slows all of them: two threads
    beside one busy process were slower than one. What others use is what the system counts less what we used. Those
    that give way to us (niced, idle class, a group with a small share) use a core and cost nothing: fewer threads are
    used only if ours had to wait.
    """

    WINDOW_S = 0.15  # the system counts in ticks of 10 ms
    SPARE = 0.3  # of a core: what others may use before it counts
    PATIENCE = 0.1  # of a core: what our threads may have waited for one; beside an equal they wait 0.5
    RETRY_S = 10.0  # after which all threads are tried: those with fewer wait for nobody, whoever is there

    def __init__(self, n_threads: int) -> None:
        self.n_threads = self.n_active = n_threads
        self._since, self._last = time.perf_counter(), processor_seconds() if n_threads > 1 else None
        self._fewer_since = 0.0

    def look(self) -> bool:
        """Call between regions; True when `n_active` has changed."""
        now, last = time.perf_counter(), self._last
        if now < self._since + self.WINDOW_S or last is None:
            return False
        seen, elapsed = processor_seconds(), now - self._since
        self._since, self._last = now, seen
        if seen is None or elapsed > 10 * self.WINDOW_S:  # we were idle: nothing to learn from
            return False
        before, self.n_active = self.n_active, self._next(seen, last, now, elapsed)
        if self.n_active < before:
            self._fewer_since = now
        return self.n_active != before

    def _next(self, seen: Used, last: Used, now: float, elapsed: float) -> int:
        n = self.wanted(seen.others - last.others, elapsed, seen.n_cores)
        if seen.waited is None or last.waited is None:
            return n
        if self.n_active < self.n_threads and now > self._fewer_since + self.RETRY_S:
            return self.n_threads
        return n if n > self.n_active or seen.waited - last.waited > self.PATIENCE * elapsed else self.n_active

    def wanted(self, others_s: float, elapsed_s: float, n_cores: int) -> int:
        """Threads to use where others took `others_s` seconds of `n_cores` cores in `elapsed_s`."""
        busy = others_s / elapsed_s
        return max(1, min(self.n_threads, math.floor(n_cores - busy + self.SPARE)))


def busy_cores(before: Used, now: Used, elapsed_s: float) -> float | None:
    """Cores that others used meanwhile, where they left too few for a thread on each of ours; else None."""
    n, others, elapsed = machine.n_usable_cores(), now.others - before.others, max(elapsed_s, 1e-3)
    return others / elapsed if Crowd(n).wanted(others, elapsed, now.n_cores) < n else None


class Used(NamedTuple):
    """Processor time since some start, and the number of cores."""

    others: float  # seconds
    n_cores: int
    waited: float | None  # seconds that our threads wanted to run and could not; None where the system does not say


def processor_seconds() -> Used | None:
    """None where the system does not say."""
    try:
        times, n_cores = psutil.cpu_times(), psutil.cpu_count()
    except OSError:
        return None
    busy = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
    return Used(busy - time.process_time(), n_cores, waited_seconds()) if n_cores else None


def waited_seconds() -> float | None:
    """What Linux counts as our threads' time in the queue for a core; None where nobody counts."""
    total, tasks = 0, Path("/proc/self/task")
    try:
        Path("/proc/self/schedstat").read_bytes()
        threads = list(tasks.iterdir())
    except OSError:
        return None
    for thread in threads:
        with suppress(OSError):  # it may have ended
            total += int((thread / "schedstat").read_bytes().split()[1])
    return total / 1e9
