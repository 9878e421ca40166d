"""Maps a file's pages before their first use, on a thread of its own. Knows addresses, not what they hold.

The first touch of a mapped page costs a fault though the page cache holds the file, which slows the first tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from m2lite.storage import syscalls

_ASK_S = 0.1  # seconds between two questions to `stop`
_STEP = 8 * 1024**2  # bytes of one call: `stop` waits for no more, even where they come from a slow disk


class Prefault:
    """Maps all of the arrays, from the first to the last; they must be views of mappings that begin on a page."""

    def __init__(self, arrays: Sequence[NDArray[np.uint8]]) -> None:
        self._arrays = list(arrays)  # keeps the mappings
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="m2lite-prefault", daemon=True)
        self._thread.start()

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def wait(self, stop: Callable[[], bool] | None = None) -> None:
        """Until every page is mapped or cannot be mapped ahead, or `stop` says so: a slow disk takes minutes."""
        while self._thread.is_alive() and not (stop is not None and stop()):
            self._thread.join(_ASK_S)

    def stop(self) -> None:
        """Let go of the arrays; soon, whatever is left to do."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            if syscalls.AVAILABLE:
                self._map()
        finally:
            self._arrays.clear()

    def _map(self) -> None:
        for array in self._arrays:
            for start in range(0, array.nbytes, _STEP):
                n_bytes = min(_STEP, array.nbytes - start)
                at = array.ctypes.data + start
                if self._stopped.is_set() or syscalls.madvise(at, n_bytes, syscalls.POPULATE_READ):
                    return  # an older kernel refuses, or the disk fails: whoever touches the page will be told
