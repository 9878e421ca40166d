"""What is opened on a thread of its own, while the user may type already. Knows no model and no prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from m2lite.system.streams import STDERR

T = TypeVar("T")
_POLL_S = 0.1


class Opening(Generic[T]):
    """open(progress), begun; progress(n_done, n_all) says that it takes a while, and how far it is."""

    def __init__(
        self,
        open: Callable[[Callable[[int, int], None]], T],
        introduce: Callable[[T], None],
        how_far: Callable[[int, int], str],
    ) -> None:
        """`introduce` says what was opened, once, when the one who waits for it asks for it."""
        self._open, self._introduce, self._how_far = open, introduce, how_far
        self.text = ""  # how far it is, where it takes a while
        self._found: T
        self._error: BaseException | None = None
        self._is_introduced = False
        self._news, self._done = threading.Event(), threading.Event()
        self._callback: Callable[[], None] | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="m2lite-opening", daemon=True).start()

    def _run(self) -> None:
        try:
            self._found = self._open(self._tell)
        except BaseException as error:  # handed to whoever waits
            self._error = error
        with self._lock:
            self._done.set()
            callback = self._callback
        self._news.set()
        if callback is not None:
            callback()

    def _tell(self, n_done: int, n_all: int) -> None:
        self.text = self._how_far(n_done, n_all)
        self._news.set()

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    @property
    def has_failed(self) -> bool:
        return self.is_done and self._error is not None

    def is_slow(self) -> bool:
        """Waits until it is done, or says that it takes a while."""
        while not self._news.wait(_POLL_S):  # in which signals are heard
            pass
        return not self.is_done

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call it on the other thread once it is done; at once where it is. The last one counts."""
        with self._lock:
            self._callback = callback
            is_done = self.is_done
        if is_done:
            callback()

    def introduce(self) -> None:
        """Of what is open."""
        if not self._is_introduced and self._error is None:
            self._is_introduced = True
            self._introduce(self._found)

    def result(self) -> T:
        """Wait for it, and raise what went wrong; how far it is stands in the terminal's last line."""
        try:
            while not self._done.wait(_POLL_S):
                STDERR.rewrite(self.text)
        finally:
            STDERR.rewrite()
        if self._error is not None:
            raise self._error
        self.introduce()
        return self._found
