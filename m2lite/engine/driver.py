"""One thread that drives the loop while something is asked, and sleeps otherwise. Knows requests and events, no HTTP.

For those who cannot wait, such as an event loop: what happens is handed to a function, once per burst of the loop.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from m2lite.engine.handle import Handle
from m2lite.engine.request import Request
from m2lite.engine.runner import Stop
from m2lite.engine.sequence import Event
from m2lite.engine.thread import Stopped

if TYPE_CHECKING:
    from m2lite.engine.model import Engine


class News(NamedTuple):
    """What happened to one request since the last burst."""

    listener: Any  # as `Driver.submit` was given it
    events: list[Event]
    is_over: bool  # nothing more comes
    error: Exception | None = None  # why, if not because it is finished or cancelled


class Driver:
    """Drives a model's loop on a thread of its own. `submit` and `later` may be called on any thread."""

    def __init__(self, engine: Engine, deliver: Callable[[list[News]], None]) -> None:
        """`deliver` gets the news of a burst, on the driver's thread, or on the compute thread in the middle of a long
        call; it must not wait."""
        self._engine, self._deliver = engine, deliver
        self._changed = threading.Condition()
        self._asked = list[tuple[Any, Handle]]()
        self._jobs = deque[Callable[[Stop], None]]()
        self._is_closing = self._is_hurried = False
        engine.loop.on_news = self._tell  # while a long prompt is read
        self._thread = threading.Thread(target=self._run, name="m2lite-driver", daemon=True)
        self._thread.start()

    def submit(self, request: Request, listener: Any) -> Handle:
        """Ask for an answer, whose news name `listener`. Raises as `Engine.submit` does."""
        handle = self._engine.submit(request)
        with self._changed:
            is_late = self._is_closing
            if not is_late:
                self._asked.append((listener, handle))
                self._changed.notify()
        if is_late:
            self._cancel([(listener, handle)])
        return handle

    def later(self, job: Callable[[Stop], None]) -> None:
        """Run `job` on this thread when nobody waits for an answer; it ends early when its argument says so."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    @property
    def is_idle(self) -> bool:
        return not self._asked and not self._jobs

    def close(self) -> None:
        """Cancel what is under way, do the jobs that are left, and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def hurry(self) -> None:
        """Jobs that are left need not be done."""
        self._is_hurried = True

    def _is_wanted(self) -> bool:
        """Whether a job is to make room."""
        return self._is_hurried or bool(self._asked)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or self._asked or self._jobs)
                asked = list(self._asked)
                if self._is_closing:
                    self._asked.clear()
                job = self._jobs.popleft() if self._jobs and not self._asked else None
            if self._is_closing and asked:
                self._cancel(asked)
            if job is not None:
                job(self._is_wanted)
            elif self._is_closing:
                return
            elif asked:
                self._drive(asked)

    def _drive(self, asked: list[tuple[Any, Handle]]) -> None:
        failure: Exception | None = None
        try:
            self._engine.loop.drive(lambda: self._is_closing)
        except Stopped:
            return
        except Exception as error:  # whoever waits hears of it
            failure = error
        self._tell(failure, asked)

    def _tell(self, failure: Exception | None = None, failed: Sequence[tuple[Any, Handle]] = ()) -> None:
        """What came goes to whoever asked; the `failed` hear of the failure. On the compute thread in a long call."""
        news = list[News]()
        with self._changed:
            asked = list(self._asked)
        for each in asked:
            listener, handle = each
            error = failure if each in failed else None
            is_over = handle.is_over or error is not None  # asked before its events are taken
            events = handle.take()
            if events or is_over:
                news.append(News(listener, events, is_over, error or handle.error))
            if is_over:
                handle.cancel()
        over = {id(each.listener) for each in news if each.is_over}
        with self._changed:
            self._asked = [each for each in self._asked if id(each[0]) not in over]
        if news:
            self._deliver(news)

    def _cancel(self, asked: list[tuple[Any, Handle]]) -> None:
        for _, handle in asked:
            handle.cancel()
        self._deliver([News(listener, handle.take(), True) for listener, handle in asked])
