"""Drafts for the sequences of a call, and what became of them. A draft is right exactly when it equals the draw, so
drafts change when a token comes, never which. Draws nothing; used on the compute thread only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakSet

from m2lite.decode.sampling import Sampling
from m2lite.drafting.drafted import Drafted
from m2lite.drafting.modules import Draft, Followed, Modules, Todo
from m2lite.drafting.ngram import PromptLookup, load_kernels
from m2lite.drafting.options import MOST_DRAFTS, check_draft
from m2lite.errors import UsageError
from m2lite.model.cache import KVPool, Timeline
from m2lite.model.forward import Buffers
from m2lite.model.mtp import Mtp
from m2lite.model.weights import Weights

_MOST_KEPT = 128 << 20  # bytes of states that modules have not used, of all sequences
_ROOM = 64  # drafts of a call, at most, unless more sequences decode: each has logits of the whole vocabulary
_AT_ONCE = 8  # rows of a part from which on its states are not kept for later where modules draft


class SequenceDrafts:
    """What is known of one sequence: where its end stood before, and what the modules have seen."""

    def __init__(self, mode: str, n_most: int, lookup: PromptLookup | None, followed: Followed | None) -> None:
        self.mode, self.n_most, self.lookup, self.followed_by = mode, n_most, lookup, followed
        self.stats = Drafted()
        self.is_asked = False  # it takes part in the call under way, and these are its drafts
        self.foreseen = list[Draft]()  # what modules expect
        self.source = ""

    def begin(self, ids: Sequence[int], n_cached: int = 0, n_followed: Sequence[int] = ()) -> None:
        """The sequence is `ids` from now on; the first n_cached positions are computed.

        n_followed[k]: how many of them have the K and V of module k; what is not said has none.
        """
        if self.lookup is not None:
            self.lookup.follow(ids)
        if self.followed_by is not None:
            self.followed_by.begin(n_cached, n_followed)
        self.is_asked, self.foreseen = False, []

    @property
    def followed(self) -> list[int]:
        """Of each used module, up to which position its K and V are right."""
        own = self.followed_by
        return [] if own is None else [min(top, own.n_computed) for top in own.tops]

    @property
    def n_usable(self) -> int:
        """Modules that can draft; the others lack K and V of earlier positions."""
        return 0 if self.followed_by is None else self.followed_by.n_usable


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
    seconds: float
    is_measure: bool = True  # False: a prompt was read beside, or nothing should be learnt


# (sequence, k) -> what module k shall have said, and how sure: for measurements where the weights are random.
Oracle = Callable[[Ask, int], tuple[int, float]]


class Drafter:
    """Of one opened model."""

    def __init__(
        self,
        weights: Weights,
        pool: KVPool,
        buffers: Buffers,
        mode: str = "off",
        n_tokens: int | None = None,
        mtp: Mtp | None = None,
        n_modules: int = 0,
    ) -> None:
        """`mode` and `n_tokens`: of sequences for which nothing else is said; `mtp`: of which n_modules are used."""
        self._mode, self._n_tokens, self._buffers = mode, n_tokens, buffers
        self.modules = None if mtp is None else Modules(mtp, n_modules, pool, buffers)
        self._open = WeakSet[SequenceDrafts]()
        self.oracle: Oracle | None = None  # set by measurements only
        self._modules_s = 0.0  # of the call under way: time of the modules
        load_kernels()

    def open(self, mode: str | None = None, n_tokens: int | None = None) -> SequenceDrafts | None:
        """For one sequence, by default as the model was opened; None where nothing drafts. UsageError as check_draft,
        and for modules that were not opened."""
        mode, n_tokens = mode or self._mode, n_tokens or self._n_tokens
        check_draft(mode, n_tokens)
        if mode == "off":
            return None
        if mode == "mtp" and self.modules is None:
            raise UsageError("The model was opened without prediction modules.", "Open it with draft='mtp'.")
        followed = None if self.modules is None or mode == "ngram" else self.modules.new()
        lookup = None if mode == "mtp" else PromptLookup(self._buffers.n_positions + 1)
        own = SequenceDrafts(mode, n_tokens or MOST_DRAFTS, lookup, followed)
        self._open.add(own)
        return own

    def propose(self, asks: Sequence[Ask], n_rows: int) -> list[list[int]]:
        """Drafts for each of the sequences that decode in the next call, which has n_rows rows without them."""
        self._modules_s = 0.0
        n_free = min(self._buffers.n_rows - n_rows, max(len(asks), _ROOM))
        looked_up = list[list[int]]()
        for ask in asks:
            own, most = ask.own, min(ask.n_most, ask.own.n_most)
            own.is_asked, own.foreseen = True, []
            found = list[int]()
            if own.lookup is not None:
                if len(own.lookup) < len(ask.ids):
                    own.lookup.push(ask.ids[len(own.lookup) :])
                if most > 0 and own.lookup.length:
                    found = own.lookup.guess(most)
            looked_up.append(found)
        self._foresee([ask for ask, found in zip(asks, looked_up, strict=True) if not found])
        wanted = [
            found or [draft.token for draft in ask.own.foreseen] for ask, found in zip(asks, looked_up, strict=True)
        ]
        counts = _in_turn(list(map(len, wanted)), n_free)
        for ask, found, n in zip(asks, looked_up, counts, strict=True):
            ask.own.source = "" if not n else "ngram" if found else "mtp"
        return [drafts[:n] for drafts, n in zip(wanted, counts, strict=True)]

    def _foresee(self, asks: Sequence[Ask]) -> None:
        """The modules say what may come behind each."""
        if self.modules is None:
            return
        for k in range(self.modules.n_used):
            active = [a for a in asks if k < min(a.n_most, a.own.n_most, a.own.n_usable)]
            if not active:
                return
            began = time.perf_counter()
            drafts = self.modules.run(k, [_todo(ask, k) for ask in active])
            self._modules_s += time.perf_counter() - began
            for ask, draft in zip(active, drafts, strict=True):
                assert draft is not None
                if self.oracle is not None:
                    draft = Draft(*self.oracle(ask, k))
                ask.own.foreseen.append(draft)

    def computed(self, parts: Sequence[Computed], call: Call) -> None:
        """A call was computed, and its tokens were drawn; the buffers still hold what it left there."""
        keeps = self.modules is not None and any(part.own.n_usable for part in parts)
        states = self.modules.trunk_states(call.n_rows) if keeps and self.modules is not None else None
        for part in parts:
            own, n_new = part.own, len(part.ids) - part.start - 1
            n_seen = 0
            if own.is_asked:
                n_seen = 1 + _n_right(own.foreseen, part.ids, part.start + 1)
                own.stats.add(own.source, len(part.drafts), part.n_right, min(n_new, part.n_right + 1))
            if own.followed_by is not None and states is not None:
                new = states[part.at : part.at + part.n_rows]
                own.followed_by.keep(part.start, part.start + min(n_seen, part.n_rows), new)
            own.is_asked = False
        if self.modules is not None and any(part.n_rows > _AT_ONCE for part in parts):
            self._follow(parts)

    def _follow(self, parts: Sequence[Computed]) -> None:
        """The modules read prompts at once, so that their states need not be kept."""
        assert self.modules is not None
        for k in range(self.modules.n_used):
            todo = list[Todo]()
            for part in parts:
                own = part.own.followed_by
                if own is not None and k < own.n_usable and own.tops[k] < own.n_computed:
                    ids = part.ids[own.tops[k] : own.n_computed]
                    todo.append(Todo(own, part.timeline, own.tops[k], ids))
            self.modules.run(k, todo)


def _todo(ask: Ask, k: int) -> Todo:
    followed = ask.own.followed_by
    assert followed is not None
    first = followed.tops[k]
    drafts = [draft.token for draft in ask.own.foreseen]
    ids = [*ask.ids[first:], *drafts[max(0, first - len(ask.ids)) :]]
    return Todo(followed, ask.timeline, first, ids, (ask.sampling, ask.rng_stream))


def _n_right(foreseen: Sequence[Draft], ids: Sequence[int], at: int) -> int:
    """How many of the drafts, one after the other, are what came."""
    n = 0
    while n < len(foreseen) and at + n < len(ids) and foreseen[n].token == ids[at + n]:
        n += 1
    return n


def _in_turn(lengths: Sequence[int], n_most: int) -> list[int]:
    """How many drafts of each, at most n_most: all first ones, then the second ones."""
    counts = [0] * len(lengths)
    for n in range(1, MOST_DRAFTS + 1):
        for i, length in enumerate(lengths):
            if length >= n and n_most > 0:
                counts[i], n_most = n, n_most - 1
    return counts
