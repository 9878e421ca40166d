"""What the next call computes: which sequences run, wait or are preempted, and whose tokens fill the call.

Decoding sequences add a token each, and chunks of prompts fill the rest of the call. A beginning that two prompts
share is computed once: the later one waits until the earlier one has got so far. Knows positions and pages, no logits.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from m2lite.engine.prefix_cache import ROOT, PrefixCache, n_common
from m2lite.engine.sequence import Sequence, Slice
from m2lite.model.cache import PAGE, KVPool, Timeline

_TRIED = 8  # sequences with the same whole pages that are compared token by token
_WORTH = 16  # tokens that make it worth to wait for another sequence
_CATCH_UP = 16  # positions that are computed again where prediction modules lack them
_USUAL = 128.0  # tokens of an answer, until it is known better
_TOGETHER = 8  # a share of the places is filled at once, unless nobody decodes: so several prompts share a call


@dataclass
class Counts:
    """What was done so far."""

    n_steps: int = 0
    n_prompt: int = 0  # tokens of prompts that were computed
    n_cached: int = 0  # tokens of prompts that were in the prefix cache
    n_drawn: int = 0  # tokens of answers
    n_recomputed: int = 0  # tokens computed again, of sequences that were preempted
    n_preempted: int = 0
    n_expert_reads: int = 0  # experts that were gone through, of all layers and steps
    n_rows: int = 0  # of all calls, but for drafts that were wrong
    n_drafts: int = 0  # that were verified
    n_accepted: int = 0  # of these
    n_running: int = 0  # sequences, now
    n_most_running: int = 0  # of these, at once


class Scheduler:
    """Sequences that wait, and those that run, in the order in which they were admitted."""

    def __init__(self, pool: KVPool, cache: PrefixCache, n_rows: int) -> None:
        """`n_rows`: of a call, which bounds how many sequences run at once."""
        self.pool, self.cache, self.n_rows = pool, cache, n_rows
        self.n_most = n_rows  # sequences that run at once
        self.n_noted = n_rows  # rows of a prompt in a call whose logits are all needed
        self.waiting = deque[Sequence]()
        self.preempted = deque[Sequence]()
        self.running = list[Sequence]()
        self.in_flight = list[Sequence]()  # of these, in a call that waits for others between its layers
        self.counts = Counts()
        self._beginning = dict[bytes, list[Sequence]]()  # by a page's key, running sequences whose prompts have it
        self._usual = _USUAL

    @property
    def is_idle(self) -> bool:
        return not (self.running or self.waiting or self.preempted)

    def pick(self, n_longest: int | None = None) -> list[Slice]:
        """What the next call computes: a token of each decoding sequence, and of prompts what there is room for.

        Of prompts only those of which at most n_longest tokens are missing, where that is given.
        """
        self._admit()
        for sequence in self.running:
            if sequence.timeline is None:
                self._begin_as(sequence)
        while not self._has_room():
            if not self._preempt():
                return []
        slices, n_pages, n_left, lacks_pages = list[Slice](), 0, self.n_rows, False
        for sequence in sorted(self.running, key=lambda s: s.is_prefill):  # decoding ones first, then who came first
            timeline, n = sequence.timeline, min(n_left, sequence.n_todo)
            n = min(n, self.n_noted) if sequence.n_unnoted else n
            if sequence.awaits is not None or timeline is None or n < 1 or sequence in self.in_flight:
                continue
            if n_longest is not None and sequence.n_todo > n_longest:
                continue
            n_more = self._reserve(timeline, n, n_pages)
            if n_more is None:
                lacks_pages = True
                continue
            n_pages, at = n_more, timeline.length
            slices.append(Slice(sequence, at, sequence.ids[at : at + n], n == sequence.n_todo))
            n_left -= n
        if not slices and lacks_pages and self._preempt():
            return self.pick(n_longest)
        return slices

    def remove(self, sequence: Sequence) -> None:
        """It has ended: what it computed stays for others, while there is room."""
        for waiting in (self.waiting, self.preempted):
            if sequence in waiting:
                waiting.remove(sequence)
        if sequence in self.running:
            if sequence.answer.is_finished:
                self._usual += (len(sequence.answer.completion.tokens) - self._usual) / 16
            self.publish(sequence, is_end=True)
            self._stop(sequence)

    def publish(self, sequence: Sequence, is_end: bool = False) -> None:
        """Pages of it that are whole go to the prefix cache; at its end, or where another waits, the last one too."""
        timeline, n_whole, followed = sequence.timeline, sequence.n_computed // PAGE, list[int]()
        if timeline is None or sequence.request.keep == "nothing":
            return
        if sequence.drafts is not None:
            followed = sequence.drafts.followed
        n_followed = min(followed, default=0)
        if n_whole > sequence.n_published or (is_end and n_whole):
            sequence.extend_keys()
            # The one before again: prediction modules may have come as far as its end only now.
            first = max(0, sequence.n_published - 1)
            self.cache.publish(timeline, sequence.ids, sequence.keys[:n_whole], first, n_followed)
            sequence.n_published = n_whole
        if is_end:
            self.cache.publish_end(timeline, sequence.ids, sequence.keys, n_followed)

    def _stop(self, sequence: Sequence) -> None:
        """It runs no more, and its pages are the cache's or nobody's."""
        self.running.remove(sequence)
        if sequence.timeline is not None:
            sequence.timeline.release()
        sequence.timeline, sequence.n_published, sequence.awaits = None, 0, None
        for key in (ROOT, *sequence.keys):
            holders = self._beginning.get(key, [])
            if sequence in holders:
                holders.remove(sequence)
                if not holders:
                    del self._beginning[key]

    def _preempt(self) -> bool:
        """The sequence that was admitted last lets go of its pages, to go on later.

        False for one alone: its length is bounded, so it has room once the cache is empty and nothing is being saved.
        """
        others = [each for each in self.running if each not in self.in_flight]
        if self.in_flight and len(others) < 2:  # the call under way ends soon
            return False
        if len(self.running) == 1:
            self.cache.clear()
            return False
        sequence = others[-1]
        self.publish(sequence)
        self._stop(sequence)
        self.preempted.appendleft(sequence)
        self.counts.n_preempted += 1
        return True

    # Room

    def _has_room(self) -> bool:
        """Whether each decoding sequence can take one more token."""
        n_pages: int | None = 0
        for sequence in self.running:
            is_decoding = sequence.n_todo == 1 and sequence not in self.in_flight
            if n_pages is not None and is_decoding and sequence.timeline is not None:
                n_pages = self._reserve(sequence.timeline, 1, n_pages)
        return n_pages is not None

    def _reserve(self, timeline: Timeline, n_new: int, n_before: int) -> int | None:
        """n_before pages and those of n_new tokens more, if all are free, cached ones being given back for them.

        Where nothing else is left, the timeline's last page is taken from the cache instead of being copied.
        """
        n_pages = n_before + timeline.pages_needed(n_new)
        if not self.pool.has_free(n_pages) and self.cache.unshare_end(timeline):
            n_pages = n_before + timeline.pages_needed(n_new)
        return n_pages if self.pool.has_free(n_pages) else None

    # Admission

    def _admit(self) -> None:
        """Begin sequences while there are places and pages."""
        n_open = self.n_most - len(self.running)
        if n_open < self.n_most / _TOGETHER and any(not s.is_prefill for s in self.running):
            return
        while len(self.running) < self.n_most and (self.preempted or self.waiting):
            is_new = not self.preempted
            sequence = self._choose() if is_new else self.preempted[0]
            self._look_for(sequence)
            if self.running and self._n_promised(sequence) > self.pool.n_free // PAGE + self.cache.n_reclaimable:
                return
            (self.waiting if is_new else self.preempted).remove(sequence)
            self.running.append(sequence)
            for key in (ROOT, *sequence.keys):
                self._beginning.setdefault(key, []).append(sequence)
            self.counts.n_most_running = max(self.counts.n_most_running, len(self.running))
            self._begin_as(sequence)

    def _n_promised(self, sequence: Sequence) -> int:
        """Pages that the running sequences and this one will need, with answers of the usual length."""
        n_there = 0 if sequence.awaits is not None else self.cache.depth(sequence.keys[: sequence.n_reusable // PAGE])
        return sum(s.pages_to_end(self._usual) for s in (*self.running, sequence)) - n_there

    def _choose(self) -> Sequence:
        """Whose turn it is: who begins as sequences that are here do, but nobody is passed over for ever."""
        first = self.waiting[0]
        best, depth, window = first, self._depth(first), max(64, 2 * self.n_most)
        if first.n_passed < window:
            for i, other in enumerate(self.waiting):
                if i >= window:
                    break
                if len(other.keys) > depth and (found := self._depth(other)) > depth:
                    best, depth = other, found
        first.n_passed += best is not first
        return best

    def _depth(self, sequence: Sequence) -> int:
        """Whole pages of its prompt that are here, or will be."""
        keys = sequence.keys
        n = self.cache.depth(keys)
        return n + next((i for i, key in enumerate(keys[n:]) if key not in self._beginning), len(keys) - n)

    def _look_for(self, sequence: Sequence) -> None:
        """Who runs already and computes more of its beginning than is here by now."""
        ids, n_most = sequence.ids, sequence.n_reusable
        depth = next((n for n, key in enumerate(sequence.keys) if key not in self._beginning), len(sequence.keys))
        holders = self._beginning.get(sequence.keys[depth - 1] if depth else ROOT, [])
        if sequence in holders:
            holders = holders[: holders.index(sequence)]  # those that may wait for it are behind it
        holders = [other for other in holders if other.request.keep != "nothing"]
        sequence.awaits, sequence.n_awaited = None, 0
        at, n_best = depth * PAGE, PAGE * self.cache.depth(sequence.keys) + _WORTH - 1
        for other in holders[: -_TRIED - 1 : -1]:
            n = min(n_most, at + n_common(ids[at:], other.request.prompt[at:]))
            if n > n_best:
                sequence.awaits, sequence.n_awaited, n_best = other, n, n

    def _begin_as(self, sequence: Sequence) -> None:
        """Its timeline, with what was computed by now; who waits for one that has gone looks again."""
        other = sequence.awaits
        if other is not None and other not in self.running:
            self._look_for(sequence)
            other = sequence.awaits
        if other is not None and other.n_computed < sequence.n_awaited:
            return
        if other is not None:
            self.publish(other, is_end=True)
        timeline, n_followed = self.cache.fork(sequence.ids, sequence.n_reusable, sequence.keys)
        n_modules = 0 if sequence.drafts is None else len(sequence.drafts.followed)
        if n_modules and n_followed >= timeline.length - _CATCH_UP:
            n = max(0, n_followed - n_modules)  # so that each module has the state before its first position
            n_followed = min(n_followed, -(-n // PAGE) * PAGE)  # their K and V on the pages that stay
            timeline.rewind(max(0, n_followed - n_modules))
        sequence.timeline = timeline
        sequence.awaits, sequence.n_awaited = None, 0
        sequence.n_published = sequence.timeline.length // PAGE
        n, n_prompt = sequence.timeline.length, len(sequence.request.prompt)
        self.counts.n_cached += max(0, min(n, n_prompt) - sequence.n_counted)
        if sequence.n_counted == 0:
            sequence.answer.completion.stats.n_reused = n
        sequence.n_counted = max(sequence.n_counted, n)
        if sequence.drafts is not None:
            sequence.drafts.begin(sequence.ids, n, [n_followed] * n_modules)
