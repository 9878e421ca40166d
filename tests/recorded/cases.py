"""What is recorded: for every model the same scenarios, with other values of the factors each time. Only data.

FOUND stands for stop texts that the recording takes from what the case says without them. What is left out, since the
program is at fault there today: an answer that reaches its `max_tokens` behind a thinking that was closed, or that is
interrupted within a thinking that has a budget.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.recorded.models import NAMES
from tests.recorded.record import Case, options_of

Prompt = list[list[Any]]  # texts, each so many times

FOUND = ["found"]
SAMPLINGS: list[dict[str, float]] = [
    {"temperature": 0},
    {},
    {"temperature": 0.3, "top_k": 5},
    {"temperature": 0.7, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.5, "top_k": 5, "min_p": 0.1},
]
PENALTIES: list[dict[str, float]] = [
    {},
    {"presence_penalty": 0.8},
    {},
    {"frequency_penalty": 0.6},
    {"presence_penalty": 0.3, "frequency_penalty": -0.4},
]
DRAFTS: list[list[Any]] = [["off", None], ["ngram", 3], ["auto", None], ["ngram", None]]
MODULES: list[list[Any]] = [["mtp", 1], ["mtp", 3], ["auto", None], ["mtp", None]]  # only m2-tiny has any

STORY = "Tell me a story about a fox, an owl and the river. "
SHORT: list[Prompt] = [[["Hello", 1]], [["What is 2 + 3?", 1]], [["Who are you?", 1]]]
MEDIUM: Prompt = [[STORY, 2]]
LONG: Prompt = [[STORY, 10], ["Which of them is the oldest, and why?", 1]]
REPEATING: Prompt = [["one two three ", 9], ["one", 1]]
RAW: Prompt = [["Once upon a time there was a fox who met an owl by the river. ", 3]]

SCHEMA = {
    "type": "object",
    "properties": {"is_small": {"type": "boolean"}, "kind": {"enum": ["fox", "owl"]}, "n": {"type": "integer"}},
    "required": ["is_small", "kind", "n"],
    "additionalProperties": False,
}
SCHEMA["properties"]["n"] |= {"minimum": 0, "maximum": 999}  # type: ignore[index]
_WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": _WEATHER}]
_CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Oslo"}}}
CALLED = [
    {"role": "user", "content": "How is the weather in Oslo?"},
    {"role": "assistant", "content": "I look.", "reasoning_content": "A tool knows.", "tool_calls": [_CALL]},
]


def how(i: int, **more: Any) -> dict[str, Any]:
    """Options of an answer: the factors' values take turns."""
    return SAMPLINGS[i % len(SAMPLINGS)] | PENALTIES[i // 2 % len(PENALTIES)] | {"seed": 100 + i} | more


def ask(prompt: Prompt, stop_after: int | None = None, **options: Any) -> dict[str, Any]:
    return {"do": "ask", "prompt": prompt, "options": options} | (
        {} if stop_after is None else {"stop_after": stop_after}
    )


def go_on(do: str, stop_after: int | None = None, **options: Any) -> dict[str, Any]:
    return {"do": do, "options": options} | ({} if stop_after is None else {"stop_after": stop_after})


def chat(*steps: dict[str, Any], **more: Any) -> Case:
    return {"door": "chat", "steps": list(steps)} | more


def turns(i: int) -> Case:
    first, second = how(i, max_tokens=40), how(i + 1, max_tokens=30, logprobs=1)
    return chat(ask(SHORT[i % 3], **first), ask(LONG, **second), ask(REPEATING, **how(i + 2, max_tokens=60)))


def resumed(i: int) -> Case:
    options = how(i)
    return chat(ask(MEDIUM, 20, **options), go_on("resume", 45, **options), go_on("resume", **options), ctx=320)


def resumed_behind_a_limit(i: int) -> Case:
    options = how(i + 1, logprobs=0)
    steps = [ask(MEDIUM, **options | {"max_tokens": 25}), go_on("resume", 70, **options), go_on("resume", **options)]
    return chat(*steps, ctx=320, system="You speak like a pirate.")


def stopped(i: int) -> Case:
    return chat(
        ask(SHORT[i % 3], think_tokens=0, stop_texts=FOUND, **how(i)),
        ask(MEDIUM, think_tokens=6, stop_texts=FOUND, **how(i + 1)),
        go_on("regenerate", think_tokens=3, stop_texts=FOUND, **how(i + 1)),
        ctx=512,
    )


def closed_late(i: int) -> Case:
    return chat(
        ask(MEDIUM, think_tokens=50, **how(i)),
        {"do": "undo"},
        ask(REPEATING, think_tokens=0, logprobs=1, **how(i + 3)),
        ctx=256,
    )


def shaped(i: int) -> Case:
    """The interrupted one has no `max_tokens`, and its thinking is closed by then."""
    options = how(i, schema=SCHEMA, think_tokens=0, logprobs=2)
    return chat(
        ask(SHORT[i % 3], 12, **options),
        go_on("resume", **options),
        ask(MEDIUM, **how(i + 1, schema=SCHEMA, think_tokens=10, max_tokens=400)),
    )


def asked_again(i: int) -> Case:
    options = how(i + 1, max_tokens=25)
    steps = [ask(SHORT[i % 3], **options), *[go_on("regenerate", **options)] * 2]
    return chat(*steps, {"do": "undo"}, ask(LONG, **options), ask(MEDIUM, **options), go_on("regenerate", **options))


def results(i: int) -> Case:
    restore = {"do": "restore", "messages": CALLED}
    told = {"do": "results", "results": ["Rain, 4 degrees"], "options": how(i, max_tokens=40)}
    return chat(restore, told, ask(SHORT[0], max_tokens=40, **how(i + 1)), tools=TOOLS)


def thinking_kept(i: int) -> Case:
    return chat(
        ask(MEDIUM, max_tokens=24, **how(i)),
        ask(SHORT[i % 3], think_tokens=7, stop_texts=FOUND, **how(i + 1)),
        ask(LONG, max_tokens=24, **how(i + 2)),
        keep_thinking=True,
    )


def generate(prompt: Prompt, options: dict[str, Any], **more: Any) -> Case:
    return {"door": "generate", "steps": [ask(prompt, **options)]} | more


def generated(i: int) -> Case:
    return generate(LONG, how(i, max_tokens=70, logprobs=2))


def generated_and_stopped(i: int) -> Case:
    return generate(MEDIUM, how(i + 2, think_tokens=12, stop_texts=FOUND), ctx=512)


def generated_json(i: int) -> Case:
    return generate(SHORT[i % 3], how(i, think_tokens=0, schema=SCHEMA))


def raw_text(i: int) -> Case:
    return generate(RAW, how(i, max_tokens=60), no_template=True)


def request(name: str, prompt: Prompt, **options: Any) -> dict[str, Any]:
    return {"id": name, "prompt": prompt, "options": options}


def mixed(i: int) -> list[dict[str, Any]]:
    """Every kind of limit at once, behind a beginning that some share."""
    return [
        request("a", [[STORY, 4]], max_tokens=40, **how(i)),
        request("b", [[STORY, 4], ["Make it short.", 1]], think_tokens=0, stop_texts=FOUND, **how(i + 1)),
        request("c", SHORT[i % 3], think_tokens=5, schema=SCHEMA, **how(i + 2)),
        request("d", REPEATING, max_tokens=80, logprobs=1, **how(i + 3)),
        request("e", [[STORY, 4], ["Thank you", 1]], think_tokens=30, stop_texts=FOUND, **how(i + 4)),
        {"id": "f", "messages": [*CALLED, {"role": "tool", "content": "Sun"}], "options": how(i + 5, max_tokens=30)},
    ]


def batched(i: int) -> Case:
    return {"door": "batch", "inflight": 4, "tools": TOOLS, "requests": mixed(i)}


def preempted(i: int) -> Case:
    """Answers that grow longer than is usual, in a pool where two have room to their end."""
    requests = [request(f"p{n}", [["one two ", n + 1]], max_tokens=260, **how(i + n)) for n in range(4)]
    requests[2]["options"] |= {"max_tokens": 500, "think_tokens": 20}
    return {"door": "batch", "inflight": 4, "pool": 512, "ctx": 448, "requests": requests}


def lines(i: int) -> Case:
    return {"door": "batch command", "inflight": 3, "requests": mixed(i + 1)}


SCENARIOS: list[Callable[[int], Case]] = [
    turns, resumed, resumed_behind_a_limit, stopped, closed_late, shaped, asked_again, results, thinking_kept,
    generated, generated_and_stopped, generated_json, raw_text, batched, preempted, lines,
]  # fmt: skip


def make_cases(attempt: int = 0) -> dict[str, Case]:
    """By name; each attempt has other values. m2-tiny has every scenario twice, first with its prediction modules."""
    found = dict[str, Case]()
    for m, model in enumerate(["m2-tiny", *NAMES]):
        drafts = MODULES if m == 0 else DRAFTS
        for s, scenario in enumerate(SCENARIOS):
            plain = {"model": model, "kv": ("f16", "q8_0")[(m + s) % 2], "ctx": 1024, "draft": drafts[(m + s) % 4]}
            case = plain | scenario(7 * m + 3 * s + 101 * attempt)
            if m > 1 and case["draft"] == ["ngram", 3]:
                for options in options_of(case):  # random models repeat themselves where nothing is drawn
                    if "stop_texts" not in options:
                        options |= {"temperature": 0, "presence_penalty": 0, "frequency_penalty": 0}
            found[f"{model} {scenario.__name__.replace('_', ' ')}" + (" with modules" if m == 0 else "")] = case
    return found
