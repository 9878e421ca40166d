"""Which tokens may come next, for the model to verify: prompt lookup, prediction modules, and the gate between them.

A draft is right exactly when it equals the draw, so drafts change when a token comes, never which. One Drafter belongs
to one session; apart from `follow` it is used by jobs of the compute thread only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2lite.decode.gate import MOST_DRAFTS, Gate
from m2lite.decode.sampling import Sampling
from m2lite.errors import BadModelError, UsageError
from m2lite.model.cache import PAGE
from m2lite.model.config import ARCHITECTURE
from m2lite.storage.gguf_reader import GGUFFile, open_gguf
from m2lite.storage.sidecar import check_trunk, sidecar_path

if TYPE_CHECKING:  # these import Numba
    from m2lite.decode.leaving import Leaving
    from m2lite.decode.lookup import Lookup
    from m2lite.decode.replay import Replay
    from m2lite.model.cache import Timeline

MODES = ("auto", "mtp", "ngram", "off")


def check_draft(mode: str, n_tokens: int | None) -> None:
    """Raises UsageError for what cannot be meant."""
    if mode not in MODES:
        raise UsageError(f"Draft mode {mode!r} does not exist.", f"Use one of: {', '.join(MODES)}.")
    if n_tokens is not None and not 1 <= n_tokens <= MOST_DRAFTS:
        raise UsageError(f"{n_tokens} draft tokens were asked for.", f"Use 1 to {MOST_DRAFTS}.")


@dataclass
class Drafting:
    """How a model was asked to draft, and the file of its prediction modules."""

    mode: str = "off"
    n_tokens: int | None = None  # at most, of a step
    sidecar: GGUFFile | None = None
    warning: str | None = None  # why the file beside the model is not used

    @property
    def n_modules(self) -> int:
        """That are used; 0 for a file that says nothing sensible, which is refused when it is bound."""
        if self.sidecar is None:
            return 0
        n = self.sidecar.metadata.get(f"{ARCHITECTURE}.nextn_predict_layers")
        return min(n, self.n_tokens or n, MOST_DRAFTS) if isinstance(n, int) and n > 0 else 0

    def describe(self) -> str:
        """For the start line."""
        sources = {"auto": "prompt lookup", "ngram": "prompt lookup", "mtp": "", "off": ""}[self.mode]
        modules = f"{self.n_modules} MTP modules" if self.n_modules else ""
        found = " and ".join(part for part in (sources, modules) if part)
        return f"drafts {self.mode}: {found}" if found else f"drafts {self.mode}"

    def leave_modules(self, why: str) -> None:
        """They are not used after all."""
        if self.sidecar is not None:
            self.warning = f"{self.sidecar.path.name} is not used: {why}"
            self.sidecar.close()
            self.sidecar = None

    def close(self) -> None:
        if self.sidecar is not None:
            self.sidecar.close()


def open_drafting(
    gguf: GGUFFile, mode: str, n_tokens: int | None, mtp: str | os.PathLike[str] | None = None
) -> Drafting:
    """The modules in the file `mtp`, or in the one beside the model.

    A file beside the model that belongs to another, or is damaged, is an error only if modules were asked for.
    """
    check_draft(mode, n_tokens)
    drafting = Drafting(mode, n_tokens)
    if mode not in ("auto", "mtp"):
        if mtp is not None:
            raise UsageError(f"--mtp was given with --draft {mode}.", "Leave one of them out.")
        return drafting
    path = sidecar_path(gguf.path) if mtp is None else Path(mtp)
    if not path.exists():
        if mode == "mtp" or mtp is not None:
            raise UsageError(
                f"{path} does not exist, so there are no prediction modules.", "Use --mtp or --draft auto."
            )
        return drafting
    try:
        drafting.sidecar = open_gguf(path)
        check_trunk(drafting.sidecar, gguf)
    except BadModelError as error:
        drafting.close()
        if mode == "mtp" or mtp is not None:
            raise
        return Drafting(mode, n_tokens, warning=f"{path.name} is not used: {error}")
    return drafting


@dataclass
class Drafted:
    """What the drafts of one answer brought."""

    n_steps: int = 0  # calls of the model that settled a token, with drafts or without
    n_tokens: int = 0  # that they settled
    n_proposed: int = 0  # drafts that were verified
    reached: list[int] = field(default_factory=list)  # drafts j whose predecessors were right
    accepted: list[int] = field(default_factory=list)  # of these, right
    sources: dict[str, int] = field(default_factory=dict)  # steps whose drafts came from there

    @property
    def n_accepted(self) -> int:
        return sum(self.accepted)

    @property
    def acceptance(self) -> list[float | None]:
        """Share of right drafts by position, of those behind right ones."""
        return [a / n if n else None for a, n in zip(self.accepted, self.reached, strict=True)]

    @property
    def tokens_per_step(self) -> float | None:
        return self.n_tokens / self.n_steps if self.n_steps else None

    def add(self, source: str, n_drafts: int, n_right: int, n_new: int) -> None:
        """A step settled n_new tokens: n_right drafts, and the token behind them unless the answer had ended."""
        self.n_steps += 1
        self.n_tokens += n_new
        if not n_drafts:
            return
        self.n_proposed += n_drafts
        self.sources[source] = self.sources.get(source, 0) + 1
        more = [0] * (n_drafts - len(self.reached))
        self.reached += more
        self.accepted += more
        for j in range(min(n_new, n_drafts)):
            self.reached[j] += 1
            self.accepted[j] += j < n_right

    def include(self, other: Drafted) -> None:
        """Another answer's, too."""
        self.n_steps += other.n_steps
        self.n_tokens += other.n_tokens
        self.n_proposed += other.n_proposed
        self.reached = _sums(self.reached, other.reached)
        self.accepted = _sums(self.accepted, other.accepted)
        for source, n in other.sources.items():
            self.sources[source] = self.sources.get(source, 0) + n

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "proposed": self.n_proposed,
            "accepted": self.n_accepted,
            "steps": self.n_steps,
            "tokens_per_step": self.tokens_per_step,
            "acceptance": self.acceptance,
            "sources": self.sources,
        }


# (length of the row, k) -> what module k shall have said behind it, and how sure: where the weights are random.
Oracle = Callable[[int, int], tuple[int, float]]


class Drafter:
    """Proposes drafts for one session, and learns what became of them."""

    def __init__(
        self,
        mode: str,
        n_tokens: int | None,
        gate: Gate,
        replay: Replay | None,
        lookup: Lookup | None,
        leave: Leaving | None = None,
    ) -> None:
        """`n_tokens`: the most drafts of a step; else what the modules can, and MOST_DRAFTS of a prompt lookup.

        `leave`: of a model that is streamed.
        """
        self._is_auto = mode == "auto"
        self._gate, self._replay, self._lookup = gate, replay, lookup
        self._most = n_tokens or MOST_DRAFTS
        self._n_modules = min(self._most, gate.n_modules)
        self._row = list[int]()
        self._source, self._shares = "", list[float]()
        self._modules_s = 0.0  # of the step under way: time of the modules
        self.leave = leave
        self.oracle: Oracle | None = None  # set by measurements only
        self._n_quiet = 0  # steps since the last that was looked at
        self._kept_at = 0  # address for the trunk's state of the next of them
        self.quiet = 0  # steps that may pass without a look
        self.is_cold = True  # the next step is the first after a pause
        self.drafted = Drafted()

    def follow(self, tokens: Sequence[int]) -> None:
        """An answer to `tokens` begins."""
        self._gate.saw_answer(self.drafted.n_tokens)
        self.drafted, self.quiet = Drafted(), 0
        self._row = list(tokens)
        if self._lookup is not None:
            self._lookup.follow(tokens)

    def propose(self, n_left: int, timeline: Timeline, sampling: Sampling, stream: int) -> list[int]:
        """Drafts for what comes behind the row, whose last token the model has not seen yet; n_left tokens may come."""
        self.conclude()
        gate, replay, n_modules = self._gate, self._replay, self._n_modules
        if self._is_auto:
            if gate.n_steps >= gate.next_plan:
                gate.plan(0 if replay is None else replay.n_behind, n_left)
            n_modules = gate.n_modules_now
        n_lookup = self._n_lookup()
        if n_lookup or (n_modules and replay is not None):
            most = min(n_left - 1, self._most, len(timeline.pages) * PAGE + timeline.pool.n_free - len(self._row))
            if n_lookup and (drafts := self._look_up(min(n_lookup, most))):
                return drafts
            if n_modules and most > 0 and replay is not None:
                return self._draft(replay, min(n_modules, most), sampling, stream)
        if self.leave is not None:
            self.leave.begin(())
        return []

    def _n_lookup(self) -> int:
        """Of the tokens that follow the match, how many may be drafts."""
        if self._lookup is None or not (length := self._lookup.length):
            return 0
        return self._gate.lookup_drafts(length) if self._is_auto else self._most

    def _look_up(self, most: int) -> list[int]:
        lookup = self._lookup
        assert lookup is not None
        self._source, self._shares = "ngram", []
        if self.leave is not None:
            self.leave.begin(self._gate.lookup_chances(lookup.length))
        return lookup.guess(max(0, most))

    def _draft(self, replay: Replay, n_modules: int, sampling: Sampling, stream: int) -> list[int]:
        gate, drafts, right = self._gate, list[int](), 1.0
        chances: list[float] = []
        self._source, self._shares, self._modules_s = "mtp", [], 0.0  # those of a step that was stopped, too
        for k in range(n_modules):
            if k and self._is_auto and not gate.goes_on(k, right):
                break
            began = time.perf_counter()
            token, share, n_rows = replay.draft(k, self._row, drafts, sampling, stream)
            if self.oracle is not None:
                token, share = self.oracle(len(self._row), k)
            seconds = time.perf_counter() - began
            gate.saw_module(k, n_rows, seconds)
            self._modules_s += seconds
            drafts.append(token)
            self._shares.append(share)
            chances.append(gate.chance(share))
            right *= chances[-1]
        if self.leave is not None:
            self.leave.begin(chances)
        return drafts[: gate.verified(chances)] if self._is_auto else drafts

    def keep(self, start: int, n_rows: int) -> None:
        """Rows of the prompt were computed."""
        if self._replay is not None:
            self._replay.keep(start, n_rows, 0)

    def begin(self, drawn: list[int]) -> None:
        """The first token behind the prompt, whose rows were kept."""
        self.push(drawn)
        self._rest()

    def _rest(self) -> None:
        """Let steps pass without a look if the gate says so, and if nothing was found to look up."""
        self.quiet = self._gate.rest() if self._is_auto else 0
        if self.quiet and self._n_lookup():
            self.quiet = 0
        if self.quiet and self._replay is not None:
            self._kept_at = self._replay.reserve(self.quiet)

    def pass_by(self, token: int) -> None:
        """A step without drafts and without a look at the clock: for a small model, those would be felt."""
        lookup, replay = self._lookup, self._replay
        assert lookup is not None  # what drafts with modules only has no quiet steps
        self._row.append(token)
        self._n_quiet += 1
        self.quiet -= 1
        if replay is None:
            is_match = lookup.pass_by(token, 0, 0, 0)
        else:
            is_match = lookup.pass_by(token, self._kept_at, replay.state, replay.n_embd)
            self._kept_at += 4 * replay.n_embd
        if is_match:
            if told := lookup.told:
                self._gate.saw_match(abs(told), told > 0)
            if (length := lookup.length) and self._gate.lookup_drafts(length):
                self.quiet = 0

    def conclude(self) -> None:
        """What passed by is counted, too."""
        n, self._n_quiet = self._n_quiet, 0
        if n:
            self.is_cold = False
            self._gate.pass_by(n)
            self.drafted.n_steps += n
            self.drafted.n_tokens += n
            if self._replay is not None:
                self._replay.kept(n)

    def settle(self, start: int, drafts: Sequence[int], new: list[int], began: float) -> None:
        """A step from position `start` on verified the drafts and drew `new`: those that were right, and one more.

        began: the clock's time before it.
        """
        gate, shares, n_right = self._gate, self._shares, 0
        if self.leave is not None:
            self.leave.end(1 + len(drafts), time.perf_counter() - began)
        is_measure = not (self.is_cold and gate.is_quick)
        self.is_cold = False
        if not drafts:
            gate.saw_step(1, len(shares), (time.perf_counter() - began) * is_measure)
        else:
            n_right = n_common(drafts, new)
        if self._replay is not None:
            self._replay.keep(start, 1 + n_right, 1 + n_right)
        for k in range(min(len(new), len(shares), len(drafts))):
            gate.saw_draft(k, shares[k], k < n_right)
        self.drafted.add(self._source, len(drafts), n_right, len(new))
        self._shares = []
        self.push(new)
        if drafts:
            seconds = time.perf_counter() - began - self._modules_s
            gate.saw_step(1 + len(drafts), len(shares), seconds * is_measure)
        self._modules_s = 0.0
        self._rest()

    def push(self, new: list[int]) -> None:
        """The row goes on."""
        self._row += new
        if self._lookup is not None:
            for told in self._lookup.push(new):
                self._gate.saw_match(abs(told), told > 0)


def _sums(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [x + y for x, y in zip_longest(a, b, fillvalue=0)]


def n_common(a: Sequence[object], b: Sequence[object]) -> int:
    """How many tokens, or messages, both begin with."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
