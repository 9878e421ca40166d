"""Several threads on one model, closed models and sessions, forked processes, and calls that cannot be meant."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from m2lite import Model, Sampling, UsageError
from m2lite.engine.handle import Handle
from m2lite.engine.request import Request
from m2lite.engine.sequence import Event, Finished
from m2lite.engine.thread import compute_thread
from m2lite.text.template import encode_chat
from tests.children import PATIENCE_S

QUESTIONS = ["Tell me a story about a fox.", "Tell me a story about a bear.", "Thank you", "What is 2 + 3?"]
N_THREADS = 4


@pytest.fixture(scope="module")
def tiny(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model, ctx=256, sequences=4) as model:
        yield model


def request_of(model: Model, n: int, **more: Any) -> Request:
    ids = encode_chat(model.tokenizer, model.template, [{"role": "user", "content": QUESTIONS[n % len(QUESTIONS)]}])
    return Request(prompt=ids, sampling=Sampling(1.0, seed=n % 3), rng_stream=n, **{"max_tokens": 50} | more)


def in_threads(*calls: Callable[[], object]) -> None:
    """All at once; the first error is raised here."""
    errors: list[BaseException] = []

    def run(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_threads_share_a_model(tiny: Model) -> None:
    """Each drives the loop for all, and reads its own answer: handles and sessions, some of them cancelled."""
    expected = [tiny.submit(request_of(tiny, n)).result().tokens for n in range(12)]
    found: dict[int, list[int]] = {}

    def handles(numbers: range) -> None:
        for n in numbers:
            abandoned = tiny.submit(request_of(tiny, n + 1))
            events = list(tiny.submit(request_of(tiny, n)))
            assert isinstance(events[-1], Finished)
            found[n] = events[-1].completion.tokens
            abandoned.cancel()

    def sessions(numbers: range) -> None:
        for n in numbers:
            with tiny.session() as session:
                request = request_of(tiny, n)
                options: Any = {"sampling": request.sampling, "rng_stream": n, "max_tokens": request.max_tokens}
                found[n] = list(session.generate(request.prompt, **options))

    tiny.loop.forget()
    in_threads(*(lambda i=i: (handles, sessions)[i % 2](range(3 * i, 3 * i + 3)) for i in range(N_THREADS)))
    assert [found[n] for n in range(12)] == expected
    assert compute_thread().run(lambda: tiny.loop.scheduler.is_idle)


def test_an_answer_that_another_thread_ends(tiny: Model) -> None:
    """Between the two looks of its reader, at its events and at whether it is over, all of it may happen."""
    handle = tiny.submit(request_of(tiny, 0))
    sequence = handle._sequence

    class Late(deque[Event]):
        def __bool__(self) -> bool:
            is_filled = len(self) > 0
            while not is_filled and not sequence.is_over:
                tiny.loop.drive()
            return is_filled

    sequence.events = Late()
    events = list(handle)
    assert isinstance(events[-1], Finished) and events[-1].completion.finish_reason in ("stop", "length")


def test_requests_that_come_and_go_while_others_are_dropped(tiny: Model) -> None:
    """A thread that submits and one that cancels: the inbox is nobody's alone."""
    is_over = threading.Event()

    def come_and_go() -> None:
        while not is_over.is_set():
            handles = [tiny.submit(request_of(tiny, n)) for n in range(8)]
            for handle in handles:
                handle.cancel()

    def answer() -> None:
        try:
            for n in range(4):
                assert tiny.submit(request_of(tiny, n)).result().finish_reason in ("stop", "length")
        finally:
            is_over.set()

    in_threads(come_and_go, come_and_go, answer)
    assert compute_thread().run(lambda: tiny.loop.scheduler.is_idle) and not tiny.loop._inbox


def test_a_model_that_is_closed_under_an_answer(bundled_model: Path) -> None:
    model = Model.open(bundled_model, ctx=256)
    handle = model.submit(request_of(model, 0))
    events = handle.events()
    next(events)
    in_threads(model.close)
    with pytest.raises(UsageError, match="closed"):
        list(events)
    assert handle.is_over and isinstance(handle.error, UsageError)


def test_a_request_that_meets_the_end_of_its_model(bundled_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was let in a moment before: nothing is computed in memory that is gone."""
    model = Model.open(bundled_model, ctx=256)
    model.close()
    with monkeypatch.context() as patch:
        patch.setattr(model.loop, "is_closed", False)
        handle = model.submit(request_of(model, 0))
    with pytest.raises(UsageError, match="closed"):
        handle.result()


def test_logits_that_wait_behind_the_end_of_their_model(bundled_model: Path) -> None:
    model, ends, waiting = Model.open(bundled_model, ctx=256), threading.Event(), threading.Event()
    job = compute_thread().submit(ends.wait)
    model.close()  # waits for nobody: something is under way
    assert not model.loop.is_closed
    compute_thread().submit(waiting.set)

    def ask() -> None:
        with pytest.raises(UsageError, match="closed"):
            model.logits([1, 2, 3])

    thread = threading.Thread(target=ends.set)
    thread.start()
    ask()
    thread.join()
    assert job.result() and waiting.is_set()


def test_a_dropped_handle_is_cancelled(tiny: Model) -> None:
    handle: Handle | None = tiny.submit(request_of(tiny, 0))
    assert handle is not None
    sequence = handle._sequence
    del handle
    compute_thread().run(lambda: None)
    assert sequence.is_over and sequence.answer.completion.finish_reason == "interrupted"


# What each call gives, also where Python leaves assertions out.
ERRORS = """
import os, sys
from m2lite import Model, Sampling
from m2lite.engine.request import Request

def told(name, call):
    try:
        call()
        found = "nothing"
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    sys.stdout.write(f"{name}: {found}\\n")
    sys.stdout.flush()

model = Model.open(sys.argv[1], ctx=256)
other = Model.open(sys.argv[1], ctx=256)
other.close()
closed = model.session()
closed.close()
session = model.session()
n = model.config.n_vocab
told("debug", lambda: 1 / __debug__)
told("closed session", lambda: closed.generate([1, 2]))
told("closed model", lambda: other.session().generate([1, 2]))
told("closed model's request", lambda: other.submit(Request(prompt=[1])))
told("closed model's logits", lambda: other.logits([1]))
told("no tokens", lambda: session.generate([1], max_tokens=0))
told("empty prompt", lambda: session.generate([]))
told("empty request", lambda: model.submit(Request(prompt=[])))
told("empty logits", lambda: model.logits([]))
told("id too large", lambda: session.generate([1, n]))
told("id below 0", lambda: session.generate([-1]))
told("id of a given answer", lambda: model.submit(Request(prompt=[1], given=[n])))
told("id of a script", lambda: model.submit(Request(prompt=[1], script=[n])))
told("id in logits", lambda: model.logits([n]))
told("no integers", lambda: session.generate([1.5]))
told("thinking", lambda: model.submit(Request(prompt=[1], think_tokens=-1)))
told("random numbers", lambda: session.generate([1], rng_stream=-1))
told("logprobs", lambda: model.submit(Request(prompt=[1], logprobs=-1)))
told("too long", lambda: session.generate([1] * 257))
told("too long for logits", lambda: model.logits([1] * 257))
told("drafts", lambda: model.submit(Request(prompt=[1], draft="always")))
told("afterwards", lambda: 1 / (len(list(session.generate([1, 2], max_tokens=3, ignore_stop=True))) - 3))

begun = model.submit(Request(prompt=[1, 2, 3], ignore_stop=True))
events = begun.events()
next(events)
pid = os.fork()
if not pid:
    told("forked request", lambda: model.submit(Request(prompt=[1])))
    told("forked session", lambda: model.session().generate([1]))
    told("forked handle", lambda: begun.result())
    told("forked logits", lambda: model.logits([1]))
    told("forked open", lambda: Model.open(sys.argv[1]))
    told("forked cancel", begun.cancel)
    told("forked close", model.close)
    os._exit(0)
assert_code = os.waitpid(pid, 0)[1]
told("child", lambda: 1 / (1 - assert_code))
told("parent", lambda: 1 / (len(list(session.generate([3], max_tokens=2, ignore_stop=True))) - 2))
model.close()
"""
EXPECTED = {
    "closed session": "UsageError: The session is closed.",
    "closed model": "UsageError: The model is closed.",
    "closed model's request": "UsageError: The model is closed.",
    "closed model's logits": "UsageError: The model is closed.",
    "no tokens": "UsageError: max_tokens is 0.",
    "empty prompt": "UsageError: The prompt is empty.",
    "empty request": "UsageError: The prompt is empty.",
    "empty logits": "UsageError: Logits of 0 tokens",
    "id too large": "UsageError: Token id ",
    "id below 0": "UsageError: Token id -1 is outside",
    "id of a given answer": "UsageError: Token id ",
    "id of a script": "UsageError: Token id ",
    "id in logits": "UsageError: Token id ",
    "no integers": "UsageError: Token ids are no list of integers",
    "thinking": "UsageError: think_tokens is -1.",
    "random numbers": "UsageError: rng_stream is -1.",
    "logprobs": "UsageError: logprobs is -1.",
    "too long": "ContextError: The prompt needs 257 tokens",
    "too long for logits": "ContextError: The prompt needs 257 tokens",
    "drafts": "UsageError: Draft mode 'always' does not exist.",
    "afterwards": "ZeroDivisionError",
    "forked request": "UsageError: Process ",
    "forked session": "UsageError: Process ",
    "forked handle": "UsageError: Process ",
    "forked logits": "UsageError: Process ",
    "forked open": "UsageError: Process ",
    "forked cancel": "nothing",
    "forked close": "nothing",
    "child": "nothing",
    "parent": "ZeroDivisionError",
}


@pytest.mark.parametrize("flags", [[], ["-O"]], ids=["plain", "optimised"])
def test_each_mistake_has_its_error(bundled_model: Path, command_env: dict[str, str], flags: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *flags, "-c", ERRORS, bundled_model],
        env=command_env, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert found.pop("debug").startswith("ZeroDivisionError" if flags else "nothing")
    assert found.keys() == EXPECTED.keys()
    assert {name: found[name] for name in EXPECTED if not found[name].startswith(EXPECTED[name])} == {}
