"""Answers that come back as messages are the ids that they were, so that the next prompt begins with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m2lite import Model, Sampling
from m2lite.dialogue.chat_request import ChatRequest
from m2lite.dialogue.encode import encode_kept
from m2lite.model.cache import PAGE
from m2lite.serve.kept import KeptAnswers, said
from m2lite.serve.server import ServeOptions, Server
from m2lite.text.messages import check_messages
from m2lite.text.template import Template, encode_chat
from tests.serve.conftest import serving
from tests.serve.test_chat_completions import WEATHER

QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
# Written as the template would not: blanks at the ends, arguments in another order and form.
CALL = (
    '\n I look. \n</think>\n\n Wait. \n<minimax:tool_call>\n<invoke name="get_weather">\n'
    '<parameter name="city">Paris</parameter>\n</invoke></minimax:tool_call>[e~['
)


def first_turn(found: Any, **more: Any) -> tuple[list[Any], Any]:
    """The question, the call and its result, as a client sends them back; and the usage of the first answer."""
    answer = found.openai.chat.completions.create(model="m", messages=QUESTION, tools=[WEATHER], **more)
    message = answer.choices[0].message
    assert message.tool_calls
    told = {
        "role": "assistant",
        "content": message.content.strip(),
        "reasoning_content": message.reasoning_content.strip(),
        "tool_calls": [call.model_dump() for call in message.tool_calls],
    }
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    return [*QUESTION, told, result], answer.usage


def cached(found: Any, messages: list[Any]) -> int:
    answer = found.openai.chat.completions.create(model="m", messages=messages, tools=[WEATHER], max_tokens=4)
    n: int = answer.usage.prompt_tokens_details.cached_tokens
    return n


def test_the_next_turn_hits_to_the_end_of_the_answer(tiny: Model) -> None:
    tiny.loop.forget()
    script = tiny.tokenizer.encode(CALL, control=True)
    with serving(tiny, script=lambda prompt: script if len(prompt) < 600 else None) as found:
        messages, usage = first_turn(found)
        assert cached(found, messages) >= usage.prompt_tokens + usage.completion_tokens - 1 - 16
        assert found.server.metrics.n_recalled == 1
        changed = [messages[0], {**messages[1], "reasoning_content": "Something else."}, messages[2]]
        assert cached(found, changed) < usage.prompt_tokens + 4
        assert found.server.metrics.n_rendered == 1


def test_an_answer_without_its_thinking_is_known_by_its_call(tiny: Model) -> None:
    """Not where somebody changed it, nor by an id that is not its own."""
    tiny.loop.forget()
    script = tiny.tokenizer.encode(CALL, control=True)
    with serving(tiny, script=lambda prompt: script if len(prompt) < 600 else None) as found:
        messages, usage = first_turn(found)
        answer = {name: value for name, value in messages[1].items() if name != "reasoning_content"}
        whole = usage.prompt_tokens + usage.completion_tokens - 1 - 16
        for changes, is_known in (
            ({"tool_calls": [answer["tool_calls"][0] | {"id": "call_0"}]}, False),
            ({"content": "Wait, please."}, False),
            ({"reasoning_content": "Something else."}, False),
            ({}, True),
        ):
            assert (cached(found, [messages[0], answer | changes, messages[2]]) >= whole) == is_known, changes
        more = [*messages[:1], answer, *messages[2:], {"role": "user", "content": "And tomorrow?"}]
        assert cached(found, more) >= whole + len(tiny.tokenizer.encode("sunny"))
        assert (found.server.metrics.n_recalled, found.server.metrics.n_rendered) == (2, 3)


def test_text_and_calls_may_come_apart(tiny: Model) -> None:
    """As `llm` sends an answer that has both."""
    tiny.loop.forget()
    script = tiny.tokenizer.encode(CALL, control=True)
    with serving(tiny, script=lambda prompt: script if len(prompt) < 600 else None) as found:
        messages, usage = first_turn(found)
        text, calls = ({"role": "assistant", name: messages[1][name]} for name in ("content", "tool_calls"))
        whole = usage.prompt_tokens + usage.completion_tokens - 1 - 16
        assert cached(found, [messages[0], text, calls, messages[2]]) >= whole
        other = {**calls, "reasoning_content": "And now?"}
        assert cached(found, [messages[0], text, other, messages[2]]) < whole


@pytest.mark.parametrize("has_thinking", [True, False])
def test_after_a_restart(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_thinking: bool) -> None:
    """Pages and ids were written when nobody waited."""
    from m2lite.engine import kv_disk

    monkeypatch.setattr(kv_disk, "user_dir", lambda _: tmp_path)
    script = tiny.tokenizer.encode(CALL, control=True)
    tiny.use_disk(1 << 30)
    try:
        tiny.loop.forget()
        with serving(tiny, script=lambda _: script) as found:
            messages, usage = first_turn(found)
        if not has_thinking:
            del messages[1]["reasoning_content"]
        tiny.loop.forget()
        with serving(tiny) as found:
            assert cached(found, messages) >= usage.prompt_tokens + usage.completion_tokens - PAGE
            assert found.server.metrics.n_recalled == 1
    finally:
        tiny.loop.prefix_cache.disk = None


def test_the_longest_unused_goes_first() -> None:
    kept = KeptAnswers(3 * (200 + 40))
    messages = [{"role": "assistant", "content": str(n)} for n in range(4)]
    for message in messages[:3]:
        kept.keep([1, 2], message, range(10))
    assert kept.recall()([1, 2], messages[0]) is not None
    kept.keep([1, 2], messages[3], range(10))
    found = [kept.recall()([1, 2], message) is not None for message in messages]
    assert found == [True, False, True, True]
    assert kept.recall()([1, 3], messages[0]) is None


def test_what_counts_as_the_same_message() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": [2]}}}
    again = {"id": "b", "type": "function", "function": {"arguments": {"y": [2], "x": 1}, "name": "f"}}
    message = {"role": "assistant", "content": "hm", "reasoning_content": " a\n", "tool_calls": [call]}
    assert said(message) == said({**message, "content": "hm\n", "reasoning_content": "a", "tool_calls": [again]})
    for other in ({"content": "h m"}, {"reasoning_content": ""}, {"tool_calls": []}, {"tool_calls": [call, call]}):
        assert said(message) != said({**message, **other})


def test_one_walk_along_a_row(tiny: Model) -> None:
    """Whatever of it is hashed before: each answer is found behind the row that it stood behind."""
    kept, row = KeptAnswers(), list[int]()
    rows = list[tuple[list[int], dict[str, Any]]]()
    for n in range(5):
        row = [*row, *range(n, n + 50 * n)]
        message = {"role": "assistant", "content": f"answer {n}"}
        rows.append((row, message))
        kept.keep(row, message, [n])
    recall = kept.recall()
    assert [list(recall(row, message) or ()) for row, message in rows] == [[n] for n in range(5)]


@pytest.mark.parametrize("n_answers", [1, 2])
def test_an_answer_without_its_thinking_is_the_templates(tiny: Model, n_answers: int) -> None:
    """A client that drops the thinking gets the row that the template writes: no empty thought stands there."""
    calls = [{"function": {"name": "f", "arguments": {"a": "b"}}}]
    messages = check_messages(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            *[{"role": "assistant", "content": "Hello."}] * n_answers,
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "So.", "tool_calls": calls},
            {"role": "tool", "content": "1"},
        ]
    )
    row = encode_kept(tiny.tokenizer, tiny.template, messages, None, True, KeptAnswers().recall())
    text = tiny.tokenizer.decode(encode_chat(tiny.tokenizer, tiny.template, messages))
    assert tiny.tokenizer.decode(row) == text


def test_only_what_is_new_is_rendered(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt goes on from that of the last request of its conversation, and is what it would be without."""
    server = Server(tiny, ServeOptions())
    messages: list[Any] = [{"role": "system", "content": "word " * 100}, {"role": "user", "content": "Hi"}]
    rendered = list[int]()

    def count(messages: list[Any], *arguments: Any, **options: Any) -> str:
        rendered.append(len(json.dumps(messages)))
        return Template.render(tiny.template, messages, *arguments, **options)

    for n in range(4):
        request = ChatRequest(check_messages(messages), Sampling(seed=0))
        expected = Server(tiny, ServeOptions()).encode(request)
        with monkeypatch.context() as patch:
            patch.setattr(tiny.template, "render", count)
            assert server.encode(request) == expected
        assert (max(rendered) > 500) == (n == 0), rendered
        rendered.clear()
        answer = {"role": "assistant", "content": "Hello.", "reasoning_content": "hm" * (n % 2)}
        messages += [answer, {"role": "user", "content": f"And {n}?"}]
