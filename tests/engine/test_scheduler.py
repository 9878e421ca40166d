"""Who runs, waits or is preempted: whatever happens around it, an answer is the one that its prompt gets alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2lite import ContextError, M2liteError, Model, Sampling
from m2lite.engine.batch import Batch
from m2lite.engine.handle import Handle
from m2lite.engine.prefix_cache import page_keys
from m2lite.engine.request import Request
from m2lite.engine.scheduler import Scheduler
from m2lite.engine.sequence import Slice
from m2lite.engine.thread import compute_thread
from m2lite.model.cache import PAGE
from tests.engine.asked import CTX, STORY, alone, n_pool, n_unheld, request_of, run_all, said

NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 60, "maxItems": 80}


@pytest.fixture(scope="module")
def tiny(bundled_model: Path) -> Iterator[Model]:
    """With room for all: what each answer is alone."""
    with Model.open(bundled_model, draft="off", ctx=CTX) as model:
        yield model


@pytest.fixture
def stepwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn of the loop is one step."""
    monkeypatch.setattr("m2lite.engine.loop.BURST_S", 0.0)


# Preemption


@pytest.mark.parametrize("draft", ["off", "ngram", "mtp", "auto"])
def test_preempted_sequences_go_on(bundled_model: Path, tiny: Model, draft: str) -> None:
    """Eight with pages for three: with a schema, penalties, a budget of thinking and what is noted of each token."""
    long: dict[str, Any] = {"max_tokens": 200, "ignore_stop": True}
    drawn = Sampling(1.0, seed=4, frequency_penalty=0.4, presence_penalty=0.2)
    kinds: list[dict[str, Any]] = [
        {}, {}, {"sampling": Sampling(0, seed=0)}, {"logprobs": 0}, {"schema": NUMBERS, "think_tokens": 5},
        {"sampling": drawn, "think_tokens": 30, "logprobs": 2}, {"keep": "nothing"}, {"sampling": drawn},
    ]  # fmt: skip
    requests = [request_of(tiny, STORY, n, **long | kind) for n, kind in enumerate(kinds)]
    expected = [alone(tiny, request) for request in requests]
    preempted = set[str]()

    class Noting(Scheduler):
        _usual = property(lambda self: 0.0, lambda self, tokens: None)  # type: ignore[assignment]  # answers are short

        def _preempt(self) -> bool:
            preempted.add(self.running[-1].request.key)
            return super()._preempt()

    with Model.open(bundled_model, draft=draft, sequences=8, ctx=CTX, pool=3 * CTX) as model:
        model.loop.scheduler.__class__ = Noting
        batch = Batch(model, 8)
        done = {end.request.key: end for end in batch.run(requests)}
        assert n_unheld(model) == n_pool(model)
    for request, answer in zip(requests, expected, strict=True):
        assert done[request.key].error is None and said(done[request.key].completion) == answer, request.key
    assert batch.counts.n_preempted >= 2 and preempted >= {"4", "5"}
    assert batch.counts.n_recomputed > 0 and batch.counts.n_most_running > 3


def test_cached_pages_go_before_anybody_is_preempted(bundled_model: Path, tiny: Model) -> None:
    long: dict[str, Any] = {"max_tokens": 200, "ignore_stop": True}
    old = [request_of(tiny, f"{n} {STORY}", n, **long) for n in range(3)]
    new = [request_of(tiny, f"{n} {STORY}", n, **long) for n in range(3, 6)]
    expected = [alone(tiny, request) for request in new]
    with Model.open(bundled_model, draft="off", sequences=3, ctx=CTX, pool=3 * CTX) as model:
        list(Batch(model, 3).run(old))
        assert model.runner.pool.n_free == 0  # all of it is cached
        batch = Batch(model, 3)
        done = {end.request.key: said(end.completion) for end in batch.run(new)}
        assert model.loop.prefix_cache.n_evicted >= 8
    assert [done[request.key] for request in new] == expected
    assert batch.counts.n_preempted == 0 and batch.counts.n_most_running == 3


def test_what_can_never_fit_is_refused_at_once(bundled_model: Path, tiny: Model) -> None:
    for ctx, pool in ((CTX, 2 * CTX), (CTX, 128)):
        with Model.open(bundled_model, draft="off", ctx=ctx, pool=pool, sequences=2) as model:
            limit = min(ctx, pool)
            with pytest.raises(ContextError, match=f"needs {limit + 1} tokens; {limit} are free of {limit}"):
                model.submit(Request(prompt=[1] * (limit + 1)))
            with pytest.raises(ContextError):
                model.submit(Request(prompt=[1] * 100, given=[1] * (limit - 99)))
            assert model.loop.n_waiting == 0 and n_unheld(model) == n_pool(model)
            request = replace(request_of(tiny, "Hello"), prompt=[1] * limit)
            done = model.submit(request).result()
            assert (len(done.tokens), done.finish_reason) == (1, "length")


def test_one_alone_waits_for_pages_that_are_being_saved(
    bundled_model: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another thread writes the pages of a chat: they are not free yet, but will be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    request = request_of(tiny, STORY, max_tokens=190, ignore_stop=True)
    expected = alone(tiny, request)
    with Model.open(bundled_model, draft="off", ctx=CTX) as model:
        model.use_disk()
        ids = list(range(1, 200))
        model.submit(Request(prompt=ids, max_tokens=1, ignore_stop=True)).result()
        cache = model.loop.prefix_cache
        pinned = compute_thread().run(lambda: cache.pin(page_keys(ids)))
        assert len(pinned) == 3
        handle = model.submit(request)
        for _ in range(100):
            model.loop.drive()
        assert not handle.is_over and len(handle.completion.tokens) < 100
        compute_thread().run(lambda: cache.unpin([page for _, page, _ in pinned]))
        assert said(handle.result()) == expected
        assert n_unheld(model) == n_pool(model)


# Cancelling


def test_cancelling_frees_pages_within_one_step(bundled_model: Path, tiny: Model, stepwise: None) -> None:
    options: dict[str, Any] = {"max_tokens": 100, "ignore_stop": True, "keep": "nothing"}
    requests = [request_of(tiny, f"{n} {STORY}", n, **options) for n in range(2)]
    with Model.open(bundled_model, draft="off", sequences=2, ctx=CTX) as model:
        first, second = (model.submit(request) for request in requests)
        for _ in range(20):
            model.loop.drive()
        timeline = second._sequence.timeline
        assert timeline is not None and not first.is_over and not second.is_over
        n_pages, n_free, n_steps = len(timeline.pages), n_unheld(model), model.loop.counts.n_steps
        assert n_pages >= 2
        second.cancel()
        model.loop.drive()
        assert second.is_over and second.completion.finish_reason == "interrupted"
        assert n_unheld(model) == n_free + PAGE * n_pages and model.loop.counts.n_steps == n_steps + 1
        assert list(second) and second.result().finish_reason == "interrupted"  # what had come by then
        assert said(first.result()) == alone(tiny, requests[0])


def test_who_has_not_begun_is_cancelled_as_well(bundled_model: Path, tiny: Model, stepwise: None) -> None:
    """One in the inbox, one that waits for a place, and one that was preempted."""
    requests = [request_of(tiny, f"{n} {STORY}", n, max_tokens=180, ignore_stop=True) for n in range(4)]
    expected = alone(tiny, requests[0])
    with Model.open(bundled_model, draft="off", sequences=3, ctx=CTX, pool=CTX + 2 * PAGE) as model:
        scheduler = model.loop.scheduler
        scheduler.n_most, scheduler._usual = 2, 0.0
        handles = [model.submit(request) for request in requests[:3]]
        while not scheduler.preempted:
            model.loop.drive()
        handles.append(model.submit(requests[3]))
        assert [each.request.key for each in scheduler.preempted] == ["1"] and len(model.loop._inbox) == 1
        for handle in handles[1:]:
            handle.cancel()
        model.loop.drive()
        assert all(handle.is_over for handle in handles[1:]) and len(scheduler.running) == 1
        assert said(handles[0].result()) == expected
        assert n_unheld(model) == n_pool(model)


# A common beginning


@pytest.mark.parametrize("how", ["cancelled", "cancelled in a call", "failed", "preempted", "finished", "nothing kept"])
@pytest.mark.parametrize("draft", ["off", "mtp"])
def test_who_waits_for_a_common_beginning_gets_it(
    bundled_model: Path, tiny: Model, stepwise: None, monkeypatch: pytest.MonkeyPatch, how: str, draft: str
) -> None:
    """Whatever becomes of the one that computes it; and nobody is taken for stopped who is not."""
    requests = [request_of(tiny, STORY * 4 + str(n), n, max_tokens=30) for n in range(3)]
    if how == "nothing kept":
        requests[0] = replace(requests[0], keep="nothing")
    expected = [alone(tiny, request) for request in requests]
    with Model.open(bundled_model, draft=draft, sequences=4, ctx=CTX) as model:
        model.n_rows = 24
        other = model.submit(Request(prompt=[1, 2, 3], ignore_stop=True, draft="off"))  # that came before
        first, second, third = handles = [model.submit(request) for request in requests]
        one = first._sequence
        model.loop.drive()
        model.loop.drive()
        assert second._sequence.awaits is (None if how == "nothing kept" else one)
        assert third._sequence.awaits is second._sequence
        assert 0 < one.n_computed < 60
        evaluate_rows = model.runner.evaluate_rows

        def evaluate(parts: Any, *args: Any) -> Any:
            ids = next((ids for timeline, ids in parts if timeline is one.timeline), ())
            if ids:
                if how == "cancelled in a call":
                    first.cancel()
                elif how == "failed" and len(ids) > 1:
                    raise M2liteError("NaN or infinity in layer 1.")
            return evaluate_rows(parts, *args)

        monkeypatch.setattr(model.runner, "evaluate_rows", evaluate)
        if how == "cancelled":
            first.cancel()
        elif how == "cancelled in a call":  # which is of that one alone
            other.cancel()
        elif how == "preempted":
            for _ in handles:
                compute_thread().run(model.loop.scheduler._preempt)
        assert said(second.result()) == expected[1] and said(third.result()) == expected[2]
        run_all(model, handles)
        other.cancel()
        assert isinstance(first.error, M2liteError) == (how == "failed")
        if how in ("preempted", "finished", "nothing kept"):
            assert said(first.completion) == expected[0]
            assert (model.loop.counts.n_preempted > 0) == (how == "preempted")
        elif how != "failed":
            assert first.completion.finish_reason == "interrupted"
        if how not in ("failed", "cancelled", "cancelled in a call"):
            n_prompt = sum(len(request.prompt) for request in (other.request, *requests))
            assert model.loop.counts.n_prompt + model.loop.counts.n_cached == n_prompt
            n_parts = 2 if how == "nothing kept" else 1
            assert model.loop.counts.n_prompt < n_parts * len(requests[0].prompt) + 3 * 20
        assert n_unheld(model) == n_pool(model) and not model.loop.scheduler._beginning


def test_one_answer_is_given_to_who_keeps_nothing(tiny: Model) -> None:
    """It may begin with what others have computed, but nobody with what it has."""
    tiny.loop.forget()
    request = request_of(tiny, STORY * 4, keep="nothing")
    expected = said(tiny.submit(request).result())
    assert len(tiny.loop.prefix_cache) == 0
    kept = replace(request, keep="memory")
    assert said(tiny.submit(kept).result()) == expected
    again = tiny.submit(request)
    assert said(again.result()) == expected and again.completion.stats.n_reused == len(request.prompt) - 1


# Fairness


def test_decoding_goes_on_while_prompts_are_read(bundled_model: Path, tiny: Model, stepwise: None) -> None:
    """Long prompts and many short ones: each step has a token of each sequence that decodes, and others what fits."""
    long = [request_of(tiny, f"{n} " + STORY * 6, n, max_tokens=5) for n in range(3)]
    short = [request_of(tiny, "Hello", n, max_tokens=5) for n in range(3, 15)]
    decoding = [request_of(tiny, STORY + str(n), n, max_tokens=100, ignore_stop=True) for n in range(15, 18)]
    steps = list[list[Slice]]()

    class Noting(Scheduler):
        def pick(self, n_longest: int | None = None) -> list[Slice]:
            slices = super().pick(n_longest)
            decodes = [s for s in self.running if s.timeline is not None and s.n_todo == 1]
            assert {id(s) for s in decodes} <= {id(each.sequence) for each in slices}
            assert sum(len(each.ids) for each in slices) <= self.n_rows
            steps.append(slices)
            return slices

    with Model.open(bundled_model, draft="off", sequences=18, ctx=CTX) as model:
        model.n_rows = 32
        model.loop.scheduler.__class__ = Noting
        handles = [model.submit(request) for request in decoding]
        while not all(handle.completion.tokens for handle in handles):
            model.loop.drive()
        n_before = [len(handle.completion.tokens) for handle in handles]
        steps.clear()
        others = [model.submit(request) for request in (*long, *short)]
        run_all(model, others)
        reading = [slices for slices in steps if any(len(each.ids) > 1 for each in slices)]
        assert len(reading) >= 3 * 150 // 32
        n_most = max(map(len, steps))
        assert n_most > len(decoding) + 1  # several prompts share a call
        for handle, n in zip(handles, n_before, strict=True):
            assert len(handle.completion.tokens) == n + len(steps)
        requests = [*decoding, *long, *short]
        run_all(model, handles)
        answers = [said(handle.completion) for handle in (*handles, *others)]
    assert answers == [alone(tiny, request) for request in requests]


# Everything at once

PROMPTS = [list(b"once upon a time " * n) + list(b"the fox") * k for n in (0, 3, 7, 10) for k in (1, 5, 11)]
A_REQUEST = st.fixed_dictionaries({
    "prompt": st.sampled_from(PROMPTS),
    "max_tokens": st.sampled_from([1, 5, 40, 100]),
    "keep": st.sampled_from(["memory", "memory", "nothing"]),
    "draft": st.sampled_from(["off", "ngram"]),
    "sampling": st.sampled_from([Sampling(0, seed=0), Sampling(1.0, seed=1, frequency_penalty=0.5)]),
    "rng_stream": st.integers(0, 1),
})  # fmt: skip
ACTION = st.one_of(
    st.tuples(st.just("submit"), A_REQUEST),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("forget"), st.none()),
    st.tuples(st.just("drive"), st.integers(1, 12)),
    st.tuples(st.just("preempt"), st.none()),
)


@pytest.fixture(scope="module")
def pools(model_files: dict[str, Path]) -> Iterator[dict[int, Model]]:
    """Models with pools of so many pages; 0: with room for all."""
    opened = {n: Model.open(model_files["random"], ctx=CTX, sequences=8, pool=n * PAGE or None) for n in (0, 4, 7, 12)}
    yield opened
    for model in opened.values():
        model.close()


KNOWN = dict[str, list[int]]()


def known(model: Model, request: Request) -> list[int]:
    key = str((request.prompt, request.max_tokens, request.sampling, request.rng_stream))
    if key not in KNOWN:
        KNOWN[key] = alone(model, request)[0]
    return KNOWN[key]


@settings(max_examples=60, deadline=None)
@given(
    n_pages=st.sampled_from([4, 7, 12]),
    n_rows=st.sampled_from([1, 9, 64, 256]),
    usual=st.sampled_from([0.0, 128.0]),
    actions=st.lists(ACTION, min_size=3, max_size=25),
)
def test_whatever_happens_answers_are_the_same(
    pools: dict[int, Model], n_pages: int, n_rows: int, usual: float, actions: list[tuple[str, Any]]
) -> None:
    """Requests that come and go over a small pool; at the end every page is free, or the cache's alone."""
    model = pools[n_pages]
    scheduler, cache, handles = model.loop.scheduler, model.loop.prefix_cache, list[Handle]()
    model.n_rows, scheduler.n_most, scheduler._usual = n_rows, min(n_rows, 8), usual
    for what, value in actions:
        if what == "submit":
            handles.append(model.submit(Request(ignore_stop=True, **value)))
        elif what == "cancel" and handles:
            handles[value % len(handles)].cancel()
        elif what == "forget":
            model.loop.forget()
        elif what == "preempt":
            compute_thread().run(lambda: len(scheduler.running) > 1 and scheduler._preempt())
        elif what == "drive":
            for _ in range(value):
                model.loop.drive()
    run_all(model, handles)
    for handle in handles:
        assert handle.error is None
        is_whole, tokens = handle.completion.finish_reason == "length", known(pools[0], handle.request)
        assert handle.completion.tokens == tokens[: None if is_whole else len(handle.completion.tokens)]
        assert is_whole or handle._sequence.is_cancelled
    assert scheduler.is_idle and not scheduler._beginning
    assert n_unheld(model) == n_pool(model)
    n = len(cache)
    assert compute_thread().run(lambda: sum(cache.evict() for _ in range(n + 1))) == n  # and it gives all of them back
    assert model.runner.pool.n_free == n_pool(model)
