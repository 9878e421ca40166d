"""One answer's steps on the compute thread: evaluate, draw, draft what may follow. Knows ids, not sessions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m2lite.decode.drafts import Drafter
from m2lite.decode.engine import Engine, Stop, ask
from m2lite.decode.rules import Rule
from m2lite.decode.sampling import Logits, Sampling, draw

if TYPE_CHECKING:  # this imports Numba
    from m2lite.model.cache import Timeline

BURST_S = 0.004  # for which one job decodes on: to hand over to the compute thread and back takes 0.02 to 0.2 ms


@dataclass(frozen=True)
class Generation:
    """How an answer is drawn, and when it ends."""

    engine: Engine
    timeline: Timeline
    drafter: Drafter | None
    sampling: Sampling
    stream: int
    stop: Stop | None
    stop_ids: frozenset[int]
    n_most: int  # tokens of the row
    rules: Sequence[Rule] = ()
    script: Sequence[int] | None = None  # of a measurement: the row's ids, which are said whatever is drawn

    def read(self, start: int, chunk: Sequence[int]) -> None:
        """Evaluate a part of the prompt."""
        self.engine.evaluate(self.timeline, start, chunk, stop=self.stop)
        if self.drafter is not None:
            self.drafter.keep(start, len(chunk))

    def first(self, start: int, chunk: Sequence[int]) -> list[int]:
        """Evaluate the end of the prompt and draw the first id of the answer."""
        logits = self.engine.evaluate(self.timeline, start, chunk, stop=self.stop)
        n = start + len(chunk)
        drawn = [self._draw(logits[-1], n)]
        if self.drafter is not None:
            self.drafter.keep(start, len(chunk))
            self.drafter.begin(drawn)
        return drawn

    def _draw(self, logits: Logits, position: int) -> int:
        for rule in self.rules:
            logits = rule.apply(logits)
        token = draw(logits, self.sampling, self.stream, position)
        token = token if self.script is None else self.script[position]
        for rule in self.rules:
            rule.settle(token)
        return token

    def decode(self, start: int, token: int, drawn: list[int]) -> None:
        """Append the next ids to `drawn` for BURST_S or up to the end; `token`, not evaluated yet, is at `start`."""
        until = time.perf_counter() + BURST_S
        if self.drafter is not None:
            self.drafter.is_cold = True
        try:
            while True:
                new = self._step(start, token)
                drawn += new
                start, token = start + len(new), new[-1]
                if token in self.stop_ids or start + 1 >= self.n_most or time.perf_counter() >= until:
                    break
                ask(self.stop)
        finally:
            if self.drafter is not None:
                self.drafter.conclude()

    def _step(self, start: int, token: int) -> list[int]:
        """Evaluate the token and the drafts behind it: the ids drawn, up to the first that was no draft."""
        drafter, engine = self.drafter, self.engine
        if drafter is None or drafter.quiet > 0:
            logits = engine.evaluate(self.timeline, start, [token], stop=self.stop)
            new = [self._draw(logits[0], start + 1)]
            if drafter is not None:
                drafter.pass_by(new[0])
            return new
        began = time.perf_counter()
        drafts = drafter.propose(self.n_most - start - 1, self.timeline, self.sampling, self.stream)
        if not drafts:
            began = time.perf_counter()  # most steps without drafts do not even ask for them
        leave = drafter.leave if drafts else None
        logits = engine.evaluate(self.timeline, start, [token, *drafts], "all", self.stop, leave)
        drafts = drafts[: len(logits) - 1]  # those that were verified
        new = []
        for j in range(len(drafts) + 1):
            new.append(self._draw(logits[j], start + 1 + j))
            if j == len(drafts) or new[-1] != drafts[j] or new[-1] in self.stop_ids:
                break
        drafter.settle(start, drafts, new, began)
        return new
