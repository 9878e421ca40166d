"""Answers that fit a JSON schema: masks over the vocabulary from llguidance. Knows ids, no messages.

The thinking is free; from its end on only tokens may come that lead on to JSON of the schema, and the answer may end
only where that is whole. The same holds for other grammars. llguidance is imported late: most answers need none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
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
Schema = Mapping[str, Any]


def check_schema(schema: object) -> str:
    """The grammar (Lark) of a JSON schema; UsageError for one that is wrong, or that cannot be kept to whole."""
    # M2 writes up to two line breaks between its thinking and its answer; they are no part of it.
    grammar = f"start: BREAKS json\nBREAKS: /\\n{{0,2}}/\njson: {json_rule(schema)}"
    if why := why_wrong(grammar):
        raise UsageError(f"The JSON schema cannot be used: {why}.", "Correct or simplify it.")
    return grammar


def json_rule(schema: object, is_lenient: bool = False) -> str:
    """JSON of the schema in a grammar; `is_lenient` if what llguidance does not know may be left open."""
    if not isinstance(schema, Mapping):
        raise UsageError(f"The JSON schema is a {type(schema).__name__}.", "Give an object.")
    try:
        text = json.dumps(
            {**schema, "x-guidance": {"whitespace_pattern": _BLANKS, "lenient": is_lenient}}, allow_nan=False
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"The JSON schema is no JSON ({error}).") from None
    if len(text) > _MOST_SCHEMA:
        raise UsageError(f"The JSON schema has {len(text):,} characters, limit {_MOST_SCHEMA:,}.", "Use a shorter one.")
    if (number := _too_low(schema)) is not None:
        raise UsageError(f"The JSON schema holds the number {number}, limit -2**63.", "Use one above it.")
    return f"%json {text}"


def _too_low(schema: Mapping[str, Any]) -> float | None:
    """A number on which llguidance ends the whole process: it negates the lowest that 64 bits hold."""
    rest: list[Any] = [schema]
    while rest:
        item = rest.pop()
        if isinstance(item, int | float) and item <= -(2**63) + 512:  # whose float64 is that number
            return item
        rest += item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ()
    return None


@lru_cache(256)
def why_wrong(grammar: str) -> str:
    """What llguidance has against the grammar; empty if nothing."""
    matcher = matcher_class()
    with panics_as(UsageError("The JSON schema cannot be used: llguidance fails on it.", "Correct or simplify it.")):
        try:
            return " ".join(matcher.validate_grammar(matcher.grammar_from_lark(grammar)).split())
        except UnicodeEncodeError as error:
            return f"it holds U+{ord(grammar[error.start]):04X}, half of a character"


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


def matcher_class() -> type[LLMatcher]:
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise UsageError("JSON schemas need the package llguidance.", "pip install llguidance.") from None
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
        matching = Matching(self, check_schema(schema), "The JSON schema")
        return Constraint(matching, self.tokenizer, in_thinking, most_tokens or MOST_TOKENS)


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


class Matching:
    """A text as far as it fits a grammar."""

    def __init__(self, masks: Masks, grammar: str, what: str) -> None:
        """`what`: what cannot be followed any further where it fails."""
        self._what, self._n_vocab = what, masks.tokenizer.n_vocab
        self._failed = M2liteError(f"{what} cannot be followed any further: llguidance fails on it.", "Simplify it.")
        with panics_as(self._failed):
            matcher = matcher_class()
            self._matcher = matcher(masks.vocabulary, matcher.grammar_from_lark(grammar), log_level=0)
        self._check()
        self._mask = np.zeros((self._n_vocab + 31) // 32, np.int32)

    def apply(self, logits: Logits) -> Logits:
        """Those [V] of tokens that the text can go on with; the others are -inf."""
        with panics_as(self._failed):
            self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._n_vocab]
        allowed = np.full(logits.shape, -np.inf, np.float32)
        np.copyto(allowed[: self._n_vocab], logits[: self._n_vocab], where=bits.view(bool))
        return allowed

    def push(self, token: int) -> None:
        with panics_as(self._failed):
            self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            why = " ".join(self._matcher.get_error().split())
            raise M2liteError(f"{self._what} cannot be followed any further: {why[:300]}.", "Simplify it.")


class Constraint:
    """A rule: behind the thinking no token that the grammar's text could not go on with."""

    def __init__(
        self, matching: Matching, tokenizer: Tokenizer, in_thinking: bool, most_tokens: int | None,
        has_calls: bool = False,
    ) -> None:  # fmt: skip
        """`most_tokens`: of JSON; `has_calls` if it may be a block of calls as well, which is as long as it likes."""
        self._matching, self._tool_open_id = matching, tokenizer.tool_open_id if has_calls else None
        self._in_thinking, self._think_close_id = in_thinking, tokenizer.think_close_id
        # Who only thinks has not answered, and a call inside the thinking would keep to no grammar.
        self._banned = [*sorted(tokenizer.stop_ids), *([] if self._tool_open_id is None else [self._tool_open_id])]
        self._n_left, self._most = most_tokens, most_tokens

    def apply(self, logits: Logits) -> Logits:
        if self._in_thinking:
            return without(logits, self._banned)
        if self._n_left is not None and self._n_left <= 0:
            raise M2liteError(
                f"The JSON is not whole after {self._most:,} tokens.",
                "Allow more (--max-tokens), or bound it in the schema (maxLength, maxItems).",
            )
        return self._matching.apply(logits)

    def push(self, token: int) -> None:
        if self._in_thinking:
            self._in_thinking = token != self._think_close_id
            return
        if token == self._tool_open_id:
            self._n_left = None
        if self._n_left is not None:
            self._n_left -= 1
        self._matching.push(token)


def without(logits: Logits, ids: Sequence[int]) -> Logits:
    """The logits, with which none of `ids` can be drawn."""
    changed = logits.copy()
    changed[ids] = -np.inf
    return changed
