"""Bounds on work that hold on any machine and beside anything: calls and bytes, never seconds."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def bounded_work(n_calls: int, n_bytes: float) -> Iterator[None]:
    """Fails where the block makes more calls (Python's and C's) or holds more bytes at once."""
    n = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal n
        n += event in ("call", "c_call")

    tracemalloc.start()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert n <= n_calls, f"{n} calls"
    assert peak <= n_bytes, f"{peak} bytes"
