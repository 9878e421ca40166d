"""The compute thread: what waits for it, and who need not."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2lite import Model, Sampling
from m2lite.decode.compute import Stopped, compute_thread
from m2lite.decode.conversation import Conversation

GREEDY = Sampling(0, seed=0)


class AfterSeconds:
    """A stop flag that is set a while after it was made."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def __call__(self) -> bool:
        return time.monotonic() >= self._at


@pytest.fixture
def small_heap() -> Iterator[None]:
    """Nothing that the tests before left is collected: with the whole suite's objects it takes 0.2 s and more."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def slow_to_compile() -> Any:
    """A function of many statements that no cache holds."""
    import numba

    lines = [f"    x = x * {i}.5 + np.sqrt(x + {i}) if x > {i} else x - np.sin(x)" for i in range(80)]
    names: dict[str, Any] = {"np": np}
    exec("\n".join(["def slow(x):", *lines, "    return x"]), names)  # noqa: S102
    return numba.njit(names["slow"])


@pytest.fixture(scope="module")
def tiny(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model) as model:
        yield model


def test_result_comes_back_while_somebody_may_stop_it() -> None:
    assert compute_thread().run(lambda: 7, stop=lambda: False) == 7
    assert compute_thread().run(lambda: 7, stop=lambda: True) == 7  # it ends by itself
    with pytest.raises(ZeroDivisionError):
        compute_thread().run(lambda: 1 // 0, stop=lambda: False)


def test_who_stops_does_not_wait() -> None:
    ends = threading.Event()
    try:
        begun = time.monotonic()
        with pytest.raises(Stopped):
            compute_thread().run(lambda: ends.wait(30), stop=lambda: True)
        assert time.monotonic() - begun < 0.5
    finally:
        ends.set()
    assert compute_thread().run(lambda: 3) == 3


@pytest.mark.parametrize("draft", ["off", "auto"])
@pytest.mark.usefixtures("small_heap")
def test_stopped_while_a_kernel_is_compiled(tiny: Model, monkeypatch: pytest.MonkeyPatch, draft: str) -> None:
    """The caller is back at once, the compiler ends behind, and the next answer is as if nothing had been."""
    engine, evaluate = tiny.engine, tiny.engine.evaluate
    kernel, compiled = slow_to_compile(), threading.Event()

    def compiles_first(*arguments: Any, **options: Any) -> Any:
        if not compiled.is_set():
            kernel(1.0)
            compiled.set()
        return evaluate(*arguments, **options)

    with tiny.session(draft) as session:
        conversation = Conversation(session)
        list(conversation.ask("Hello", sampling=GREEDY))
        monkeypatch.setattr(engine, "evaluate", compiles_first)
        begun = time.monotonic()
        list(conversation.ask("Tell me a story.", sampling=GREEDY, stop=AfterSeconds(0.2)))
        assert time.monotonic() - begun < 0.2 + 0.5
        assert not compiled.is_set(), "it compiled too fast to show anything"
        assert conversation.n_turns == 1 and conversation.answer.finish_reason == "interrupted"
        list(conversation.ask("Who are you?", sampling=GREEDY))  # waits for the compiler
        assert compiled.is_set()
        row = conversation.encode(conversation.messages[:-1])
    with tiny.session("off") as fresh:
        assert list(fresh.generate(row, sampling=GREEDY)) == conversation.answer.tokens
