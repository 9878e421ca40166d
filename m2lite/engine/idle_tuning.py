"""The first moment in which nobody waits: a second or two of experiments with what matters most.

Only where nothing is known of the machine yet. `m2lite tune` does it thoroughly. Knows the engine, not its sessions.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial

from m2lite.engine.ratios import Ratio, is_won, may_win, noise_of, summary
from m2lite.engine.thread import compute_thread
from m2lite.engine.tuned import Change, Tuning, save_tuning, this_machine, tuning_path
from m2lite.errors import M2liteError
from m2lite.simd import tuning
from m2lite.simd.crowd import Used, busy_cores, processor_seconds

Values = Mapping[str, int]

# What decides how fast weights come from memory, which is most of decoding, and needs no other code.
CANDIDATES: tuple[dict[str, int], ...] = ({"tiles_ahead": 0}, {"tiles_ahead": 1}, {"tiles_ahead": 4})
N_FIRST, N_PAIRS = 5, 15
_REST_S, _PAUSE_S = 1.0, 0.05  # for which nobody computed before; between two looks
_MOST_TRIES = 5  # that were disturbed
_END_S = 1.0  # for a pair to end


class Disturbed(Exception):
    """Somebody waits, or other programs are busy: what was measured says little."""


class IdleTuning:
    """Times `read`, which reads more bytes of weights than a cache holds, on a thread that gives way to all others."""

    def __init__(self, read: Callable[[], None], read_bytes: int, is_idle: Callable[[], bool]) -> None:
        self._read, self._read_bytes, self._is_idle = read, read_bytes, is_idle
        self._stopped = threading.Event()
        self._best_s = float("inf")
        self._thread = threading.Thread(target=self._run, name="m2lite-tune", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """For ever, and soon: no weights are read after what the compute thread is at."""
        self._stopped.set()
        self._thread.join(_END_S)

    def _run(self) -> None:
        before = tuning.DEFAULTS
        for _ in range(_MOST_TRIES):
            if not self._rests():
                return
            began, used = time.monotonic(), processor_seconds()
            try:
                changes = self._try_all(before)
                if _is_busy(began, used):
                    raise Disturbed
            except Disturbed:
                tuning.use(before)
                continue
            found = Tuning(changes, {}, self._read_bytes / self._best_s, f"{datetime.now(UTC):%Y-%m-%d %H:%M}, idle")
            tuning.use(found.values)
            with suppress(M2liteError):  # it is measured again at the next start
                save_tuning(tuning_path(this_machine()), found)
            return

    def _rests(self) -> bool:
        """Once nobody has computed for a while, here or in other programs; False when it is stopped."""
        since, used = time.monotonic(), processor_seconds()
        while not self._stopped.wait(_PAUSE_S):
            is_idle = self._is_idle()
            if is_idle and time.monotonic() < since + _REST_S:
                continue
            if is_idle and not _is_busy(since, used):
                return True
            since, used = time.monotonic(), processor_seconds()
        return False

    def _try_all(self, before: Values) -> Sequence[Change]:
        noise = {"decode": noise_of(self._ratios(before, before, N_PAIRS))}
        best, best_ratio = list[Change](), 0.0
        for values in CANDIDATES:
            after = {**before, **values}
            ratios = self._ratios(before, after, N_FIRST)
            if may_win({"decode": summary(ratios)}, noise):
                ratios += self._ratios(before, after, N_PAIRS - N_FIRST)
            found: dict[str, Ratio] = {"decode": summary(ratios)}
            if is_won(found, noise) and found["decode"][1] > best_ratio:
                best, best_ratio = [Change(name, value, found) for name, value in values.items()], found["decode"][1]
        return best

    def _ratios(self, before: Values, after: Values, n: int) -> list[float]:
        """Time before over time after, in pairs."""
        found = list[float]()
        for i in range(n):
            if not self._is_idle():
                raise Disturbed
            pair = (before, after) if i % 2 else (after, before)
            first, second = compute_thread().run(partial(self._pair, pair))
            found.append(first / second if i % 2 else second / first)
        return found

    def _pair(self, settings: tuple[Values, Values]) -> tuple[float, float]:
        if self._stopped.is_set():  # the weights may be gone
            raise Disturbed
        seconds = list[float]()
        for values in settings:
            tuning.use(values)
            began = time.perf_counter()
            self._read()
            seconds.append(time.perf_counter() - began)
        self._best_s = min(self._best_s, *seconds)
        return seconds[0], seconds[1]


def _is_busy(began: float, used: Used | None) -> bool:
    """Whether other programs were, since then, or the system does not say."""
    now = processor_seconds()
    return used is None or now is None or busy_cores(used, now, time.monotonic() - began) is not None
