"""One sequence under way: its ids, how far they are computed, its pages and its answer. Knows no other sequence."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from m2lite.engine.answer import Answer, Completion, Token
from m2lite.engine.prefix_cache import page_keys
from m2lite.engine.request import Request
from m2lite.model.cache import PAGE
from m2lite.text.reply import Piece

if TYPE_CHECKING:  # these import Numba
    from m2lite.drafting.sequence import SequenceDrafts
    from m2lite.model.cache import Timeline
    from m2lite.model.stream import Traffic


class Prompt(NamedTuple):
    """How far a prompt is computed."""

    n_done: int  # tokens, those that were cached included
    n_total: int
    n_cached: int


class Finished(NamedTuple):
    """The answer has ended."""

    completion: Completion
    pieces: list[Piece]  # text that the end completes


Event = Prompt | Token | Finished


@dataclass(eq=False)
class Sequence:
    """A request that is answered."""

    request: Request
    answer: Answer
    drafts: SequenceDrafts | None = None
    timeline: Timeline | None = None  # while it is running
    keys: list[bytes] = field(default_factory=list)  # of the whole pages of its prompt, and of its answer as they fill
    n_published: int = 0  # whole pages that the prefix cache knows
    n_counted: int = 0  # positions that were counted as computed or cached
    n_passed: int = 0  # others that were admitted before it, though they came later
    awaits: Sequence | None = None  # who computes the beginning that both have
    n_awaited: int = 0  # tokens of that
    n_accepted: int = 0  # drafts of the last call that were right
    has_drawn: bool = False  # a token of the answer
    traffic: Traffic | None = None  # of a streamed model, before it
    faults: int = 0  # of the process, before it
    is_cancelled: bool = False
    events: deque[Event] = field(default_factory=deque)
    error: Exception | None = None
    is_over: bool = False  # nothing more happens

    def __post_init__(self) -> None:
        self.keys = page_keys(self.answer.ids)

    @property
    def ids(self) -> list[int]:
        return self.answer.ids

    @property
    def n_computed(self) -> int:
        return 0 if self.timeline is None else self.timeline.length

    @property
    def n_todo(self) -> int:
        """Tokens that are not computed: one while it decodes, more of a prompt and behind forced tokens."""
        return len(self.ids) - self.n_computed

    @property
    def n_unnoted(self) -> int:
        """Tokens of the prompt whose logprobs are asked for and not known yet."""
        if self.request.prompt_logprobs is None:
            return 0
        return len(self.request.prompt) - 1 - len(self.answer.completion.prompt_logprobs)

    @property
    def n_reusable(self) -> int:
        """Positions that need not be computed where somebody else has: up to the first whose logits are needed."""
        return len(self.answer.completion.prompt_logprobs) if self.n_unnoted else len(self.ids) - 1

    @property
    def is_prefill(self) -> bool:
        return self.n_todo > 1

    def pages_to_end(self, usual_tokens: float) -> int:
        """Pages that it will need, if its answer is of the usual length."""
        n_more = max(usual_tokens - len(self.answer.completion.tokens), PAGE)
        end = len(self.ids) + min(n_more, self.answer.n_left)
        start = max(self.n_computed, self.n_awaited)
        return math.ceil(end / PAGE) - start // PAGE

    def extend_keys(self) -> None:
        """Keys of pages that are whole by now."""
        if self.n_computed // PAGE > len(self.keys):
            self.keys = page_keys(self.ids[: self.n_computed], self.keys)

    def deliver(self) -> None:
        """What came of the answer goes to whoever asked."""
        self.events += self.answer.new
        self.answer.new.clear()

    def end(self, error: Exception | None = None) -> None:
        """Nothing more happens: it is finished, cancelled or has failed."""
        self.error = error
        if error is None and not self.answer.is_finished:
            self.answer.end("interrupted")
        self.deliver()
        if error is None and self.answer.is_finished:
            self.events.append(Finished(self.answer.completion, self.answer.last_pieces))
        self.drafts, self.is_over = None, True


class Slice(NamedTuple):
    """What a sequence adds to a call: `ids` stand behind its timeline, and the last of them are drafts."""

    sequence: Sequence
    start: int
    ids: Ids[int]
    is_end: bool  # whether nothing of the sequence is missing behind them, but for drafts
    n_drafts: int = 0

    @property
    def timeline(self) -> Timeline:
        assert self.sequence.timeline is not None
        return self.sequence.timeline

    @property
    def n_own(self) -> int:
        """Tokens that are no drafts."""
        return len(self.ids) - self.n_drafts

    @property
    def drafts(self) -> Ids[int]:
        return self.ids[self.n_own :]

    @property
    def n_outputs(self) -> int:
        """Rows, the last ones, that a token is drawn from."""
        return self.is_end + self.n_drafts

    @property
    def end(self) -> int:
        """The position behind what is no draft."""
        return self.start + self.n_own

    @property
    def n_most_drafts(self) -> int:
        """That there is room for, on the page that is needed anyway."""
        return min(self.sequence.answer.n_left - 1, -self.end % PAGE)
