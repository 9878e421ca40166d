"""Tool calls that keep to a choice and to schemas, whatever the model would rather say, and are read as they were."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from m2lite import M2liteError, Model, Sampling, UsageError
from m2lite.dialogue.conversation import Conversation
from m2lite.sampling.json_schema import Masks
from m2lite.sampling.rules import LogitsProcessor
from m2lite.sampling.tool_choice import CallRules, NamedTool, ToolChoice
from m2lite.text.reply import Reply, ReplyStream
from m2lite.text.tokenizer import Tokenizer


def tool(name: str, parameters: Any, strict: bool = False) -> dict[str, Any]:
    function = {"name": name, "parameters": parameters} | ({"strict": True} if strict else {})
    return {"type": "function", "function": function}


def closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


WEATHER = closed(
    {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]},
     "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "city", "days",
)  # fmt: skip
LINES = {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 3}
FILE = closed({"path": {"type": "string", "pattern": r"^/\w+$"}, "lines": LINES})
TOOLS = [tool("weather", WEATHER), tool("read", FILE), tool("now", None)]
BY_NAME: dict[str, Any] = {"weather": WEATHER, "read": FILE, "now": {}}
# Of a number without bounds the grammar allows exponents that no float has.
POINT = closed({"x": {"type": "number", "minimum": -9, "maximum": 9}}, "x")


@pytest.fixture(scope="module")
def tiny(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model) as model:
        yield model


ENDS = ("</parameter>\n", "</parameter>\n", "a/b", "</p", '"', "]", "}", "1", "0", "AA-111", "@a.a")


def drive(
    rule: LogitsProcessor, tokenizer: Tokenizer, seed: int, begin: str = "</think>", most: int = 4000
) -> list[int]:
    """`begin`, and then tokens drawn among those allowed, now and then what may lead to an end, up to a block's end."""
    random, blank = np.random.default_rng(seed), np.zeros(tokenizer.n_vocab, np.float32)
    ids, plan = tokenizer.encode(begin, control=True), list[int]()
    for token in ids:
        rule.push(token)
    while len(ids) < most:
        allowed = np.isfinite(rule.apply(blank))
        assert allowed.any(), f"nothing may follow {tokenizer.decode(ids)!r}"
        if not plan and random.random() < 0.2:
            plan = tokenizer.encode(str(random.choice(ENDS)))
        plan = plan if plan and allowed[plan[0]] else []
        token = plan.pop(0) if plan else int(random.choice(allowed.nonzero()[0]))
        if token in tokenizer.stop_ids:
            return ids
        ids.append(token)
        rule.push(token)
        if token == tokenizer.tool_close_id:
            return ids
    pytest.fail(f"no end: {tokenizer.decode(ids)[:2000]!r}")


def read(tokenizer: Tokenizer, ids: Sequence[int], tools: list[dict[str, Any]]) -> Reply:
    stream = ReplyStream(tokenizer, in_thinking=True, tools=tools)
    for token in ids:
        stream.push(token)
    stream.finish()
    return stream.reply()


def check(call: dict[str, Any], schema: Any) -> None:
    """The arguments fit, also once they were JSON."""
    arguments = json.loads(json.dumps(call["function"]["arguments"]))
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(arguments)


def rule_of(model: Model, tools: list[dict[str, Any]], choice: ToolChoice = "required", **more: Any) -> LogitsProcessor:
    calls = CallRules.of(tools, choice, **{"is_parallel": True} | more)
    assert calls is not None
    return calls.rule(model.masks, in_thinking=True, most_tokens=None)


def allowed(rule: LogitsProcessor, model: Model) -> set[int]:
    blank = np.zeros(model.tokenizer.n_vocab, np.float32)
    return set(np.isfinite(rule.apply(blank)).nonzero()[0].tolist())


def push(rule: LogitsProcessor, model: Model, text: str) -> None:
    """Each of its tokens is allowed."""
    for token in model.tokenizer.encode(text, control=True):
        assert token in allowed(rule, model), (text, token)
        rule.push(token)


text = st.fixed_dictionaries(
    {"type": st.just("string")},
    optional={"maxLength": st.integers(0, 9), "description": st.just("x")},
) | st.sampled_from([
    {"type": "string"}, {"type": "string", "minLength": 2}, {"const": "a b"}, {"const": "</parameter>x"},
    {"enum": ["a", "é\n\"'", "null", "5", "<invoke"]}, {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {"type": "string", "pattern": "a/b|^x\\d+"}, {"type": "string", "pattern": "</?p", "maxLength": 20},
    {"type": "string", "format": "date"}, {"type": "string", "format": "ipv4"}, {"type": "string", "format": "uuid"},
    {"type": "string", "format": "date-time"}, {"type": "string", "format": "email"},
    {"oneOf": [{"const": "a", "title": "A"}, {"const": "b"}]}, {"allOf": [{"type": "string"}, {"maxLength": 3}]},
    {"anyOf": [{"type": "string", "maxLength": 2}, {"const": "much longer"}]}, {"$ref": "#/$defs/name"},
])  # fmt: skip
other = st.sampled_from([
    {"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}, {"type": "integer", "maximum": 5},
    {"type": "number", "exclusiveMinimum": 0.5, "maximum": 1000}, {"enum": [1, 2.5, None, True]},
    {"const": [1, "</parameter>"]},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 3}, POINT, {"$ref": "#/$defs/point"},
    {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    closed({"a": {"type": "string", "maxLength": 3}, "b": {"$ref": "#/$defs/point"}}, "b"),
    {"type": ["integer", "null"]}, {"anyOf": [POINT, {"type": "null"}]},
])  # fmt: skip
mixed = st.sampled_from([
    {}, {"description": "whatever"}, {"type": ["string", "null"]}, {"type": ["string", "integer"], "maxLength": 3},
    {"anyOf": [{"type": "string"}, {"type": "null"}]}, {"anyOf": [{"type": "string"}, {"type": "number"}]},
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}, "minItems": 1}]},
    {"anyOf": [{"type": "string", "pattern": "^[a-z]*$"}, {"type": "null"}, {"type": "number"}]},
    {"anyOf": [{"enum": ["auto", "all"]}, {"type": "integer", "minimum": 3}]}, {"enum": ["a", 1, None, "null", [2]]},
    {"anyOf": [{"$ref": "#/$defs/name"}, {"type": "boolean"}]}, {"oneOf": [{"type": "string"}, {"type": "boolean"}]},
    {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/point"}]}, {"type": ["string", "array", "object"]},
])  # fmt: skip
names = st.sampled_from(["x", "y", "a b", "é", "class", "x-y", "parameter", "'", "]", "&amp;", "name="])
DEFS = {"name": {"type": "string", "minLength": 1, "maxLength": 6}, "point": POINT}


@st.composite
def objects(draw: st.DrawFn) -> dict[str, Any]:
    properties = draw(st.dictionaries(names, text | other | mixed, max_size=4))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    schema = closed(properties, *required) | {"$defs": DEFS}
    if properties and draw(st.booleans()):
        schema["anyOf"] = [
            {"required": [name]} for name in draw(st.sets(st.sampled_from(sorted(properties)), min_size=1))
        ]
    if draw(st.booleans()):
        del schema["additionalProperties"]
    return schema


@pytest.mark.parametrize("strict", [True, False])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schemas=st.lists(objects(), min_size=1, max_size=2), seed=st.integers(0, 2**32), is_parallel=st.booleans())
def test_calls_are_read_as_they_were_meant(
    tiny: Model, strict: bool, schemas: list[Any], seed: int, is_parallel: bool
) -> None:
    """Without a warning, and fitting the schemas, for any draws."""
    tools = [tool(f"t{n}", schema, strict) for n, schema in enumerate(schemas)]
    try:
        rule = rule_of(tiny, tools, is_parallel=is_parallel)
    except UsageError as error:
        event(error.what)
        assert strict and "</parameter>" in error.what
        return
    assume(strict or "</parameter>x" not in json.dumps(schemas))  # where it is not strict, that is left open
    reply = read(tiny.tokenizer, drive(rule, tiny.tokenizer, seed), tools)
    assert allowed(rule, tiny) == tiny.tokenizer.stop_ids
    assert not reply.errors and reply.tool_calls and not reply.content
    assert is_parallel or len(reply.tool_calls) == 1
    for call in reply.tool_calls:
        check(call, schemas[int(call["function"]["name"][1:])])


CHOICES: list[tuple[ToolChoice, bool]] = [
    ("required", True), ("required", False), (NamedTool("weather"), True), (NamedTool("now"), True),
]  # fmt: skip


@pytest.mark.parametrize(("choice", "is_parallel"), CHOICES)
@pytest.mark.parametrize("options", [{}, {"think_tokens": 0}, {"think_tokens": 4}], ids=["thinks", "not", "little"])
def test_the_model_calls_and_drafts_change_nothing(
    tiny: Model, choice: ToolChoice, is_parallel: bool, options: dict[str, Any]
) -> None:
    more: Any = {"tool_choice": choice, "parallel_tool_calls": is_parallel} | options
    for seed in (1, 2, 3):
        found = []
        for draft in ("off", "auto", "mtp", "ngram"):
            with tiny.session(draft) as session:
                conversation = Conversation(session, tools=TOOLS)
                list(conversation.ask("Weather?", sampling=Sampling(seed=seed), max_tokens=400, **more))
            found.append(conversation.answer)
        assert all(answer.tokens == found[0].tokens for answer in found)
        reply, reason = found[0].reply, found[0].finish_reason
        assert reason == "stop" or (reason == "length" and len(found[0].tokens) == 400)
        if reason == "stop":
            assert reply.tool_calls and not reply.errors and not reply.content
        for call in reply.tool_calls:
            check(call, BY_NAME[call["function"]["name"]])
            assert not isinstance(choice, NamedTool) or call["function"]["name"] == choice.name
        assert len(reply.tool_calls) <= 1 or (choice == "required" and is_parallel)


def test_a_call_that_was_cut_goes_on_as_the_whole_one(tiny: Model) -> None:
    more: Any = {"sampling": Sampling(seed=3), "tool_choice": NamedTool("weather"), "think_tokens": 9}
    whole = Conversation(tiny.session(), tools=TOOLS)
    list(whole.ask("Weather?", max_tokens=400, **more))
    assert whole.answer.reply.tool_calls and whole.answer.finish_reason == "stop"
    for n in (1, 20, len(whole.answer.tokens) - 12):
        parted = Conversation(tiny.session(), tools=TOOLS)
        list(parted.ask("Weather?", max_tokens=n, **more))
        assert parted.answer.finish_reason == "length" and not parted.answer.reply.tool_calls
        list(parted.resume(**more))
        assert parted.answer.tokens == whole.answer.tokens


def test_what_no_choice_asks_for_is_free(tiny: Model) -> None:
    """No rule at all, so that not a token changes."""
    for tools, choice, is_parallel in ((TOOLS, "auto", True), (None, "none", False), ([], "auto", False)):
        assert CallRules.of(tools, choice, is_parallel) is None


def test_none_calls_nothing(tiny: Model) -> None:
    rule, tokenizer = rule_of(tiny, TOOLS, "none"), tiny.tokenizer
    everything = set(range(tokenizer.n_vocab))
    for text in ("hm", "</think>", "\n\nNo."):
        assert everything - allowed(rule, tiny) == {tokenizer.tool_open_id}
        push(rule, tiny, text)
    ask, options = [{"role": "user", "content": "Weather?"}], {"seed": 5, "max_tokens": 60}
    found = [tiny.chat(ask, tools=TOOLS, tool_choice=choice, **options) for choice in ("auto", "none")]
    assert found[0]["content"] == found[1]["content"] and "tool_calls" not in found[1]


def test_a_block_begins_behind_the_thinking(tiny: Model) -> None:
    tokenizer, everything = tiny.tokenizer, set(range(tiny.tokenizer.n_vocab))
    assert everything - allowed(rule_of(tiny, TOOLS), tiny) == tokenizer.stop_ids | {tokenizer.tool_open_id}
    strict = rule_of(tiny, [tool("f", POINT, True)], "auto")
    assert everything - allowed(strict, tiny) == {tokenizer.tool_open_id}
    fresh = CallRules([tool("f", POINT, True)]).rule(tiny.masks, False, None)  # the prompt has not opened the thinking
    assert allowed(fresh, tiny) == everything
    push(fresh, tiny, "\n<think>hm")
    assert everything - allowed(fresh, tiny) == {tokenizer.tool_open_id}
    push(fresh, tiny, "</think>No. <think><minimax:tool_call>\n<invoke name=")


def test_strict_tools_under_auto(tiny: Model) -> None:
    """Their parameters fit; everything beside a block is free, and so are the values of other tools."""
    tools = [tool("point", POINT, True), tool("any", POINT)]
    rule = rule_of(tiny, tools, "auto")
    push(rule, tiny, 'Hm.</think>\n\nLet me see.\n<minimax:tool_call>\n<invoke name="')
    assert {tiny.tokenizer.token_bytes(i)[:1] for i in allowed(rule, tiny)} == {b"p", b"a"}
    push(
        rule,
        tiny,
        'any">\n<parameter name="z">whatever</parameter>\n</invoke>\n<invoke name="point">\n<parameter name="x">',
    )
    assert {tiny.tokenizer.token_bytes(i)[:1] for i in allowed(rule, tiny)} <= {bytes([c]) for c in b"-0123456789"}
    push(rule, tiny, "5</parameter>\n</invoke>\n</minimax:tool_call> and <minimax:tool_call>\n<invoke")
    for seed in range(20):
        rule = rule_of(tiny, tools, "auto")
        reply = read(tiny.tokenizer, drive(rule, tiny.tokenizer, seed, "</think>So:<minimax:tool_call>"), tools)
        assert reply.tool_calls and reply.content == "So:"
        for call in reply.tool_calls:
            if call["function"]["name"] == "point":
                check(call, POINT)
        assert all("point" not in error for error in reply.errors)


def test_one_call_at_most(tiny: Model) -> None:
    rule, tokenizer = rule_of(tiny, TOOLS, "auto", is_parallel=False), tiny.tokenizer
    push(rule, tiny, 'Hm.</think>\n\n<minimax:tool_call>\n<invoke name="now">\n</invoke>\n')
    assert allowed(rule, tiny) == {tokenizer.tool_close_id}
    push(rule, tiny, "</minimax:tool_call>")
    assert set(range(tokenizer.n_vocab)) - allowed(rule, tiny) == {tokenizer.tool_open_id}


def test_a_call_or_an_answer_of_the_schema(tiny: Model) -> None:
    tools, kinds = [tool("weather", WEATHER, True), tool("read", FILE)], set()
    for seed in range(60):
        ids = drive(rule_of(tiny, tools, "auto", schema=POINT), tiny.tokenizer, seed)
        reply = read(tiny.tokenizer, ids, tools)
        for call in reply.tool_calls:
            check(call, BY_NAME[call["function"]["name"]])
        if not reply.tool_calls:
            jsonschema.validate(json.loads(reply.content), POINT)
        assert not reply.errors and not (reply.tool_calls and reply.content)
        kinds.add(bool(reply.tool_calls))
    assert kinds == {True, False}
    messages = [{"role": "user", "content": "Where?"}]
    said = tiny.chat(messages, tools=tools, schema=POINT, tool_choice="none", seed=1, think_budget=9)
    jsonschema.validate(json.loads(said["content"]), POINT)
    said = tiny.chat(messages, tools=[tool("now", None)], schema=POINT, tool_choice="required", seed=1, think_budget=9)
    assert {call["function"]["name"] for call in said["tool_calls"]} == {"now"} and not said["content"]


def test_only_json_has_a_limit_of_its_own(tiny: Model) -> None:
    calls = CallRules([tool("f", {"properties": {"x": {}}})], schema={"type": "string"})
    for begin, is_endless in (('"', False), ('<minimax:tool_call>\n<invoke name="f">\n<parameter name="x">', True)):
        rule = calls.rule(tiny.masks, in_thinking=False, most_tokens=40)
        push(rule, tiny, begin + "a b c " * 3)
        for token in tiny.tokenizer.encode("b" * 300):
            rule.push(token)
        if is_endless:
            assert allowed(rule, tiny)
        else:
            with pytest.raises(M2liteError, match="not whole after 40 tokens"):
                rule.apply(np.zeros(tiny.tokenizer.n_vocab, np.float32))


def test_what_is_not_strict_is_kept_to_as_far_as_it_can_be(tiny: Model) -> None:
    parameters = {
        "properties": {"a": {"type": "string", "pattern": "(?<=x)y"}, "b": {"type": "integer", "not": {"const": 3}},
                       "c": {"enum": ["q"]}},
        "required": ["c"], "additionalProperties": {"type": "boolean"}, "minProperties": 1,
    }  # fmt: skip
    rule = rule_of(tiny, [tool("f", parameters)])
    push(rule, tiny, '</think><minimax:tool_call>\n<invoke name="f">\n<parameter name="a">any</parameter>\n')
    push(rule, tiny, '<parameter name="b">3</parameter>\n<parameter name="z">true</parameter>\n<parameter name="c">q<')
    odd = rule_of(tiny, [tool("f", {"type": "array"})])
    push(odd, tiny, '</think><minimax:tool_call>\n<invoke name="f">\n<parameter name="a">any</parameter>\n</invoke>')


def test_alternatives_of_all_parameters(tiny: Model) -> None:
    """Those of each anyOf together, in any order, and nothing that one of them rules out."""
    base = {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"], "$ref": "#/$defs/more"}
    more = {"properties": {"id": {"maximum": 3}, "n": {"type": "null"}}, "anyOf": [{"required": ["n"]}, POINT_OR_ID]}
    schema = base | {"$defs": {"more": more}}
    for seed in range(30):
        tools = [tool("f", schema, True)]
        reply = read(tiny.tokenizer, drive(rule_of(tiny, tools), tiny.tokenizer, seed), tools)
        assert reply.tool_calls and not reply.errors
        for call in reply.tool_calls:
            check(call, schema)


POINT_OR_ID = closed({"x": {"type": "boolean"}, "id": {}}, "x")
STRICT_NO: list[tuple[Any, str]] = [
    ({"type": "array"}, "of type 'array'"),
    ({"properties": {"a": {"type": "string", "not": {"const": "x"}}}}, "'a' that says 'not' of text"),
    ({"properties": {"a": {"type": "integer", "not": {"const": 1}}}}, "'a' that says what llguidance refuses"),
    ({"properties": {"a": {"type": "string", "pattern": "(?=a)"}}}, "'a' that says what llguidance refuses"),
    ({"properties": {"a": {"type": "string", "pattern": "(^a|b)"}}}, r"\^ and \$ may only"),
    ({"properties": {"a": {"type": "string", "format": "uri"}}}, "format 'uri'"),
    ({"properties": {"a": {"type": "string", "minLength": -1}}}, "minLength -1"),
    ({"properties": {"a": {"type": "string", "maxLength": 10**9}}}, "maxLength 1000000000"),
    ({"properties": {"a": {"const": "</parameter>"}}}, "only text with </parameter>"),
    ({"properties": {"a": {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}}}, "oneOf"),
    ({"properties": {"a": {"type": ["string", "integer"], "minimum": 3}}}, "text that may be another value"),
    ({"properties": {"a": {"type": "array", "items": {"$ref": "#"}}}}, "refers to '#'"),
    ({"properties": {"a": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "array"}]}}}, "says more of both"),
    ({"properties": {"a<": {}}}, "'a<', a name that no call can hold"),
    ({"properties": {f"a{n}": {} for n in range(65)}}, "has 65 parameters"),
    ({"properties": {}, "additionalProperties": True}, "parameters that it does not name"),
    ({"properties": {}, "required": ["a"], "additionalProperties": False}, "no call at all"),
    ({"properties": {"a": False}, "required": ["a"]}, "no call at all"),
    ({"minProperties": 1}, "'minProperties' of all parameters"),
    ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, "oneOf of all parameters"),
    ({"anyOf": [{"required": [f"a{n}"]} for n in range(20)]}, "20 alternatives"),
    ({"anyOf": [{"properties": {"a": {"type": "string"}}}, {"properties": {"a": {"type": "null"}}}]}, "text in one"),
    ({"$ref": "#"}, "has no end"),
    ({"properties": {"a": {"$ref": "#/properties/a"}}}, "has no end"),
]  # fmt: skip


@pytest.mark.parametrize(("parameters", "said"), STRICT_NO)
def test_what_strict_cannot_be(parameters: Any, said: str) -> None:
    """An error that names the tool; the same tool can be called where it is not strict."""
    with pytest.raises(UsageError, match=f"The schema of the tool 'f' .*{said}"):
        CallRules([tool("f", parameters, True)]).check()
    CallRules([tool("f", parameters)], "required").check()


def test_wrong_choices(tiny: Model) -> None:
    with pytest.raises(UsageError, match="'x', which was not given"):
        CallRules.of(TOOLS, NamedTool("x"), True)
    with pytest.raises(UsageError, match="no tools were given"):
        CallRules.of(None, "required", True)
    with pytest.raises(UsageError, match="no tools were given"):
        tiny.generate("Hi", tool_choice="required")
    with pytest.raises(UsageError, match="No call can hold the name"):
        CallRules([tool('a"b', None)], "required").check()
    with pytest.raises(UsageError, match="half of a character"):
        CallRules([tool("f", {"properties": {"a": {"const": "\ud800"}}}, True)]).check()


def test_a_vocabulary_without_tags(tiny: Model) -> None:
    tokenizer = copy.copy(tiny.tokenizer)
    tokenizer.tool_open_id = None
    with pytest.raises(UsageError, match="no tokens for tool calls"):
        CallRules(TOOLS, "required").rule(Masks(tokenizer), False, None)
