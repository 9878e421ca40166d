"""While nothing is computed, the experts that earlier runs used most are read. Knows the engine, not its sessions."""

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
        self._stream = stream
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="m2lite-warm", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Soon: after the expert that is being read."""
        self._stopped.set()
        self._thread.join()

    def wait(self) -> None:
        """Until there is no more to read."""
        self._thread.join()

    def _run(self) -> None:
        syscalls.idle_io()
        while not self._stopped.is_set():
            if compute_thread().busy:
                time.sleep(_PAUSE_S)
                continue
            warming = compute_thread().run(self._stream.begin_warming)
            if warming is None:
                return
            try:
                self._read(warming)
            except M2liteError:  # whoever needs it will be told
                return
            finally:
                compute_thread().run(partial(self._stream.end_warming, warming))

    def _read(self, warming: Warming) -> None:
        try:
            if warming.unit is not None:
                warming.flight.set_result(self._stream.fill(warming.unit))
        except BaseException as error:
            warming.flight.set_exception(error)
            raise
