"""The public Python: prompts and messages in, completions and messages out; the keywords, and what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import m2lite
from m2lite import Batch, ContextError, M2liteError, Model, Request, Sampling, UsageError
from m2lite.dialogue.conversation import Conversation
from m2lite.engine.model import Engine
from m2lite.engine.thread import compute_thread
from m2lite.text.template import encode_chat

STORY = "Once upon a time"
MESSAGES = [{"role": "user", "content": "What is 3 + 4?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def tiny(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model, ctx=512) as model:
        yield model


def test_a_prompt_is_continued(tiny: Model) -> None:
    found = tiny.generate(STORY, max_tokens=20, seed=7, temperature=0.7, top_k=20)
    with tiny.session() as session:
        sampling = Sampling(temperature=0.7, top_k=20, seed=7)
        assert found.tokens == list(session.generate(STORY, max_tokens=20, sampling=sampling))
    assert found.text == tiny.tokenizer.decode(found.tokens)
    assert found.finish_reason == "length" and len(found.tokens) == 20
    assert found.stats.n_prompt == len(tiny.encode_prompt(STORY)) and found.stats.n_generated == 20


def test_text_and_ids_are_the_same_prompt(tiny: Model) -> None:
    ids = tiny.encode_prompt(STORY)
    prompts: list[Any] = [STORY, ids, tuple(ids), np.array(ids)]
    asked = [tiny.generate(prompt, max_tokens=8, seed=1).tokens for prompt in prompts]
    assert len(asked[0]) == 8 and asked.count(asked[0]) == len(asked)


def test_prompts_are_answered_together_as_alone(tiny: Model) -> None:
    prompts: list[Any] = [STORY, "The little dog", tiny.encode_prompt("Tom and"), STORY]
    alone = [tiny.generate(prompt, max_tokens=12, seed=3).tokens for prompt in prompts]
    n_steps = tiny.loop.counts.n_steps
    together = tiny.generate(prompts, max_tokens=12, seed=3)
    assert [each.tokens for each in together] == alone
    assert tiny.loop.counts.n_steps - n_steps < 2 * 12, "they did not share the calls"


def test_rng_streams_tell_equal_prompts_apart(tiny: Model) -> None:
    found = tiny.generate([STORY] * 3, rng_stream=range(3), max_tokens=16, seed=5)
    assert len({tuple(each.tokens) for each in found}) == 3
    assert tiny.generate(STORY, rng_stream=2, max_tokens=16, seed=5).tokens == found[2].tokens
    with pytest.raises(UsageError, match="2 rng_streams for 1 prompts"):
        tiny.generate([STORY], rng_stream=[1, 2])


def test_keywords_go_before_the_sampling(tiny: Model) -> None:
    sampling = Sampling(temperature=1.3, seed=9)
    greedy = tiny.generate(STORY, max_tokens=12, temperature=0.0).tokens
    assert tiny.generate(STORY, max_tokens=12, sampling=sampling, temperature=0.0).tokens == greedy
    assert tiny.generate(STORY, max_tokens=12, sampling=sampling).tokens != greedy


def test_stop_and_logprobs(tiny: Model) -> None:
    whole = tiny.generate(STORY, max_tokens=40, temperature=0.0)
    word = whole.text.split()[4]
    cut = tiny.generate(STORY, max_tokens=40, temperature=0.0, stop=word, logprobs=2)
    assert cut.text == whole.text[: whole.text.index(word)] and cut.finish_reason == "stop"
    assert len(cut.logprobs) == len(cut.tokens)
    for token, noted in zip(cut.tokens, cut.logprobs, strict=True):
        assert noted is not None and noted.likeliest[0] == (token, noted.logprob) and len(noted.likeliest) == 2


def test_a_schema_is_kept_to(tiny: Model) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    message = tiny.chat(MESSAGES, schema=schema, think_budget=0, seed=0)
    assert set(json.loads(message["content"])) == {"n"}
    with pytest.raises(M2liteError, match="cut off after 5 tokens"):
        tiny.chat(MESSAGES, schema=schema, think_budget=0, seed=0, max_tokens=5)


def test_a_chat_is_that_of_the_terminal(tiny: Model) -> None:
    with tiny.session() as session:
        talk = Conversation(session)
        for question in ("What is 3 + 4?", "Tell me a story about a cat."):
            for _ in talk.ask(question, sampling=Sampling(seed=4), max_tokens=60):
                pass
        messages: list[Any] = list(MESSAGES)
        messages.append(tiny.chat(messages, seed=4, max_tokens=60))
        messages.append({"role": "user", "content": "Tell me a story about a cat."})
        last = tiny.chat(messages, seed=4, max_tokens=60)
    assert [*messages, last] == talk.messages
    assert last.completion.tokens == talk.answer.tokens and last.tokens == talk.answer.tokens
    assert last.completion.stats.n_reused > 0, "the first turn was computed again"


def test_a_stream_is_the_message_in_pieces(tiny: Model) -> None:
    message = tiny.chat(MESSAGES, seed=4)
    pieces = tiny.chat(MESSAGES, seed=4, stream=True)
    texts = {"thinking": "", "content": "", "tool_call": ""}
    for piece in pieces:
        texts[piece.kind] += piece.text
    assert texts == {"thinking": message["reasoning_content"], "content": message["content"], "tool_call": ""}
    assert pieces.message == message and pieces.message.completion.finish_reason == "stop"


def test_a_stream_that_is_closed_keeps_what_came(tiny: Model) -> None:
    whole = tiny.chat(MESSAGES, seed=4)
    pieces = tiny.chat(MESSAGES, seed=4, stream=True)
    first = [next(pieces), next(pieces)]
    pieces.close()
    assert list(pieces) == []
    message = pieces.message
    assert message.completion.finish_reason == "interrupted"
    assert message["reasoning_content"] == "".join(piece.text for piece in first)
    assert whole["reasoning_content"].startswith(message["reasoning_content"])
    compute_thread().run(lambda: None)  # what it had to do by then is done
    assert not tiny.loop.scheduler.running


def test_tools_are_called(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """m2-tiny calls no tools: its tokens are given, as measurements do it."""
    text = (
        'I look.\n</think>\n\n<minimax:tool_call>\n<invoke name="get_weather">\n'
        '<parameter name="city">Paris</parameter>\n</invoke>\n</minimax:tool_call>[e~['
    )
    script = tiny.tokenizer.encode(text, control=True)
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "submit", lambda request: Model.submit(tiny, replace(request, script=script)))
        message = tiny.chat(CALL, tools=[WEATHER])
    assert message["reasoning_content"] == "I look." and message.completion.finish_reason == "stop"
    [call] = message["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": {"city": "Paris"}}
    messages: list[Any] = [*CALL, message, {"role": "tool", "content": "sunny, 21 degrees"}]
    row = encode_chat(tiny.tokenizer, tiny.template, messages, [WEATHER])
    answer = tiny.chat(messages, tools=[WEATHER], seed=1, max_tokens=20)
    assert answer.completion.stats.n_prompt == len(row) and len(answer.completion.tokens) == 20


def test_logits(tiny: Model) -> None:
    ids = tiny.encode_prompt(STORY)
    logits = tiny.logits(ids)
    assert logits.shape == (len(ids), tiny.config.n_vocab) and logits.dtype == np.float32
    assert tiny.generate(ids, max_tokens=1, temperature=0.0).tokens == [int(logits[-1].argmax())]


def test_two_threads(tiny: Model) -> None:
    prompts = [STORY, "The little dog"]
    alone = [[tiny.generate(p, max_tokens=30, seed=n).tokens for n in range(4)] for p in prompts]
    found: list[Any] = [None, None]

    def ask(i: int) -> None:
        found[i] = [tiny.generate(prompts[i], max_tokens=30, seed=n).tokens for n in range(4)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_asyncio(tiny: Model) -> None:
    async def ask() -> list[Any]:
        asked = [asyncio.to_thread(tiny.chat, MESSAGES, seed=n, max_tokens=30) for n in range(3)]
        return await asyncio.gather(*asked)

    assert asyncio.run(ask()) == [tiny.chat(MESSAGES, seed=n, max_tokens=30) for n in range(3)]


REFUSED: dict[str, tuple[Callable[[Model], object], type[Exception], str]] = {
    "no prompt": (lambda model: model.generate(""), UsageError, "prompt is empty"),
    "no ids": (lambda model: model.generate([]), UsageError, "prompt is empty"),
    "no id at first": (lambda model: model.generate([cast(int, 2.5)]), UsageError, r"holds 2\.5, which is no token id"),
    "no id": (lambda model: model.generate([1, cast(int, 2.5)]), UsageError, r"holds 2\.5, which is no token id"),
    "id outside": (lambda model: model.generate([1, 1 << 20]), UsageError, "1048576 is outside the vocabulary"),
    "negative id": (lambda model: model.generate([-1]), UsageError, "-1 is outside the vocabulary"),
    "no tokens": (lambda model: model.generate(STORY, max_tokens=0), UsageError, "max_tokens is 0"),
    "budget": (lambda model: model.chat(MESSAGES, think_budget=-1), UsageError, "think_tokens is -1"),
    "temperature": (lambda model: model.generate(STORY, temperature=-1.0), UsageError, "temperature is -1"),
    "logprobs": (lambda model: model.generate(STORY, logprobs=21), UsageError, "logprobs is 21"),
    "stop": (lambda model: model.generate(STORY, stop=""), UsageError, "stop has 1 texts"),
    "draft": (lambda model: model.generate(STORY, draft="magic"), UsageError, "'magic' does not exist"),
    "too long": (lambda model: model.generate([1] * 513), ContextError, "needs 513 tokens"),
    "one of many": (lambda model: model.generate([[1, 2], [1] * 513]), ContextError, "needs 513 tokens"),
    "no messages": (lambda model: model.chat([]), UsageError, "no list of messages"),
    "nothing asked": (
        lambda model: model.chat([*MESSAGES, {"role": "assistant", "content": "7"}]), UsageError, "nothing is asked"
    ),
    "role": (lambda model: model.chat([{"role": "cat", "content": "x"}]), UsageError, "role 'cat'"),
    "tool": (lambda model: model.chat(MESSAGES, tools=[{"type": "function"}]), UsageError, "Tool 0 has no name"),
    "schema": (lambda model: model.chat(MESSAGES, schema={"type": 3}), M2liteError, "schema"),
    "choice": (lambda model: model.chat(MESSAGES, tool_choice="any"), UsageError, "tool_choice is 'any'"),
    "no tools": (lambda model: model.chat(MESSAGES, tool_choice="required"), UsageError, "no tools were given"),
    "keyword": (lambda model: cast(Any, model).generate(STORY, top_x=3), TypeError, "top_x"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused(tiny: Model, case: str) -> None:
    ask, kind, match = REFUSED[case]
    n_steps = tiny.loop.counts.n_steps
    with pytest.raises(kind, match=match):
        ask(tiny)
    compute_thread().run(lambda: None)  # what it had to do by then is done
    assert tiny.loop.counts.n_steps == n_steps and tiny.loop.n_waiting == 0


def test_a_closed_model_says_so(bundled_model: Path) -> None:
    with Model.open(bundled_model, ctx=64, draft="off") as model:
        pass
    calls: list[Callable[[], object]] = [
        lambda: model.generate(STORY), lambda: model.chat(MESSAGES), lambda: model.logits([1]),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(UsageError, match="The model is closed"):
            call()


def test_an_option_that_does_not_exist(bundled_model: Path) -> None:
    with pytest.raises(TypeError, match="'cxt' is no option of a model; known are threads, ctx,"):
        Model.open(bundled_model, cxt=64)  # type: ignore[call-arg]


def test_requests_and_batches_are_public(tiny: Model) -> None:
    assert {"Batch", "Model", "Request", "Sampling", "Session"} <= set(m2lite.__all__) and issubclass(Model, Engine)
    row = encode_chat(tiny.tokenizer, tiny.template, MESSAGES)
    request = Request(prompt=row, sampling=Sampling(seed=4), key="a")
    [done] = Batch(tiny, 2).run([request])
    assert done.completion is not None
    assert done.completion.tokens == tiny.submit(request).result().tokens == tiny.chat(MESSAGES, seed=4).tokens
