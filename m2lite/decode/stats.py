"""What one answer cost. Knows numbers that others measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from m2lite.decode.drafts import Drafted

if TYPE_CHECKING:  # this imports Numba
    from m2lite.model.stream import Traffic


@dataclass
class Stats:
    """What one answer cost. Times are those of the compute thread's calls, not of whoever consumes the tokens."""

    n_prompt: int = 0  # tokens before the answer
    n_reused: int = 0  # of these, already in the KV cache
    n_generated: int = 0
    first_token_s: float | None = None
    prompt_s: float = 0.0
    decode_s: float = 0.0  # of all tokens but the first
    traffic: Traffic | None = None  # of a model that is larger than its memory
    drafted: Drafted | None = None  # with drafting
    plain_s: float | None = None  # a token without drafts, where one was measured
    major_faults: int = 0  # pages of the process that had to be waited for one by one

    def followed_by(self, other: Stats) -> Stats:
        """Of an answer that was drawn in two parts: what both cost."""
        both = replace(self, n_generated=self.n_generated + other.n_generated)
        between_s = other.prompt_s if other.n_generated else 0.0  # what was given between is read, and a token drawn
        both.decode_s += between_s + other.decode_s
        both.plain_s, both.major_faults = other.plain_s, self.major_faults + other.major_faults
        if self.traffic is not None and other.traffic is not None:
            both.traffic = self.traffic.plus(other.traffic)
        if self.drafted is not None and other.drafted is not None:
            both.drafted = Drafted()
            both.drafted.include(self.drafted)
            both.drafted.include(other.drafted)
        return both

    @property
    def saved_s(self) -> float | None:
        """Seconds that the same tokens would have taken longer one by one, where it is known what one takes."""
        if self.drafted is None or self.plain_s is None or not self.n_generated:
            return None
        return (self.n_generated - 1) * self.plain_s - self.decode_s

    @property
    def prompt_tokens_per_s(self) -> float | None:
        n = self.n_prompt - self.n_reused
        return n / self.prompt_s if n > 0 and self.prompt_s > 0 else None

    @property
    def tokens_per_s(self) -> float | None:
        return (self.n_generated - 1) / self.decode_s if self.n_generated > 1 and self.decode_s > 0 else None
