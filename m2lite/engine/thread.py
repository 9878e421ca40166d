"""The one thread that makes every kernel call and every compilation. Knows no model.

Numba's workqueue layer aborts when two threads call parallel kernels, and a signal on the main thread would have to
wait for the kernel to end; so kernels run here and the caller waits interruptibly.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from m2lite.errors import UsageError

T = TypeVar("T")
_POLL_S = 0.05  # between two looks at whether to stop
_GRACE_S = 0.25  # for a job to end by itself, as kernels do; the compiler goes on behind


class Abandoned(Exception):
    """Raised on the compute thread inside a job for whose result nobody waits any more."""


class Stopped(Exception):
    """The caller's `stop` said so in the middle of a call."""


class Job(Generic[T]):
    """A call that is queued, running or done."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._running = threading.Lock()  # held until there is a result; an Event would cost more than a small call
        self._running.acquire()
        self._value: T
        self._error: BaseException | None = None
        self.abandoned = False

    def run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # handed to whoever waits
            self._error = error
        self._running.release()

    def result(self, stop: Callable[[], bool] | None = None) -> T:
        """Wait and return. A signal handler may raise out of the wait: the job then ends at its next check.

        Raises Stopped a moment after `stop` says so, even if the job goes on, which then counts as abandoned.
        """
        try:
            if stop is None:
                with self._running:
                    pass
            else:
                self._wait(stop)
        except BaseException:
            self.abandoned = True
            raise
        if self._error is not None:
            raise self._error
        return self._value

    def _wait(self, stop: Callable[[], bool]) -> None:
        while not self._running.acquire(timeout=_POLL_S):
            if stop() and not self._running.acquire(timeout=_GRACE_S):
                raise Stopped
        self._running.release()


class ComputeThread:
    """A daemon thread with a queue: jobs run one at a time, in the order in which they came."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job[Any]] = queue.SimpleQueue()
        self._n_pending = 0
        self._current: Job[Any] | None = None
        self._lock = threading.Lock()
        self.pid = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="m2lite-compute", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._n_pending > 0

    def submit(self, call: Callable[[], T]) -> Job[T]:
        job = Job(call)
        with self._lock:
            self._n_pending += 1
        self._jobs.put(job)
        return job

    def run(self, call: Callable[[], T], stop: Callable[[], bool] | None = None) -> T:
        """`call()` on the compute thread; Stopped where `stop` says so and it does not end."""
        if threading.current_thread() is self._thread:
            return call()
        return self.submit(call).result(stop)

    def check(self) -> None:
        """For long jobs, between kernels: raises Abandoned when nobody waits for the running job any more."""
        if self._current is not None and self._current.abandoned:
            raise Abandoned

    def _serve(self) -> None:
        while True:
            job = self._current = self._jobs.get()
            job.run()
            self._current = None
            with self._lock:
                self._n_pending -= 1
            del job


_lock = threading.Lock()
_thread: ComputeThread | None = None


def compute_thread() -> ComputeThread:
    """The process's only one, started on first use. UsageError in a fork of a process that had one: it stayed there."""
    global _thread
    if _thread is not None and is_forked():
        raise UsageError(
            f"Process {os.getpid()} was forked from {_thread.pid}, which had opened a model: nothing can be computed.",
            "Start processes with spawn, or open models in the forked ones only.",
        )
    with _lock:
        if _thread is None:
            _thread = ComputeThread()
        return _thread


def is_busy() -> bool:
    """Whether a kernel call or compilation is under way."""
    return _thread is not None and not is_forked() and _thread.busy


def is_forked() -> bool:
    """Whether this process is a fork of the one that has the compute thread."""
    return _thread is not None and _thread.pid != os.getpid()
