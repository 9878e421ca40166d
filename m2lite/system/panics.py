"""Libraries written in Rust that fail inside: their exception is no Exception, and ends the process. Knows none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from m2lite.errors import M2liteError


def is_panic(error: BaseException) -> bool:
    """Whether it is PyO3's PanicException, a class that each library has for itself."""
    return type(error).__name__ == "PanicException"


@contextmanager
def panics_as(error: M2liteError) -> Iterator[None]:
    """Inside, a panic is `error`; the library has written its own words to stderr."""
    try:
        yield
    except BaseException as found:
        if is_panic(found):
            raise error from None
        raise
