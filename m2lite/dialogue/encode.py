"""Which ids messages are: rendered by the template, or with every answer's own ids kept. Knows no session."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from m2lite.engine.prefix_cache import n_common
from m2lite.errors import UsageError
from m2lite.text.reply import Said, close_thinking, opens_thinking
from m2lite.text.template import Template, encode_chat
from m2lite.text.tokenizer import Tokenizer

Message = dict[str, Any]
Tools = Sequence[Mapping[str, Any]] | None
Recall = Callable[[Sequence[int], Message], Sequence[int] | None]  # (ids before an answer, the answer) -> its own ids
Known = Callable[[int], Sequence[int] | None]  # n -> the ids of the first n messages, up to where an answer begins


def answer_ids(tokenizer: Tokenizer, template: Template, message: Message) -> list[int]:
    """What the model said, behind the prompt for its answer; what it may have said where nobody kept the ids."""
    if isinstance(message, Said) and message.tokens:
        return list(message.tokens)
    thinking, content = message.get("reasoning_content", ""), str(message["content"])
    calls = _call_ids(tokenizer, template, message) if message.get("tool_calls") else []
    closed = close_thinking(tokenizer) if content or calls else []
    return [*(tokenizer.encode(thinking) if thinking else []), *closed, *tokenizer.encode(content), *calls]


def _call_ids(tokenizer: Tokenizer, template: Template, message: Message) -> list[int]:
    """The block of an answer's calls, as the template writes it."""
    stub = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": message["tool_calls"]}]
    row = encode_chat(tokenizer, template, stub, add_generation_prompt=False)
    if tokenizer.tool_open_id not in row or tokenizer.tool_close_id not in row:
        raise UsageError("This chat template writes calls without MiniMax-M2's tags.", "Leave --keep-thinking out.")
    end = len(row) - row[::-1].index(tokenizer.tool_close_id)
    return [*tokenizer.encode("\n"), *row[row.index(tokenizer.tool_open_id) : end]]


def _plain_ids(tokenizer: Tokenizer, template: Template, message: Message) -> list[int]:
    """An answer without thinking, as the template writes it."""
    calls = _call_ids(tokenizer, template, message) if message.get("tool_calls") else []
    return [*tokenizer.encode(str(message["content"])), *calls]


def _opening(tokenizer: Tokenizer, template: Template) -> list[int]:
    """The ids by which a prompt opens the thinking, behind those that begin any answer."""
    stub: list[Message] = [{"role": "user", "content": "x"}]
    prompt = encode_chat(tokenizer, template, stub)
    answered = encode_chat(
        tokenizer, template, [*stub, {"role": "assistant", "content": "x"}], add_generation_prompt=False
    )
    return prompt[n_common(prompt, answered) :]


def encode_kept(
    tokenizer: Tokenizer, template: Template, messages: Sequence[Message], tools: Tools, is_to_answer: bool,
    recall: Recall | None = None, known: Known | None = None,
) -> list[int]:  # fmt: skip
    """The row of a chat that keeps what was said: only what came between the answers is rendered.

    So it begins with the row of the chat up to any answer, whatever the template leaves out of earlier turns.
    `recall` knows the ids of answers that came back as messages; one that it does not know, and that came without its
    thinking, stands there as the template writes it. `known` gives rows that were made before.
    """
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not places:
        return encode_chat(tokenizer, template, messages, tools, add_generation_prompt=is_to_answer)
    start, row = _longest(known, places)
    row = row or encode_chat(tokenizer, template, messages[: places[0]], tools)
    for place, following in zip(places[start:], [*places[start + 1 :], len(messages)], strict=True):
        said = None if recall is None else recall(row, messages[place])
        if recall is None or said is not None or messages[place].get("reasoning_content"):
            ids = answer_ids(tokenizer, template, messages[place]) if said is None else list(said)
        else:
            opening, ids = _opening(tokenizer, template), _plain_ids(tokenizer, template, messages[place])
            row = row[: len(row) - len(opening)] if opening and row[-len(opening) :] == opening else row
        was_open = opens_thinking(tokenizer, row) or ids[:1] == [tokenizer.think_open_id]
        row += ids
        if was_open and tokenizer.think_close_id not in ids and not messages[place].get("tool_calls"):
            row += close_thinking(tokenizer)  # it was stopped there
        is_prompt = following < len(messages) or (is_to_answer and place + 1 < following)
        row += _behind(tokenizer, template, messages[place + 1 : following], is_prompt)
    return row


def _longest(known: Known | None, places: Sequence[int]) -> tuple[int, list[int]]:
    """(n, the row up to the answer places[n]) for the last answer whose row is known; (0, []) if there is none."""
    if known is not None:
        for n in reversed(range(len(places))):
            if row := known(places[n]):
                return n, list(row)
    return 0, []


def _behind(tokenizer: Tokenizer, template: Template, messages: Sequence[Message], is_prompt: bool) -> list[int]:
    """The ids that end an answer, and those of what follows it up to the next."""
    stub: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    if messages and messages[0]["role"] == "tool":
        stub[1] = {"role": "assistant", "content": "x", "tool_calls": [{"name": "x", "arguments": {}}]}
    before = encode_chat(tokenizer, template, stub, add_generation_prompt=False)
    whole = encode_chat(tokenizer, template, [*stub, *messages], add_generation_prompt=is_prompt)
    end = next((i for i in reversed(range(len(before))) if before[i] in tokenizer.stop_ids), None)
    if end is None or whole[: len(before)] != before:
        raise UsageError("This chat template renders a turn by what follows it.", "Leave --keep-thinking out.")
    return whole[end:]
