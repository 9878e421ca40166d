"""The errors that a user can cause or meet, each with its exit code. Knows nothing of where they are raised."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

from m2lite.shown import shown


class M2liteError(Exception):
    """One sentence on what is wrong, with the numbers, and one on what to do.

    Both are one line whatever names they quote: nothing that a file or a request holds can forge another. `details`
    are further lines between them.
    """

    exit_code = 1

    def __init__(self, what: str, todo: str = "", *, details: Sequence[str] = ()) -> None:
        self.what = shown(what)
        self.todo = shown(todo)
        self.details = tuple(map(shown, details))
        super().__init__(self.what, self.todo)

    def __str__(self) -> str:
        if self.details:
            return "\n".join([self.what, *self.details, self.todo]).strip()
        return f"{self.what} {self.todo}".strip()

    def located(self, where: str) -> Self:
        """The same error, with `where` named before what is wrong."""
        error = copy.copy(self)
        error.what = shown(f"{where}: {self.what}")
        error.args = error.what, error.todo
        return error


class UsageError(M2liteError):
    """The command or an option cannot be meant."""

    exit_code = 2


class ContextError(M2liteError):
    """A prompt does not fit: it needs `needed` positions, `free` of `limit` are left."""

    exit_code = 2

    def __init__(self, what: str, todo: str = "", *, needed: int = 0, free: int = 0, limit: int = 0) -> None:
        super().__init__(what, todo)
        self.needed = needed
        self.free = free
        self.limit = limit


class BadModelError(M2liteError):
    """A model file is damaged, foreign or lying; names the tensor or key, what was expected and what was found."""

    exit_code = 4


class ResourceError(M2liteError):
    """Memory or disk does not suffice."""

    exit_code = 5
