"""Threads beside other programs: by what the system is said to count, and beside real ones."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from m2lite.simd import crowd
from m2lite.simd.crowd import Crowd, Used, waited_seconds

COUNTS = waited_seconds() is not None


@pytest.mark.parametrize(
    ("n_threads", "n_cores", "others", "wanted"),
    [(2, 2, 0.0, 2), (2, 2, 0.25, 2), (2, 2, 1.0, 1), (2, 2, 5.0, 1), (8, 8, 3.0, 5), (4, 64, 20.0, 4), (1, 2, 2.0, 1)],
)
def test_threads_leave_cores_to_others(n_threads: int, n_cores: int, others: float, wanted: int) -> None:
    assert Crowd(n_threads).wanted(others * 0.15, 0.15, n_cores) == wanted


def active(monkeypatch: pytest.MonkeyPatch, n_threads: int, *windows: tuple[float, float | None]) -> list[int]:
    """Threads after each window in which others used so many of as many cores, and ours waited for so many."""
    clock, used, waited = 0.0, 0.0, 0.0
    seen, is_counted = list[int](), windows[0][1] is not None
    monkeypatch.setattr(crowd.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(crowd, "processor_seconds", lambda: Used(used, n_threads, waited if is_counted else None))
    looking = Crowd(n_threads)
    for others, wait in windows:
        clock += Crowd.WINDOW_S
        used += others * Crowd.WINDOW_S
        waited += (wait or 0.0) * Crowd.WINDOW_S
        looking.look()
        seen.append(looking.n_active)
    return seen


@pytest.mark.parametrize("wait", [0.5, None])
def test_threads_come_back_when_others_go(monkeypatch: pytest.MonkeyPatch, wait: float | None) -> None:
    rest = None if wait is None else 0.0
    windows = [(0.0, rest), (1.0, wait), (1.0, rest), (0.0, rest), (0.0, rest)]
    assert active(monkeypatch, 2, *windows) == [2, 1, 1, 2, 2]


def test_those_who_give_way_cost_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    assert active(monkeypatch, 2, (1.0, 0.02), (2.0, 0.02), (1.0, 0.5), (1.0, 0.0)) == [2, 2, 1, 1]


def test_all_threads_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who came first and did not give way has gone; who is there now gives way."""
    n = int(Crowd.RETRY_S / Crowd.WINDOW_S) + 1
    seen = active(monkeypatch, 4, (2.0, 1.0), *[(2.0, 0.0)] * n, (2.0, 0.05), (2.0, 1.0))
    assert seen[: n - 1] == [2] * (n - 1)
    assert seen[-2:] == [4, 2]
    assert active(monkeypatch, 4, *[(2.0, None)] * (n + 2)) == [2] * (n + 2), "where waiting is not counted, in vain"


@pytest.mark.slow
@pytest.mark.skipif(not COUNTS, reason="this system does not count what threads wait for")
def test_the_system_counts_waiting_threads() -> None:
    """A thread beside a process on the same core waits for its turn."""
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); os.write(1, b'!')\n"
        "while os.getppid() == PARENT: pass"
    )
    core = {min(os.sched_getaffinity(0))}
    other = subprocess.Popen([sys.executable, "-c", script.replace("PARENT", str(os.getpid()))], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.read(1) == b"!"
        ends, before = threading.Event(), waited_seconds()
        assert before is not None
        thread = threading.Thread(target=_work_on, args=(core, ends))
        thread.start()
        while (waited_seconds() or 0.0) < before + 0.1:  # for ever where it is not counted
            ends.wait(0.02)
        ends.set()
        thread.join()
    finally:
        other.kill()
        other.communicate()


def _work_on(core: set[int], ends: threading.Event) -> None:
    os.sched_setaffinity(0, core)  # this thread's alone
    while not ends.is_set():
        pass
