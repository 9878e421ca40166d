"""Sequences that fail beside others, errors of all, and stops between layers: nobody else notices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2lite import BadModelError, M2liteError, Model
from m2lite.engine.batch import Batch
from m2lite.engine.handle import Handle
from m2lite.engine.thread import Stopped
from m2lite.sampling import json_schema
from tests.engine.asked import CTX, STORY, alone, n_pool, n_unheld, request_of, run_all, said

NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 60, "maxItems": 80}


@pytest.fixture(scope="module")
def tiny(bundled_model: Path) -> Iterator[Model]:
    """With room for all: what each answer is alone."""
    with Model.open(bundled_model, draft="off", ctx=CTX) as model:
        yield model


def failing(model: Model, handle: Handle, fail: Callable[[], Any], after: int) -> Callable[..., Any]:
    """evaluate_rows that calls `fail` once the handle's sequence has `after` tokens, or puts NaN into its logits."""
    evaluate_rows, sequence = model.runner.evaluate_rows, handle._sequence

    def evaluate(parts: Any, outputs: Any, *args: Any) -> Any:
        at = next((i for i, (timeline, _) in enumerate(parts) if timeline is sequence.timeline), None)
        is_due = at is not None and len(sequence.answer.completion.tokens) >= after
        if is_due and (found := fail()) is not None:
            raise found
        logits = evaluate_rows(parts, outputs, *args)
        if is_due:
            first = sum(outputs[:at])
            logits[first : first + outputs[at]] = np.nan
        return logits

    return evaluate


@pytest.mark.parametrize("draft", ["off", "mtp", "ngram"])
@pytest.mark.parametrize("kind", ["layer", "logits", "bug"])
def test_a_sequence_that_fails_ends_alone(
    bundled_model: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch, kind: str, draft: str
) -> None:
    """With what it had said by then. The others' answers are what they are without it, and drafts go on."""
    requests = [request_of(tiny, f"{n} {STORY}", n, max_tokens=60, ignore_stop=True) for n in range(4)]
    expected = [alone(tiny, request) for request in requests]
    with Model.open(bundled_model, draft=draft, sequences=4, ctx=CTX) as model:
        handles = [model.submit(request) for request in requests]
        error = {"layer": M2liteError("NaN or infinity in layer 1."), "logits": None, "bug": None}[kind]
        if kind == "bug":
            rule = handles[1].answer._rules

            class Broken:
                def apply(self, logits: Any) -> Any:
                    if len(handles[1].completion.tokens) >= 10:
                        raise ZeroDivisionError
                    return logits

                def push(self, token: int) -> None: ...

            rule.append(Broken())
        else:
            monkeypatch.setattr(model.runner, "evaluate_rows", failing(model, handles[1], lambda: error, 10))
        run_all(model, handles)
        assert isinstance(handles[1].error, ZeroDivisionError if kind == "bug" else M2liteError)
        n_said = len(handles[1].completion.tokens)
        assert 10 <= n_said < 20 and handles[1].completion.tokens == expected[1][0][:n_said]
        for n in (0, 2, 3):
            assert handles[n].error is None and said(handles[n].completion) == expected[n], n
        assert n_unheld(model) == n_pool(model)
        if kind == "bug":
            with pytest.raises(ZeroDivisionError):
                handles[1].result()


def test_a_schema_that_fails_is_an_error_of_its_own(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [request_of(tiny, f"{n} {STORY}", n) for n in range(2)]
    expected = [alone(tiny, request) for request in good]
    monkeypatch.setattr(json_schema, "MOST_TOKENS", 12)
    bad = request_of(tiny, STORY, 9, schema=NUMBERS, think_tokens=3, max_tokens=None)
    done = {end.request.key: end for end in Batch(tiny, 3).run([good[0], bad, good[1]])}
    assert isinstance(done["9"].error, M2liteError) and "not whole after 12 tokens" in str(done["9"].error)
    assert [said(done[request.key].completion) for request in good] == expected
    assert n_unheld(tiny) == n_pool(tiny)


def test_an_error_of_the_file_ends_all(bundled_model: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that run, and those that wait as soon as they would be computed."""
    requests = [request_of(tiny, f"{n} {STORY}", n) for n in range(4)]
    with Model.open(bundled_model, draft="off", sequences=2, ctx=CTX) as model:
        model.loop.scheduler.n_most = 2
        handles = [model.submit(request) for request in requests]
        error = BadModelError("model.gguf: the model file changed on disk.")
        monkeypatch.setattr(model.runner, "evaluate_rows", failing(model, handles[0], lambda: error, 3))
        for handle in handles[:2]:
            with pytest.raises(BadModelError):
                handle.result()

        def fail(*_: Any) -> None:
            raise error

        monkeypatch.setattr(model.runner, "evaluate_rows", fail)
        with pytest.raises(BadModelError):
            list(Batch(model, 2).run(requests[3:] + requests[:1]))
        run_all(model, handles)
        assert all(isinstance(handle.error, BadModelError) for handle in handles)
        assert n_unheld(model) == n_pool(model)


@pytest.mark.parametrize("draft", ["off", "mtp"])
@pytest.mark.parametrize("is_failing", [False, True], ids=["all sound", "one fails"])
def test_a_stop_leaves_all_as_it_was(
    bundled_model: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch, draft: str, is_failing: bool
) -> None:
    """Between layers, at each place in turn; also while it is found out whose fault an error is."""
    requests = [request_of(tiny, f"{n} {STORY}", n, max_tokens=20, ignore_stop=True) for n in range(3)]
    expected = [alone(tiny, request) for request in requests]
    with Model.open(bundled_model, draft=draft, sequences=3, ctx=CTX) as model:
        handles = [model.submit(request) for request in requests]
        if is_failing:
            error = M2liteError("NaN or infinity in layer 1.")
            monkeypatch.setattr(model.runner, "evaluate_rows", failing(model, handles[2], lambda: error, 10))
        n_stopped = 0
        for n_most in [*range(25), *range(25)]:
            n_asked = 0

            def stop(n_most: int = n_most) -> bool:
                nonlocal n_asked
                n_asked += 1
                return n_asked > n_most

            try:
                model.loop.drive(stop)
            except Stopped:
                n_stopped += 1
        run_all(model, handles)
        assert n_stopped > 10
        for handle, answer in zip(handles[: 3 - is_failing], expected, strict=False):
            assert handle.error is None and said(handle.completion) == answer
        assert (handles[2].error is not None) == is_failing
        assert n_unheld(model) == n_pool(model)
