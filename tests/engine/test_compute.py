"""The compute thread: what waits for it, and who need not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2lite import Model, Sampling
from m2lite.dialogue.conversation import Conversation
from m2lite.engine.thread import Stopped, compute_thread, is_busy

GREEDY = Sampling(0, seed=0)


def to_compile() -> Any:
    """A function of some statements that no cache holds."""
    import numba

    lines = [f"    x = x * {i}.5 + np.sqrt(x + {i}) if x > {i} else x - np.sin(x)" for i in range(8)]
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
        with pytest.raises(Stopped):  # who waited for the job would wait for ever
            compute_thread().run(ends.wait, stop=lambda: True)
        assert is_busy()
    finally:
        ends.set()
    assert compute_thread().run(lambda: 3) == 3


@pytest.mark.parametrize("draft", ["off", "auto"])
def test_stopped_while_a_kernel_is_compiled(tiny: Model, monkeypatch: pytest.MonkeyPatch, draft: str) -> None:
    """The caller is back before, the compiler ends behind, and the next answer is as if nothing had been."""
    runner, evaluate = tiny.runner, tiny.runner.evaluate_rows
    kernel, begun, returned, compiled = to_compile(), threading.Event(), threading.Event(), threading.Event()

    def compiles_first(*arguments: Any, **options: Any) -> Any:
        if not compiled.is_set():
            begun.set()
            kernel(1.0)
            returned.wait()  # however fast the compiler is
            compiled.set()
        return evaluate(*arguments, **options)

    with tiny.session(draft) as session:
        conversation = Conversation(session)
        list(conversation.ask("Hello", sampling=GREEDY))
        monkeypatch.setattr(runner, "evaluate_rows", compiles_first)
        list(conversation.ask("Tell me a story.", sampling=GREEDY, stop=begun.is_set))
        assert not compiled.is_set()
        returned.set()
        assert conversation.n_turns == 1 and conversation.answer.finish_reason == "interrupted"
        list(conversation.ask("Who are you?", sampling=GREEDY))  # waits for the compiler
        assert compiled.is_set()
        row = conversation.encode(conversation.messages[:-1])
    with tiny.session("off") as fresh:
        assert list(fresh.generate(row, sampling=GREEDY)) == conversation.answer.tokens
