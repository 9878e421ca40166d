"""OpenAI's chat completions: a request's fields as one table, and the response. Knows no file and no terminal.

What the table lacks is an error that names the field: nothing is ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from m2lite.dialogue.conversation import AnswerOptions
from m2lite.engine.answer import Completion
from m2lite.engine.request import Request
from m2lite.errors import M2liteError, UsageError
from m2lite.sampling.draw import Sampling
from m2lite.sampling.json_schema import Schema, check_schema
from m2lite.sampling.rules import Logprob
from m2lite.sampling.tool_choice import CallRules, NamedTool, ToolChoice
from m2lite.text.messages import Message, Tool, check_messages, check_tools
from m2lite.text.stop_text import check_stop_texts
from m2lite.text.tokenizer import Tokenizer

MOST_REQUEST_BYTES = 64 << 20  # of its JSON
MOST_LOGPROBS = 20  # OpenAI's limit
_ANY_JSON: Schema = {"type": "object"}  # of response_format json_object


@dataclass(frozen=True)
class ChatRequest:
    messages: list[Message]
    sampling: Sampling
    tools: list[Tool] | None = None
    max_tokens: int | None = None
    think_tokens: int | None = None
    stop_texts: tuple[str, ...] = ()
    schema: Schema | None = None
    logprobs: int | None = None
    model: str | None = None  # as it was asked for; there is one, whatever it is called
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True

    def check_calls(self) -> None:
        """UsageError for tools, or a choice of them, that an answer cannot keep to."""
        calls = CallRules.of(self.tools, self.tool_choice, self.parallel_tool_calls, self.schema)
        if calls is not None:
            calls.check()

    def to_engine(
        self, prompt: Sequence[int], rng_stream: int, key: str = "", draft: str | None = None,
        draft_tokens: int | None = None,
    ) -> Request:  # fmt: skip
        """The same for the engine: `prompt` are the ids of the messages, or whatever is to be continued."""
        return Request(
            prompt=prompt, rng_stream=rng_stream, key=key, tools=self.tools, sampling=self.sampling,
            max_tokens=self.max_tokens, think_tokens=self.think_tokens, stop_texts=self.stop_texts,
            schema=self.schema, logprobs=self.logprobs, draft=draft, draft_tokens=draft_tokens,
            tool_choice=self.tool_choice, parallel_tool_calls=self.parallel_tool_calls,
        )  # fmt: skip

    def options(self) -> AnswerOptions:
        return {
            "sampling": self.sampling, "max_tokens": self.max_tokens, "think_tokens": self.think_tokens,
            "stop_texts": self.stop_texts, "schema": self.schema, "logprobs": self.logprobs,
            "tool_choice": self.tool_choice, "parallel_tool_calls": self.parallel_tool_calls,
        }  # fmt: skip


def _number(low: float, high: float) -> Callable[[str, Any], float]:
    def parse(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise UsageError(f"{name} is {value!r}.", f"Use a number from {low:g} to {high:g}.")
        return float(value)

    return parse


def _whole(low: int, high: int) -> Callable[[str, Any], int]:
    def parse(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UsageError(f"{name} is {value!r}.", f"Use a whole number from {low} to {high}.")
        return value

    return parse


def _only(*values: Any) -> Callable[[str, Any], Any]:
    """Fields of which one thing can be done: it may be asked for."""

    def parse(name: str, value: Any) -> Any:
        if not any(type(value) is type(each) and value == each for each in values):
            raise UsageError(f"{name} is {value!r}, which is not supported.", f"Use {values[0]!r} or leave it out.")
        return value

    return parse


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name} is a {type(value).__name__}, expected a string.")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}.", "Use true or false.")
    return value


def parse_messages(name: str, value: Any) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UsageError(f"{name} is no list of messages.", 'Give [{"role": "user", "content": ...}].')
    renamed = [_known_role(message) for message in value]
    if isinstance(renamed[-1], Mapping) and renamed[-1].get("role") == "assistant":
        raise UsageError("The last message is the assistant's: nothing is asked.", "End with a question.")
    return check_messages(renamed)


def _known_role(message: Any) -> Any:
    """`developer` is what newer clients call the system message."""
    is_named = isinstance(message, Mapping) and message.get("role") == "developer"
    return {**message, "role": "system"} if is_named else message


def _tools(name: str, value: Any) -> list[Tool] | None:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UsageError(f"{name} is no list of tools.")
    return check_tools(value)


def parse_tool_choice(name: str, value: Any) -> ToolChoice:
    """As OpenAI writes it."""
    if value in ("auto", "none", "required"):
        choice: ToolChoice = value
        return choice
    if isinstance(value, Mapping) and value.get("type") == "function":
        tool = value.get("function", value)
        if isinstance(tool, Mapping) and isinstance(tool.get("name"), str):
            return NamedTool(tool["name"])
    raise UsageError(
        f"{name} is {value!r}.", 'Use auto, none, required or {"type": "function", "function": {"name": ...}}.'
    )


def _schema(name: str, value: Any) -> Schema | None:
    kind = value.get("type") if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping) or kind not in ("text", "json_object", "json_schema"):
        raise UsageError(f"{name} is of type {kind!r}.", "Use text, json_object or json_schema.")
    if kind == "text":
        return None
    if kind == "json_object":
        return _ANY_JSON
    named = value.get("json_schema")
    if not isinstance(named, Mapping) or not isinstance(named.get("schema"), Mapping):
        raise UsageError(f"{name} has no schema.", 'Give {"json_schema": {"name": ..., "schema": {...}}}.')
    check_schema(named["schema"])
    schema: Schema = named["schema"]
    return schema


# Field -> how its value is read. The names of `ChatRequest` and `Sampling` where those have it.
FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "messages": parse_messages,
    "model": _string,
    "tools": _tools,
    "tool_choice": parse_tool_choice,
    "parallel_tool_calls": _flag,
    "max_tokens": _whole(1, 2**31),
    "max_completion_tokens": _whole(1, 2**31),
    "temperature": _number(0, 100),
    "top_p": _number(0, 1),
    "top_k": _whole(0, 2**31),
    "min_p": _number(0, 1),
    "seed": _whole(0, 2**64 - 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "stop": lambda name, value: check_stop_texts(value),
    "response_format": _schema,
    "logprobs": _flag,
    "top_logprobs": _whole(0, MOST_LOGPROBS),
    "think_budget": _whole(0, 2**31),
    "n": _only(1),
    "stream": _only(False),
}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty")


def parse_request(body: object, defaults: ChatRequest) -> ChatRequest:
    """The request that a JSON body is; what it leaves out, or has as null, is as in `defaults`. UsageError else."""
    if not isinstance(body, Mapping):
        raise UsageError(f"The request is a {type(body).__name__}, expected an object.")
    found = dict[str, Any]()
    for name, value in body.items():
        if name not in FIELDS:
            raise UsageError(f"The field {name!r} is not supported.", f"Known are {', '.join(FIELDS)}.")
        if value is not None:
            found[name] = FIELDS[name](name, value)
    if "messages" not in found:
        raise UsageError("The request has no messages.", 'Give "messages": [{"role": "user", "content": ...}].')
    if "max_tokens" in found and found["max_tokens"] != found.get("max_completion_tokens", found["max_tokens"]):
        raise UsageError("max_tokens and max_completion_tokens differ.", "Leave one of them out.")
    if "top_logprobs" in found and not found.get("logprobs"):
        raise UsageError("top_logprobs was given without logprobs.", 'Add "logprobs": true.')
    request = replace(
        defaults,
        messages=found["messages"],
        tools=found.get("tools", defaults.tools),
        max_tokens=found.get("max_completion_tokens", found.get("max_tokens", defaults.max_tokens)),
        think_tokens=found.get("think_budget", defaults.think_tokens),
        stop_texts=found.get("stop", defaults.stop_texts),
        schema=found.get("response_format", defaults.schema),
        logprobs=found.get("top_logprobs", 0) if found.get("logprobs") else defaults.logprobs,
        sampling=replace(defaults.sampling, **{name: found[name] for name in _SAMPLING if name in found}),
        model=found.get("model"),
        tool_choice=found.get("tool_choice", defaults.tool_choice),
        parallel_tool_calls=found.get("parallel_tool_calls", defaults.parallel_tool_calls),
    )
    request.check_calls()
    return request


def check_whole(schema: Schema | None, answer: Completion) -> None:
    """M2liteError for an answer that should be JSON of the schema and was cut off: half of it is of no use."""
    if schema is not None and answer.finish_reason == "length":
        what = "tool call" if answer.reply.errors else "JSON"
        raise M2liteError(
            f"The answer was cut off after {len(answer.tokens):,} tokens, before its {what} was whole.",
            "Allow more (--max-tokens, --ctx, --think-budget), or bound it in the schema (maxLength, maxItems).",
        )


def response_body(answer: Completion, tokenizer: Tokenizer, name: str, model: str, created: int) -> dict[str, Any]:
    """The answer as a chat completion. `name` becomes its id; `created` is in seconds since 1970.

    `m2lite_warnings`, where there are any, says what was wrong with its tool calls or may have been meant otherwise.
    """
    reply = answer.reply
    message = reply.message()
    if reply.tool_calls:
        start = f"call_{_hash(name, answer)}_"
        message["tool_calls"] = [
            _written_call(f"{start}{n}", **call["function"]) for n, call in enumerate(reply.tool_calls)
        ]
    is_called = reply.tool_calls and answer.finish_reason == "stop"
    choice = {
        "index": 0,
        "message": message,
        "logprobs": response_logprobs(answer.logprobs, tokenizer),
        "finish_reason": "tool_calls" if is_called else answer.finish_reason,
    }
    n_in, n_out = answer.stats.n_prompt, len(answer.tokens)
    body = {
        "id": name,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": {"prompt_tokens": n_in, "completion_tokens": n_out, "total_tokens": n_in + n_out},
    }
    return body | ({"m2lite_warnings": reply.errors} if reply.errors else {})


def _written_call(call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": call_id, "type": "function", "function": function}


def _hash(name: str, answer: Completion) -> str:
    """The same on every run, and of no other answer: clients merge calls with the same id."""
    told = json.dumps([name, answer.stats.n_prompt, list(answer.tokens)])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def response_logprobs(found: Sequence[Logprob | None], tokenizer: Tokenizer) -> dict[str, Any] | None:
    """By token of the answer, its thinking and tags included; those that nobody drew have none."""
    if not found:
        return None
    return {"content": [_entry(each, tokenizer) for each in found if each is not None]}


def _entry(each: Logprob, tokenizer: Tokenizer) -> dict[str, Any]:
    likeliest = [_named(token, logprob, tokenizer) for token, logprob in each.likeliest]
    return {**_named(each.token, each.logprob, tokenizer), "top_logprobs": likeliest}


def _named(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}
