"""Drafting changes when a token comes, never which: the bundled model and its modules, alone and side by side."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from m2lite import Model, Sampling
from m2lite.drafting.drafted import Drafted
from m2lite.drafting.drafter import Drafter
from m2lite.text.template import encode_chat
from tests.drafting.harness import Loop, drafter_of

ROOT = Path(__file__).resolve().parents[2]
ITEMS = json.loads((ROOT / "models" / "m2-tiny" / "heldout_prompts.json").read_text())
SETTINGS = [("mtp", 1), ("mtp", 2), ("mtp", 3), ("ngram", 1), ("ngram", 3), ("ngram", 7), ("auto", None), ("auto", 2)]
GREEDY, DRAWN, WILD = Sampling(temperature=0, seed=3), Sampling(seed=3), Sampling(2.0, 0, 1.0, seed=3)
SAMPLINGS = {"greedy": GREEDY, "drawn": DRAWN, "wild": WILD}

Setting = tuple[str, int | None]


@pytest.fixture(scope="module")
def model(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model, sequences=16) as opened:
        yield opened


@pytest.fixture(scope="module")
def drafter(model: Model) -> Drafter:
    return drafter_of(model)


def chat(model: Model, index: int) -> list[int]:
    return encode_chat(model.tokenizer, model.template, ITEMS[index]["messages"])


def answer(
    model: Model,
    drafter: Drafter,
    prompt: list[int],
    setting: Setting,
    sampling: Sampling,
    n: int = 60,
    **options: bool,
) -> tuple[list[int], Drafted | None]:
    loop = Loop(model, drafter)
    s = loop.add(prompt, n, sampling, setting, **options)
    loop.run()
    loop.close()
    return s.ids[s.n_prompt :], None if s.own is None else s.own.stats


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_setting_gives_the_same_ids(model: Model, drafter: Drafter, sampling: str) -> None:
    """Also where the answer is longer than the model would make it, and its end is drafted and passed."""
    for prompt, ignore in itertools.product((chat(model, 0), chat(model, 25), [5, 6, 7] * 9), (False, True)):
        plain, nothing = answer(model, drafter, prompt, ("off", None), SAMPLINGS[sampling], ignore_stop=ignore)
        assert nothing is None
        for setting in SETTINGS:
            drafted, found = answer(model, drafter, prompt, setting, SAMPLINGS[sampling], ignore_stop=ignore)
            assert drafted == plain, setting
            assert found is not None and found.n_tokens == len(drafted) - 1


@pytest.mark.parametrize("n_chunk", [0, 7])
def test_all_modules_draft_for_many_sequences_as_for_one(model: Model, drafter: Drafter, n_chunk: int) -> None:
    """They say the same side by side, beside prompts in parts, with other settings beside them."""
    loop, expected, found = Loop(model, drafter, n_chunk), [], Drafted()
    for i in range(8):
        ids, drafted = answer(model, drafter, chat(model, i), ("mtp", 3), GREEDY, 80)
        assert drafted is not None
        found.include(drafted)
        expected.append((ids, drafted.as_dict()))
        loop.add(chat(model, i), 80, GREEDY, ("mtp", 3), i)
        loop.add(chat(model, i), 30, GREEDY, SETTINGS[i] if i % 3 else ("off", None), i)
    loop.run()
    for i, (ids, drafted) in enumerate(expected):
        same, other = loop.sequences[2 * i : 2 * i + 2]
        assert same.own is not None and same.own.stats.as_dict() == drafted
        assert same.ids[same.n_prompt :] == ids and other.ids[other.n_prompt :] == ids[:30]
    loop.close()
    assert all(share is not None and share > 0.75 for share in found.acceptance) and len(found.acceptance) == 3
