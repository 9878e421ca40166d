"""What one answer cost. Knows numbers that others measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from m2lite.drafting.drafted import Drafted

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
