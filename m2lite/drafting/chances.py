"""How often drafts come true: by the length of a match, by a module's share, by depth. Knows no token and no cost."""

from __future__ import annotations

from bisect import bisect_right

from m2lite.drafting.cost import Estimate
from m2lite.drafting.options import MOST_DRAFTS

_SHARES = (0.5, 0.7, 0.85, 0.95, 0.99)  # bounds of how sure a module is
_LENGTHS = (4, 6, 9, 13, 20)  # bounds of how long a match is
_ANSWER = 256.0  # tokens of an answer, until it is known better
_ANSWERS = 16.0  # the latest so many count


def _estimates(*priors: float) -> list[Estimate]:
    return [Estimate(p, n=3, rate=0.015) for p in priors]


class Chances:
    """Learnt from what came, whether a draft was verified or not."""

    def __init__(self, n_modules: int) -> None:
        self.hits = _estimates(*[0.75] * n_modules)  # that module k's draft is right if those before it are
        self.by_share = _estimates(0.3, 0.5, 0.7, 0.85, 0.95, 0.99)
        self.by_length = _estimates(0.4, 0.6, 0.75, 0.85, 0.9, 0.95)
        self.n_tokens, self.n_answers = _ANSWER, 1.0  # lately

    def saw_draft(self, k: int, share: float, is_right: bool) -> None:
        """The draft of module k, which was so sure, behind right ones."""
        self.hits[k].add(is_right)
        self.by_share[bisect_right(_SHARES, share)].add(is_right)

    def saw_match(self, length: int) -> None:
        """A match of that length foresaw the next token; negative if another came."""
        self.by_length[bisect_right(_LENGTHS, abs(length))].add(length > 0)

    def saw_tokens(self, n: int, is_first: bool) -> None:
        """An answer goes on, or begins."""
        self.n_tokens += n
        self.n_answers += is_first
        if self.n_answers > _ANSWERS:
            self.n_tokens, self.n_answers = self.n_tokens / 2, self.n_answers / 2

    @property
    def answer_tokens(self) -> float:
        """Of an answer, lately."""
        return self.n_tokens / self.n_answers

    def of_share(self, share: float) -> float:
        """That a module's draft is right, of which it is so sure."""
        return self.by_share[bisect_right(_SHARES, share)].value

    def of_match(self, length: int) -> list[float]:
        """That the tokens behind a match are right, each if those before it are: with each of them the match grows."""
        chances = [each.value for each in self.by_length[bisect_right(_LENGTHS, length) :]]
        return chances + [chances[-1]] * (MOST_DRAFTS - len(chances))

    def kind_of_match(self, length: int) -> int:
        """Matches of one kind have the same chances."""
        return bisect_right(_LENGTHS, length)

    def estimates(self) -> list[Estimate]:
        """All, to be kept for the next process."""
        return [*self.hits, *self.by_share, *self.by_length]
