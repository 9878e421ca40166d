"""What is asked of the engine: token ids, and how to go on from them. Knows no messages and no model."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from m2lite.errors import UsageError
from m2lite.sampling.draw import Sampling
from m2lite.sampling.json_schema import Schema
from m2lite.sampling.tool_choice import CallRules, ToolChoice

Keep = Literal["nothing", "memory"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """An answer to `prompt`. All limits count the same tokens: drawn, forced and `given` ones."""

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    rng_stream: int = 0  # separates the random numbers of requests that share a seed
    max_tokens: int | None = None  # of the answer, its thinking included
    think_tokens: int | None = None  # after so many tokens of thinking it is closed; 0: there is none
    stop_texts: Sequence[str] = ()  # the content ends before the first of them
    schema: Schema | None = None  # the content is JSON of it
    logprobs: int | None = None  # note each token's, and those of so many of the likeliest
    prompt_logprobs: int | None = None  # the same of the prompt's tokens, which are all computed anew for it
    experts: bool = False  # note which ones each token was drawn with
    tools: Sequence[Mapping[str, Any]] | None = None  # OpenAI schemas of what may be called
    tool_choice: ToolChoice = "auto"  # "none", "required" or one of them: what comes behind the thinking
    parallel_tool_calls: bool = True  # several calls at once
    given: Sequence[int] = ()  # ids that the answer begins with: one that was stopped goes on
    ignore_stop: bool = False  # for measurements: only limits end the answer
    script: Sequence[int] | None = None  # for measurements: the answer's ids, which are said whatever is drawn
    draft: str | None = None  # where drafts come from, and how many at most; None: as the model was opened
    draft_tokens: int | None = None
    keep: Keep = "memory"  # whether other requests may begin with what was computed for this one
    key: str = ""  # the caller's name for it

    @property
    def calls(self) -> CallRules | None:
        """What is asked of its calls, if anything; UsageError for what cannot be."""
        return CallRules.of(self.tools, self.tool_choice, self.parallel_tool_calls, self.schema)

    def check(self, n_vocab: int) -> None:
        """Raises UsageError for what cannot be meant."""
        if not len(self.prompt):
            raise UsageError("The prompt is empty.", "Give at least one token.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}.", "Use 1 or more, or leave it out.")
        if self.think_tokens is not None and self.think_tokens < 0:
            raise UsageError(f"think_tokens is {self.think_tokens}.", "Use 0 or more, or leave it out.")
        if self.logprobs is not None and self.logprobs < 0:
            raise UsageError(f"logprobs is {self.logprobs}.", "Use 0 or more, or leave it out.")
        if self.prompt_logprobs is not None and self.prompt_logprobs < 0:
            raise UsageError(f"prompt_logprobs is {self.prompt_logprobs}.", "Use 0 or more, or leave it out.")
        if not 0 <= self.rng_stream < 1 << 64:
            raise UsageError(f"rng_stream is {self.rng_stream}.", "Use 0 or more, below 2**64.")
        for ids in (self.prompt, self.given, self.script or ()):
            try:
                numbers = array("q", ids)
            except (TypeError, OverflowError) as error:
                raise UsageError(f"Token ids are no list of integers ({error}).", "Encode first.") from None
            bad = next((i for i in (min(numbers, default=0), max(numbers, default=0)) if not 0 <= i < n_vocab), None)
            if bad is not None:
                raise UsageError(
                    f"Token id {bad} is outside the vocabulary of {n_vocab:,}.", "Encode with its tokenizer."
                )
