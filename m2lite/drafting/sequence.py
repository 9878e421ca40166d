"""What a drafter keeps of a sequence, and what it is asked and told of each call. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from m2lite.drafting.drafted import Drafted

if TYPE_CHECKING:  # these import Numba
    from m2lite.drafting.modules import Draft, ModuleState
    from m2lite.drafting.ngram import PromptLookup
    from m2lite.model.cache import Timeline
    from m2lite.sampling.draw import Sampling


class SequenceDrafts:
    """What is known of one sequence: where its end stood before, and what the modules have seen."""

    def __init__(self, mode: str, n_most: int, lookup: PromptLookup | None, followed: ModuleState | None) -> None:
        self.is_auto, self.n_most = mode == "auto", n_most  # of a call, at most
        self.lookup, self.module_state = lookup, followed
        self.stats = Drafted()
        self.rest = 0  # calls for which nobody looks for drafts: nothing matched lately, and modules do not pay
        self.n_rested = self.n_unmatched = 0  # calls since somebody looked; looks since a match
        # Of the call under way, in which it decodes:
        self.is_asked = False
        self.wanted, self.source = list[int](), ""  # drafts that there are, and where they come from
        self.chances: Sequence[float] = ()  # that each is right if those before it are
        self.foreseen: list[Draft] = []  # what the modules expect, whether it is verified or not

    def begin(self, ids: Sequence[int], n_cached: int = 0, n_followed: Sequence[int] = ()) -> None:
        """The sequence is `ids` from now on; the first n_cached positions are computed.

        n_followed[k]: up to where they and what follows them have the K and V of module k; what is not said has none.
        """
        if self.lookup is not None:
            self.lookup.follow(ids)
        if self.module_state is not None:
            self.module_state.begin(n_cached, n_followed)
            self.stats.n_modules_off = len(self.module_state.tops) - self.n_usable
        self.is_asked = False

    @property
    def rests(self) -> bool:
        """Whether the next call goes on without a look at drafts, if it is of one row."""
        return self.rest > 0 and not self.is_asked

    @property
    def followed(self) -> list[int]:
        """Of each used module, up to which position its K and V are right."""
        own = self.module_state
        return [] if own is None else [min(top, own.n_computed) for top in own.tops]

    @property
    def n_usable(self) -> int:
        """Modules that can draft; the others lack K and V of earlier positions."""
        return 0 if self.module_state is None else self.module_state.n_usable


class Ask(NamedTuple):
    """A sequence whose last token is computed in the next call, and which may have n_most drafts behind it."""

    own: SequenceDrafts
    timeline: Timeline
    ids: Sequence[int]  # of the whole sequence
    n_most: int
    sampling: Sampling
    rng_stream: int


class Computed(NamedTuple):
    """What a call computed of a sequence: n_rows that stand, from its row `at` on, at positions from `start` on."""

    own: SequenceDrafts
    timeline: Timeline
    at: int
    start: int
    n_rows: int  # without wrong drafts
    ids: Sequence[int]  # of the whole sequence, with what was drawn and forced
    drafts: Sequence[int] = ()  # that were verified
    n_right: int = 0


class Call(NamedTuple):
    """A call of the model, drafts included."""

    n_rows: int
    n_drafts: int
    n_expert_reads: int  # experts that it went through, of all layers
    seconds: float  # from behind `propose` to behind the draws
    is_measure: bool = True  # False: a prompt was read beside, or nothing should be learnt
