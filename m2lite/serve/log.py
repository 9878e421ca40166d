"""One line on stderr for each request: what it was, and what became of it. Knows no prompts."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from m2lite.system.streams import note

_MOST_SHOWN = 200  # characters of a path
_QUIET = ("/health", "/metrics")  # asked every few seconds by programs that watch
_PAGE = "/page/"  # files of the page, asked for whenever it is opened


@dataclass
class RequestLog:
    """Of the request that the current task answers."""

    id: str
    method: str
    path: str
    status: int = 0
    prefix: str = ""  # names what its prompt begins with
    notes: list[str] = field(default_factory=list)  # of whoever answered
    began: float = field(default_factory=time.monotonic)

    def write(self) -> None:
        if (self.path in _QUIET or self.path.startswith(_PAGE)) and self.status < 400:
            return
        seconds = time.monotonic() - self.began
        what = f"{self.id} {self.method} {self.path[:_MOST_SHOWN]} {self.status or 'no answer'}"
        note(" · ".join([what, *self.notes, f"{seconds:.1f} s"]))


current: ContextVar[RequestLog | None] = ContextVar("current", default=None)
