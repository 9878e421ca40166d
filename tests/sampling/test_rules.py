"""Penalties and log probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from m2lite import Model, Sampling, UsageError
from m2lite.dialogue.conversation import Conversation
from m2lite.sampling.rules import Logprobs, Penalties

LOGITS = np.random.default_rng(5).normal(0, 3, 50).astype(np.float32)


@pytest.fixture(scope="module")
def tiny(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model) as model:
        yield model


def test_penalties_are_the_formula() -> None:
    rule, before = Penalties(Sampling(presence_penalty=0.5, frequency_penalty=0.25)), LOGITS.copy()
    assert rule.apply(LOGITS) is LOGITS
    for token in (3, 7, 3, 3):
        rule.push(token)
    expected = LOGITS.copy()
    expected[3] -= np.float32(0.5 + 0.25 * 3)
    expected[7] -= np.float32(0.75)
    np.testing.assert_array_equal(rule.apply(LOGITS), expected)
    np.testing.assert_array_equal(LOGITS, before)


def test_logprobs_are_the_models() -> None:
    rule = Logprobs(3)
    rule.push(1)  # nobody drew it
    rule.apply(LOGITS)
    rule.push(9)
    wide = LOGITS.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum())
    assert rule.found[0] is None
    noted = rule.found[1]
    assert noted is not None and noted.token == 9
    assert noted.logprob == pytest.approx(expected[9], rel=1e-12)
    best = np.argsort(-wide)[:3]
    assert [token for token, _ in noted.likeliest] == best.tolist()
    assert [logprob for _, logprob in noted.likeliest] == pytest.approx(expected[best], rel=1e-12)


@pytest.mark.parametrize("sampling", [{"presence_penalty": 2.1}, {"frequency_penalty": float("nan")}])
def test_penalties_that_are_none(sampling: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="penalty"):
        Sampling(**sampling)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_nothing(tiny: Model, temperature: float) -> None:
    """Ids and log probabilities with rules are those without drafts, also where a budget closes the thinking."""
    sampling = Sampling(temperature, seed=4, presence_penalty=0.4, frequency_penalty=0.8)
    found = []
    for draft in ("off", "auto", "mtp", "ngram"):
        with tiny.session(draft) as session:
            conversation = Conversation(session)
            list(conversation.ask("Tell me a story.", sampling=sampling, logprobs=2, think_tokens=3, max_tokens=150))
            answer = conversation.answer
            assert len(answer.logprobs) == len(answer.tokens)
            assert all(n is None or n.token == t for n, t in zip(answer.logprobs, answer.tokens, strict=True))
            found.append((answer.tokens, answer.logprobs))
    assert all(each == found[0] for each in found)
    n_none = sum(n is None for n in found[0][1])
    assert n_none == 3 and found[0][1][0] is not None  # the ids that closed the thinking, and only those


def test_what_was_said_is_said_less(tiny: Model) -> None:
    def most_often(sampling: Sampling) -> int:
        with tiny.session() as session:
            tokens = list(session.generate("Once upon a time", sampling=sampling, max_tokens=200, ignore_stop=True))
        return int(np.bincount(tokens).max())

    assert most_often(Sampling(0, seed=1, frequency_penalty=2.0)) < most_often(Sampling(0, seed=1)) / 2


def test_resumed_answer_goes_on_with_its_counts(tiny: Model) -> None:
    sampling = Sampling(1.0, seed=3, frequency_penalty=1.0)
    with tiny.session() as session:
        whole = Conversation(session)
        list(whole.ask("Tell me a story.", sampling=sampling, max_tokens=120))
    with tiny.session() as session:
        parted = Conversation(session)
        list(parted.ask("Tell me a story.", sampling=sampling, max_tokens=50))
        list(parted.resume(sampling=sampling, max_tokens=70))
        assert parted.answer.tokens == whole.answer.tokens
