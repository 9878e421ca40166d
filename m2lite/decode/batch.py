"""Many answers in lock-step: one pass over the weights per step, whoever takes part. Knows ids, no lines and no files.

In each step every answer under way adds a row, and prompts that are still to be read fill the rest of the call. So an
expert is read once for all rows that chose it. A row's numbers do not depend on the others in the call, so answers are
those that each prompt would get alone.

Drafts add rows to an answer, whose draws say which of them are right (batch_drafts.py): never another token.

A beginning that prompts share is computed once: a row that begins as another does waits until that has got so far, and
takes its pages. Rows that are done stay for a while, for those to come.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from m2lite.decode.batch_drafts import BatchDrafts, CallCost
from m2lite.decode.batch_modules import BatchModule, Followed, Settled
from m2lite.decode.batch_rows import Counts, Done, Part, Row, Upcoming, page_hashes
from m2lite.decode.compute import compute_thread
from m2lite.decode.drafts import n_common
from m2lite.decode.engine import Stop, ask
from m2lite.decode.gate import Gate
from m2lite.decode.sampling import Logits
from m2lite.decode.writer import Wish, Writer
from m2lite.errors import ContextError, M2liteError
from m2lite.model.cache import PAGE

if TYPE_CHECKING:  # these import Numba
    from m2lite.decode.session import Model

_KEPT = 64  # rows that are done and stay, while their pages are not needed
_TRIED = 8  # rows with the same whole pages that are compared token by token
_SHARE = 16  # tokens that make it worth to wait for another row, or to copy a page
_LENGTH = 128.0  # of an answer, until it is known better
_IDLE_S = 0.01  # between two looks for wishes when there are none
_TOGETHER = 8  # a share of the places is filled at once, unless nobody answers


class Batch:
    """Answers `n_inflight` wishes at a time. Not for two threads."""

    def __init__(self, model: Model, n_inflight: int, stop: Stop | None = None) -> None:
        self._model, self._engine, self._stop = model, model.engine, stop
        self._pool = model.engine.pool
        self._n_inflight = min(n_inflight, model.n_rows)
        self._window = max(64, 2 * n_inflight)  # wishes that are looked at for the next
        self._upcoming: deque[Upcoming] = deque()
        self._rows: list[Row] = []  # under way, in the order in which they began
        self._back: deque[Row] = deque()  # that had to give way
        self._kept: deque[Row] = deque()  # done, the one used last at the end
        self._holders: dict[bytes, list[Row]] = {}
        self._length = _LENGTH
        self._drafts = _drafts_of(model)
        self.counts = Counts()

    def run(
        self, wishes: Iterable[Wish | None], after_step: Callable[[], None] = lambda: None
    ) -> Generator[Done, None, None]:
        """Each wish's end as it comes, in no order; Stopped where `stop` says so. Takes wishes as it needs them.

        A wish that is None says that there is none just now.
        """
        source, is_open = iter(wishes), True
        compute = compute_thread()
        try:
            while True:
                is_open = is_open and self._take(source)
                ask(self._stop)
                if not (self._rows or self._back or self._upcoming):
                    if not is_open:
                        return
                    time.sleep(_IDLE_S)
                    continue
                yield from compute.run(self._step, self._stop)
                after_step()
        finally:
            compute.submit(self._release)

    def _take(self, source: Iterator[Wish | None]) -> bool:
        """Wishes until there are enough to choose from; False when the last was taken."""
        while len(self._upcoming) < self._window:
            try:
                wish = next(source)
            except StopIteration:
                return False
            if wish is None:
                break
            self._upcoming.append(Upcoming(wish, page_hashes(wish.row)))
        return True

    def _release(self) -> None:
        for row in (*self._rows, *self._kept):
            row.timeline.release()
        self._rows, self._kept, self._holders = [], deque(), {}
        self._upcoming.clear()
        self._back.clear()

    def _step(self) -> list[Done]:
        """One call of the model, and a token for every row whose end it reached."""
        n_before = len(self._rows)
        done = self._admit()
        if len(self._rows) > n_before:
            self._engine.fit()  # our own memory grows with them
        parts = self._with_drafts(self._parts())
        if not parts:
            return done
        began = time.perf_counter()
        n_draws = [part.n_draws for part in parts]
        logits = self._engine.evaluate_rows([(part.row.timeline, part.ids) for part in parts], n_draws, self._stop)
        self._count(parts)
        at = 0
        for part, n in zip(parts, n_draws, strict=True):
            writer = part.row.writer
            error = self._settle(part, logits[at : at + n])
            at += n
            if error is not None or writer.is_done:
                done.append(Done(writer.wish, None if error is not None else writer.answer, error))
                self._finish(part.row)
        if self._drafts is not None:
            is_alone = all(part.end == part.start + 1 for part in parts)  # beside a prompt the time would be another's
            seconds = time.perf_counter() - began if is_alone else 0.0
            n_rows = sum(len(part.ids) for part in parts)
            self._drafts.saw_step(n_rows, sum(p.n_drafts for p in parts), self._engine.n_expert_reads, seconds)
            if self._drafts.follows:
                self._foresee(parts, n_rows, is_alone)
        return done

    def _foresee(self, parts: Sequence[Part], n_rows: int, is_alone: bool) -> None:
        """The prediction module follows what was settled."""
        assert self._drafts is not None
        at, settled = 0, list[Settled]()
        for part in parts:
            row = part.row
            if row in self._rows:
                draws = row.writer.draws if row.n_todo == 1 else None
                ids = row.writer.row[part.start : row.timeline.length + 1]
                settled.append(Settled(row.followed, row.timeline, at, part.start, ids, draws))
            at += len(part.ids)
        if self._has_pages(sum(each.timeline.pages_needed(1) for each in settled)):
            self._drafts.follow(n_rows, settled, is_alone)

    def _with_drafts(self, parts: list[Part]) -> list[Part]:
        """The parts, with drafts behind those of answers."""
        if self._drafts is None:
            return parts
        answers = [i for i, part in enumerate(parts) if part.n_draws]
        n_rows = sum(len(part.ids) for part in parts)
        n_free = self._model.n_rows - n_rows
        rooms = [min(parts[i].room, n_free) for i in answers]
        known = [(parts[i].row.lookup, parts[i].row.followed) for i in answers]
        for i, (ids, is_foreseen) in zip(answers, self._drafts.choose(known, rooms, n_rows), strict=True):
            ids = ids[:n_free]
            parts[i] = parts[i]._replace(ids=parts[i].ids + ids, n_drafts=len(ids))
            n_free -= len(ids)
            self.counts.n_foreseen += is_foreseen and len(ids)
        return parts

    def _count(self, parts: Sequence[Part]) -> None:
        counts = self.counts
        counts.n_steps += 1
        counts.n_now = len(self._rows)
        counts.n_most = max(counts.n_most, counts.n_now)
        counts.n_expert_reads += self._engine.n_expert_reads
        counts.n_drafts += sum(part.n_drafts for part in parts)

    def _settle(self, part: Part, logits: Logits) -> M2liteError | None:
        """The part was computed: the row goes on with what its logits [draws, V] say, right drafts included.

        Returns an error that is the answer's own.
        """
        row, counts, error, n_right = part.row, self.counts, None, 0
        start, end = part.start, part.end
        counts.n_again += max(0, min(end, row.n_seen) - start)
        counts.n_read += max(0, min(end, len(row.writer.wish.row)) - max(start, row.n_seen))
        if len(logits):
            before = len(row.writer.row)
            error, n_right = self._write(row, logits, part.ids[len(part.ids) - part.n_drafts :])
            self._follow(row, row.writer.row[before:])
        if n_right < part.n_drafts:
            row.timeline.rewind(end + n_right)
        counts.n_right += n_right
        counts.n_rows += end - start + n_right
        row.n_seen = max(row.n_seen, end + n_right)
        return error

    def _write(self, row: Row, logits: Logits, drafts: Sequence[int]) -> tuple[M2liteError | None, int]:
        """The row's next tokens, up to the first that was no draft: (an error of its own, drafts that were right).

        An error is one of a schema that cannot be followed.
        """
        writer, n_right = row.writer, 0
        before = len(writer.answer.tokens)
        try:
            while not writer.is_done:
                at = len(writer.row)
                writer.write(logits[n_right])
                if n_right == len(drafts) or writer.row[at:] != [drafts[n_right]]:
                    break
                n_right += 1
        except M2liteError as error:
            return error, n_right
        self.counts.n_drawn += len(writer.answer.tokens) - before
        return None, n_right

    def _follow(self, row: Row, new: Sequence[int]) -> None:
        """What may be drafted follows from the row's tokens, of which these are new."""
        drafts = self._drafts
        if drafts is None or not new:
            return
        drafts.saw_foreseen(row.followed, new[0])
        if row.writer.is_done:
            return
        if row.lookup is None:
            row.lookup = drafts.lookup(row.writer.row, row.writer.n_most)
        else:
            drafts.push(row.lookup, new)

    def _finish(self, row: Row) -> None:
        """Its prompt stays for those that begin as it does, while there is room."""
        self._rows.remove(row)
        row.lookup = None
        row.followed.cut(len(row.writer.wish.row))
        self._length += (len(row.writer.answer.tokens) - self._length) / 16
        if row.timeline.length > (n := len(row.writer.wish.row)):
            row.timeline.rewind(n)
        self._kept.append(row)
        while len(self._kept) > _KEPT:
            self._drop(self._kept.popleft())

    def _drop(self, row: Row) -> None:
        """Nobody can begin as it does any more."""
        row.timeline.release()
        for key in row.hashes:
            self._holders[key].remove(row)
            if not self._holders[key]:
                del self._holders[key]

    def _parts(self) -> list[Part]:
        """What the next call computes: a token of each answer, and of prompts as much as there is room for."""
        for row in self._rows:
            self._take_share(row)
        while not self._has_pages(sum(row.timeline.pages_needed(1) for row in self._rows if row.n_todo == 1)):
            self._give_way()
        parts, n_pages, room = list[Part](), 0, self._model.n_rows
        follows = self._drafts is not None and self._drafts.follows
        n_spare = min(len(self._rows), room // 4) if follows else 0  # rows that begin take one more of the module
        for row in sorted(self._rows, key=lambda row: row.is_reading):  # answers first, then who came first
            if row.donor is not None or not room:
                continue
            at, n = row.timeline.length, min(room - n_spare if row.is_reading else room, row.n_todo)
            if n < 1 or not self._has_pages(n_pages + row.timeline.pages_needed(n)):
                continue
            n_pages += row.timeline.pages_needed(n)
            parts.append(Part(row, at, row.writer.row[at : at + n], n == row.n_todo))
            room -= n
        if not parts and self._rows:
            self._give_way()
            return self._parts()
        return parts

    def _take_share(self, row: Row) -> None:
        """The beginning that another row has computed by now; who waits for one that has gone waits no more."""
        donor = row.donor
        if donor is None:
            return
        if donor not in self._rows and donor not in self._kept:
            row.donor = None
        elif donor.timeline.length >= row.n_share:
            row.timeline = donor.timeline.fork()
            row.timeline.rewind(row.n_share)
            row.followed = donor.followed.shared(row.n_share)
            self.counts.n_shared += max(0, row.n_share - row.n_seen)
            row.n_seen = max(row.n_seen, row.n_share)
            row.donor = None

    def _has_pages(self, n_pages: int) -> bool:
        """So many are free, rows that are kept being dropped for them."""
        while self._pool.n_free // PAGE < n_pages:
            if not self._kept:
                return False
            self._drop(self._kept.popleft())
        return True

    def _give_way(self) -> None:
        """The answer that began last lets go of its pages, to be computed again later."""
        row = self._rows.pop()
        assert self._rows, "one row alone has room: its length is bounded"
        self._drop(row)
        row.donor, row.followed = None, Followed()
        self._back.appendleft(row)

    def _admit(self) -> list[Done]:
        """Begin answers while there are places and pages; those that cannot begin have ended."""
        done = list[Done]()
        n_open = self._n_inflight - len(self._rows)
        if any(not row.is_reading for row in self._rows) and n_open < self._n_inflight / _TOGETHER:
            return done  # so that several prompts are read in one call
        while len(self._rows) < self._n_inflight and (self._back or self._upcoming):
            row = self._back[0] if self._back else None
            at = 0
            if row is None:
                at = self._choose()
                wish = self._upcoming[at].wish
                try:
                    row = self._begin(self._upcoming[at])
                except M2liteError as error:
                    done.append(Done(wish, None, error))
                    del self._upcoming[at]
                    continue
            self._look_for_donor(row)
            if self._rows and not self._has_pages(self._promised() + self._pages_of(row)):
                break
            if self._back:
                self._back.popleft()
            else:
                del self._upcoming[at]
            for key in row.hashes:
                self._holders.setdefault(key, []).append(row)
            self._rows.append(row)
        return done

    def _choose(self) -> int:
        """Whose turn it is: who begins as rows that are here do, but nobody is passed over for ever."""
        first = self._upcoming[0]
        best, depth = 0, self._depth(first.hashes)
        if first.n_passed < self._window:
            for i, other in enumerate(self._upcoming):
                if len(other.hashes) > depth and (found := self._depth(other.hashes)) > depth:
                    best, depth = i, found
        first.n_passed += best > 0
        return best

    def _depth(self, hashes: Sequence[bytes]) -> int:
        """Whole pages that a row which is here begins with, too."""
        return next((n for n, key in enumerate(hashes) if key not in self._holders), len(hashes))

    def _begin(self, upcoming: Upcoming) -> Row:
        """The row of a wish, made once however often there is no room yet; M2liteError for what cannot be answered."""
        if upcoming.row is not None:
            return upcoming.row
        wish, limit = upcoming.wish, min(self._model.ctx, self._pool.n_positions)
        if len(wish.row) > limit:
            raise ContextError(
                f"The prompt needs {len(wish.row):,} tokens; the context is {limit:,}.",
                "Shorten it, or use a larger --ctx.",
                needed=len(wish.row),
                free=limit,
                limit=limit,
            )
        writer = Writer(wish, self._model.tokenizer, self._model.masks, limit + 1)
        upcoming.row = Row(writer, self._pool.timeline(), upcoming.hashes)
        return upcoming.row

    def _look_for_donor(self, row: Row) -> None:
        """The row that is here whose beginning is this one's for longest."""
        ids, n_most = row.writer.row, min(len(row.writer.wish.row), len(row.writer.row) - 1)
        depth = self._depth(row.hashes)
        holders = self._holders[row.hashes[depth - 1]] if depth else [*self._kept, *self._rows]
        row.donor, row.n_share = None, _SHARE - 1
        for other in holders[: -_TRIED - 1 : -1]:
            theirs, at = other.writer.wish.row, depth * PAGE
            n = min(n_most, at + n_common(ids[at:], theirs[at:]))
            if n > row.n_share:
                row.donor, row.n_share = other, n
        if row.donor is None:
            row.n_share = 0
        elif row.donor in self._kept:  # used now
            self._kept.remove(row.donor)
            self._kept.append(row.donor)

    def _promised(self) -> int:
        """Pages that rows which are here will need: for their prompts, and for answers of the usual length."""
        return sum(self._pages_of(row) for row in self._rows)

    def _pages_of(self, row: Row) -> int:
        n_more = max(self._length - len(row.writer.answer.tokens), PAGE)
        end = len(row.writer.row) + min(n_more, row.writer.n_left)
        start = max(row.timeline.length, row.n_share)
        return int(-(-end // PAGE) - start // PAGE)


def _drafts_of(model: Model) -> BatchDrafts | None:
    """As the model was opened.

    A model that is streamed drafts only if it was asked for: experts that nobody else chose would come from disk.
    """
    engine = model.engine
    mode, n_most, modules = engine.drafting.mode, engine.drafting.n_tokens, engine.modules
    if mode == "off" or (mode == "auto" and engine.stream is not None):
        return None
    module = None if modules is None or mode == "ngram" else BatchModule(modules)
    gate = engine.gate if mode == "auto" else Gate(engine.drafting.n_modules)
    return BatchDrafts(gate, CallCost.of(engine.weights), n_most, mode, module)
