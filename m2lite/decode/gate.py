"""What drafts cost here and how often they come true, measured as it goes; how many of them pay. Knows no token.

A step computes the token that was drawn last and k drafts behind it in one call, and settles 1 to k + 1 tokens. With
E tokens expected of a step that takes t seconds, the step is worth E x (seconds a token takes at the best) - t; the
gate takes what is worth most. Everything in it is an estimate that moves with each step, so a slower disk, a longer
context or a text that is hard to foresee changes its mind. What it does not do it cannot measure: now and then it tries
something else, for at most PROBE_SHARE of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST_DRAFTS = 7  # with the token before them 8 rows, which go through a layer in one call
PLAN_EVERY = 8  # steps between two looks at the estimates
PROBE_SHARE = 0.01  # of the time, for trying what is expected to be slower
PROBE_AFTER = 48  # steps for which something was not measured
_ROW = 0.25  # of a step of one row: what another row costs, as long as nobody has measured it
_MODULE = 0.1  # of it: a prediction module
_CATCH_UP = 0.2  # of a module's step: one more row, as it catches up with a prompt
_FAR = 512  # steps over which catching up must pay, at most
_SHARES = (0.5, 0.7, 0.85, 0.95, 0.99)  # bounds of how sure a module is
_LENGTHS = (4, 6, 9, 13, 20)  # bounds of how long a match is


@dataclass
class Estimate:
    """A mean that forgets: the first values count alike, later ones `rate` at least."""

    value: float
    n: float = 0.0
    rate: float = 0.05

    def add(self, x: float) -> None:
        self.n += 1
        self.value += max(1 / self.n, self.rate) * (x - self.value)


class Speed:
    """How fast the machine is just now: seconds of anything, over what it usually takes."""

    def __init__(self) -> None:
        self.value = 0.0  # 0 until something was measured

    def relative(self, seconds: float, usual: float) -> float:
        """`seconds` at the usual speed, after a look at how the speed has changed; what is far off counts less."""
        if not self.value:
            self.value = seconds / usual
        x = min(max(seconds / self.value, usual / 4), 4 * usual)
        self.value *= 1 + 0.05 * (x / usual - 1)
        return x


class Gate:
    """Shared by the sessions of a model. Costs are in units of a step of one row until `Speed` makes them seconds."""

    def __init__(self, n_modules: int, lookup: bool) -> None:
        self.n_modules, self.has_lookup = n_modules, lookup
        self._speed = Speed()
        self._rows = [Estimate(1 + _ROW * (n - 1)) for n in range(MOST_DRAFTS + 2)]  # index: rows of a step
        self._modules = [Estimate(_MODULE) for _ in range(n_modules)]
        self._hits = [Estimate(0.75, n=4, rate=0.03) for _ in range(n_modules)]  # that draft j is right if j - 1 were
        self._sure = [Estimate(p, n=2, rate=0.03) for p in (0.3, 0.5, 0.7, 0.85, 0.95, 0.99)]  # by a module's share
        self._found = [Estimate(p, n=2, rate=0.03) for p in (0.4, 0.6, 0.75, 0.85, 0.9, 0.95)]  # by a match's length
        self._last_use = [0] * (n_modules + 1)  # steps at which so many modules drafted
        self._n_steps = 0
        self._next_plan = 0
        self._spent = self._total = 0.0
        self._token = 1.0  # what a token takes at the best
        self.n_modules_now = 0  # how many pay
        self._gain = 0.0  # of a step with them, over one without
        self._lookup_drafts = [0] * len(self._found)  # how many pay, by a match's length
        self.plan(0, _FAR)

    # What was seen

    def saw_step(self, n_rows: int, n_modules: int, seconds: float) -> None:
        """A step verified n_rows - 1 drafts, n_modules of them by modules, whose own time is told with saw_module."""
        estimate = self._rows[n_rows]
        estimate.add(self._speed.relative(seconds, estimate.value))
        self._n_steps += 1
        self._total += estimate.value
        self._last_use[n_modules] = self._n_steps

    def saw_module(self, k: int, seconds: float) -> None:
        """Module k drafted for rows that are as many as a step settles."""
        estimate = self._modules[k]
        estimate.add(self._speed.relative(seconds, estimate.value))
        self._total += estimate.value

    def saw_draft(self, k: int, share: float, is_right: bool) -> None:
        """The draft of module k, which was so sure, behind right ones."""
        self._hits[k].add(is_right)
        self._sure[_class(share, _SHARES)].add(is_right)

    def saw_match(self, length: int, is_right: bool) -> None:
        """A match of that length told the next token; known of every token, verified or not."""
        self._found[_class(length, _LENGTHS)].add(is_right)

    # What pays

    def plan(self, n_behind: int, n_left: int) -> int:
        """How many modules shall draft in the next step.

        n_behind: rows that they have to catch up with; n_left: tokens that may yet come.
        """
        if self._n_steps < self._next_plan:
            return self.n_modules_now
        self._next_plan = self._n_steps + PLAN_EVERY
        arms = [self._arm(k) for k in range(self.n_modules + 1)]
        self._token = min(seconds / tokens for tokens, seconds in arms)
        values = [tokens * self._token - seconds for tokens, seconds in arms]
        best = max(range(len(arms)), key=values.__getitem__)
        n_steps = min(n_left, _FAR) / arms[best][0]
        if (values[best] - values[0]) * n_steps <= self._catch_up(best, n_behind):
            best = 0
        self.n_modules_now, self._gain = best, values[best] - values[0]
        self._plan_lookup()
        return self._probe(values, n_behind)

    def _arm(self, k: int) -> tuple[float, float]:
        """Tokens and time expected of a step with k modules' drafts."""
        tokens = right = 1.0
        for estimate in self._hits[:k]:
            right *= estimate.value
            tokens += right
        return tokens, self.rows_cost(k + 1) + sum(m.value for m in self._modules[:k])

    def _catch_up(self, k: int, n_behind: int) -> float:
        return max(0, n_behind - 4) * _CATCH_UP * sum(m.value for m in self._modules[:k])

    def _probe(self, values: Sequence[float], n_behind: int) -> int:
        """What was not tried for long, if its price is within what may be spent; else the best."""
        best = self.n_modules_now
        oldest = min(range(len(values)), key=self._last_use.__getitem__)
        if oldest == best or self._n_steps - self._last_use[oldest] < PROBE_AFTER:
            return best
        price = values[best] - values[oldest] + self._catch_up(oldest, n_behind)
        if self._spent + price > PROBE_SHARE * self._total:
            return best
        self._spent += price
        self._last_use[oldest] = self._n_steps
        self._next_plan = self._n_steps + 1
        return oldest

    def _plan_lookup(self) -> None:
        if not self.has_lookup:
            return
        for i in range(len(self._found)):
            chances = [e.value for e in self._found[i:]]
            self._lookup_drafts[i] = self.worth(chances + [chances[-1]] * (MOST_DRAFTS - len(chances)), self._gain)

    def lookup_drafts(self, length: int) -> int:
        """How many tokens behind a match of that length to verify, instead of what modules would draft."""
        return self._lookup_drafts[_class(length, _LENGTHS)]

    def worth(self, chances: Sequence[float], instead: float = 0.0) -> int:
        """How many of the drafts to verify that are right with these chances, each if those before it are."""
        best, most = 0, instead
        value, right = self.rows_cost(1), 1.0
        for n, chance in enumerate(chances[:MOST_DRAFTS], 1):
            right *= chance
            value += right * self._token
            gain = value - self.rows_cost(n + 1)
            if gain > most:
                best, most = n, gain
        return best

    def chance(self, share: float) -> float:
        """That a module's draft is right, of which it is so sure."""
        return self._sure[_class(share, _SHARES)].value

    def goes_on(self, k: int, right: float) -> bool:
        """Whether module k should draft, too, where all before it are right with that chance."""
        cost = self._modules[k].value + self.rows_cost(k + 2) - self.rows_cost(k + 1)
        return right * self._hits[k].value * self._token > cost

    def rows_cost(self, n_rows: int) -> float:
        """Of a step; one that was not measured lies on a line with its neighbours."""
        rows = self._rows
        if rows[n_rows].n:
            return rows[n_rows].value
        below = next((n for n in range(n_rows - 1, 0, -1) if rows[n].n), 0)
        above = next((n for n in range(n_rows + 1, len(rows)) if rows[n].n), 0)
        if below and above:
            share = (n_rows - below) / (above - below)
            return rows[below].value + share * (rows[above].value - rows[below].value)
        if below:
            return rows[below].value * (1 + _ROW * (n_rows - 1)) / (1 + _ROW * (below - 1))
        if above:
            return rows[above].value * (1 + _ROW * (n_rows - 1)) / (1 + _ROW * (above - 1))
        return rows[n_rows].value

    @property
    def plain_s(self) -> float | None:
        """Seconds of a step without drafts, as far as one was measured."""
        return self._rows[1].value * self._speed.value if self._rows[1].n else None


def _class(x: float, bounds: Sequence[float]) -> int:
    for i, bound in enumerate(bounds):
        if x < bound:
            return i
    return len(bounds)
