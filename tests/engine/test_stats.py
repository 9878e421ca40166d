"""What an answer is said to have cost: the modules' time too. A clock that only they move."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from m2lite import Model
from m2lite.engine import loop as loop_module


def test_drafting_is_in_the_time_of_an_answer(bundled_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each proposal, and ten for each call that it learns of; the prompt's are the prompt's."""
    now = 0.0
    with Model.open(bundled_model, ctx=256, draft="mtp", draft_tokens=1) as model:
        drafter = model.runner.drafter
        propose, computed = drafter.propose, drafter.computed

        def slow_propose(*args: Any) -> list[list[int]]:
            nonlocal now
            now += 1
            return propose(*args)

        def slow_computed(parts: Sequence[Any], call: Any) -> None:
            nonlocal now
            assert call.seconds == 0  # the drafter learns what the call alone took
            now += 10
            computed(parts, call)

        monkeypatch.setattr(loop_module, "time", SimpleNamespace(perf_counter=lambda: now))
        monkeypatch.setattr(drafter, "propose", slow_propose)
        monkeypatch.setattr(drafter, "computed", slow_computed)
        with model.session() as session:
            list(session.generate([5, 6, 7], max_tokens=8, ignore_stop=True))
        stats = session.stats
    assert stats.drafted is not None and stats.prompt_s == stats.first_token_s == 10
    assert stats.decode_s == 11 * stats.drafted.n_steps > 0
