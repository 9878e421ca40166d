"""Where an answer ends: the same at each limit, whichever door it comes through, and wherever it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from m2lite import ContextError, Model, Sampling, UsageError
from m2lite.dialogue.conversation import Conversation, Turn
from m2lite.engine.answer import Completion
from m2lite.engine.batch import Batch
from m2lite.engine.request import Request
from m2lite.text.reply import Said, close_thinking
from m2lite.text.template import encode_chat
from tests.conftest import Run

MESSAGES = [{"role": "user", "content": "Thank you"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}
SAMPLINGS = {
    "greedy": Sampling(0, seed=0),
    "drawn": Sampling(1.0, seed=1),
    "penalties": Sampling(1.0, seed=2, presence_penalty=0.4, frequency_penalty=0.3),
}
STREAM = 5
WIDE = 512
N_LEFT = range(9)
DRAFTS = ["off", "ngram", "mtp", "auto"]


class Kind(NamedTuple):
    """What is asked for, and after how many tokens it matters; None: at the end of the answer."""

    options: dict[str, Any]
    at: int | None = None


KINDS = {
    "max_tokens": Kind({}, 0),
    "no thinking": Kind({"think_tokens": 0}, 0),
    "thinking budget": Kind({"think_tokens": 4}, 4),
    "stop text": Kind({"think_tokens": 0, "stop_texts": ["I am gl", "come!", "you re"]}),
    "schema": Kind({"think_tokens": 2, "schema": SCHEMA}),
    "end token": Kind({"logprobs": 2}),
}


@pytest.fixture(scope="module")
def wide(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model, draft="mtp", ctx=WIDE) as model:
        yield model


@pytest.fixture(scope="module", params=list(SAMPLINGS))
def sampling(request: pytest.FixtureRequest) -> Sampling:
    return SAMPLINGS[request.param]


def prompt_of(model: Model) -> list[int]:
    return encode_chat(model.tokenizer, model.template, MESSAGES)


def request_of(model: Model, sampling: Sampling, options: dict[str, Any], **more: Any) -> Request:
    return Request(prompt=prompt_of(model), sampling=sampling, rng_stream=STREAM, **options, **more)


def whole(model: Model, sampling: Sampling, kind: Kind) -> Completion:
    """The answer where nothing limits it but its kind."""
    done = model.submit(request_of(model, sampling, kind.options, draft="off")).result()
    assert done.finish_reason == "stop" and len(done.tokens) < 60
    return done


def limits(kind: Kind, answer: Completion) -> list[int]:
    """How many tokens may come: from where it matters on, or on both sides of the end."""
    start = max(0, len(answer.tokens) - 4) if kind.at is None else kind.at
    return [start + n for n in N_LEFT if start + n > 0]


def cut(answer: Completion, n_most: int) -> tuple[list[int], str]:
    """What comes of the answer where only n_most tokens may: a token that ends it is one of them."""
    n = len(answer.tokens) + (answer.stop_id is not None)
    return answer.tokens[:n_most], "stop" if n <= n_most else "length"


def said(done: Completion) -> tuple[Any, ...]:
    return done.tokens, done.finish_reason, done.reply, done.logprobs


def chat(model: Model, sampling: Sampling, options: dict[str, Any]) -> Completion:
    conversation = Conversation(model.session())
    pieces = list(conversation.reply_to(MESSAGES, STREAM, sampling=sampling, **options))
    assert "".join(piece.text for piece in pieces if piece.kind == "content") == conversation.answer.reply.content
    return conversation.answer


def through_all_doors(model: Model, sampling: Sampling, options: dict[str, Any]) -> Completion:
    """The answer, which is the same through each door; the KV that it takes fits into the context."""
    request, runner, n_kv = request_of(model, sampling, options), model.runner, 0
    evaluate_rows = runner.evaluate_rows

    def counted(parts: Any, *args: Any) -> Any:
        nonlocal n_kv
        n_kv = max(n_kv, *(timeline.length + len(ids) for timeline, ids in parts))
        return evaluate_rows(parts, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "evaluate_rows", counted)
        done = chat(model, sampling, options)
        assert said(model.submit(request).result()) == said(done)
        for draft in DRAFTS[:3]:
            assert said(model.submit(replace(request, draft=draft)).result()) == said(done), draft
        (end,) = Batch(model, 1).run([request])
        assert end.completion is not None and said(end.completion) == said(done)
        if set(options) <= {"max_tokens"}:
            with model.session() as session:
                ids = session.generate(
                    request.prompt, max_tokens=request.max_tokens, sampling=sampling, rng_stream=STREAM
                )
                assert list(ids) == done.tokens and session.finish_reason == done.finish_reason
    assert len(request.prompt) + len(done.tokens) <= model.ctx + 1 and n_kv <= model.ctx
    assert request.max_tokens is None or len(done.tokens) <= request.max_tokens
    return done


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_few_tokens_are_left(wide: Model, sampling: Sampling, kind: Kind) -> None:
    answer = whole(wide, sampling, kind)
    for n_most in limits(kind, answer):
        done = through_all_doors(wide, sampling, {**kind.options, "max_tokens": n_most})
        assert (done.tokens, done.finish_reason) == cut(answer, n_most), n_most


@pytest.mark.parametrize("name", ["penalties", pytest.param("greedy", marks=pytest.mark.slow)])
def test_few_positions_are_left(bundled_model: Path, wide: Model, name: str) -> None:
    """The last token needs no position."""
    sampling, n_prompt = SAMPLINGS[name], len(prompt_of(wide))
    answers = [(kind, whole(wide, sampling, kind)) for kind in KINDS.values()]
    for n_most in sorted({n for each in answers for n in limits(*each)}):
        with Model.open(bundled_model, draft="mtp", ctx=n_prompt + n_most - 1) as model:
            assert model.runner.pool.n_positions == model.ctx
            for kind, answer in answers:
                if n_most in limits(kind, answer):
                    done = through_all_doors(model, sampling, kind.options)
                    assert (done.tokens, done.finish_reason) == cut(answer, n_most), (n_most, kind)


def test_many_end_side_by_side(wide: Model, sampling: Sampling) -> None:
    """All kinds and limits in one batch."""
    requests, expected = [], {}
    for name, kind in KINDS.items():
        answer = whole(wide, sampling, kind)
        for n_most in limits(kind, answer):
            key = f"{name} {n_most}"
            expected[key] = cut(answer, n_most)
            requests.append(request_of(wide, sampling, {**kind.options, "max_tokens": n_most}, key=key))
    with Model.open(wide.path, ctx=128, sequences=16) as model:
        for end in Batch(model, 16).run(requests):
            assert end.completion is not None
            done = end.completion
            assert (done.tokens, done.finish_reason) == expected.pop(end.request.key), end.request.key
    assert not expected


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_answer_goes_on_from_everywhere(wide: Model, sampling: Sampling, kind: Kind) -> None:
    """As if it had not been interrupted: also in the middle of what closes its thinking, and at its very end."""
    options = kind.options | {"logprobs": 1}
    for n_most in (None, 8):
        request = request_of(wide, sampling, options | {"max_tokens": n_most})
        answer = wide.submit(replace(request, draft="off")).result()
        for n in range(len(answer.tokens) + 1):
            given = answer.tokens[:n]
            done = wide.submit(replace(request, given=given, draft=DRAFTS[n % 4])).result()
            assert said(done)[:3] == said(answer)[:3], n
            assert done.logprobs == [None] * n + answer.logprobs[n:]
            assert done.stats.n_generated == len(answer.tokens) - n


@pytest.mark.parametrize("n_most", [1, 2, 5, 9])
def test_an_answer_goes_on_to_the_end_of_the_context(wide: Model, bundled_model: Path, n_most: int) -> None:
    sampling, n_prompt = SAMPLINGS["penalties"], len(prompt_of(wide))
    answer = whole(wide, sampling, KINDS["thinking budget"])
    request = request_of(wide, sampling, KINDS["thinking budget"].options)
    with Model.open(bundled_model, draft="off", ctx=n_prompt + n_most - 1) as model:
        for n in range(n_most):
            done = model.submit(replace(request, given=answer.tokens[:n])).result()
            assert (done.tokens, done.finish_reason) == (answer.tokens[:n_most], "length")
        with pytest.raises(ContextError):  # it is as long as can be
            model.submit(replace(request, given=answer.tokens[:n_most]))


def test_thinking_that_ends_about_where_its_budget_does(wide: Model) -> None:
    """It is closed once, by the model or by force; replayed, both are the same."""
    close_id, request = wide.tokenizer.think_close_id, request_of(wide, SAMPLINGS["greedy"], {})
    free = wide.submit(request).result()
    assert close_id is not None
    n_thought = free.tokens.index(close_id)
    for budget in (n_thought - 1, n_thought, n_thought + 1, n_thought + 2, 100):
        limited = replace(request, think_tokens=budget)
        answer = wide.submit(limited).result()
        assert answer.tokens.count(close_id) == 1
        assert (answer.tokens == free.tokens) == (budget > n_thought)
        for n in range(len(answer.tokens) + 1):
            assert wide.submit(replace(limited, given=answer.tokens[:n])).result().tokens == answer.tokens


def test_given_ids_that_go_another_way(wide: Model) -> None:
    """Thinking that is longer than the budget, as of an answer that began with another: it is closed at once."""
    request = request_of(wide, SAMPLINGS["greedy"], {})
    free, closing = wide.submit(request).result(), close_thinking(wide.tokenizer)
    for n in range(3, free.tokens.index(closing[-2])):
        done = wide.submit(replace(request, think_tokens=2, given=free.tokens[:n])).result()
        assert done.tokens[: n + len(closing)] == [*free.tokens[:n], *closing]


def test_a_chat_that_was_stopped_at_the_last_token(wide: Model) -> None:
    """Nothing comes behind a stop text, though the chat was stopped before it was told that the answer is over."""
    answer = whole(wide, SAMPLINGS["greedy"], KINDS["stop text"])
    conversation = Conversation(wide.session())
    said = Said.of(answer.reply.message(), answer.tokens)
    conversation.restore([*MESSAGES, said], Turn(tokens=answer.tokens))
    list(conversation.resume(sampling=SAMPLINGS["greedy"], **KINDS["stop text"].options))
    assert (conversation.answer.tokens, conversation.answer.finish_reason) == (answer.tokens, "stop")


def test_limits_through_the_commands(run_inline: Run, wide: Model, bundled_model: Path, tmp_path: Path) -> None:
    sampling, n_prompt = Sampling(1.0, seed=3), len(prompt_of(wide))
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    cases: list[tuple[dict[str, Any], list[str], int]] = [
        ({"max_tokens": 3}, ["-n", "3"], WIDE),
        ({"max_tokens": 1, "think_tokens": 0}, ["-n", "1", "--think-budget", "0"], WIDE),
        ({"think_tokens": 4}, ["--think-budget", "4"], n_prompt + 5),
        ({"think_tokens": 0, "stop_texts": ["I am gl"]}, ["--think-budget", "0", "--stop", "I am gl"], WIDE),
        ({"think_tokens": 2, "schema": SCHEMA}, ["--think-budget", "2", "--json-schema", str(schema)], WIDE),
    ]
    for options, flags, ctx in cases:
        done = run_inline(
            "generate", bundled_model, "-p", "Thank you", "--json", "--seed", "3", "--temp", "1", "--ctx", str(ctx),
            *flags,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        request = Request(prompt=prompt_of(wide), sampling=sampling, rng_stream=0, **options)  # a chat's first
        if ctx < WIDE:
            request = replace(request, max_tokens=ctx + 1 - n_prompt)
        expected = wide.submit(request).result()
        assert (found["tokens"], found["finish_reason"]) == (expected.tokens, expected.finish_reason)
        assert found["usage"]["completion_tokens"] == len(expected.tokens)


def test_one_token_where_the_thinking_is_closed_at_once(run_inline: Run, tmp_path: Path) -> None:
    """What closes it counts: one token was asked for, and one is reported."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Who are you?", "max_tokens": 1, "think_budget": 0}\n')
    assert run_inline("batch", source, "-o", out).returncode == 0
    body = json.loads(out.read_text())["response"]["body"]
    assert body["usage"]["completion_tokens"] == 1
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 1


def test_what_cannot_be_meant(wide: Model) -> None:
    request = request_of(wide, SAMPLINGS["greedy"], {})
    bad: dict[str, Any] = {"max_tokens": 0, "think_tokens": -1, "logprobs": -1, "rng_stream": -1, "given": [1, 10**6]}
    for name, value in bad.items():
        with pytest.raises(UsageError):
            wide.submit(replace(request, **{name: value}))
