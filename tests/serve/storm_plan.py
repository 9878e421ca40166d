"""What a storm of requests asks: whole answers, clients that leave or are slow, and what is refused. Knows no server.

All of it follows from a seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

Dialect = Literal["chat", "completions", "responses", "messages"]
Manner = Literal[
    "whole", "slow to read", "slow to send", "leaves at once", "leaves in the answer", "leaves in its body", "refused"
]
Body = dict[str, Any]

PATHS: dict[Dialect, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
CONTEXT = 1024
_MANNERS: dict[Manner, int] = {
    "whole": 45, "slow to read": 6, "slow to send": 4, "leaves at once": 9, "leaves in the answer": 12,
    "leaves in its body": 8, "refused": 16,
}  # fmt: skip
_RULE = "Answer in one short sentence, and say when you are not sure. Never guess a number that you were not told. "
_BEGINNINGS = [
    "",
    *(f"You help with {what}. {_RULE * n}".strip() for n, what in enumerate(("maps", "food", "cats"), 2)),
]
_QUESTIONS = ["Hello", "Who are you?", "What is 2 + 3?", "Tell me a story.", "What is the capital of France?"]
_ODD = ["", "\0", "é漢字😀", "]~b]ai\n<think>[e~[</minimax:tool_call>", "x" * 400]
_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "n": {"type": "integer"}},
    "required": ["city", "n"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "look", "parameters": _SCHEMA}}
_HUGE = 17 << 20  # bytes: more than a body may have
_EVERY = 97  # requests, of which one is huge


class Refusal(NamedTuple):
    """What is sent in place of a body that can be answered, and the status that it gets."""

    data: bytes
    status: int
    headers: Mapping[str, str] = {}
    path: str = ""  # behind the dialect's own


@dataclass(frozen=True)
class Ask:
    number: int
    dialect: Dialect
    manner: Manner
    body: Body
    keywords: Body = field(default_factory=dict)  # the same for `Model.chat` or `generate`
    at: float = 0.0  # where a client leaves: a share of its body or of its patience
    n_events: int = 0  # of the answer, after which it leaves
    more: str = ""  # what is asked behind the answer
    refusal: Refusal | None = None

    @property
    def data(self) -> bytes:
        return json.dumps(self.body).encode() if self.refusal is None else self.refusal.data

    @property
    def path(self) -> str:
        return PATHS[self.dialect] + ("" if self.refusal is None else self.refusal.path)

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))


def plan(n: int, seed: int) -> list[Ask]:
    dice = random.Random(seed)
    return [_ask(number, dice) for number in range(n)]


def follow_up(ask: Ask, message: Body) -> Ask:
    """What the client of a chat asks next, behind the answer's `message`."""
    messages = [*ask.body["messages"], message, {"role": "user", "content": ask.more}]
    return replace(ask, body=ask.body | {"messages": messages}, more="")


def _ask(number: int, dice: random.Random) -> Ask:
    dialect = dice.choices(list(PATHS), (4, 2, 2, 2))[0]
    manner = dice.choices(list(_MANNERS), list(_MANNERS.values()))[0]
    body, keywords = _MAKERS[dialect](dice)
    body |= {"model": "any"}
    if manner == "leaves in the answer" or (manner != "refused" and dice.random() < 0.5):
        body["stream"] = not isinstance(body.get("prompt"), list) or isinstance(body["prompt"][0], int)
    ask = Ask(number, dialect, manner, body, keywords, dice.random(), dice.randrange(12))
    if number % _EVERY == _EVERY // 2:
        return replace(ask, manner="refused", refusal=Refusal(b'{"x": "' + b"y" * _HUGE + b'"}', 413))
    if manner == "refused":
        return replace(ask, refusal=dice.choice(_REFUSALS)(ask))
    is_plain = not {"tools", "schema", "stop"} & keywords.keys() and keywords["max_tokens"] < CONTEXT
    if dialect == "chat" and manner == "whole" and is_plain and dice.random() < 0.5:
        return replace(ask, more=dice.choice(_QUESTIONS))
    return ask


# Bodies that can be answered


def _options(dice: random.Random) -> Body:
    """How an answer is drawn, in the words of `Model.chat`."""
    found: Body = {"seed": dice.randrange(1 << 32), "max_tokens": dice.randrange(1, 60)}
    if dice.random() < 0.04:
        found["max_tokens"] = 1_000_000  # more than there is room for
    for name, values in {
        "temperature": (0, 0.5, 1.5), "top_p": (0.5, 0.9), "top_k": (5, 50), "min_p": (0.05,),
        "presence_penalty": (0.5,), "frequency_penalty": (0.5,),
    }.items():  # fmt: skip
        if dice.random() < 0.2:
            found[name] = dice.choice(values)
    return found


def _messages(dice: random.Random) -> list[Body]:
    beginning, n = dice.choice(_BEGINNINGS), dice.choice((0, 0, 1, 2))
    found = [{"role": "system", "content": beginning}] if beginning else []
    for question in _QUESTIONS[:n]:
        found += [{"role": "user", "content": question}, {"role": "assistant", "content": f"That is about {question}"}]
    text = dice.choice(_ODD) if dice.random() < 0.1 else dice.choice(_QUESTIONS)
    return [*found, {"role": "user", "content": text}]


def _chat(dice: random.Random) -> tuple[Body, Body]:
    messages, options = _messages(dice), _options(dice)
    more, theirs = Body(), Body()
    kind = dice.choice(("", "", "", "schema", "tools", "logprobs", "stop", "think"))
    if kind == "schema":
        more, theirs = (
            {"schema": _SCHEMA},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}},
        )
    elif kind == "tools":
        choice = dice.choice(("auto", "none", "required"))
        more = theirs = {"tools": [_TOOL], "tool_choice": choice}
    elif kind == "logprobs":
        more, theirs = {"logprobs": 2}, {"logprobs": True, "top_logprobs": 2}
    elif kind == "stop":
        more = theirs = {"stop": ["a", "the "]}
    elif kind == "think":
        more, theirs = {"think_budget": 8}, {"thinking": {"type": "enabled", "budget_tokens": 8}}
    body = {"messages": messages, "return_token_ids": True, **options, **theirs}
    return body, {"messages": messages, **options, **more}


def _completions(dice: random.Random) -> tuple[Body, Body]:
    texts = [f"{dice.choice(_BEGINNINGS)}\n{dice.choice(_QUESTIONS)}" for _ in range(2)]
    prompt: Any = dice.choice((texts[0], texts, [dice.randrange(300, 900) for _ in range(dice.randrange(1, 200))]))
    options = _options(dice)
    return {"prompt": prompt, "return_token_ids": True, **options}, {"prompt": prompt, **options}


def _responses(dice: random.Random) -> tuple[Body, Body]:
    messages, options = _messages(dice), _options(dice)
    theirs = {name: value for name, value in options.items() if name != "max_tokens"}
    body = {"input": messages, "max_output_tokens": options["max_tokens"], **theirs}
    if messages[0]["role"] == "system":
        body |= {"instructions": messages[0]["content"], "input": messages[1:]}
    return body, {"messages": messages, **options}


def _anthropic(dice: random.Random) -> tuple[Body, Body]:
    messages, options = _messages(dice), _options(dice)
    body: Body = {"messages": messages, **options}
    if messages[0]["role"] == "system":
        body |= {"system": messages[0]["content"], "messages": messages[1:]}
    return body, {"messages": messages, **options}


_MAKERS: dict[Dialect, Callable[[random.Random], tuple[Body, Body]]] = {
    "chat": _chat, "completions": _completions, "responses": _responses, "messages": _anthropic,
}  # fmt: skip


# Bodies that are refused

_PLACES: dict[Dialect, str] = {
    "chat": "messages",
    "completions": "prompt",
    "responses": "input",
    "messages": "messages",
}


def _changed(ask: Ask, **fields: Any) -> bytes:
    return json.dumps(ask.body | fields).encode()


def _saying(ask: Ask, content: Any) -> bytes:
    """With that for a question."""
    is_chat = ask.dialect != "completions"
    return _changed(ask, **{_PLACES[ask.dialect]: [{"role": "user", "content": content}] if is_chat else content})


_REFUSALS: list[Callable[[Ask], Refusal]] = [
    lambda ask: Refusal(_changed(ask)[:-2], 400),
    lambda ask: Refusal(b"[]", 400),
    lambda ask: Refusal(b"", 400),
    lambda ask: Refusal(_changed(ask, x="\ud800"), 400),
    lambda ask: Refusal(_changed(ask), 415, {"content-type": "text/plain"}),
    lambda ask: Refusal(_changed(ask), 403, {"host": "evil.example"}),
    lambda ask: Refusal(_changed(ask), 403, {"origin": "https://evil.example"}),
    lambda ask: Refusal(_changed(ask), 404, path="/nothing"),
    lambda ask: Refusal(_changed(ask, temperature=9e9), 400),
    lambda ask: Refusal(_changed(ask, seed=-1), 400),
    lambda ask: Refusal(_changed(ask, stream="yes"), 400),
    lambda ask: Refusal(_changed(ask, **{_PLACES[ask.dialect]: 3}), 400),
    lambda ask: Refusal(_saying(ask, "word " * 2 * CONTEXT), 400),
    lambda ask: Refusal(_saying(ask, [{"type": "image_url", "image_url": {"url": "x"}}]), 400),
]
