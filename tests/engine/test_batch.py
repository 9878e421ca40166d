"""Many requests at once: answers are those that each prompt would get alone, whoever its mates are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from m2lite import ContextError, M2liteError, Model, Sampling
from m2lite.dialogue.conversation import Conversation
from m2lite.engine.answer import Completion
from m2lite.engine.batch import Batch
from m2lite.engine.request import Request
from m2lite.engine.thread import Stopped, compute_thread
from m2lite.model.cache import PAGE
from m2lite.storage import syscalls
from m2lite.text.template import encode_chat

QUESTIONS = [
    "Hello", "Who are you?", "What is 2 + 3?", "Tell me a story.", "Tell me a story about a cat.",
    "Tell me a story about the sea and a king.", "Thank you", "What is a bird?", "Count to five.", "Say no more.",
]  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"]}
# What may be asked of an answer; each question gets the next.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"think_tokens": 0},
    {"think_tokens": 6, "logprobs": 2},
    {"stop_texts": (".", "the")},
    {"max_tokens": 7},
    {"max_tokens": 1},
    {"schema": SCHEMA},
    {"schema": SCHEMA, "think_tokens": 3, "logprobs": 0},
]


@pytest.fixture(scope="module")
def tiny(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model, draft="off", sequences=32) as model:
        yield model


def ask(key: str, row: Sequence[int], rng_stream: int, options: dict[str, Any], **more: Any) -> Request:
    return Request(key=key, prompt=row, rng_stream=rng_stream, **options, **more)


def request_of(model: Model, n: int, temperature: float) -> Request:
    messages = [{"role": "user", "content": QUESTIONS[n % len(QUESTIONS)]}]
    penalty = 0.5 * (n % 3 == 0)
    sampling = Sampling(temperature, seed=n % 4, frequency_penalty=penalty)
    options: Any = {"sampling": sampling, "max_tokens": 60, **OPTIONS[n % len(OPTIONS)]}
    return ask(str(n), encode_chat(model.tokenizer, model.template, messages), 1000 + n, options)


OPTION_NAMES = ("sampling", "max_tokens", "think_tokens", "stop_texts", "schema", "logprobs")


def alone(model: Model, request: Request) -> Completion:
    with model.session() as session:
        conversation = Conversation(session)
        messages = [{"role": "user", "content": QUESTIONS[int(request.key) % len(QUESTIONS)]}]
        options = {name: getattr(request, name) for name in OPTION_NAMES}
        list(conversation.reply_to(messages, request.rng_stream, **options))
        return conversation.answer


def n_free(model: Model) -> int:
    """Positions that no sequence holds, when the compute thread is done."""
    cache = model.loop.prefix_cache
    return compute_thread().run(lambda: model.runner.pool.n_free + PAGE * cache.n_reclaimable)


def same(a: Completion | None, b: Completion) -> bool:
    assert a is not None
    return (a.tokens, a.reply, a.finish_reason, a.logprobs) == (b.tokens, b.reply, b.finish_reason, b.logprobs)


@pytest.fixture(scope="module", params=[0.0, 1.0], ids=["greedy", "drawn"])
def expected(tiny: Model, request: pytest.FixtureRequest) -> tuple[list[Request], list[Completion]]:
    requests = [request_of(tiny, n, request.param) for n in range(24)]
    return requests, [alone(tiny, request) for request in requests]


@pytest.mark.parametrize("n_inflight", [1, 2, 5, 24])
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_answers_are_those_of_each_alone(
    tiny: Model, expected: tuple[list[Request], list[Completion]], n_inflight: int, order: str
) -> None:
    requests, answers = expected
    given = requests if order == "forward" else requests[::-1]
    batch = Batch(tiny, n_inflight)
    done = {end.request.key: end for end in batch.run(given)}
    assert len(done) == len(requests)
    for request, answer in zip(requests, answers, strict=True):
        assert done[request.key].error is None
        assert same(done[request.key].completion, answer), request.key
    assert batch.counts.n_most_running == min(n_inflight, len(requests))
    assert n_free(tiny) == tiny.runner.pool.n_positions  # every page came back


@pytest.fixture(scope="module", params=[("ngram", None), ("ngram", 1), ("mtp", 1), ("auto", None)], ids=str)
def drafting(bundled_model: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    mode, n_tokens = request.param
    with Model.open(bundled_model, draft=mode, draft_tokens=n_tokens, sequences=32) as model:
        yield model


@pytest.mark.parametrize("n_inflight", [1, 24])
def test_drafts_change_no_answer(
    drafting: Model, expected: tuple[list[Request], list[Completion]], n_inflight: int
) -> None:
    """Nor what is counted of prompts. What they save is calls."""
    requests, answers = expected
    batch = Batch(drafting, n_inflight)
    done = {end.request.key: end for end in batch.run(requests)}
    for request, answer in zip(requests, answers, strict=True):
        assert same(done[request.key].completion, answer), request.key
    counts = batch.counts
    assert counts.n_accepted <= counts.n_drafts
    assert counts.n_accepted > 0 or drafting.runner.drafting.mode == "auto"
    assert counts.n_prompt + counts.n_cached == sum(len(request.prompt) for request in requests)
    assert n_free(drafting) == drafting.runner.pool.n_positions


@pytest.mark.parametrize("n_inflight", [1, 4])
def test_drafts_save_calls(bundled_model: Path, tiny: Model, n_inflight: int) -> None:
    """Answers that say the same again and again, at temperature 0."""
    row = tiny.tokenizer.encode("one two three four " * 30)
    options: Any = {"sampling": Sampling(0, seed=0), "max_tokens": 100}
    requests = [ask(str(n), row[n:], n, options, ignore_stop=True) for n in range(4)]
    with Model.open(bundled_model, draft="ngram", sequences=4) as drafting:
        plain, drafted = Batch(tiny, n_inflight), Batch(drafting, n_inflight)
        answers = [{end.request.key: end.completion for end in batch.run(requests)} for batch in (plain, drafted)]
    for request in requests:
        assert same(answers[0][request.key], answers[1][request.key])
    assert drafted.counts.n_drawn == plain.counts.n_drawn
    assert drafted.counts.n_steps <= 0.85 * plain.counts.n_steps


@pytest.mark.parametrize("n_inflight", [1, 16])
@pytest.mark.parametrize("system", ["", "Answer as if you were talking to a child of six years. " * 8])
def test_modules_are_as_often_right_as_alone(bundled_model: Path, n_inflight: int, system: str) -> None:
    """It follows prompts in parts, beginnings that another row has computed, and drafts that were wrong."""
    with Model.open(bundled_model, draft="mtp", draft_tokens=1, sequences=16) as model:
        requests, n_accepted, n_drafts = [], 0, 0
        for n, question in enumerate(QUESTIONS):
            front = [{"role": "system", "content": system}] if system else []
            row = encode_chat(model.tokenizer, model.template, [*front, {"role": "user", "content": question}])
            requests.append(ask(str(n), row, n, {"sampling": Sampling(0, seed=0), "max_tokens": 80}))
            with model.session() as session:
                list(session.generate(row, max_tokens=80, sampling=Sampling(0, seed=0)))
                assert session.stats.drafted is not None
                n_accepted += session.stats.drafted.n_accepted
                n_drafts += session.stats.drafted.n_proposed
        batch = Batch(model, n_inflight)
        list(batch.run(requests))
    counts = batch.counts
    assert n_accepted / n_drafts > 0.6  # m2-tiny has hardly seen such system prompts
    assert counts.n_accepted / counts.n_drafts > n_accepted / n_drafts - 0.03
    assert counts.n_cached > 9 * 100 or not system


@pytest.mark.slow
@pytest.mark.parametrize("pool", [256, 512, 1024])
@pytest.mark.parametrize(("threads", "draft"), [(1, "ngram"), (2, "off"), (2, "auto")])
def test_little_room_changes_nothing(
    bundled_model: Path, expected: tuple[list[Request], list[Completion]], pool: int, threads: int, draft: str
) -> None:
    requests, answers = expected
    with Model.open(bundled_model, draft=draft, sequences=24, ctx=256, pool=pool, threads=threads) as model:
        batch = Batch(model, 24)
        done = {end.request.key: end for end in batch.run(requests)}
        assert all(same(done[w.key].completion, a) for w, a in zip(requests, answers, strict=True))
        assert n_free(model) == pool


@pytest.mark.skipif(not syscalls.AVAILABLE, reason="models are streamed on Linux only")
@pytest.mark.parametrize("load", ["mmap", "direct"])
def test_streamed_model(bundled_model: Path, expected: tuple[list[Request], list[Completion]], load: str) -> None:
    requests, answers = expected
    with Model.open(bundled_model, draft="off", sequences=8, load=load, ctx=256, threads=2) as model:
        done = {end.request.key: end for end in Batch(model, 8).run(requests)}
        assert (model.runner.stream is not None) == (load == "direct")
    assert all(same(done[w.key].completion, a) for w, a in zip(requests, answers, strict=True))


def test_preempted_answers_are_the_same(tiny: Model, bundled_model: Path) -> None:
    """More begin than can end side by side: those that came last let go of their pages, and say the same later."""
    messages = [{"role": "user", "content": "Tell me a story about a king."}]
    row = encode_chat(tiny.tokenizer, tiny.template, messages)
    options: Any = {"sampling": Sampling(1.0, seed=1), "max_tokens": 200, "logprobs": 1}
    requests = [ask(str(n), row, n, options) for n in range(8)]
    with Model.open(bundled_model, draft="off", sequences=8, ctx=256, pool=448) as model:
        batch = Batch(model, 8)
        model.loop.scheduler._usual = 0.0  # answers are thought to be short
        done = {end.request.key: end.completion for end in batch.run(requests)}
        assert n_free(model) == 448
    assert batch.counts.n_recomputed > 0
    for request in requests:
        with tiny.session() as session:
            conversation = Conversation(session)
            list(conversation.reply_to(messages, request.rng_stream, **options))
            assert same(done[request.key], conversation.answer)


def test_tokens_are_counted(tiny: Model, expected: tuple[list[Request], list[Completion]]) -> None:
    requests, answers = expected
    batch = Batch(tiny, 8)
    list(batch.run(requests))
    counts = batch.counts
    assert counts.n_prompt + counts.n_cached == sum(len(request.prompt) for request in requests)
    forced = sum(each is None for answer in answers for each in answer.logprobs)
    assert counts.n_drawn >= sum(len(answer.tokens) for answer in answers) - forced
    n_layers, n_used = tiny.config.n_layers, tiny.config.n_experts_used
    assert n_layers * n_used * counts.n_steps <= counts.n_expert_reads <= n_layers * n_used * counts.n_rows


def test_nobody_waits_for_ever(tiny: Model) -> None:
    """One prompt that nothing resembles, in front of many that begin alike: it is passed over, but not to the end."""
    text = "the same again " * 50
    rows = [encode_chat(tiny.tokenizer, tiny.template, [{"role": "user", "content": f"{text}{n}"}]) for n in range(400)]
    rows.insert(1, tiny.tokenizer.encode("Something else altogether. " * 20))
    options: Any = {"sampling": Sampling(0, seed=0), "max_tokens": 1}
    order = [end.request.key for end in Batch(tiny, 1).run(ask(str(n), row, n, options) for n, row in enumerate(rows))]
    assert 1 < order.index("1") < 150


def test_requests_are_taken_as_they_are_needed(tiny: Model) -> None:
    taken = 0

    def requests() -> Iterator[Request]:
        nonlocal taken
        for n in range(1000):
            taken += 1
            yield request_of(tiny, n, 0.0)

    run = Batch(tiny, 4).run(requests())
    next(run)
    assert taken < 100
    run.close()
    assert n_free(tiny) == tiny.runner.pool.n_positions


def test_a_request_of_its_own_fault(tiny: Model) -> None:
    """A prompt that is too long and a schema that has no end are errors of theirs alone."""
    good = request_of(tiny, 0, 0.0)
    long = ask("long", list(good.prompt) * 100, 1, {})
    endless: Any = {"sampling": Sampling(0, seed=0), "schema": {"$ref": "#"}}
    done = {end.request.key: end for end in Batch(tiny, 4).run([long, ask("endless", good.prompt, 2, endless), good])}
    assert isinstance(done["long"].error, ContextError) and done["long"].completion is None
    assert isinstance(done["endless"].error, M2liteError) and done["endless"].completion is None
    assert same(done["0"].completion, alone(tiny, good))


def test_stopped_in_the_middle(tiny: Model) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 200

    with pytest.raises(Stopped):
        list(Batch(tiny, 4, stop).run(request_of(tiny, n, 0.0) for n in range(100)))
    assert n_free(tiny) == tiny.runner.pool.n_positions
    request = request_of(tiny, 3, 1.0)
    (end,) = Batch(tiny, 4).run([request])
    assert same(end.completion, alone(tiny, request))
