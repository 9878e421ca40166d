"""An answer under way, as whoever asked for it sees it. Knows the loop only as what it drives."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from m2lite.engine.answer import Answer, Completion
from m2lite.engine.request import Request
from m2lite.engine.runner import Stop
from m2lite.engine.sequence import Event, Sequence
from m2lite.engine.thread import Stopped

if TYPE_CHECKING:
    from m2lite.engine.loop import Loop


class Handle:
    """An answer under way, as whoever asked for it sees it: iterate its events, wait for its end, or cancel it."""

    def __init__(self, loop: Loop, sequence: Sequence) -> None:
        self._loop, self._sequence = loop, sequence
        self._release = weakref.finalize(self, loop.cancel, sequence)
        self._release.atexit = False

    @property
    def request(self) -> Request:
        return self._sequence.request

    @property
    def completion(self) -> Completion:
        """As far as it has come; whole once the events have ended."""
        return self._sequence.answer.completion

    @property
    def answer(self) -> Answer:
        return self._sequence.answer

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens; `error` then says what went wrong, if anything did."""
        return self._sequence.is_over

    @property
    def error(self) -> Exception | None:
        return self._sequence.error

    def take(self) -> list[Event]:
        """What has happened and nobody took yet. Drives nothing."""
        events, found = self._sequence.events, list[Event]()
        while events:
            found.append(events.popleft())
        return found

    def events(self, stop: Stop | None = None) -> Generator[Event, None, None]:
        """What happens, in order, up to Finished; without that where it was cancelled or `stop` said so.

        `stop` is asked between layers, on the compute thread. Raises the request's own error, if it ends with one.
        """
        sequence, is_stopped = self._sequence, False
        try:
            while True:
                is_last = sequence.is_over or is_stopped  # asked first: another thread may drive the loop
                while sequence.events:
                    yield sequence.events.popleft()
                if is_last:
                    break
                try:
                    self._loop.drive(stop)
                except Stopped:  # the compute thread may still be busy, with a compilation
                    is_stopped = True
            if sequence.error is not None:
                raise sequence.error
        finally:
            self.cancel()

    def __iter__(self) -> Iterator[Event]:
        return self.events()

    def result(self, stop: Stop | None = None) -> Completion:
        """The whole answer; one that is "interrupted" where it was stopped."""
        for _ in self.events(stop):
            pass
        return self.completion

    def cancel(self) -> None:
        """It is answered no further, and its pages are free when this returns or soon after."""
        self._loop.cancel(self._sequence)
