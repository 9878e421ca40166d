"""What drafts cost here and how often they come true, measured as it goes; how many of them pay. Knows no token.

A step computes the token that was drawn last and k drafts behind it in one call, and settles 1 to k + 1 tokens. With
E tokens expected of a step that takes t, the step is worth E x (what a token takes at the best) - t; the gate takes
what is worth most. Everything in it is an estimate that moves with each step, so a slower disk, a longer context or a
text that is hard to foresee changes its mind. What it does not do it cannot measure: now and then it tries another
number of modules for some steps, each so seldom that it costs about PROBE_SHARE of the time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MOST_DRAFTS = 7  # with the token before them 8 rows, which go through a layer in one call
PLAN_EVERY, PLAN_SELDOM = 32, 256  # steps between two looks at the estimates; where nothing was drafted between
QUIET = 64  # steps of a small model that go by without one that has no drafts and is measured
PROBE_SHARE = 0.002  # of the time, for trying each number of modules that is expected to be slower
_QUICK_SHARE = 0.0005  # the same of a small model: what it does with each token in a trial is felt after it, too
PROBE_AFTER = 64  # steps for which something was not tried, at least
PLAIN_AFTER = 128  # steps without one that had no drafts, at most
TRIAL, TRIAL_COLD = 6, 2  # steps of a trial; of these not measured: what was not used before is not in the caches
LONG_TRIAL, LONG_COLD = 64, 32  # of a small model without drafts: it comes back into the caches an expert at a time
_MARGIN = 0.01  # of a step: what drafts must promise at least, since what looks best among estimates rarely is as good
_QUICK_MARGIN = 0.15  # the same for modules of a small model: which of them are in the caches changes what is measured
_QUICK_S = 0.002  # a step's time below which the gate's own shows
WASTED_TRIED = 4  # of the steps in which no draft of a module is worth verifying, one in so many does it all the same
_WELL_KNOWN = 32  # measurements; what has fewer is tried sooner
_FOLLOW = 0.1  # of a change in speed, with each step
_FAR_OFF = 4.0  # times what is expected: more of one step counts as this
_FORGET = 1024  # steps after which a cost that was not measured is unknown again
# As long as nothing was measured, in steps of one row:
_ROW = 0.25  # one row more
_MODULE = 0.1  # a prediction module's draft
_CATCH_UP = 0.02  # a row of the prompt, in a module
_ANSWER = 256.0  # tokens of an answer
_SHARES = (0.5, 0.7, 0.85, 0.95, 0.99)  # bounds of how sure a module is
_LENGTHS = (4, 6, 9, 13, 20)  # bounds of how long a match is


@dataclass(slots=True)
class Estimate:
    """A mean that forgets: the first values count alike, later ones `rate` at least."""

    value: float
    n: float = 0.0
    rate: float = 0.05

    def add(self, x: float) -> None:
        self.n += 1
        self.value += max(1 / self.n, self.rate) * (x - self.value)


def _chances(*priors: float) -> list[Estimate]:
    return [Estimate(p, n=3, rate=0.015) for p in priors]


class Gate:
    """Shared by the sessions of a model.

    Costs are relative; `_level` makes them seconds. It follows the kind of step that is most frequent, so a machine
    that slows down, or a context that grows, moves all costs alike, and what was measured long ago keeps its ratio.
    """

    def __init__(self, n_modules: int) -> None:
        self.n_modules = n_modules
        self.n_modules_now = 0  # how many pay
        self._level = 0.0  # seconds of a cost of 1; 0 until something was measured
        self._rows = [Estimate(1 + _ROW * (n - 1)) for n in range(MOST_DRAFTS + 2)]  # index: rows of a step
        self._modules = [Estimate(_MODULE) for _ in range(n_modules)]  # a draft
        self._catch_up = Estimate(_CATCH_UP)  # a row of a module that is behind
        self._hits = _chances(*[0.75] * n_modules)  # that draft j is right if those before it were
        self._sure = _chances(0.3, 0.5, 0.7, 0.85, 0.95, 0.99)  # by a module's share
        self._n_wasted = 0  # steps in which no draft of a module was worth verifying
        self._found = _chances(0.4, 0.6, 0.75, 0.85, 0.9, 0.95)  # by a match's length
        self._answer = Estimate(_ANSWER, n=1, rate=0.1)  # tokens
        self.n_steps = self.next_plan = self._n_drafted = self._seldom = 0
        self._uses = [0.0] * len(self._rows)  # of steps with so many rows, lately
        self._seen = [0] * len(self._rows)  # the last step with so many rows that was measured
        self._usual = 1  # rows of the most frequent
        self.is_trying = False  # the next steps are for knowing better: no draft is left out
        self._plain_known = False  # what a step without drafts takes
        self.is_quick = False  # a step takes so little that it should not be looked at
        self._measure_from = 0
        self.settling: Callable[[], bool] | None = None  # whether the model's pages are still being mapped
        self._tried = [0] * (n_modules + 1)  # the last step in which so many modules drafted
        # What follows from the estimates, made by `plan`
        self._costs = [e.value for e in self._rows]  # of steps, as far as is known or can be guessed
        self._token = 1.0  # what a token takes at the best
        self._values = [0.0] * (n_modules + 1)  # of a step with so many modules' drafts
        self._wished = 0  # modules that would pay if they had not to catch up
        self._gain = 0.0  # of the best over a step without drafts
        self._lookup_drafts = [-1] * len(self._found)  # how many pay, by a match's length; -1 until somebody asks
        self._choose(0, 1)

    # What was seen

    def saw_step(self, n_rows: int, n_modules: int, seconds: float) -> None:
        """A step verified n_rows - 1 drafts, with n_modules at work, whose own time is told with saw_module.

        A small model's first step after a pause, with cold caches and threads that have to wake up, is no measure:
        0 seconds.
        """
        estimate = self._rows[n_rows]
        if seconds and self._measures():
            self._level = self._level or seconds / estimate.value
            relative = min(seconds / self._level / estimate.value, _FAR_OFF)
            if n_rows == self._usual and estimate.n:
                self._level *= 1 + _FOLLOW * (relative - 1)
                estimate.n += 1
            else:
                estimate.add(relative * estimate.value)
        self.n_steps += 1
        self._n_drafted += n_rows > 1
        self._uses[n_rows] += 1
        if seconds:
            self._seen[n_rows] = self.n_steps
        self._tried[n_modules] = self.n_steps

    def pass_by(self, n_steps: int) -> None:
        """So many steps without drafts were not measured."""
        self.n_steps += n_steps
        self._uses[1] += n_steps

    def saw_module(self, k: int, n_rows: int, seconds: float) -> None:
        """Module k drafted behind n_rows that it had not seen: a step's, or more as it caught up."""
        if not (self._measures() and self._level):
            return
        if n_rows > MOST_DRAFTS + 1:
            self._catch_up.add(seconds / self._level / n_rows)
            return
        estimate = self._modules[k]
        estimate.add(min(seconds / self._level, _FAR_OFF * estimate.value))

    def _measures(self) -> bool:
        """Whether what is seen now is what it will cost later."""
        if self.settling is not None and self.settling():
            return False
        self.settling = None
        return self.n_steps >= self._measure_from

    def saw_draft(self, k: int, share: float, is_right: bool) -> None:
        """The draft of module k, which was so sure, behind right ones."""
        self._hits[k].add(is_right)
        self._sure[bisect_right(_SHARES, share)].add(is_right)

    def saw_match(self, length: int, is_right: bool) -> None:
        """A match of that length told the next token; known of every token, verified or not."""
        self._found[bisect_right(_LENGTHS, length)].add(is_right)

    def saw_answer(self, n_tokens: int) -> None:
        """The next answer may be as long; its row is another, with which modules have to catch up."""
        if n_tokens:
            self._answer.add(n_tokens)
        if self._wished and not (self.is_trying and not self.n_modules_now):  # a trial without modules goes on
            self.next_plan = self.n_steps

    # What pays

    def plan(self, n_behind: int, n_left: int) -> None:
        """Set n_modules_now, how many modules shall draft in each of the next steps.

        n_behind: rows that they have to catch up with; n_left: tokens that may yet come.
        """
        is_new = not self._plain_known and self._rows[1].n >= TRIAL  # now it is known whether the model is quick
        self._plain_known |= is_new
        if self._n_drafted or self.is_trying or self._wished or is_new:
            self._seldom, self._n_drafted, self.is_trying = 0, 0, False
            self._choose(n_behind, n_left)
        else:
            self._seldom = min(2 * self._seldom + PLAN_EVERY, PLAN_SELDOM - PLAN_EVERY)
        self.next_plan = self.n_steps + PLAN_EVERY + self._seldom
        if self._rows[self.n_modules_now + 1].n < TRIAL:  # a guess: look at it soon
            self.next_plan = self.n_steps + TRIAL
        self._probe(n_behind)

    def _choose(self, n_behind: int, n_left: int) -> None:
        """What follows from the estimates."""
        self._fill_costs()
        self.is_quick = 0 < self._level * self._costs[1] < _QUICK_S
        arms = [self._arm(k) for k in range(self.n_modules + 1)]
        self._token = token = min(cost / tokens for tokens, cost in arms)
        self._values = values = [tokens * token - cost for tokens, cost in arms]
        best = max(range(len(arms)), key=values.__getitem__)
        margin = _QUICK_MARGIN if self.is_quick else _MARGIN
        gain, self._wished = values[best] - values[0] - margin * self._costs[1], best
        if gain * min(n_left, self._answer.value) / arms[best][0] <= self._catching_up(best, n_behind):
            best, gain = 0, 0.0
        self.n_modules_now, self._gain = best, gain
        self._lookup_drafts = [-1] * len(self._found)

    def _arm(self, k: int) -> tuple[float, float]:
        """Tokens and cost expected of a step with k modules' drafts."""
        tokens, right, cost = 1.0, 1.0, self._costs[k + 1]
        for j in range(k):
            right *= self._hits[j].value
            tokens += right
            cost += self._modules[j].value
        return tokens, cost

    def _catching_up(self, n_modules: int, n_behind: int) -> float:
        return self._catch_up.value * n_modules * n_behind if n_behind > MOST_DRAFTS + 1 else 0.0

    def _probe(self, n_behind: int) -> None:
        """Something else than the best, so seldom that its price is a small share of what steps cost."""
        best, values, step = self.n_modules_now, self._values, self._costs[self._usual]
        for k, tried in enumerate(self._tried):
            is_long = self.is_quick and not k
            n_steps, n_cold = (LONG_TRIAL, LONG_COLD) if is_long else (TRIAL, TRIAL_COLD)
            known, catching_up = self._rows[k + 1].n, self._catching_up(k, n_behind)
            price = n_steps * (values[best] - values[k]) + catching_up
            share = _QUICK_SHARE if self.is_quick else PROBE_SHARE
            pause = max(PROBE_AFTER, price / (share * step) * min(1.0, known / _WELL_KNOWN))
            if k == 0:  # the price itself may be wrong, and this is what everything is compared with
                pause = min(pause, PLAIN_AFTER * n_steps / TRIAL)
            if known < n_steps - n_cold + 1 and catching_up < TRIAL:  # hardly anything is known of it yet
                pause = 0 if is_long or not known else PROBE_AFTER
            if k != best and self.n_steps - tried >= pause:
                self._tried[k], self.next_plan = self.n_steps, self.n_steps + n_steps
                self.n_modules_now, self.is_trying, self._measure_from = k, True, self.n_steps + n_cold
                return

    def _fill_costs(self) -> None:
        """What was not measured lies between its neighbours, or beyond the last in proportion."""
        rows, costs = self._rows, self._costs
        for n, last in enumerate(self._seen):
            self._uses[n] *= 0.9
            if self.n_steps - last > _FORGET and n > self.n_modules + 1:  # else trials renew it
                rows[n].n = 0
        self._usual = self._uses.index(max(self._uses))
        below = 0  # the last that was measured
        for n in range(1, len(rows)):
            if not rows[n].n:
                continue
            costs[n] = value = rows[n].value
            for m in range(below + 1, n):
                if below:
                    costs[m] = costs[below] + (m - below) / (n - below) * (value - costs[below])
                else:
                    costs[m] = value * (1 + _ROW * (m - 1)) / (1 + _ROW * (n - 1))
            below = n
        for m in range(below + 1, len(rows)):
            base = below or m
            costs[m] = rows[base].value * (1 + _ROW * (m - 1)) / (1 + _ROW * (base - 1))

    def lookup_drafts(self, length: int) -> int:
        """How many tokens behind a match of that length to verify, instead of what modules would draft."""
        i = bisect_right(_LENGTHS, length)
        if self._lookup_drafts[i] < 0:
            self._lookup_drafts[i] = self.worth(self.lookup_chances(length), self._gain)
        return self._lookup_drafts[i]

    def lookup_chances(self, length: int) -> list[float]:
        """That the tokens behind a match are right, each if those before it are: with each of them the match grows."""
        chances = [e.value for e in self._found[bisect_right(_LENGTHS, length) :]]
        return chances + [chances[-1]] * (MOST_DRAFTS - len(chances))

    def worth(self, chances: Sequence[float], instead: float = 0.0) -> int:
        """How many of the drafts to verify that are right with these chances, each if those before it are."""
        costs, token = self._costs, self._token
        best, most = 0, instead + _MARGIN * costs[1]
        value, right = costs[1], 1.0
        for n, chance in enumerate(chances, 1):
            right *= chance
            value += right * token
            if value - costs[n + 1] > most:
                best, most = n, value - costs[n + 1]
        return best

    def verified(self, chances: Sequence[float]) -> int:
        """How many of the modules' drafts to verify, which are there."""
        if self.is_trying:
            return len(chances)
        n = self.worth(chances)
        if not n:
            self._n_wasted += 1
            if self._n_wasted % WASTED_TRIED == 0:  # else nobody would know if they had become better
                return len(chances)
        return n

    def chance(self, share: float) -> float:
        """That a module's draft is right, of which it is so sure."""
        return self._sure[bisect_right(_SHARES, share)].value

    def goes_on(self, k: int, right: float) -> bool:
        """Whether module k should draft, too, where all before it are right with that chance."""
        if self.is_trying:
            return True
        cost = self._modules[k].value + self._costs[k + 2] - self._costs[k + 1]
        return right * self._hits[k].value * self._token > cost

    def rest(self) -> int:
        """How many of the next steps, if they have no drafts, need not be looked at: a look would be felt.

        So many that one in QUIET is measured, and no plan is late.
        """
        if not self.is_quick or self.is_trying or self.n_modules_now:
            return 0
        return max(0, min(self._seen[1] + QUIET, self.next_plan) - self.n_steps)

    @property
    def plain_s(self) -> float | None:
        """Seconds of a step without drafts, as far as one was measured."""
        return self._rows[1].value * self._level if self._rows[1].n else None
