"""What drafts brought, counted. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any


@dataclass
class Drafted:
    """What the drafts of one sequence brought, or of several."""

    n_steps: int = 0  # calls that drew a token of the sequence, with drafts or without; its prompt's excepted
    n_tokens: int = 0  # that they drew
    n_proposed: int = 0  # drafts that were verified
    reached: list[int] = field(default_factory=list)  # drafts j whose predecessors were right
    accepted: list[int] = field(default_factory=list)  # of these, right
    sources: dict[str, int] = field(default_factory=dict)  # steps whose drafts came from there
    n_modules_off: int = 0  # prediction modules that lack K and V of what was read from a cache

    @property
    def n_accepted(self) -> int:
        return sum(self.accepted)

    @property
    def acceptance(self) -> list[float | None]:
        """Share of right drafts by position, of those behind right ones."""
        return [a / n if n else None for a, n in zip(self.accepted, self.reached, strict=True)]

    @property
    def tokens_per_step(self) -> float | None:
        return self.n_tokens / self.n_steps if self.n_steps else None

    def add(self, source: str, n_drafts: int, n_right: int, n_new: int) -> None:
        """A call drew n_new tokens: n_right drafts, and the token behind them unless the answer had ended."""
        self.n_steps += 1
        self.n_tokens += n_new
        if not n_drafts:
            return
        self.n_proposed += n_drafts
        self.sources[source] = self.sources.get(source, 0) + 1
        more = [0] * (n_drafts - len(self.reached))
        self.reached += more
        self.accepted += more
        for j in range(min(n_new, n_drafts)):
            self.reached[j] += 1
            self.accepted[j] += j < n_right

    def include(self, other: Drafted) -> None:
        """Another sequence's, too."""
        self.n_steps += other.n_steps
        self.n_tokens += other.n_tokens
        self.n_proposed += other.n_proposed
        self.reached = _sums(self.reached, other.reached)
        self.accepted = _sums(self.accepted, other.accepted)
        self.n_modules_off = max(self.n_modules_off, other.n_modules_off)
        for source, n in other.sources.items():
            self.sources[source] = self.sources.get(source, 0) + n

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "proposed": self.n_proposed,
            "accepted": self.n_accepted,
            "steps": self.n_steps,
            "tokens_per_step": self.tokens_per_step,
            "acceptance": self.acceptance,
            "sources": self.sources,
            "modules_off": self.n_modules_off,
        }


def _sums(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [x + y for x, y in zip_longest(a, b, fillvalue=0)]
