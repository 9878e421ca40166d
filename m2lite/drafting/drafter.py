"""Drafts for the sequences of a call, and what became of them. Draws nothing; used on the compute thread only.

A draft is right exactly when it equals the draw, so drafts change when a token comes, never which. For each call

    drafts = drafter.propose(asks, n_rows)          # for the sequences that decode in it
    logits = forward(rows and drafts)               # with drafter.cut_off(), where that is not None
    drafter.computed(parts, call)                   # once its tokens are drawn: of all sequences that were in it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from weakref import WeakSet

from m2lite.drafting.chances import Chances
from m2lite.drafting.cost import CallCost, Sizes
from m2lite.drafting.kept import load_kept, save_kept
from m2lite.drafting.missing import MissingExperts
from m2lite.drafting.modules import Draft, Modules, ModuleState, Todo
from m2lite.drafting.ngram import PromptLookup, load_kernels
from m2lite.drafting.options import MOST_DRAFTS, check_draft
from m2lite.drafting.planner import MOST_AT_ONCE, Planner
from m2lite.drafting.sequence import Ask, Call, Computed, SequenceDrafts
from m2lite.errors import UsageError
from m2lite.model.buffers import Buffers
from m2lite.model.cache import KVPool, Timeline
from m2lite.model.mtp import Mtp
from m2lite.model.observer import Observer
from m2lite.model.weights import Weights
from m2lite.sampling.draw import Sampling

_MOST_KEPT = 128 << 20  # bytes of states that modules have not used, of all sequences
_SAMPLE, _NEW = 4, 8  # one in so many calls without drafts is measured, but for the first ones of a process
_COLD = 2  # calls that are not measured: they find cold caches
_MOST_REST, _REST_SHARE = 16, 4  # calls for which nobody looks for drafts, at most, and of those since a match
_LOOK = 64  # calls between two looks at how much memory the states take
_AT_ONCE = 8  # rows of a part from which on its states are not kept for later where modules draft


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
        self.cost = CallCost(Sizes.of(weights), None if mtp is None else Sizes.of_module(mtp))
        self.chances = Chances(n_modules)
        self._planner = Planner(n_modules, self.cost, self.chances)
        stream, n_layers = buffers.stream, weights.config.n_layers
        self._missing = None if stream is None else MissingExperts(stream, n_layers, self.cost)
        self._kept: Path | None = None
        self._n_levels, self._learns = 0, False  # of the call under way: modules that drafted; whether all are auto
        self._n_measured = self._n_rested = self._next_look = 0  # calls; that sequences rested in, not yet counted
        self.mapping: Callable[[], bool] | None = None  # whether the model's pages are still being mapped
        self.oracle: Oracle | None = None  # set by measurements only
        load_kernels()

    def remember(self, path: Path) -> None:
        """Begin with what earlier processes learnt, which is kept at `path` (see `kept_path`); `save` adds to it."""
        self._kept = path
        load_kept(path, self._planner)

    def save(self) -> None:
        """Keep what was learnt, if it is to be remembered and anything was."""
        if self._kept is not None and self._n_measured > _COLD:
            save_kept(self._kept, self._planner)

    @property
    def plain_s(self) -> float | None:
        """Seconds of a call of one row without drafts, as far as one was measured."""
        return self.cost.plain_s

    def load_module_kernels(self, timeline: Timeline, n_rows: int) -> None:
        """Compile, or load from the cache, what modules need for n_rows; behind a call that computed as many zeros."""
        if self.modules is not None:
            followed = self.modules.new(1)
            followed.keep(0, 0, self.modules.trunk_states(n_rows)[:n_rows])
            self.modules.run(0, [Todo(followed, timeline, 0, [0] * n_rows, (Sampling(0.0, seed=0), 0))])

    def check(self, mode: str | None, n_tokens: int | None) -> tuple[str, int | None]:
        """The two, by default as the model was opened. UsageError as check_draft, and for modules that are not open."""
        mode, n_tokens = mode or self._mode, n_tokens or self._n_tokens
        check_draft(mode, n_tokens)
        if mode == "mtp" and self.modules is None:
            raise UsageError("The model was opened without prediction modules.", "Open it with draft='mtp'.")
        return mode, n_tokens

    def open(self, mode: str | None = None, n_tokens: int | None = None) -> SequenceDrafts | None:
        """For one sequence; None where nothing drafts. UsageError as `check`."""
        mode, n_tokens = self.check(mode, n_tokens)
        if mode == "off":
            return None
        followed = None if self.modules is None or mode == "ngram" else self.modules.new(n_tokens or MOST_DRAFTS)
        lookup = None if mode == "mtp" else PromptLookup(self._buffers.n_positions + 1)
        own = SequenceDrafts(mode, n_tokens or MOST_DRAFTS, lookup, followed)
        self._open.add(own)
        return own

    def propose(self, asks: Sequence[Ask], n_rows: int) -> list[list[int]]:
        """Drafts for each of the sequences that decode in the next call, which has n_rows rows without them."""
        planner, missing = self._planner, self._missing
        self._n_levels = n_auto = n_wanted = 0
        matches = list[Ask]()
        for ask in asks:
            n_auto += ask.own.is_auto
            if self._begin(ask):
                matches.append(ask)
        # What fixed numbers of drafts show is not learnt: auto would know more than it can find out itself.
        self._learns = n_auto == len(asks) > 0
        if n_auto and planner.is_due(n_auto):
            followed = [ask.own.module_state for ask in asks if ask.own.is_auto]
            self._plan([each for each in followed if each is not None], n_auto)
        if missing is not None:
            missing.begin()
            planner.missing = missing.cost
        if not matches and not planner.depth and n_auto == len(asks):  # as nearly always where nothing pays
            if len(asks) == n_rows == 1 and missing is None:
                own = asks[0].own
                own.rest = min(own.n_unmatched // _REST_SHARE, _MOST_REST)
            return [[] for _ in asks]
        for ask in matches:
            n_wanted += self._look_up(ask, n_rows)
        if self.modules is not None and (planner.depth or n_auto < len(asks)):
            n_wanted += self._foresee([ask for ask in asks if not ask.own.wanted], n_rows)
        if not n_wanted:
            return [[] for _ in asks]
        drafts = self._choose([ask.own for ask in asks], n_rows)
        for ask, own_drafts in zip(asks, drafts, strict=True):
            ask.own.source = ask.own.source if own_drafts else ""
        if missing is not None and n_rows == 1 and self._learns:
            missing.expect(asks[0].own.chances)
        return drafts

    def cut_off(self) -> Observer | None:
        """Says layer by layer which rows of the call just proposed are worth reading experts for.

        None where all are: the model is in memory, or this is not the call of one sequence that drafts what pays.
        """
        return self._missing if self._missing is not None and self._missing.is_asked() else None

    def _begin(self, ask: Ask) -> bool:
        """The sequence takes part, and its lookup knows all of its ids; whether their end stood before."""
        own, _, ids, *_ = ask
        lookup, own.n_unmatched, own.rest = own.lookup, own.n_unmatched + 1, 0
        if own.n_rested:
            self.chances.saw_tokens(own.n_rested, is_first=False)
            self._n_rested, own.n_rested = self._n_rested + own.n_rested, 0
        if own.is_asked and own.module_state is not None:  # the last call was stopped
            own.module_state.forget_drafts()
        own.is_asked = True
        if own.wanted:
            own.wanted, own.source, own.foreseen = [], "", []
        if lookup is None:
            return False
        if (n := lookup.n) < len(ids):
            for length in lookup.push(ids[n:]):
                if own.is_auto:
                    self.chances.saw_match(length)
        if lookup.length:
            own.n_unmatched = 0
        return lookup.length > 0

    def _plan(self, followed: Sequence[ModuleState], n_auto: int) -> None:
        """For the sequences of which modules have to read least."""
        n_usable = max((each.n_usable for each in followed), default=0)
        able = [each for each in followed if each.n_usable == n_usable]
        behind = [0, *(min(each.n_behind(k) for each in able) for k in range(1, n_usable + 1))]
        self._planner.plan(n_auto, [n if n > k * _AT_ONCE else 0 for k, n in enumerate(behind)])

    def _look_up(self, ask: Ask, n_rows: int) -> int:
        """What followed the end of the sequence where it stood before, as far as it pays; how many."""
        own, lookup, n = ask.own, ask.own.lookup, MOST_DRAFTS
        assert lookup is not None
        if own.is_auto:
            n = self._planner.lookup_drafts(lookup.length, n_rows)
        n = min(n, ask.n_most, own.n_most)
        if n > 0:
            own.wanted, own.source = lookup.guess(n), "ngram"
            own.chances = self.chances.of_match(lookup.length)[: len(own.wanted)]
        return len(own.wanted)

    def _foresee(self, asks: Sequence[Ask], n_rows: int) -> int:
        """The modules say what may come behind each, as far as it pays; how many drafts that are."""
        modules, planner, n_wanted = self.modules, self._planner, 0
        assert modules is not None
        active = [(ask, 1.0) for ask in asks if self._may_foresee(ask.own)]
        for k in range(modules.n_used):
            n = len(active)
            active = [
                (ask, right)
                for ask, right in active
                if k < min(ask.n_most, ask.own.n_most, ask.own.n_usable)
                and (not ask.own.is_auto or (k < planner.depth and planner.goes_on(k, right, n_rows, n)))
            ]
            if not active:
                break
            self._n_levels = k + 1
            drafts = self._run(k, [_todo(ask, k) for ask, _ in active])
            for i, (ask, right) in enumerate(active):
                draft = drafts[i] if self.oracle is None else Draft(*self.oracle(ask, k))
                assert draft is not None
                active[i] = ask, right * self.chances.of_share(draft.share)
                ask.own.foreseen.append(draft)
        for ask in asks:
            if ask.own.foreseen:
                ask.own.wanted, ask.own.source = [draft.token for draft in ask.own.foreseen], "mtp"
                ask.own.chances = [self.chances.of_share(draft.share) for draft in ask.own.foreseen]
                n_wanted += len(ask.own.wanted)
        return n_wanted

    def _may_foresee(self, own: SequenceDrafts) -> bool:
        """Whether modules draft for it: not where they would have to catch up with more than they bring."""
        followed, depth = own.module_state, self._planner.depth
        if followed is None or not own.is_auto:
            return followed is not None
        n_behind = followed.n_behind(depth)
        return n_behind <= depth * _AT_ONCE or self._planner.is_worth_catching_up(n_behind, own.stats.n_tokens)

    def _run(self, k: int, todo: Sequence[Todo]) -> list[Draft | None]:
        """Module k is run, and what that costs is learnt."""
        assert self.modules is not None
        began = time.perf_counter()
        drafts = self.modules.run(k, todo)
        if self._learns and self._planner.measures and not self._is_mapping():
            n_heads = sum(each.draw is not None for each in todo)
            self.cost.saw_module(sum(len(each.ids) for each in todo), n_heads, time.perf_counter() - began)
        return drafts

    def _choose(self, owns: Sequence[SequenceDrafts], n_rows: int) -> list[list[int]]:
        """Of the wanted drafts those that were asked for, and of the others what pays."""
        n_free = min(self._buffers.n_rows - n_rows, max(len(owns), MOST_AT_ONCE))
        counts = _in_turn([0 if own.is_auto else len(own.wanted) for own in owns], n_free)
        n_fixed = sum(counts)
        chances = [own.chances if own.is_auto and own.wanted else () for own in owns]
        paying = self._planner.choose(chances, n_rows + n_fixed, n_free - n_fixed)
        return [own.wanted[: a + b] for own, a, b in zip(owns, counts, paying, strict=True)]

    def rested(self, own: SequenceDrafts, start: int, n_new: int) -> None:
        """Instead of `propose` and `computed`, where a call has one row and its sequence `rests`."""
        own.rest -= 1
        own.n_rested += 1
        own.stats.n_steps += 1
        own.stats.n_tokens += n_new
        if own.module_state is not None and self.modules is not None:
            own.module_state.keep(start, start + 1, self.modules.trunk_states(1)[:1])

    def computed(self, parts: Sequence[Computed], call: Call) -> None:
        """A call was computed, its tokens were drawn; the buffers still hold its rows, and timelines their pages."""
        states, n_read = None, 0
        for part in parts:
            own, _, at, start, n_rows, *_ = part
            n_seen, state = 0, own.module_state
            if own.is_asked:
                n_seen, own.is_asked = self._learn(part), False
            else:
                n_read += n_rows
            if state is not None and self.modules is not None:
                if states is None:
                    states = self.modules.trunk_states(call.n_rows)
                state.keep(start, start + min(n_seen, n_rows), states[at : at + n_rows])
        if self._learns:
            self._learn_cost(call)
            self._learns = False
        if states is not None and (n_read or self._planner.n_calls >= self._next_look):
            self._next_look = self._planner.n_calls + _LOOK
            self._bound(parts)

    def _learn_cost(self, call: Call) -> None:
        planner, missing = self._planner, self._missing
        waited = 0.0 if missing is None else missing.end(call.n_rows, call.n_drafts)
        if not call.is_measure:
            return
        # Calls without drafts are alike, and come all the time.
        if call.n_drafts or planner.is_trial or planner.n_calls < _NEW or not planner.n_calls % _SAMPLE:
            if planner.measures and not self._is_mapping():
                self._n_measured += 1
                if self._n_measured > _COLD:
                    self.cost.saw(call.n_rows, call.n_drafts, call.n_expert_reads, call.seconds - waited)
        planner.saw_call(self._n_levels, call.n_drafts, self._n_rested)
        self._n_rested = 0

    def _learn(self, part: Computed) -> int:
        """What became of the sequence's drafts; how many of its rows the modules have seen as they stand."""
        own, _, _, start, _, ids, drafts, n_right = part
        n_new, stats = len(ids) - start - 1, own.stats
        if self._learns:
            self.chances.saw_tokens(n_new, is_first=not stats.n_steps)
        stats.add(own.source, len(drafts), n_right, min(n_new, n_right + 1))
        if not own.foreseen:
            return 1
        for k, draft in enumerate(own.foreseen[:n_new]):
            is_right = draft.token == ids[start + 1 + k]
            if self._learns:
                self.chances.saw_draft(k, draft.share, is_right)
            if not is_right:
                return 1 + k
        return 1 + min(len(own.foreseen), n_new)

    def _is_mapping(self) -> bool:
        """Whether the model's pages are still being mapped: what calls take says nothing of later ones."""
        if self.mapping is not None and not self.mapping():
            self.mapping = None
        return self.mapping is not None

    def _bound(self, parts: Sequence[Computed]) -> None:
        """Modules read prompts at once where they are at work; states that would take too much memory are dropped."""
        reading, most = list[Computed](), _MOST_KEPT // max(1, len(self._open))
        for part in parts:
            followed = part.own.module_state
            if followed is None or not followed.n_usable:
                continue
            if part.n_rows > _AT_ONCE and self._reads_at_once(part):
                reading.append(part)
            elif followed.n_bytes > most:
                followed.drop(followed.n_computed)
        for k in range(max((self._n_at_work(part) for part in reading), default=0)):
            self._run(k, [_reading(part, k) for part in reading if k < self._n_at_work(part)])

    def _n_at_work(self, part: Computed) -> int:
        depth = self._planner.depth if part.own.is_auto else MOST_DRAFTS
        return min(depth, part.own.n_usable)

    def _reads_at_once(self, part: Computed) -> bool:
        followed, planner = part.own.module_state, self._planner
        if followed is None or not part.own.is_auto:
            return followed is not None
        n_rows = planner.depth * (len(part.ids) - followed.tops[0])  # those of its end, too, which come later
        return n_rows > 0 and not planner.is_trial and planner.is_worth_catching_up(n_rows, part.own.stats.n_tokens)


def _reading(part: Computed, k: int) -> Todo:
    """What module k has not seen of what was computed."""
    followed = part.own.module_state
    assert followed is not None
    first = followed.tops[k]
    return Todo(followed, part.timeline, first, part.ids[first : followed.n_computed])


def _todo(ask: Ask, k: int) -> Todo:
    followed = ask.own.module_state
    assert followed is not None
    first = followed.tops[k]
    drafts = [draft.token for draft in ask.own.foreseen]
    ids = [*ask.ids[first:], *drafts[max(0, first - len(ask.ids)) :]]
    return Todo(followed, ask.timeline, first, ids, (ask.sampling, ask.rng_stream))


def _in_turn(lengths: Sequence[int], n_most: int) -> list[int]:
    """How many drafts of each, at most n_most: all first ones, then the second ones."""
    counts = [0] * len(lengths)
    for n in range(1, MOST_DRAFTS + 1):
        for i, length in enumerate(lengths):
            if length >= n and n_most > 0:
                counts[i], n_most = n, n_most - 1
    return counts
