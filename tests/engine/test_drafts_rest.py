"""Where nothing matches and no module pays, `auto` looks for drafts less and less; a match brings it back at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from m2lite import Model, Request, Sampling
from m2lite.drafting.sequence import SequenceDrafts
from m2lite.engine.answer import Completion

N_NEW, N_AGAIN = 200, 60  # tokens that come for the first time, and that come again behind them


@pytest.fixture(scope="module")
def model(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model, ctx=512, draft="auto", heat=False) as opened:
        yield opened


def ids_of(model: Model) -> list[int]:
    """A prompt of 8 and an answer, in which no token stands twice up to where it repeats itself."""
    usual = [i for i in range(300, model.config.n_vocab) if i not in model.tokenizer.stop_ids]
    chosen = np.random.default_rng(7).permutation(usual)[: 8 + N_NEW].tolist()
    return [*chosen, *chosen[8 : 8 + N_AGAIN]]


def answer(model: Model, ids: list[int], draft: str) -> Completion:
    script = ids[8:]
    request = Request(
        prompt=ids[:8], script=script, sampling=Sampling(seed=1), draft=draft, ignore_stop=True, keep="nothing"
    )
    return model.submit(request).result()


def test_looks_become_few_and_come_back_with_a_match(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, ids = model.runner.drafter, ids_of(model)
    planner = drafter._planner
    plan = planner.plan

    def plan_no_modules(n_asks: int, behind: Sequence[int]) -> None:
        plan(n_asks, behind)
        planner.depth, planner.gain, planner.is_trial = 0, 0.0, False

    monkeypatch.setattr(planner, "plan", plan_no_modules)
    looks, rests, states = list[int](), list[int](), list[tuple[int, int]]()
    propose, rested = drafter.propose, drafter.rested

    def count_look(asks, n_rows):  # type: ignore[no-untyped-def]
        looks.append(len(asks[0].ids))
        return propose(asks, n_rows)

    def count_rest(own: SequenceDrafts, start: int, n_new: int) -> None:
        rested(own, start, n_new)
        rests.append(start)
        assert own.module_state is not None
        states.append((start + 1, own.module_state.n_computed))

    monkeypatch.setattr(drafter, "propose", count_look)
    monkeypatch.setattr(drafter, "rested", count_rest)
    found = answer(model, ids, "auto")
    assert found.tokens == ids[8:]
    n_new = 8 + N_NEW
    assert len([n for n in looks if n < n_new]) < N_NEW / 4 < N_NEW * 3 / 4 < len([n for n in rests if n < n_new])
    assert len([n for n in rests if n >= n_new]) <= 16  # until it is seen that tokens come again
    assert all(there == seen for there, seen in states)  # modules could go on from everywhere
    drafted = found.stats.drafted
    assert drafted is not None
    assert drafted.n_steps == len(looks) + len(rests)
    assert drafted.n_tokens == len(found.tokens) - 1  # the first came with the prompt


def test_what_was_rested_counts_in_the_plan(model: Model) -> None:
    planner = model.runner.drafter._planner
    before = planner.n_calls
    answer(model, ids_of(model), "auto")
    n = planner.n_calls - before
    assert N_NEW - 16 <= n <= N_NEW + N_AGAIN  # but for the rest that the end cut short
