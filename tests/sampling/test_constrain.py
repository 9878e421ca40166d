"""Answers that fit a JSON schema, whatever the model would rather say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from m2lite import M2liteError, Model, Sampling, UsageError
from m2lite.dialogue.chat_request import check_whole
from m2lite.dialogue.conversation import Conversation
from m2lite.sampling.json_schema import check_schema, load_schema

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "é\n\"'", "</think>[e~["]}, "maxItems": 3},
        "more": {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["name", "age", "tags", "more"],
    "additionalProperties": False,
    "$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
}
SCHEMAS = {
    "person": PERSON,
    "enum": {"enum": ["yes", "no", 3, None]},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "date": {"type": "string", "format": "date"},
    "list": {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "minItems": 4, "maxItems": 4},
}


@pytest.fixture(scope="module")
def tiny(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model) as model:
        yield model


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("options", [{}, {"think_tokens": 0}, {"think_tokens": 4}], ids=["thinks", "not", "little"])
def test_answers_validate_and_drafts_change_nothing(tiny: Model, name: str, options: dict[str, Any]) -> None:
    schema, found = SCHEMAS[name], []
    for temperature, seed in ((0.0, 0), (1.0, 5), (2.0, 6)):
        for draft in ("off", "auto", "mtp", "ngram"):
            with tiny.session(draft) as session:
                conversation = Conversation(session)
                sampling = Sampling(temperature, seed=seed)
                list(conversation.ask("Who is the cat?", sampling=sampling, schema=schema, **options))
                answer = conversation.answer
            assert answer.finish_reason == "stop"
            jsonschema.validate(json.loads(answer.reply.content), schema)
            found.append(answer.tokens)
        assert all(tokens == found[-1] for tokens in found[-4:])


def test_raw_text_goes_on_as_json(tiny: Model) -> None:
    with tiny.session() as session:
        conversation = Conversation(session)
        list(conversation.complete("The answer:", sampling=Sampling(seed=1), schema=SCHEMAS["list"]))
        jsonschema.validate(json.loads(conversation.answer.reply.content), SCHEMAS["list"])


def test_resumed_answer_is_the_whole_one(tiny: Model) -> None:
    sampling = Sampling(seed=8)
    with tiny.session() as session:
        whole = Conversation(session)
        list(whole.ask("Who?", sampling=sampling, schema=PERSON, max_tokens=400))
    for n in (1, 10, len(whole.answer.tokens) - 2):
        with tiny.session() as session:
            parted = Conversation(session)
            list(parted.ask("Who?", sampling=sampling, schema=PERSON, max_tokens=n))
            with pytest.raises(M2liteError, match="cut off"):
                check_whole(PERSON, parted.answer)
            list(parted.resume(sampling=sampling, schema=PERSON))
            assert parted.answer.tokens == whole.answer.tokens


def test_no_control_token_comes_within(tiny: Model) -> None:
    """Their text may, in a string; their ids may not."""
    masks, tokenizer = tiny.masks, tiny.tokenizer
    rule = masks.constraint({"type": "string"}, in_thinking=False)
    for token in tokenizer.encode('"a'):
        rule.push(token)
    allowed = np.isfinite(rule.apply(np.zeros(tiny.config.n_vocab, np.float32)))
    assert not allowed[[*tokenizer.control_strings.values(), *tokenizer.stop_ids]].any()
    assert allowed[tokenizer.encode("b")].all()
    for token in tokenizer.encode('</think>"'):
        rule.push(token)
    allowed = np.isfinite(rule.apply(np.zeros(tiny.config.n_vocab, np.float32)))
    assert allowed[sorted(tokenizer.stop_ids)].all()


def test_thinking_is_free_but_must_end(tiny: Model) -> None:
    rule, tokenizer = tiny.masks.constraint(PERSON, in_thinking=True), tiny.tokenizer
    logits = np.zeros(tiny.config.n_vocab, np.float32)
    allowed = np.isfinite(rule.apply(logits))
    assert (~allowed).nonzero()[0].tolist() == sorted(tokenizer.stop_ids)
    assert tokenizer.think_close_id is not None
    rule.push(tokenizer.think_close_id)
    assert np.isfinite(rule.apply(logits)).sum() < 50


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "strnig"}, "strnig"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "string", "pattern": "(?<=a)b"}, "look-around"),
        ({"type": "string", "format": "foo"}, "foo"),
        ({"not": {}}, "not"),
        ({"enum": [-(2**63) + 512]}, "-9223372036854775296, limit"),
        ({"type": "array", "items": {"type": "integer", "minimum": -1e300, "maximum": -1e20}}, "limit"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
        ([], "list"),
        ("{}", "str"),
        ({"enum": ["x" * (1 << 20)]}, "limit"),
    ],
)
def test_bad_schemas(schema: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_schema(schema)


def test_a_schema_cannot_loosen_the_check() -> None:
    with pytest.raises(UsageError, match="not"):
        check_schema({"not": {}, "x-guidance": {"lenient": True}})


@pytest.mark.parametrize("text", ["{", '{"type": NaN', "[1", "[" * 100_000])
def test_files_that_are_no_json(text: str) -> None:
    with pytest.raises(UsageError, match=r"s\.json: no JSON"):
        load_schema(text, "s.json")


def test_openai_wrapping_is_understood() -> None:
    assert load_schema(json.dumps({"name": "x", "schema": PERSON}), "s") == PERSON
    assert load_schema(json.dumps(PERSON), "s") == PERSON


def test_what_goes_on_for_ever_is_stopped(tiny: Model) -> None:
    """A schema that has no end by itself, and one that needs an endless value."""
    with tiny.session() as session:
        conversation = Conversation(session)
        endless = {"type": "array", "items": {"type": "integer"}, "minItems": 1000}
        list(conversation.ask("Count.", sampling=Sampling(0, seed=0), schema=endless, max_tokens=60))
        with pytest.raises(M2liteError, match="after 60 tokens"):
            check_whole(endless, conversation.answer)
        with pytest.raises(M2liteError, match="schema cannot be followed"):
            list(conversation.ask("Count.", sampling=Sampling(0, seed=0), schema={"$ref": "#"}))
    rule = tiny.masks.constraint({}, in_thinking=False, most_tokens=2)
    for token in tiny.tokenizer.encode("111")[:1] * 2:
        rule.push(token)
    with pytest.raises(M2liteError, match="not whole after 2 tokens"):
        rule.apply(np.zeros(tiny.config.n_vocab, np.float32))
