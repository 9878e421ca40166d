"""Which tokens may come next, for the model to verify: prompt lookup, prediction modules, and the gate between them.

A draft is right exactly when it equals the draw, so drafts change when a token comes, never which. One Drafter belongs
to one session; apart from `follow` it is used by jobs of the compute thread only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2lite.decode.gate import MOST_DRAFTS, Gate
from m2lite.decode.lookup import Lookup, n_common
from m2lite.decode.sampling import Sampling
from m2lite.errors import BadModelError, UsageError
from m2lite.model.cache import PAGE
from m2lite.model.config import ARCHITECTURE
from m2lite.storage.gguf_reader import GGUFFile, open_gguf
from m2lite.storage.identity import trunk_identity
from m2lite.storage.sidecar import sidecar_path

if TYPE_CHECKING:  # these import Numba
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
        _check_trunk(drafting.sidecar, gguf)
    except BadModelError as error:
        drafting.close()
        if mode == "mtp" or mtp is not None:
            raise
        return Drafting(mode, n_tokens, warning=f"{path.name} is not used: {error}")
    return drafting


def _check_trunk(sidecar: GGUFFile, gguf: GGUFFile) -> None:
    found, identity = sidecar.metadata.get("m2lite.mtp.trunk"), trunk_identity(gguf)
    if found != identity:
        raise BadModelError(
            f"{sidecar.path}: the modules belong to trunk {found!r}, the model is {identity!r}.",
            "Convert both from the same checkpoint.",
        )


@dataclass
class Drafted:
    """What the drafts of one answer brought."""

    n_steps: int = 0  # calls of the model that settled a token, with drafts or without
    n_tokens: int = 0  # that they settled
    n_proposed: int = 0  # drafts that were verified
    reached: list[int] = field(default_factory=list)  # drafts j whose predecessors were right
    accepted: list[int] = field(default_factory=list)  # of these, right
    sources: dict[str, int] = field(default_factory=dict)  # steps whose drafts came from there
    plain_s: float | None = None  # what a step without drafts takes, where the gate knows it

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


class Drafter:
    """Proposes drafts for one session, and learns what became of them."""

    def __init__(self, mode: str, n_tokens: int | None, gate: Gate, replay: Replay | None) -> None:
        """`n_tokens`: the most drafts of a step; else what the modules can, and MOST_DRAFTS of a prompt lookup."""
        self._is_auto = mode == "auto"
        self._gate = gate
        self._replay = replay if mode in ("auto", "mtp") else None
        self._lookup = Lookup() if mode in ("auto", "ngram") else None
        self._most = n_tokens or MOST_DRAFTS
        self._n_modules = min(self._most, gate.n_modules)
        self._row: list[int] = [] if self._lookup is None else self._lookup.row
        self._source, self._shares = "", list[float]()
        self.drafted = Drafted()

    def follow(self, tokens: Sequence[int]) -> None:
        """An answer to `tokens` begins."""
        self.drafted = Drafted()
        if self._lookup is not None:
            self._lookup.follow(tokens)
            self._row = self._lookup.row
        else:
            self._row = list(tokens)

    def propose(self, n_left: int, timeline: Timeline, sampling: Sampling, stream: int) -> list[int]:
        """Drafts for what comes behind the row, whose last token the model has not seen yet; n_left tokens may come."""
        self._shares = []
        most = min(n_left - 1, self._most, len(timeline.pages) * PAGE + timeline.pool.n_free - len(self._row))
        if most < 1:
            return []
        replay, gate, lookup = self._replay, self._gate, self._lookup
        n_modules = self._n_modules
        if self._is_auto:
            n_modules = gate.plan(0 if replay is None else replay.n_behind, n_left)
        if lookup is not None and lookup.length:
            n = gate.lookup_drafts(lookup.length) if self._is_auto else most
            if n:
                self._source = "ngram"
                return lookup.guess(min(n, most))
        if replay is None or not n_modules:
            return []
        self._source = "mtp"
        return self._draft(replay, min(n_modules, most), sampling, stream)

    def _draft(self, replay: Replay, n_modules: int, sampling: Sampling, stream: int) -> list[int]:
        gate, drafts, right = self._gate, list[int](), 1.0
        chances = []
        for k in range(n_modules):
            if k and self._is_auto and not gate.goes_on(k, right):
                break
            began = time.perf_counter()
            token, share, n_rows = replay.draft(k, self._row, drafts, sampling, stream)
            if n_rows <= MOST_DRAFTS + 1:  # else it had to catch up
                gate.saw_module(k, time.perf_counter() - began)
            drafts.append(token)
            self._shares.append(share)
            chances.append(gate.chance(share))
            right *= chances[-1]
        return drafts[: gate.worth(chances)] if self._is_auto else drafts

    def keep(self, start: int, n_rows: int) -> None:
        """Rows of the prompt were computed."""
        if self._replay is not None:
            self._replay.keep(start, n_rows, 0)

    def settle(self, start: int, drafts: Sequence[int], new: Sequence[int], seconds: float) -> None:
        """A step from position `start` on verified the drafts and drew `new`: those that were right, and one more."""
        n_right, gate = n_common(drafts, new), self._gate
        if self._replay is not None:
            self._replay.keep(start, 1 + n_right, 1 + n_right)
        n_modules = len(self._shares)
        for k in range(min(len(new), n_modules, len(drafts))):
            gate.saw_draft(k, self._shares[k], k < n_right)
        gate.saw_step(1 + len(drafts), n_modules, seconds)
        self.drafted.add(self._source, len(drafts), n_right, len(new))
        self.drafted.plain_s = gate.plain_s
        self.push(new)

    def push(self, new: Sequence[int]) -> None:
        """The row goes on."""
        lookup = self._lookup
        if lookup is None:
            self._row += new
            return
        for token in new:
            if lookup.length:
                self._gate.saw_match(lookup.length, lookup.row[lookup.place] == token)
            lookup.push(token)
