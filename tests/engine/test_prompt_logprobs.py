"""Logprobs of a prompt's own tokens: those of the model's logits, whatever is computed beside them or was before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m2lite import M2liteError, Model, UsageError
from m2lite.engine.request import Request
from m2lite.engine.scheduler import Scheduler
from m2lite.engine.sequence import Slice
from m2lite.sampling.rules import Logprob, logprob_of
from tests.engine.asked import CTX, STORY, alone, n_pool, n_unheld, request_of, run_all, said


@pytest.fixture(scope="module")
def tiny(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model, draft="off", ctx=CTX) as model:
        yield model


def expected_of(model: Model, request: Request) -> list[Logprob]:
    rows, ids = model.logits(request.prompt)[:-1], request.prompt[1:]
    return [logprob_of(row, token, request.prompt_logprobs or 0) for row, token in zip(rows, ids, strict=True)]


@pytest.mark.parametrize("keep", ["memory", "nothing"])
@pytest.mark.parametrize("draft", ["off", "mtp", "ngram"])
def test_beside_others_and_preempted(bundled_model: Path, tiny: Model, draft: str, keep: Any) -> None:
    """Preempted in mid-prompt, behind a beginning that is cached, in calls of a few rows."""
    plain = {"ignore_stop": True, "keep": keep}
    kinds: list[dict[str, Any]] = [{"prompt_logprobs": 2}, {}, {"prompt_logprobs": 0}, {"logprobs": 1}] * 2
    kinds.append({"prompt_logprobs": 1})
    requests = [request_of(tiny, f"{STORY} {n // 2}", n, **plain, **kind) for n, kind in enumerate(kinds)]
    answers = [alone(tiny, replace(request, prompt_logprobs=None)) for request in requests]
    preempted = set[str]()

    class Noting(Scheduler):
        def pick(self) -> list[Slice]:
            for each in list(self.running):
                is_parted = 0 < each.n_unnoted < len(each.request.prompt) - 20
                is_awaited = any(other.awaits is each for other in self.running)  # by later ones, which go before it
                if is_parted and not is_awaited and each.request.key not in preempted and len(self.running) > 1:
                    preempted.add(each.request.key)
                    self.running.remove(each)
                    self.running.append(each)  # as if it had come last
                    assert self._preempt()
            return super().pick()

    with Model.open(bundled_model, draft=draft, sequences=9, ctx=CTX) as model:
        model.loop.scheduler.__class__ = Noting
        model.loop.scheduler.n_noted = 7
        model.submit(replace(requests[0], prompt_logprobs=None)).result()  # all of its prompt is cached
        handles = [model.submit(request) for request in requests]
        run_all(model, handles)
        assert preempted >= ({"8"} if keep == "memory" else {"0", "2", "4", "6", "8"})
        assert n_unheld(model) == n_pool(model)
    for handle, request, answer in zip(handles, requests, answers, strict=True):
        assert said(handle.completion) == answer, request.key
        noted = [] if request.prompt_logprobs is None else expected_of(tiny, request)
        assert handle.completion.prompt_logprobs == noted, request.key


def test_nothing_cached_is_used_but_what_is_computed_stays(tiny: Model) -> None:
    request = request_of(tiny, STORY, max_tokens=1, prompt_logprobs=1)
    tiny.loop.forget()
    first, second = (tiny.submit(request).result() for _ in range(2))
    assert first.prompt_logprobs == second.prompt_logprobs == expected_of(tiny, request)
    assert first.stats.n_reused == second.stats.n_reused == 0
    after = tiny.submit(replace(request, prompt_logprobs=None)).result()
    assert (after.stats.n_reused, after.prompt_logprobs) == (len(request.prompt) - 1, [])
    assert tiny.submit(replace(request, prompt=[5])).result().prompt_logprobs == []
    with pytest.raises(UsageError, match="prompt_logprobs is -1"):
        tiny.submit(replace(request, prompt_logprobs=-1))


def test_one_that_fails_or_is_cancelled_meanwhile(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else notices."""
    request = request_of(tiny, STORY, 1, prompt_logprobs=1)
    other = request_of(tiny, "Hello", 2)
    answer, row_logits = alone(tiny, other), tiny.runner.row_logits

    def failing(first: int, n: int) -> Any:
        raise M2liteError("NaN or infinity in the logits.")

    def cancelling(first: int, n: int) -> Any:
        handles[0].cancel()
        return row_logits(first, n)

    for row_logits_of_test in (failing, cancelling):
        tiny.loop.forget()
        monkeypatch.setattr(tiny.runner, "row_logits", row_logits_of_test)
        handles = [tiny.submit(request), tiny.submit(other)]
        run_all(tiny, handles)
        assert said(handles[1].completion) == answer
        assert handles[0].completion.finish_reason == "interrupted"
        assert (handles[0].error is not None) == (row_logits_of_test is failing)
        assert n_unheld(tiny) == n_pool(tiny)
