"""Which drafts pay: how many modules are at work, and which drafts are verified. Knows costs and chances, no token.

Calls decode S sequences; with E tokens expected of a call that costs t, what drafts bring is E x (what a token costs at
the best) - t. What is not done cannot be measured: now and then another number of modules is tried for some calls, each
so seldom that it costs about PROBE_SHARE of the time; LEARN_SHARE, as long as it is not well known.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

from m2lite.drafting.chances import Chances
from m2lite.drafting.cost import CallCost

MOST_AT_ONCE = 64  # drafts of a call, unless more sequences decode: each has logits of the whole vocabulary
PLAN_EVERY, PLAN_SELDOM = 32, 256  # calls between two looks at the estimates; where nothing is drafted
PROBE_SHARE = 0.002  # of the time, for trying each number of modules that is expected to be slower
LEARN_SHARE = 0.01  # the same of what is not well known
PROBE_AFTER = 64  # calls for which something was not tried, at least
PLAIN_AFTER = 256  # calls without one in which no module was at work, at most
TRIAL, TRIAL_COLD = 6, 2  # calls of a trial; of these not measured: what was not used before is not in the caches
_LEAST = 1e-6  # of an estimate that is divided by
_MARGIN = 0.01  # of a call: what drafts must promise at least, since what looks best among estimates rarely is as good
_WELL_KNOWN = 16  # calls with so many modules at work; what has had fewer is tried sooner
_OTHERS = 1.25  # times as many sequences as were planned for: plan again


class Planner:
    """Shared by all sequences of a model that draft what pays. Costs are in calls of one row."""

    def __init__(self, n_modules: int, cost: CallCost, chances: Chances) -> None:
        self.n_modules, self.cost, self.chances = n_modules, cost, chances
        self.depth = 0  # how many modules are at work
        self.is_trial = False  # to know better: all drafts are verified
        self.n_calls = self._next_plan = self._measure_from = 0
        self._tried = [0] * (n_modules + 1)  # the last call in which so many modules were at work
        self._known = [0] * (n_modules + 1)  # calls in which they were, up to _WELL_KNOWN
        self._here = [0] * (n_modules + 1)  # calls of this process in which so many were to be
        self.missing = 0.0  # what reading the experts costs that a draft of a streamed model lacks
        self.n_drafts = 0  # verified since the last plan
        self._pause = PLAN_EVERY
        self._setting = 0, 0  # sequences, and modules that they can use and one, that were planned for
        self._wanted, self._wanted_gain = 0, 0.0  # modules that seem to pay; a process begins without them
        self._n_asks = 0  # sequences that were planned for
        self._trial_rows = 0  # that modules may read for a trial, of a sequence
        self._plain = self._answered = 1.0  # what a call without drafts costs; tokens of a sequence in one with them
        self._forget()

    def _forget(self) -> None:
        self._token = 1.0  # what a token costs at the best
        self.gain = 0.0  # of the modules at work, for each sequence in a call
        self._prices = dict[int, list[float]]()  # by rows of a call without drafts: of the first n drafts beside them
        self._looked_up = dict[tuple[int, int], int]()  # drafts that pay, by rows of a call and kind of match

    @property
    def measures(self) -> bool:
        """Whether what is seen now is what it will cost later."""
        return self.n_calls >= self._measure_from

    def saw_call(self, n_levels: int, n_drafts: int, n_before: int = 0) -> None:
        """One more, in which so many modules drafted, and so many drafts were verified; n_before it without any."""
        n = self.n_calls = self.n_calls + n_before + 1
        self.n_drafts += n_drafts
        self._tried[n_levels] = n
        if n >= self._measure_from:
            self._here[self.depth] += 1
            if self._known[n_levels] < _WELL_KNOWN:
                self._known[n_levels] += 1

    def is_due(self, n_asks: int) -> bool:
        """Whether to plan before a call in which so many sequences may have drafts. A trial goes on, whoever comes."""
        if self.n_calls >= self._next_plan:
            return True
        is_other = n_asks > _OTHERS * self._n_asks or _OTHERS * n_asks < self._n_asks
        return is_other and not (self.is_trial and self._n_asks)

    def plan(self, n_asks: int, behind: Sequence[int]) -> None:
        """For calls of n_asks sequences. behind[k]: rows that k modules have to read before they draft, of the sequence
        of which they have seen most; as far as modules are usable."""
        setting = n_asks, len(behind)
        if self.n_drafts or self.is_trial or setting != self._setting or self._wanted:
            self._setting, self._n_asks, self._pause = setting, n_asks, PLAN_EVERY
            self.cost.refresh()
            self._choose(len(behind) - 1)
        else:  # nothing but the level can have changed
            self._pause = min(2 * self._pause, PLAN_SELDOM)
            self._looked_up = {}
        self.is_trial, self.n_drafts = False, 0
        self.depth, self.gain = (self._wanted, self._wanted_gain) if self._here[0] else (0, 0.0)
        self._next_plan = self.n_calls + self._pause
        if self._here[self._wanted] < TRIAL and (self._wanted or not self._known[0]):
            self._next_plan = self.n_calls + TRIAL  # a guess, or what was true in another hour: look at it soon
        elif len(behind) > 1:
            self._try_another(behind)

    def _choose(self, n_usable: int) -> None:
        self._forget()
        arms = [self._arm(k) for k in range(n_usable + 1) if k < 2 or k * self._n_asks <= MOST_AT_ONCE]
        self._token = min(cost / tokens for tokens, cost in arms)
        values = [tokens * self._token - cost for tokens, cost in arms]
        self._plain = arms[0][1]
        best = max(range(len(arms)), key=values.__getitem__)
        gain = values[best] - values[0] - _MARGIN * self._plain
        self._wanted, self._wanted_gain = (best, gain / self._n_asks) if gain > 0 else (0, 0.0)
        self._losses = [values[self._wanted] - value for value in values]
        self._answered = arms[self._wanted][0] / self._n_asks  # tokens of a sequence in a call

    def _arm(self, k: int) -> tuple[float, float]:
        """Tokens and cost expected of a call with k modules at work for all sequences."""
        n, tokens, right, cost = self._n_asks, 1.0, 1.0, 0.0
        for j in range(k):
            right *= self.chances.hits[j].value
            tokens += right
        for _ in range(k):
            cost += self.cost.draft(round(n * tokens), n)
        return n * tokens, cost + self.cost.call(n, k * n)

    def _try_another(self, behind: Sequence[int]) -> None:
        """Something else than the best, so seldom that its price is a small share of what calls cost."""
        for k, loss in enumerate(self._losses):
            price = TRIAL * loss + self.cost.catch_up(behind[k])
            share = PROBE_SHARE if self._known[k] >= _WELL_KNOWN else LEARN_SHARE
            pause = max(PROBE_AFTER if self._known[k] else 0, price / (share * self._plain))
            if k == 0:  # the price itself may be wrong, and this is what everything is compared with
                pause = min(pause, PLAIN_AFTER)
            if k == self._wanted:
                continue
            if (ahead := self._tried[k] + pause - self.n_calls) > 0:
                self._next_plan = min(self._next_plan, self.n_calls + max(PLAN_EVERY, int(ahead)))
            else:
                self._tried[k], self._next_plan = self.n_calls, self.n_calls + TRIAL
                self.depth, self.is_trial, self._measure_from = k, True, self.n_calls + TRIAL_COLD
                self._trial_rows = behind[k]
                return

    def is_worth_catching_up(self, n_rows: int, n_answered: int) -> bool:
        """Whether modules shall read n_rows, of all of them, of a sequence that has answered so many tokens."""
        if self.is_trial:
            return n_rows <= self._trial_rows
        n_calls = max(self.chances.answer_tokens, n_answered) / self._answered
        return self.gain * n_calls > self.cost.catch_up(n_rows)

    # Of a call

    def price(self, n_rows: int, n_drafts: int) -> float:
        """What so many drafts cost beside n_rows."""
        prices = self._prices.setdefault(n_rows, [0.0])
        while len(prices) <= n_drafts:
            prices.append(self.cost.call(n_rows, len(prices)) - self.cost.call(n_rows))
        return prices[n_drafts]

    def lookup_drafts(self, length: int, n_rows: int) -> int:
        """How many tokens behind a match of that length to verify, instead of what modules would draft."""
        key = n_rows, self.chances.kind_of_match(length)
        n = self._looked_up.get(key)
        if n is None:
            best, value, right, margin = 0, 0.0, 1.0, self.gain + _MARGIN * self._plain / self._n_asks
            for m, chance in enumerate(self.chances.of_match(length), 1):
                right *= chance
                value += right * self._token - (1 - right) * self.missing
                if value - self.price(n_rows, m) > margin:
                    best, margin = m, value - self.price(n_rows, m)
            n = self._looked_up[key] = best
        return n

    def goes_on(self, k: int, right: float, n_rows: int, n_active: int) -> bool:
        """Whether module k shall draft, too, and maybe those behind it, where all drafts before are right with that
        chance."""
        if self.is_trial or not k:
            return True
        value, module = 0.0, self.cost.draft(n_active, n_active) / n_active
        for j in range(k, self.depth):  # a call of two rows more may cost hardly more than one of one
            right *= self.chances.hits[j].value
            value += right * self._token - module
            price = self.price(n_rows, (j + 1) * n_active) - self.price(n_rows, k * n_active)
            if value > price / n_active:
                return True
        return False

    def choose(self, chances: Sequence[Sequence[float]], n_rows: int, n_most: int) -> list[int]:
        """How many drafts of each sequence to verify beside n_rows, at most n_most in all: the likeliest first.

        chances[i]: that each draft of sequence i is right if those before it are.
        """
        counts, best = [0] * len(chances), [0] * len(chances)
        waiting = [(-each[0], i) for i, each in enumerate(chances) if each]  # chance that it and those before are right
        heapq.heapify(waiting)
        value, most, n_drafts, since = 0.0, _MARGIN * self._plain / max(1, self._n_asks), 0, list[int]()
        while waiting and n_drafts < n_most:
            right, i = heapq.heappop(waiting)  # right: negative
            counts[i] += 1
            n_drafts += 1
            value -= right * self._token + (1 + right) * self.missing
            since.append(i)
            gain = value - self.price(n_rows, n_drafts)
            if gain > most or self.is_trial:
                most = gain
                for j in since:
                    best[j] = counts[j]
                since = []
            if counts[i] < len(chances[i]):
                heapq.heappush(waiting, (right * chances[i][counts[i]], i))
        return best

    # What is kept for the next process

    def learnt(self) -> dict[str, Any]:
        """Numbers for JSON, which `restore` takes."""
        mine = (*self.cost.estimates(), *self.chances.estimates())
        return {
            "estimates": [[each.value, each.n] for each in mine],
            "kinds": self.cost.kinds(),
            "answers": [self.chances.n_tokens, self.chances.n_answers],
            "since": [self.n_calls - tried for tried in self._tried],
            "known": self._known,
        }

    def restore(self, kept: dict[str, Any]) -> None:
        """Begin with these; ValueError, and nothing changed, unless they are what `learnt` may have given."""
        mine = (*self.cost.estimates(), *self.chances.estimates())
        estimates = _table(kept.get("estimates"), len(mine), [(0, 1e4), (0, 1e9)])
        n_costs = len(self.cost.estimates())
        if any(value > 1 for value, _ in estimates[n_costs:]) or min(self.cost.divisors(estimates)) < _LEAST:
            raise ValueError
        kinds = _table(kept.get("kinds"), None, [(1, 4096), (1e-3, 1e3), (1, 1e9), (0, 1e6)])
        ((n_tokens, n_answers),) = _table([kept.get("answers")], 1, [(0, 1e9), (1, 1e9)])
        calls = _table([kept.get("since"), kept.get("known")], 2, [(0, 1e9)] * len(self._tried))
        for own, (value, n) in zip(mine, estimates, strict=True):
            own.value, own.n = value, n
        self.cost.restore_kinds(kinds)
        self.chances.n_tokens, self.chances.n_answers = n_tokens, n_answers
        self._tried = [self.n_calls - int(n) for n in calls[0]]
        self._known = [min(int(n), _WELL_KNOWN) for n in calls[1]]
        self._next_plan = self.n_calls


def _table(rows: object, n_rows: int | None, bounds: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Rows of numbers, one for each of the bounds and within it; ValueError for anything else."""
    if not isinstance(rows, list) or len(rows) != (len(rows) if n_rows is None else n_rows):
        raise ValueError
    for row in rows:
        if not isinstance(row, list) or len(row) != len(bounds):
            raise ValueError
        for value, (low, high) in zip(row, bounds, strict=True):
            if type(value) not in (int, float) or not low <= value <= high:
                raise ValueError
    return rows
