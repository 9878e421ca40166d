"""A list of token ids that grows by prompts and answers. Owns no KV: the prefix cache knows what was computed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Self

from m2lite.engine.answer import Token
from m2lite.engine.context import check_room
from m2lite.engine.request import Request
from m2lite.engine.sequence import Event, Finished, Prompt
from m2lite.engine.stats import Stats
from m2lite.errors import UsageError
from m2lite.sampling.draw import Sampling

if TYPE_CHECKING:
    from m2lite.engine.model import Engine
    from m2lite.engine.runner import Stop

Progress = Callable[[int, int], None]  # tokens of a prompt that were computed, and that are to be


def note_progress(event: Event, progress: Progress | None) -> None:
    """Tell `progress` of a prompt that is read, if the event says so."""
    if progress is not None and isinstance(event, Prompt) and event.n_total - event.n_cached > 1:
        progress(event.n_done - event.n_cached, event.n_total - event.n_cached)


class Session:
    """What was asked and answered so far, as token ids."""

    def __init__(self, model: Engine, draft: str | None = None, draft_tokens: int | None = None) -> None:
        """`draft`, `draft_tokens`: as `Model.open` has them, by default as the model was opened."""
        model.runner.drafter.check(draft, draft_tokens)
        self.model, self.draft, self.draft_tokens = model, draft, draft_tokens
        self.tokens: list[int] = []
        self.stats = Stats()
        self.finish_reason: str | None = None  # "stop", "length" or "interrupted"
        self.is_closed = False

    @property
    def n_free(self) -> int:
        """Positions that are left in the context."""
        return max(0, self.model.ctx - len(self.tokens))

    @property
    def n_cached(self) -> int:
        """How many of the tokens need not be computed again."""
        return self.model.loop.n_cached(self.tokens)

    def check_room(self, n_tokens: int, n_kept: int = 0) -> None:
        """Raises ContextError unless `n_tokens` more fit behind the first `n_kept`."""
        check_room(n_tokens, n_kept, self.model.ctx, self.model.config)

    def set_tokens(self, tokens: Sequence[int]) -> None:
        """Make `tokens` those of the session. ContextError for more than fit."""
        self.check_room(len(tokens))
        self.tokens = list(tokens)

    def rewind(self, length: int) -> None:
        """Forget everything from position `length` on."""
        self.tokens = self.tokens[:length]

    def generate(
        self,
        prompt: str | Sequence[int] = "",
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        rng_stream: int = 0,
        stop: Stop | None = None,
        progress: Progress | None = None,
        ignore_stop: bool = False,
        script: Sequence[int] | None = None,
        keep: bool = True,
    ) -> Iterator[int]:
        """Append `prompt` and yield the ids of the answer, without the id that ends it.

        `stop` is asked between layers, on the compute thread; `progress` hears of the prompt's chunks; with
        `ignore_stop` only `max_tokens` and the context end the answer. `script`, for measurements, is said instead of
        what is drawn; without `keep` nobody can begin with what was computed. Afterwards `finish_reason` and `stats`
        describe the answer. Leaving the loop early is fine: the session keeps what was yielded.
        """
        if self.is_closed:
            raise UsageError("The session is closed.", "Begin a new one.")
        if isinstance(prompt, str):
            new = self.model.tokenizer.encode(prompt) if self.tokens else self.model.encode_prompt(prompt)
        else:
            new = list(prompt)
        if not self.tokens and not new:
            raise UsageError("The prompt is empty.", "Give at least one token.")
        self.check_room(len(new), len(self.tokens))
        request = Request(
            prompt=[*self.tokens, *new], sampling=sampling or Sampling(), rng_stream=rng_stream, max_tokens=max_tokens,
            ignore_stop=ignore_stop, script=script, draft=self.draft, draft_tokens=self.draft_tokens,
            keep="memory" if keep else "nothing",
        )  # fmt: skip
        handle = self.model.submit(request)
        self.tokens += new
        self.finish_reason, self.stats = "interrupted", handle.completion.stats
        return self._ids(handle.events(stop), progress)

    def _ids(self, events: Generator[Event, None, None], progress: Progress | None) -> Iterator[int]:
        with closing(events):
            for event in events:
                note_progress(event, progress)
                if isinstance(event, Token):
                    self.tokens.append(event.id)
                    yield event.id
                elif isinstance(event, Finished):
                    self.finish_reason, end = event.completion.finish_reason, event.completion.stop_id
                    self.tokens += [] if end is None else [end]

    def close(self) -> None:
        """It answers no more."""
        self.is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
