"""What a batch keeps of its answers: those to come, those under way, what each adds to a call. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

from m2lite.decode.batch_modules import Followed
from m2lite.decode.conversation import Answer
from m2lite.decode.writer import Wish, Writer
from m2lite.errors import M2liteError
from m2lite.model.cache import PAGE

if TYPE_CHECKING:  # these import Numba
    from m2lite.decode.lookup import Lookup
    from m2lite.model.cache import Timeline


@dataclass(frozen=True)
class Done:
    """How a wish ended: with an answer, or with an error of its own."""

    wish: Wish
    answer: Answer | None
    error: M2liteError | None = None


@dataclass
class Counts:
    """What a batch did."""

    n_steps: int = 0
    n_read: int = 0  # tokens of prompts that were computed
    n_shared: int = 0  # tokens of prompts that another row had computed
    n_drawn: int = 0
    n_again: int = 0  # tokens computed again, of answers that had to give way
    n_expert_reads: int = 0  # experts that were gone through, of all layers and steps
    n_rows: int = 0  # of all calls, but for drafts that were wrong
    n_drafts: int = 0  # that were verified
    n_right: int = 0  # of these
    n_foreseen: int = 0  # that were the prediction module's
    n_now: int = 0  # answers under way
    n_most: int = 0  # of these, at once


class Part(NamedTuple):
    """What a row adds to a call: `ids` stand behind its timeline, from `start` on, and the last of them are drafts."""

    row: Row
    start: int
    ids: list[int]
    is_end: bool  # whether nothing of the row lacks behind them, but for drafts
    n_drafts: int = 0

    @property
    def n_draws(self) -> int:
        """Rows, the last ones, that a token is drawn from."""
        return self.is_end + self.n_drafts

    @property
    def end(self) -> int:
        """The position behind what is no draft."""
        return self.start + len(self.ids) - self.n_drafts

    @property
    def room(self) -> int:
        """Drafts that there is room for, on the page that is needed anyway."""
        return min(self.row.writer.n_left - 1, -self.end % PAGE)


@dataclass(eq=False)
class Row:
    """An answer under way, or one that is done and whose prompt others may begin with."""

    writer: Writer
    timeline: Timeline
    hashes: list[bytes]
    donor: Row | None = None  # whose beginning this row waits for
    n_share: int = 0  # tokens of that
    n_seen: int = 0  # tokens that were counted as computed or shared
    lookup: Lookup | None = None  # once it answers, if anything is looked up
    followed: Followed = field(default_factory=Followed)

    @property
    def n_todo(self) -> int:
        """Tokens that lack in the cache: one, but for prompts and what was forced."""
        return len(self.writer.row) - self.timeline.length

    @property
    def is_reading(self) -> bool:
        return self.n_todo > 1


@dataclass(eq=False)
class Upcoming:
    wish: Wish
    hashes: list[bytes]
    n_passed: int = 0  # others that were chosen before it
    row: Row | None = None  # once it was tried to begin it


def page_hashes(row: Sequence[int]) -> list[bytes]:
    """Of each whole page of the row, a hash of all tokens up to its end."""
    ids, chain, found = np.array(row, np.int32), b"", list[bytes]()
    for end in range(PAGE, len(row) + 1, PAGE):
        chain = xxhash.xxh3_128_digest(chain + ids[end - PAGE : end].tobytes())
        found.append(chain)
    return found
