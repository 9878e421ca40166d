"""Drafting changes when a token comes, never which: the bundled model and its modules, alone and side by side."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from m2lite import Model, Sampling
from m2lite.drafting.cost import Estimate
from m2lite.drafting.drafted import Drafted
from m2lite.drafting.drafter import Drafter
from m2lite.engine.thread import Stopped, compute_thread
from m2lite.storage import syscalls
from m2lite.text.template import encode_chat
from tests.drafting.harness import Loop, Sequence_, drafter_of
from tests.drafting.test_planner import planner_of

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


@dataclass
class TimedLoop(Loop):
    """Calls of one row take a second, and each row more so much."""

    row_s: float = 0.0

    def took(self, n_rows: int, seconds: float) -> float:
        return 1.0 + self.row_s * (n_rows - 1)


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


def computed_before(model: Model, loop: Loop, index: int, n: int, n_followed: list[int]) -> Sequence_:
    """A sequence whose first n positions lie in the cache, as somebody else computed them."""
    s = loop.add(chat(model, index), 80, GREEDY, ("mtp", 3))
    assert s.own is not None
    compute_thread().run(lambda: model.runner.evaluate(s.timeline, 0, s.ids[:n]))
    s.own.begin(s.ids, n, n_followed)
    return s


def test_modules_draft_only_where_they_have_seen_all(model: Model, drafter: Drafter) -> None:
    """Positions of a prefix cache without their K and V are a gap; the others draft, and the ids are the same."""
    plain, _ = answer(model, drafter, chat(model, 25), ("off", None), GREEDY, 80)
    for n_followed, n_usable in (([], 0), ([19, 20, 20], 0), ([20], 1), ([20, 20, 5], 2), ([20, 20, 20], 3)):
        loop = Loop(model, drafter)
        s = computed_before(model, loop, 25, 20, n_followed)
        loop.run()
        assert s.own is not None and s.own.n_usable == n_usable
        assert s.ids[s.n_prompt :] == plain
        assert len(s.own.stats.reached) == n_usable
        assert all(len(s.ids) - 6 < n <= s.timeline.length for n in s.own.followed[:n_usable])
        loop.close()


def test_a_prefix_that_was_followed_is_as_good_as_one_that_is_computed(model: Model, drafter: Drafter) -> None:
    """The K and V of modules lie in pages that another sequence shares."""
    found = [Drafted(), Drafted()]
    for index in range(0, len(ITEMS), 3):
        loop = Loop(model, drafter)
        first = loop.add(chat(model, index), 60, GREEDY, ("mtp", 3))
        loop.run()
        assert first.own is not None
        n = len(first.ids) - 8
        assert min(first.own.followed) >= n
        later = loop.add(first.ids[: n + 1], 40, GREEDY, ("mtp", 3))
        again = loop.add(first.ids[: n + 1], 40, GREEDY, ("mtp", 3))
        assert later.own is not None and again.own is not None
        later.timeline = compute_thread().run(first.timeline.fork)
        compute_thread().run(partial(later.timeline.rewind, n))
        later.own.begin(later.ids, n, first.own.followed)
        loop.run()
        assert later.ids == again.ids
        found[0].include(again.own.stats)
        found[1].include(later.own.stats)
        loop.close()
    assert found[1].n_accepted > 0.97 * found[0].n_accepted > 100, found


def test_states_take_bounded_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where modules are not at work, states are kept up to a bound, and then the modules stay behind."""
    monkeypatch.setattr("m2lite.drafting.drafter._MOST_KEPT", 8 * 100 * 4 * model.config.n_embd)
    drafter = drafter_of(model)
    loop = Loop(model, drafter, n_chunk=16)
    drafter._planner.depth, drafter._planner._next_plan, drafter._planner._n_asks = 0, 1 << 30, 8
    for i in range(8):
        loop.add([5, 6, 7] * 40 if i % 2 else chat(model, i)[:30], 40, GREEDY)
    loop.run()
    for i, s in enumerate(loop.sequences):
        assert s.own is not None and s.own.module_state is not None
        assert s.own.n_usable == (0 if i % 2 else 3)
        assert s.own.module_state.n_bytes < 200 * 4 * model.config.n_embd
    loop.close()


def test_modules_read_prompts_at_once(model: Model, drafter: Drafter) -> None:
    loop = Loop(model, drafter, n_chunk=100)
    s = loop.add([5, 6, 7] * 200, 5, GREEDY, ("mtp", 3))
    while s.timeline.length < 500:
        compute_thread().run(loop.step)
        assert s.own is not None and s.own.module_state is not None and s.own.followed == [s.timeline.length] * 3
        assert s.own.module_state.n_bytes < 400 * 4 * model.config.n_embd
    loop.run()
    loop.close()


@pytest.mark.parametrize("setting", [("mtp", 3), ("ngram", 7), ("auto", None)])
def test_calls_that_are_stopped_change_nothing(model: Model, drafter: Drafter, setting: Setting) -> None:
    """A call is proposed for and then not computed: what is said later is the same, as are the modules' drafts."""
    expected, found = answer(model, drafter, chat(model, 25), setting, GREEDY, 60)
    loop = Loop(model, drafter)
    s = loop.add(chat(model, 25), 60, GREEDY, setting)
    loop.stops = iter([False, True, True, False, True, False, False, True] * 40)
    while not s.is_done:
        with suppress(Stopped):
            compute_thread().run(loop.step)
    loop.close()
    assert s.ids[s.n_prompt :] == expected and s.own is not None and found is not None
    assert setting[0] == "auto" or s.own.stats.as_dict() == found.as_dict()


def test_kernels_of_modules_are_loaded_before_the_first_answer(model: Model, drafter: Drafter) -> None:
    def call() -> None:
        timeline = model.runner.pool.timeline()
        model.runner.evaluate(timeline, 0, [0] * 5)
        drafter.load_module_kernels(timeline, 5)
        timeline.release()

    is_open = set(drafter._open)  # which keeps them: others' sequences may be collected at any moment
    compute_thread().run(call)
    assert set(drafter._open) == is_open


@pytest.mark.parametrize("n_prompt", [60, 63, 64])
@pytest.mark.parametrize("setting", [("mtp", 3), ("ngram", 7), ("auto", None)])
def test_the_end_of_a_page_and_of_the_pool(bundled_model: Path, n_prompt: int, setting: Setting) -> None:
    """Drafts never need a position that is not there."""
    with Model.open(bundled_model, ctx=128) as model:
        drafter, prompt = drafter_of(model), ([5, 6, 7] * 30)[:n_prompt]
        plain, _ = answer(model, drafter, prompt, ("off", None), GREEDY, 129 - n_prompt, ignore_stop=True)
        assert answer(model, drafter, prompt, setting, GREEDY, 129 - n_prompt, ignore_stop=True)[0] == plain


def test_auto_takes_what_pays(model: Model) -> None:
    """Whatever was measured before: with seconds that are set, modules are at work, or lookup, or nothing."""
    for slow, is_drafted in ((0.0, True), (3.0, False)):
        drafter = drafter_of(model)
        for i in range(4):
            loop = TimedLoop(model, drafter, row_s=slow)
            s = loop.add(chat(model, i), 300, GREEDY, ignore_stop=True)
            loop.run()
            loop.close()
        assert s.own is not None
        share = sum(s.own.stats.sources.values()) / s.own.stats.n_steps
        assert share > 0.8 if is_drafted else share < 0.2, (slow, s.own.stats)


def test_fixed_settings_teach_nothing(model: Model) -> None:
    drafter = drafter_of(model)
    before = json.dumps(drafter._planner.learnt())
    for setting in (("mtp", 3), ("ngram", 3)):
        answer(model, drafter, chat(model, 0), setting, GREEDY)
    assert json.dumps(drafter._planner.learnt()) == before
    answer(model, drafter, chat(model, 0), ("auto", None), GREEDY)
    assert json.dumps(drafter._planner.learnt()) != before


@pytest.mark.skipif(not syscalls.AVAILABLE, reason="models are streamed on Linux only")
def test_a_streamed_model_cuts_off_drafts_that_it_would_read_for(bundled_model: Path) -> None:
    """Where experts take long to read, drafts that are as often wrong; the ids are the same."""
    prompt, n_cut = [5, 6, 7] * 20, list[int]()
    with Model.open(bundled_model, load="direct", ctx=256, heat=False) as model:
        stream = model.runner.stream
        assert stream is not None
        compute_thread().run(partial(stream.resize, 6 * int(stream.ledger.sizes[0])))
        for bytes_per_s in (1e15, 1.0):
            drafter = drafter_of(model)
            plain, _ = answer(model, drafter, prompt, ("off", None), GREEDY, 60, ignore_stop=True)
            missing = drafter._missing
            assert missing is not None
            missing._second.value, missing._second.n, missing._second.rate = bytes_per_s, 1e9, 0.0
            drafter.chances.by_length = [Estimate(0.5, 1e9, 0.0) for _ in drafter.chances.by_length]
            drafter._planner.lookup_drafts = lambda length, n_rows: 7  # type: ignore[method-assign]
            drafter._planner.choose = lambda chances, n_rows, n_most: [*map(len, chances)]  # type: ignore[method-assign]
            drafted, found = answer(model, drafter, prompt, ("auto", None), GREEDY, 60, ignore_stop=True)
            assert drafted == plain and found is not None
            n_cut.append(missing.n_cut)
    assert n_cut[0] == 0 < n_cut[1]


def test_a_streamed_model_verifies_nothing_that_costs_more_to_read_than_it_saves() -> None:
    planner = planner_of(0)
    for _ in range(50):
        planner.cost.saw(1, 0, 496, 1.0)
        planner.cost.saw(2, 1, 900, 1.2)
    for missing, expected in ((0.0, 7), (0.2, 7), (20.0, 0)):
        planner.missing = missing
        planner.plan(1, [0])
        assert planner.lookup_drafts(32, 1) == planner.choose([[0.95] * 7], 1, 64)[0] == expected


def test_modules_read_what_is_more_than_a_call_in_several(model: Model, drafter: Drafter) -> None:
    """Whatever the room of a call, and whoever shares it."""
    modules, found = drafter.modules, []
    assert modules is not None
    buffers = modules._buffers
    for n_rows in (buffers.n_rows, 7):
        modules._buffers = copy(buffers)
        modules._buffers.n_rows = n_rows
        loop = Loop(model, drafter)
        for i in range(5):
            loop.add(chat(model, i), 40, GREEDY, ("mtp", 3), i)
        loop.run()
        loop.close()
        found.append([(s.ids, s.own.stats.as_dict()) for s in loop.sequences if s.own is not None])
    modules._buffers = buffers
    assert found[0] == found[1] and len(found[0]) == 5
