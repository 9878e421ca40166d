"""While nothing is computed, the experts that were used most are read. Knows the engine, not its sessions."""

from __future__ import annotations

import threading
import time
from functools import partial

from m2lite.engine.thread import compute_thread
from m2lite.errors import M2liteError
from m2lite.model.stream import Stream, Warming
from m2lite.storage import syscalls

_PAUSE_S = 0.05  # between two looks at whether something is computed


class Warmer:
    """Fills the memory that is free with the hottest experts, on a thread whose reads wait for all others."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._lock = stream, threading.Lock()
        self._thread: threading.Thread | None = None  # while there may be something to read
        self._is_wanted = self._is_stopped = False

    def wake(self) -> None:
        """Other experts may be the hottest now."""
        with self._lock:
            self._is_wanted = not self._is_stopped
            if self._is_wanted and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="m2lite-warm", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """For ever, and soon: after the expert that is being read."""
        with self._lock:
            self._is_stopped = True
        self.wait()

    def wait(self) -> None:
        """Until there is no more to read."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        syscalls.idle_io()
        while self._goes_on():
            while not self._is_stopped and self._warm_one():
                pass

    def _goes_on(self) -> bool:
        """Whether somebody woke it since it was asked last."""
        with self._lock:
            goes_on, self._is_wanted = self._is_wanted and not self._is_stopped, False
            if not goes_on:
                self._thread = None
            return goes_on

    def _warm_one(self) -> bool:
        """Whether there may be more."""
        if compute_thread().busy:
            time.sleep(_PAUSE_S)
            return True
        warming = compute_thread().run(self._stream.begin_warming)
        if warming is None:
            return False
        try:
            self._read(warming)
        except M2liteError:  # whoever needs it will be told
            return False
        finally:
            compute_thread().run(partial(self._stream.end_warming, warming))
        return True

    def _read(self, warming: Warming) -> None:
        try:
            if warming.unit is not None:
                warming.flight.set_result(self._stream.fill(warming.unit))
        except BaseException as error:
            warming.flight.set_exception(error)
            raise
