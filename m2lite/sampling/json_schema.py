"""Answers that fit a JSON schema: masks over the vocabulary from llguidance. Knows ids, no messages.

The thinking is free; from its end on only tokens may come that lead on to JSON of the schema, and the answer may end
only where that is whole. llguidance is imported late: it is an extra.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from m2lite.errors import M2liteError, UsageError
from m2lite.sampling.draw import Logits
from m2lite.system.json_text import JsonError, parse_json
from m2lite.system.panics import panics_as
from m2lite.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_TOKENS = 4096  # of an answer, unless it was said: a schema may let it go on for ever
_MOST_SCHEMA = 1 << 20  # characters
# Between the parts of JSON; a model that likes blanks would write nothing else if it might.
_BLANKS = r"( |\n{1,2}[ \t]{0,20})"
_FAILED = M2liteError("The JSON schema cannot be followed any further: llguidance fails on it.", "Simplify it.")
Schema = Mapping[str, Any]


def check_schema(schema: object) -> str:
    """The grammar of a JSON schema; UsageError for one that is wrong, or that cannot be kept to whole."""
    if not isinstance(schema, Mapping):
        raise UsageError(f"The JSON schema is a {type(schema).__name__}.", "Give an object.")
    matcher = _matcher_class()
    try:
        text = json.dumps({**schema, "x-guidance": {"whitespace_pattern": _BLANKS}}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"The JSON schema is no JSON ({error}).") from None
    if len(text) > _MOST_SCHEMA:
        raise UsageError(f"The JSON schema has {len(text):,} characters, limit {_MOST_SCHEMA:,}.", "Use a shorter one.")
    # M2 writes up to two line breaks between its thinking and its answer; they are no part of it.
    with panics_as(UsageError("The JSON schema cannot be used: llguidance fails on it.", "Correct or simplify it.")):
        grammar: str = matcher.grammar_from_lark(f"start: BREAKS json\nBREAKS: /\\n{{0,2}}/\njson: %json {text}")
        why = matcher.validate_grammar(grammar)
    if why:
        raise UsageError(f"The JSON schema cannot be used: {' '.join(why.split())}.", "Correct or simplify it.")
    return grammar


def load_schema(text: str | bytes, where: str) -> Schema:
    """The schema in `text`, a JSON schema or OpenAI's {"name", "schema"}, checked; `where` names it in errors."""
    try:
        schema = parse_json(text, most_bytes=4 * _MOST_SCHEMA)
    except JsonError as error:
        raise UsageError(f"{where}: no JSON ({error}).", "Give a JSON schema.") from None
    if isinstance(schema, dict) and isinstance(schema.get("schema"), dict) and "type" not in schema:
        schema = schema["schema"]
    try:
        check_schema(schema)
    except UsageError as error:
        raise UsageError(f"{where}: {error.what}", error.todo) from None
    return schema  # type: ignore[no-any-return]


def _matcher_class() -> type[LLMatcher]:
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise UsageError("JSON schemas need the package llguidance.", "pip install 'm2lite[schema]'.") from None
    return LLMatcher


class Masks:
    """The vocabulary as llguidance wants it: one per model, built when it is first needed (seconds for M2's)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def vocabulary(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        tokenizer = self.tokenizer
        return LLTokenizer(
            _Wrapper(tokenizer),  # type: ignore[arg-type]  # what it needs of one is written down, not its class
            n_vocab=tokenizer.n_vocab,
            eos_token=sorted(tokenizer.stop_ids),
            slices=LLTokenizer.json_slices(),
        )

    def constraint(self, schema: Schema, in_thinking: bool, most_tokens: int | None = None) -> Constraint:
        """For an answer that begins now; `in_thinking` if that comes first. At most `most_tokens` of JSON."""
        return Constraint(self, check_schema(schema), in_thinking, most_tokens or MOST_TOKENS)


class _Wrapper:
    """A tokenizer as llguidance takes it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = set(tokenizer.control_strings.values())
        self.eos_token_id = min(tokenizer.stop_ids)
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted(added | tokenizer.stop_ids)
        self.tokens = [tokenizer.token_bytes(index) for index in range(tokenizer.n_vocab)]
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode() if isinstance(text, bytes) else text)


class Constraint:
    """A rule: no token that JSON of the schema could not go on with."""

    def __init__(self, masks: Masks, grammar: str, in_thinking: bool, most_tokens: int) -> None:
        tokenizer = masks.tokenizer
        with panics_as(_FAILED):
            self._matcher = _matcher_class()(masks.vocabulary, grammar, log_level=0)
        self._check()
        self._in_thinking, self._think_close_id = in_thinking, tokenizer.think_close_id
        self._stop_ids, self._n_vocab = sorted(tokenizer.stop_ids), tokenizer.n_vocab
        self._mask = np.zeros((tokenizer.n_vocab + 31) // 32, np.int32)
        self._n_left, self._most = most_tokens, most_tokens

    def apply(self, logits: Logits) -> Logits:
        if self._in_thinking:
            return self._without_end(logits)
        if self._n_left <= 0:
            raise M2liteError(
                f"The JSON is not whole after {self._most:,} tokens.",
                "Allow more (--max-tokens), or bound it in the schema (maxLength, maxItems).",
            )
        with panics_as(_FAILED):
            self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._n_vocab]
        allowed = np.full(logits.shape, -np.inf, np.float32)
        np.copyto(allowed[: self._n_vocab], logits[: self._n_vocab], where=bits.view(bool))
        return allowed

    def _without_end(self, logits: Logits) -> Logits:
        """Who only thinks has not answered."""
        changed = logits.copy()
        changed[self._stop_ids] = -np.inf
        return changed

    def push(self, token: int) -> None:
        if self._in_thinking:
            self._in_thinking = token != self._think_close_id
            return
        self._n_left -= 1
        with panics_as(_FAILED):
            self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            why = " ".join(self._matcher.get_error().split())
            raise M2liteError(f"The JSON schema cannot be followed any further: {why[:300]}.", "Simplify it.")
