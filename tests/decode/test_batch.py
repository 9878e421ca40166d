"""Answers in lock-step: those that each prompt would get alone, whoever its mates are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m2lite import ContextError, M2liteError, Model, Sampling
from m2lite.decode.batch import Batch
from m2lite.decode.batch_rows import page_hashes
from m2lite.decode.compute import Stopped, compute_thread
from m2lite.decode.conversation import Answer, Conversation
from m2lite.decode.writer import Wish
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


def wish_of(model: Model, n: int, temperature: float) -> Wish:
    messages = [{"role": "user", "content": QUESTIONS[n % len(QUESTIONS)]}]
    penalty = 0.5 * (n % 3 == 0)
    sampling = Sampling(temperature, seed=n % 4, frequency_penalty=penalty)
    options: Any = {"sampling": sampling, "max_tokens": 60, **OPTIONS[n % len(OPTIONS)]}
    return Wish(str(n), encode_chat(model.tokenizer, model.template, messages), 1000 + n, options)


def alone(model: Model, wish: Wish) -> Answer:
    with model.session() as session:
        conversation = Conversation(session)
        messages = [{"role": "user", "content": QUESTIONS[int(wish.key) % len(QUESTIONS)]}]
        list(conversation.reply_to(messages, wish.stream, **wish.options))
        return conversation.answer


def n_free(model: Model) -> int:
    """Positions that nobody holds, when the compute thread is done."""
    return compute_thread().run(lambda: model.engine.pool.n_free)


def same(a: Answer | None, b: Answer) -> bool:
    assert a is not None
    return (a.tokens, a.reply, a.finish_reason, a.logprobs) == (b.tokens, b.reply, b.finish_reason, b.logprobs)


@pytest.fixture(scope="module", params=[0.0, 1.0], ids=["greedy", "drawn"])
def expected(tiny: Model, request: pytest.FixtureRequest) -> tuple[list[Wish], list[Answer]]:
    wishes = [wish_of(tiny, n, request.param) for n in range(24)]
    return wishes, [alone(tiny, wish) for wish in wishes]


@pytest.mark.parametrize("n_inflight", [1, 2, 5, 24])
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_answers_are_those_of_each_alone(
    tiny: Model, expected: tuple[list[Wish], list[Answer]], n_inflight: int, order: str
) -> None:
    wishes, answers = expected
    given = wishes if order == "forward" else wishes[::-1]
    batch = Batch(tiny, n_inflight)
    done = {end.wish.key: end for end in batch.run(given)}
    assert len(done) == len(wishes)
    for wish, answer in zip(wishes, answers, strict=True):
        assert done[wish.key].error is None
        assert same(done[wish.key].answer, answer), wish.key
    assert batch.counts.n_most == min(n_inflight, len(wishes))
    assert n_free(tiny) == tiny.engine.pool.n_positions  # every page came back


@pytest.fixture(scope="module", params=[("ngram", None), ("ngram", 1), ("mtp", 1), ("auto", None)], ids=str)
def drafting(bundled_model: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    mode, n_tokens = request.param
    with Model.open(bundled_model, draft=mode, draft_tokens=n_tokens, sequences=32) as model:
        yield model


@pytest.mark.parametrize("n_inflight", [1, 24])
def test_drafts_change_no_answer(drafting: Model, expected: tuple[list[Wish], list[Answer]], n_inflight: int) -> None:
    """Nor what is counted of prompts. What they save is calls."""
    wishes, answers = expected
    batch = Batch(drafting, n_inflight)
    done = {end.wish.key: end for end in batch.run(wishes)}
    for wish, answer in zip(wishes, answers, strict=True):
        assert same(done[wish.key].answer, answer), wish.key
    counts = batch.counts
    assert counts.n_right <= counts.n_drafts
    assert counts.n_right > 0 or drafting.engine.drafting.mode == "auto"
    assert counts.n_read + counts.n_shared == sum(len(wish.row) for wish in wishes)
    assert n_free(drafting) == drafting.engine.pool.n_positions


@pytest.mark.parametrize("n_inflight", [1, 4])
def test_drafts_save_calls(bundled_model: Path, tiny: Model, n_inflight: int) -> None:
    """Answers that say the same again and again, at temperature 0."""
    row = tiny.tokenizer.encode("one two three four " * 30)
    options: Any = {"sampling": Sampling(0, seed=0), "max_tokens": 100}
    wishes = [Wish(str(n), row[n:], n, options, ends=False) for n in range(4)]
    with Model.open(bundled_model, draft="ngram", sequences=4) as drafting:
        plain, drafted = Batch(tiny, n_inflight), Batch(drafting, n_inflight)
        answers = [{end.wish.key: end.answer for end in batch.run(wishes)} for batch in (plain, drafted)]
    for wish in wishes:
        assert same(answers[0][wish.key], answers[1][wish.key])
    assert drafted.counts.n_drawn == plain.counts.n_drawn
    assert drafted.counts.n_steps <= 0.85 * plain.counts.n_steps


@pytest.mark.parametrize("n_inflight", [1, 16])
@pytest.mark.parametrize("system", ["", "Answer as if you were talking to a child of six years. " * 8])
def test_module_in_lock_step_is_as_often_right_as_alone(bundled_model: Path, n_inflight: int, system: str) -> None:
    """It follows prompts in parts, beginnings that another row has computed, and drafts that were wrong."""
    with Model.open(bundled_model, draft="mtp", draft_tokens=1, sequences=16) as model:
        wishes, n_right, n_drafts = [], 0, 0
        for n, question in enumerate(QUESTIONS):
            front = [{"role": "system", "content": system}] if system else []
            row = encode_chat(model.tokenizer, model.template, [*front, {"role": "user", "content": question}])
            wishes.append(Wish(str(n), row, n, {"sampling": Sampling(0, seed=0), "max_tokens": 80}))
            with model.session() as session:
                list(session.generate(row, max_tokens=80, sampling=Sampling(0, seed=0)))
                assert session.stats.drafted is not None
                n_right += session.stats.drafted.n_accepted
                n_drafts += session.stats.drafted.n_proposed
        batch = Batch(model, n_inflight)
        list(batch.run(wishes))
    counts = batch.counts
    assert counts.n_foreseen == counts.n_drafts
    assert n_right / n_drafts > 0.6  # m2-tiny has hardly seen such system prompts
    assert counts.n_right / counts.n_drafts > n_right / n_drafts - 0.03
    assert counts.n_shared > 9 * 100 or not system


@pytest.mark.slow
@pytest.mark.parametrize("pool", [256, 512, 1024])
@pytest.mark.parametrize(("threads", "draft"), [(1, "ngram"), (2, "off"), (2, "auto")])
def test_little_room_changes_nothing(
    bundled_model: Path, expected: tuple[list[Wish], list[Answer]], pool: int, threads: int, draft: str
) -> None:
    wishes, answers = expected
    with Model.open(bundled_model, draft=draft, sequences=24, ctx=256, pool=pool, threads=threads) as model:
        batch = Batch(model, 24)
        done = {end.wish.key: end for end in batch.run(wishes)}
        assert all(same(done[w.key].answer, a) for w, a in zip(wishes, answers, strict=True))
        assert n_free(model) == pool


@pytest.mark.skipif(not syscalls.AVAILABLE, reason="models are streamed on Linux only")
@pytest.mark.parametrize("load", ["mmap", "direct"])
def test_streamed_model(bundled_model: Path, expected: tuple[list[Wish], list[Answer]], load: str) -> None:
    wishes, answers = expected
    with Model.open(bundled_model, draft="off", sequences=8, load=load, ctx=256, threads=2) as model:
        done = {end.wish.key: end for end in Batch(model, 8).run(wishes)}
        assert (model.engine.stream is not None) == (load == "direct")
    assert all(same(done[w.key].answer, a) for w, a in zip(wishes, answers, strict=True))


def test_answers_that_give_way_are_computed_again(tiny: Model, bundled_model: Path) -> None:
    """More begin than can end side by side: those that came last let go of their pages, and say the same later."""
    messages = [{"role": "user", "content": "Tell me a story about a king."}]
    row = encode_chat(tiny.tokenizer, tiny.template, messages)
    options: Any = {"sampling": Sampling(1.0, seed=1), "max_tokens": 200, "logprobs": 1}
    wishes = [Wish(str(n), row, n, options) for n in range(8)]
    with Model.open(bundled_model, draft="off", sequences=8, ctx=256, pool=448) as model:
        batch = Batch(model, 8)
        batch._length = 0.0  # answers are thought to be short
        done = {end.wish.key: end.answer for end in batch.run(wishes)}
        assert n_free(model) == 448
    assert batch.counts.n_again > 0
    for wish in wishes:
        with tiny.session() as session:
            conversation = Conversation(session)
            list(conversation.reply_to(messages, wish.stream, **options))
            assert same(done[wish.key], conversation.answer)


def test_tokens_are_counted(tiny: Model, expected: tuple[list[Wish], list[Answer]]) -> None:
    wishes, answers = expected
    batch = Batch(tiny, 8)
    list(batch.run(wishes))
    counts = batch.counts
    assert counts.n_read + counts.n_shared == sum(len(wish.row) for wish in wishes)
    forced = sum(each is None for answer in answers for each in answer.logprobs)
    assert counts.n_drawn >= sum(len(answer.tokens) for answer in answers) - forced
    n_layers, n_used = tiny.config.n_layers, tiny.config.n_experts_used
    assert n_layers * n_used * counts.n_steps <= counts.n_expert_reads <= n_layers * n_used * counts.n_rows


@pytest.mark.parametrize("n_inflight", [1, 4, 32])
def test_shared_beginning_is_computed_once(tiny: Model, n_inflight: int) -> None:
    """500 prompts with the same 300 tokens in front: those are computed once, whatever comes when."""
    system = "You answer in one word. " * 40
    rows = [
        encode_chat(
            tiny.tokenizer,
            tiny.template,
            [{"role": "system", "content": system}, {"role": "user", "content": f"Question {n}?"}],
        )
        for n in range(500)
    ]
    n_same = next(i for i in range(len(rows[0])) if len({row[i] for row in rows}) > 1)
    assert n_same > 250
    batch = Batch(tiny, n_inflight)
    options: Any = {"sampling": Sampling(0, seed=0), "max_tokens": 2}
    done = list(batch.run(Wish(str(n), row, n, options) for n, row in enumerate(rows)))
    assert len(done) == 500 and all(end.error is None for end in done)
    rest = sum(len(row) - n_same for row in rows)
    assert batch.counts.n_read <= n_same + rest
    assert batch.counts.n_shared >= 499 * n_same


def test_beginnings_of_several_kinds_and_lengths(tiny: Model) -> None:
    """A tree: what two prompts have in common is computed once, at whatever place they part."""
    words = ["red", "green", "blue"]
    messages = []
    for a in words:
        for b in words:
            for c in words:
                text = f"{a} " * 60 + f"{b} " * 40 + f"{c} " * 20
                messages.append([{"role": "user", "content": text}])
    rows = [encode_chat(tiny.tokenizer, tiny.template, message) for message in messages]
    prefixes = {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}
    options: Any = {"sampling": Sampling(0, seed=0), "max_tokens": 3}
    wishes = [Wish(str(n), row, n, options) for n, row in enumerate(rows)]
    batch = Batch(tiny, 27)
    done = {end.wish.key: end.answer for end in batch.run(wishes)}
    total = sum(map(len, rows))
    assert batch.counts.n_read + batch.counts.n_shared == total
    assert batch.counts.n_read <= len(prefixes) + 27 * 16  # a few tokens are cheaper to compute than to wait for
    for wish in wishes[::5]:
        with tiny.session() as session:
            answer = done[wish.key]
            assert answer is not None
            assert answer.tokens == list(session.generate(wish.row, sampling=Sampling(0, seed=0), max_tokens=3))


def test_nobody_waits_for_ever(tiny: Model) -> None:
    """One prompt that nothing resembles, in front of many that begin alike: it is passed over, but not to the end."""
    text = "the same again " * 50
    rows = [encode_chat(tiny.tokenizer, tiny.template, [{"role": "user", "content": f"{text}{n}"}]) for n in range(400)]
    rows.insert(1, tiny.tokenizer.encode("Something else altogether. " * 20))
    options: Any = {"sampling": Sampling(0, seed=0), "max_tokens": 1}
    order = [end.wish.key for end in Batch(tiny, 1).run(Wish(str(n), row, n, options) for n, row in enumerate(rows))]
    assert 1 < order.index("1") < 150


def test_wishes_are_taken_as_they_are_needed(tiny: Model) -> None:
    taken = 0

    def wishes() -> Iterator[Wish]:
        nonlocal taken
        for n in range(1000):
            taken += 1
            yield wish_of(tiny, n, 0.0)

    run = Batch(tiny, 4).run(wishes())
    next(run)
    assert taken < 100
    run.close()
    assert n_free(tiny) == tiny.engine.pool.n_positions


def test_a_wish_of_its_own_fault(tiny: Model) -> None:
    """A prompt that is too long and a schema that has no end are errors of theirs alone."""
    good = wish_of(tiny, 0, 0.0)
    long = Wish("long", list(good.row) * 100, 1, {})
    endless: Any = {"sampling": Sampling(0, seed=0), "schema": {"$ref": "#"}}
    done = {end.wish.key: end for end in Batch(tiny, 4).run([long, Wish("endless", good.row, 2, endless), good])}
    assert isinstance(done["long"].error, ContextError) and done["long"].answer is None
    assert isinstance(done["endless"].error, M2liteError) and done["endless"].answer is None
    assert same(done["0"].answer, alone(tiny, good))


def test_stopped_in_the_middle(tiny: Model) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 200

    with pytest.raises(Stopped):
        list(Batch(tiny, 4, stop).run(wish_of(tiny, n, 0.0) for n in range(100)))
    assert n_free(tiny) == tiny.engine.pool.n_positions
    wish = wish_of(tiny, 3, 1.0)
    (end,) = Batch(tiny, 4).run([wish])
    assert same(end.answer, alone(tiny, wish))


def test_hashes_are_of_whole_pages() -> None:
    row = list(range(200))
    hashes = page_hashes(row)
    assert len(hashes) == 3 and hashes[:2] == page_hashes(row[:128]) and page_hashes(row[:63]) == []
    assert page_hashes([*row[:100], 7, *row[101:]])[0] == hashes[0]
    assert not set(page_hashes([7, *row[1:]])) & set(hashes)
