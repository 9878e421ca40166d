"""Many requests at once: continuous batching of whatever comes. Knows ids, no lines and no files."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m2lite.engine.answer import Completion
from m2lite.engine.handle import Handle
from m2lite.engine.request import Request
from m2lite.engine.runner import Stop, ask
from m2lite.engine.scheduler import Counts
from m2lite.errors import BadModelError, M2liteError, ResourceError

if TYPE_CHECKING:
    from m2lite.engine.model import Engine

_IDLE_S = 0.01  # between two looks for requests when there are none


@dataclass(frozen=True)
class Done:
    """How a request ended: with a completion, or with an error of its own."""

    request: Request
    completion: Completion | None
    error: M2liteError | None = None


class Batch:
    """Answers `n_inflight` requests at a time. Not for two threads."""

    def __init__(self, model: Engine, n_inflight: int, stop: Stop | None = None) -> None:
        self._model, self._stop = model, stop
        self._n_inflight = min(n_inflight, model.n_rows)
        self._window = max(64, 2 * n_inflight)  # requests that wait, of which the scheduler chooses
        self._handles = list[Handle]()
        self.counts = Counts()

    def run(
        self, requests: Iterable[Request | None], after_step: Callable[[], None] = lambda: None
    ) -> Generator[Done, None, None]:
        """Each request's end as it comes, in no order; Stopped where `stop` says so. Takes requests as it needs them.

        A request that is None says that there is none just now.
        """
        loop, source, is_open = self._model.loop, iter(requests), True
        loop.scheduler.counts, loop.scheduler.n_most = self.counts, self._n_inflight
        try:
            while True:
                if is_open:
                    is_open = yield from self._take(source)
                ask(self._stop)
                if not self._handles:
                    if not is_open:
                        return
                    time.sleep(_IDLE_S)
                    continue
                loop.drive(self._stop)
                yield from self._ended()
                after_step()
        finally:
            for handle in self._handles:
                handle.cancel()
            loop.scheduler.n_most = self._model.n_rows

    def _take(self, source: Iterator[Request | None]) -> Generator[Done, None, bool]:
        """Requests until there are enough to choose from; False when the last was taken."""
        while self._model.loop.n_waiting < self._window:
            try:
                request = next(source)
            except StopIteration:
                return False
            if request is None:
                break
            try:
                self._handles.append(self._model.submit(request))
            except M2liteError as error:
                yield Done(request, None, error)
        return True

    def _ended(self) -> Iterator[Done]:
        over = [handle for handle in self._handles if handle.is_over]
        self._handles = [handle for handle in self._handles if not handle.is_over]
        for handle in over:
            error = handle.error
            if isinstance(error, BadModelError | ResourceError):
                raise error  # no request's own
            if error is not None and not isinstance(error, M2liteError):
                raise error  # a bug
            yield Done(handle.request, None if error is not None else handle.completion, error)
