"""The one loop: schedule, draft, compute, draw, accept. One sequence is a batch of one. Knows ids, no messages.

Whoever waits for an answer drives the loop: each turn is a job of the compute thread that takes all running sequences
on for a few milliseconds. A sequence's numbers do not depend on the others in a call, so its answer is the one that it
would get alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from m2lite import machine
from m2lite.drafting.sequence import Ask, Call, Computed
from m2lite.engine.answer import Answer
from m2lite.engine.context import check_room
from m2lite.engine.handle import Handle
from m2lite.engine.pace import MOST_ROWS, Pace
from m2lite.engine.prefix_cache import PrefixCache, page_keys
from m2lite.engine.request import Request
from m2lite.engine.runner import ModelRunner, Stop, ask
from m2lite.engine.scheduler import Counts, Scheduler
from m2lite.engine.sequence import Prompt, Sequence, Slice
from m2lite.engine.thread import Abandoned, Stopped, compute_thread, is_forked
from m2lite.errors import BadModelError, M2liteError, ResourceError, UsageError
from m2lite.sampling.draw import Logits
from m2lite.sampling.rules import logprob_of

if TYPE_CHECKING:
    from m2lite.sampling.json_schema import Masks
    from m2lite.text.tokenizer import Tokenizer

_OF_ALL = BadModelError, ResourceError  # errors that are no sequence's own
_SHORT = 256  # tokens of a prompt that is computed between the layers of a longer one
_HEAD_ROWS = 64  # of a prompt whose logits are there at once
_MOST_NOTED = 256  # such rows of one call: their logits take as long as some layers, and others wait
_PROMPT_SHARE = 0.5  # of what a step of others took: for so long they wait for a long prompt
BURST_S = 0.004  # for which one job goes on: to hand over to the compute thread and back takes 0.02 to 0.2 ms


class _Cancelled(Exception):
    """Nobody waits any more for what a call computes."""


class Loop:
    """Requests in, events out. `submit`, `cancel` and `drive` may be called on any thread."""

    def __init__(self, runner: ModelRunner, tokenizer: Tokenizer, masks: Masks, n_positions: int) -> None:
        """`n_positions`: of a sequence."""
        self._runner, self._tokenizer, self._masks, self._drafter = runner, tokenizer, masks, runner.drafter
        self.n_positions = n_positions
        n_rows = runner.buffers.n_rows
        self.prefix_cache = PrefixCache(runner.pool)
        self.scheduler = Scheduler(runner.pool, self.prefix_cache, n_rows)
        if runner.stream is None:  # else each call sweeps the experts
            self.scheduler.n_noted = min(n_rows, _MOST_NOTED)
        self._inbox, self.is_closed = deque[Sequence](), False
        self._pace, self._others_from = Pace(), 0.0  # when others may have their turn between two layers
        self.on_news: Callable[[], None] = lambda: None  # called where a long call let others go on

    @property
    def counts(self) -> Counts:
        return self.scheduler.counts

    @property
    def n_rows(self) -> int:
        """Of a call, at most."""
        return self.scheduler.n_rows

    @n_rows.setter
    def n_rows(self, n: int) -> None:
        self.scheduler.n_rows = min(n, self._runner.buffers.n_rows)

    @property
    def n_waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._inbox) + len(self.scheduler.waiting)

    def n_cached(self, ids: Iterable[int]) -> int:
        """How many of `ids`, from the first on, are in the prefix cache."""
        return compute_thread().run(partial(self.prefix_cache.length, list(ids)))

    def save(self, ids: Iterable[int], stop: Stop | None = None) -> int:
        """Whole pages of `ids` that are in the prefix cache go to its disk; how many went. Ends early by `stop`."""
        return self._save([page_keys(list(ids))], stop)

    def save_shared(self, stop: Stop | None = None) -> int:
        """The same of all beginnings that two requests or more had."""
        return self._save(compute_thread().run(self.prefix_cache.shared_keys), stop)

    def _save(self, all_keys: Iterable[list[bytes]], stop: Stop | None) -> int:
        cache, n_written = self.prefix_cache, 0
        disk = cache.disk
        if disk is None:
            return 0
        for keys in all_keys:
            pinned = compute_thread().run(partial(cache.pin, keys))
            try:
                for key, page, has_drafts in pinned:
                    if (stop is not None and stop()) or not disk.write(key, page, has_drafts):
                        break
                    n_written += 1
            finally:
                compute_thread().submit(partial(cache.unpin, [page for _, page, _ in pinned]))
            if pinned:
                disk.trim(keys)
        return n_written

    def share_time(self) -> None:
        """From now on nobody waits for a long prompt, or little: others go on between two of its layers.

        It takes memory, and experts that a prompt and an answer share are gone through twice. Not for a model that
        comes and goes: each call would sweep its experts.
        """
        compute_thread().run(self._runner.make_room_aside)

    def check_open(self) -> None:
        """Raises UsageError once the model was closed."""
        if self.is_closed:
            raise UsageError("The model is closed.", "Open it again.")

    def submit(self, request: Request) -> Handle:
        """Raises UsageError or ContextError for a request that can never be answered."""
        self.check_open()
        compute_thread()  # for its error in a forked process
        request.check(self._runner.pool.config.n_vocab)
        limit = min(self.n_positions, self._runner.pool.n_positions)
        check_room(len(request.prompt) + len(request.given), 0, limit, self._runner.pool.config)
        sequence = Sequence(request, Answer(request, self._tokenizer, self._masks, limit))
        sequence.drafts = self._drafter.open(request.draft, request.draft_tokens)
        if sequence.answer.is_finished:
            sequence.end()
        else:
            self._inbox.append(sequence)
        return Handle(self, sequence)

    def cancel(self, sequence: Sequence) -> None:
        if not sequence.is_over and not sequence.is_cancelled and not is_forked():
            sequence.is_cancelled = True
            compute_thread().submit(self._drop_cancelled)

    def drive(self, stop: Stop | None = None) -> None:
        """Go on for a few milliseconds, or up to the next thing that somebody may want to see. Stopped by `stop`."""
        compute_thread().run(partial(self._burst, stop), stop)

    def forget(self) -> None:
        """The prefix cache is empty, but for what is on disk."""
        compute_thread().run(self.prefix_cache.clear)

    def fill(self, ids: list[int], n_true: int) -> None:
        """Put `ids` into the prefix cache, for measurements: only n_true positions are computed, and copied behind.

        What prediction modules find there is no more than memory to read. On the compute thread.
        """
        pool, timeline = self._runner.pool, self._runner.pool.timeline()
        try:
            for start in range(0, min(n_true, len(ids)), self.n_rows):
                self._runner.evaluate(timeline, start, ids[start : min(start + self.n_rows, n_true)])
            n_pages, n_more = len(timeline.pages), len(ids) - timeline.length
            if pool.has_free(timeline.pages_needed(n_more)):
                timeline.make_room(n_more)
            for i, page in enumerate(timeline.pages[n_pages:]):
                pool.copy_page(timeline.pages[i % n_pages], page)
            timeline.length = len(ids)
            self.prefix_cache.publish(timeline, ids, page_keys(ids), 0, len(ids))
            self.prefix_cache.publish_end(timeline, ids, page_keys(ids), len(ids))
        finally:
            timeline.release()

    def close(self) -> None:
        """On the compute thread: whatever is under way ends."""
        self.is_closed = True
        self._take_inbox()
        for sequence in self._all():
            self._end(sequence, UsageError("The model was closed.", "Open it again."))
        self.prefix_cache.clear()

    # On the compute thread

    def _burst(self, stop: Stop | None) -> None:
        until = time.perf_counter() + BURST_S
        self.prefix_cache.check = partial(ask, stop)
        try:
            while True:
                ask(stop)
                self._drop_cancelled()
                if self.is_closed:
                    self.close()  # again, for what was submitted meanwhile
                if self.scheduler.is_idle or self.step(stop) or time.perf_counter() >= until:
                    return
        finally:
            self.prefix_cache.check = lambda: None

    def step(self, stop: Stop | None = None) -> bool:
        """One call of the model, and a token for each sequence whose end it reached; whether there is news to show."""
        picked = self._pick()
        if self._runner.n_rows_aside:
            long = [each for each in picked if each.n_own > MOST_ROWS]
            if long:
                return self._advance_aside(long, stop)
            picked = self._paced(picked)
        began = time.perf_counter()
        return self._advance(self._with_drafts(picked), began, stop)

    def _advance_aside(self, slices: list[Slice], stop: Stop | None) -> bool:
        """Chunks of long prompts, which let others go on between their layers."""
        slices = _cut(slices, self._runner.n_rows_aside)
        self.scheduler.in_flight = [each.sequence for each in slices]
        try:
            return self._advance(slices, time.perf_counter(), stop)
        finally:
            self.scheduler.in_flight = []

    def _let_others_go_on(self, stop: Stop | None) -> None:
        """A step of all but those in flight, who then have half as much time, and what a piece overruns it."""
        began = time.perf_counter()
        if began < self._others_from:
            return
        in_flight = self.scheduler.in_flight
        self._drop_cancelled()
        slices = self._paced(self._pick(_SHORT))
        if slices:
            self.scheduler.in_flight = []  # what is computed now is what has no other call
            try:
                self._advance(self._with_drafts(slices), time.perf_counter(), stop)
            finally:
                self.scheduler.in_flight = in_flight
            self.on_news()
        now = time.perf_counter()
        self._others_from = now + _PROMPT_SHARE * (now - began)

    def _paced(self, slices: list[Slice]) -> list[Slice]:
        """The slices, with no more of prompts than what keeps answers waiting for a moment."""
        if len(slices) == 1 and not self.scheduler.in_flight:
            return slices
        decoding = [each for each in slices if each.n_own == 1]
        return decoding + _cut([each for each in slices if each.n_own > 1], self._pace.rows(len(decoding)))

    def _advance(self, slices: list[Slice], began: float, stop: Stop | None) -> bool:
        """Compute, draw and accept; `began`: the time at which drafts were asked for."""
        called = time.perf_counter()
        computed = self._compute(slices, stop)
        if computed is None:
            news = [self._advance([each], time.perf_counter(), stop) for each in slices]
            return any(news)
        ends = accumulate(len(slice.ids) for slice, _ in computed)
        news = [self._commit(*each, end - len(each[1])) for each, end in zip(computed, ends, strict=True)]
        self._note_prompts([slice for slice, _ in computed])
        self._learn(computed, time.perf_counter() - called)
        if self._runner.n_rows_aside and not self.scheduler.in_flight:
            n_prompt = sum(each.n_own for each in slices if each.n_own > 1)
            self._pace.saw(sum(each.n_own == 1 for each in slices), n_prompt, time.perf_counter() - called)
        seconds = time.perf_counter() - began  # what modules take is in it
        for slice, _ in computed:
            self._account(slice, seconds)
            self._conclude(slice.sequence)
        return any(news) or not computed

    def _pick(self, n_longest: int | None = None) -> list[Slice]:
        n_before = len(self.scheduler.running)
        slices = self.scheduler.pick(n_longest)
        self.counts.n_running = len(self.scheduler.running)
        if len(self.scheduler.running) > n_before:
            self._runner.fit()  # our own memory grows with them
        return slices

    def _with_drafts(self, slices: list[Slice]) -> list[Slice]:
        """The slices, with drafts behind those of decoding sequences."""
        if len(slices) == 1 and _rests(slices[0]):
            return slices
        n_rows = sum(len(each.ids) for each in slices)
        n_left, asked, asks = self.n_rows - n_rows, list[int](), list[Ask]()
        for i, each in enumerate(slices):
            own, request = each.sequence.drafts, each.sequence.request
            if own is not None and len(each.ids) == 1:
                n_most = min(each.n_most_drafts, n_left)
                asks.append(Ask(own, each.timeline, each.sequence.ids, n_most, request.sampling, request.rng_stream))
                asked.append(i)
        if not asks:
            return slices
        for i, asked_for, ids in zip(asked, asks, self._drafter.propose(asks, n_rows), strict=True):
            if ids and (ids := ids[: max(0, min(n_left, asked_for.n_most))]):
                slices[i] = slices[i]._replace(ids=[*slices[i].ids, *ids], n_drafts=len(ids))
                n_left -= len(ids)
        return slices

    def _compute(self, slices: list[Slice], stop: Stop | None) -> list[tuple[Slice, Logits]] | None:
        """Logits [n_outputs, V] of each slice, valid until the next call. Sequences that fail end with their error.

        None where one of several fails: each alone shows whose fault it is.
        """
        if not slices:
            return []

        is_aside = bool(self.scheduler.in_flight)

        def is_stopped() -> bool:
            if all(each.sequence.is_cancelled for each in slices):
                raise _Cancelled  # which stops nobody else who drives the loop
            if is_aside:
                self._let_others_go_on(stop)
            return stop is not None and stop()

        leave = self._drafter.cut_off() if len(slices) == 1 and slices[0].n_drafts else None
        try:
            parts, outputs = [(each.timeline, each.ids) for each in slices], [each.n_outputs for each in slices]
            has_experts = any(each.sequence.request.experts for each in slices)
            logits = self._runner.evaluate_rows(parts, outputs, is_stopped, leave, is_aside, has_experts)
        except (Stopped, Abandoned):
            raise
        except _Cancelled:
            return []
        except Exception as error:  # what is no M2liteError is a bug: whoever waits hears of it
            if len(slices) > 1 and isinstance(error, M2liteError) and not isinstance(error, _OF_ALL):
                return None
            for each in slices:
                self._end(each.sequence, error)
            return []
        counts, found, at = self.counts, list[tuple[Slice, Logits]](), 0
        counts.n_steps += 1
        counts.n_expert_reads += self._runner.n_expert_reads
        if leave is not None:  # drafts that it left out were not verified
            n = len(logits)
            return [(slices[0]._replace(ids=slices[0].ids[:n], n_drafts=n - 1), logits)]
        for each in slices:
            found.append((each, logits[at : at + each.n_outputs]))
            at += each.n_outputs
        return found

    def _commit(self, slice: Slice, logits: Logits, first_row: int) -> bool:
        """The sequence goes on with what its logits say, right drafts included. Whether there is something to see.

        `first_row`: of the call, whose logits are the first of these.
        """
        sequence, counts, start, end = slice.sequence, self.counts, slice.start, slice.end
        answer, timeline, n_accepted = sequence.answer, slice.timeline, 0
        n_prompt, n_drawn = len(sequence.request.prompt), len(answer.completion.tokens)
        counts.n_recomputed += max(0, min(end, sequence.n_counted) - start)
        counts.n_prompt += max(0, min(end, n_prompt) - max(start, sequence.n_counted))
        drafts, experts = slice.drafts, self._runner.experts if sequence.request.experts else None
        try:
            for i, row in enumerate(logits, first_row):
                at = len(answer.ids)
                answer.draw(row, None if experts is None else experts[:, i].tobytes())
                if answer.ids[at:] != list(drafts[n_accepted : n_accepted + 1]):
                    break
                n_accepted += n_accepted < len(drafts)
                if answer.is_finished:
                    break
        except Exception as error:  # its own, also where it is a bug
            sequence.error = error
        if timeline.length > end + n_accepted:
            timeline.rewind(end + n_accepted)
        counts.n_drawn += len(answer.completion.tokens) - n_drawn
        counts.n_drafts += slice.n_drafts
        counts.n_accepted += n_accepted
        counts.n_rows += end - start + n_accepted
        sequence.n_counted = max(sequence.n_counted, end + n_accepted)
        sequence.n_accepted = n_accepted
        if slice.n_own > 1:
            total = len(sequence.request.prompt) + len(sequence.request.given)
            stats = answer.completion.stats
            sequence.events.append(Prompt(min(end, total), total, stats.n_reused))
            return True
        return answer.is_finished or sequence.error is not None or not n_drawn

    def _note_prompts(self, slices: Iterable[Slice]) -> None:
        """Logprobs of the tokens behind the call's rows, where they are asked for; the logits come some rows a time."""
        at = 0  # of the slice in the call
        for each in slices:
            sequence, found = each.sequence, each.sequence.answer.completion.prompt_logprobs
            request, first = sequence.request, len(found)
            end = min(each.end, first + sequence.n_unnoted)
            try:
                for start in range(first, end, _HEAD_ROWS):
                    if sequence.is_cancelled:
                        break
                    n = min(_HEAD_ROWS, end - start)
                    for i, row in enumerate(self._runner.row_logits(at + start - each.start, n), start + 1):
                        found.append(logprob_of(row, request.prompt[i], request.prompt_logprobs or 0))
            except Exception as error:  # its own, also where it is a bug
                sequence.error = error
            at += len(each.ids)

    def _account(self, slice: Slice, seconds: float) -> None:
        """What the step cost goes to the sequence's statistics."""
        sequence, stats = slice.sequence, slice.sequence.answer.completion.stats
        if sequence.has_drawn:
            stats.decode_s += seconds
        else:
            stats.prompt_s += seconds
            if slice.is_end:
                sequence.has_drawn, stats.first_token_s = True, stats.prompt_s
        stream = self._runner.stream
        if stream is not None and sequence.traffic is not None:
            stats.traffic = stream.traffic.since(sequence.traffic)
        stats.major_faults = machine.major_faults() - sequence.faults
        if sequence.drafts is not None:
            stats.drafted, stats.plain_s = sequence.drafts.stats, self._drafter.plain_s

    def _learn(self, computed: list[tuple[Slice, Logits]], seconds: float) -> None:
        """The drafter hears what became of its drafts, and what the call cost."""
        if len(computed) == 1 and _rests(slice := computed[0][0]):
            assert slice.sequence.drafts is not None
            self._drafter.rested(slice.sequence.drafts, slice.start, len(slice.sequence.ids) > slice.end)
            return
        parts, at, n_drafts, is_measure = list[Computed](), 0, 0, True
        for slice, _ in computed:
            sequence, own, n_own = slice.sequence, slice.sequence.drafts, slice.n_own
            if own is not None:
                n_right = sequence.n_accepted
                ids, n_rows = sequence.ids, n_own + n_right
                parts.append(Computed(own, slice.timeline, at, slice.start, n_rows, ids, slice.drafts, n_right))
            at, n_drafts, is_measure = at + len(slice.ids), n_drafts + slice.n_drafts, is_measure and n_own == 1
        if parts:
            self._drafter.computed(parts, Call(at, n_drafts, self._runner.n_expert_reads, seconds, is_measure))

    def _conclude(self, sequence: Sequence) -> None:
        """Whole pages are published; a sequence that has ended leaves."""
        if sequence.answer.is_finished or sequence.error is not None:
            self._end(sequence, sequence.error)
            return
        self.scheduler.publish(sequence)
        sequence.deliver()

    def _end(self, sequence: Sequence, error: Exception | None = None) -> None:
        """The sequence leaves, finished, cancelled or with an error."""
        self.scheduler.remove(sequence)
        sequence.end(error)
        self.counts.n_running = len(self.scheduler.running)

    def _take_inbox(self) -> None:
        stream = self._runner.stream
        while self._inbox:
            sequence = self._inbox.popleft()
            sequence.traffic = None if stream is None else replace(stream.traffic)
            sequence.faults = machine.major_faults()
            self.scheduler.waiting.append(sequence)

    def _drop_cancelled(self) -> None:
        self._take_inbox()
        for sequence in self._all():
            if sequence.is_cancelled and sequence not in self.scheduler.in_flight:
                self._end(sequence)

    def _all(self) -> list[Sequence]:
        scheduler = self.scheduler
        return [*scheduler.running, *scheduler.preempted, *scheduler.waiting]


def _rests(slice: Slice) -> bool:
    """Whether its sequence decodes and goes on without a look at drafts."""
    own = slice.sequence.drafts
    return own is not None and own.rests and len(slice.ids) == 1


def _cut(slices: Iterable[Slice], n_rows: int) -> list[Slice]:
    """Slices of prompts, the first n_rows of all of them."""
    found = list[Slice]()
    for each in slices:
        n = min(n_rows, each.n_own)
        if n:
            found.append(each if n == each.n_own else each._replace(ids=each.ids[:n], is_end=False))
        n_rows -= n
    return found
