"""Drafting changes when a token comes, never which: the bundled model and its modules, and a tiny random model."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tinymodel
from m2lite import BadModelError, Model, Sampling, UsageError
from m2lite.decode.compute import compute_thread
from m2lite.decode.drafts import Drafted
from m2lite.decode.session import Session
from m2lite.storage.sidecar import sidecar_path
from m2lite.text.template import encode_chat
from tests.model.test_refused import rewrite

ROOT = Path(__file__).resolve().parents[2]
ITEMS = json.loads((ROOT / "models" / "m2-tiny" / "heldout_prompts.json").read_text())
SETTINGS = [("mtp", 1), ("mtp", 2), ("mtp", 3), ("ngram", 1), ("ngram", 3), ("ngram", 7), ("auto", None), ("auto", 2)]
GREEDY, DRAWN, WILD = Sampling(temperature=0, seed=3), Sampling(seed=3), Sampling(2.0, 0, 1.0, seed=3)
SAMPLINGS = {"greedy": GREEDY, "drawn": DRAWN, "wild": WILD}
REPEATING = list(b"one two three four, one two three four, one two three four, one two ")

Setting = tuple[str, int | None]


@pytest.fixture(scope="module")
def model(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model) as opened:
        yield opened


def chat(model: Model, index: int) -> list[int]:
    return encode_chat(model.tokenizer, model.template, ITEMS[index]["messages"])


def answer(
    model: Model, prompt: list[int], setting: Setting, sampling: Sampling, n: int = 60, **options: object
) -> tuple[list[int], Drafted | None]:
    with model.session(*setting) as session:
        ids = list(session.generate(prompt, max_tokens=n, sampling=sampling, **options))  # type: ignore[arg-type]
        return ids, session.stats.drafted


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_setting_gives_the_same_ids(model: Model, sampling: str) -> None:
    """Also where the answer is longer than the model would make it, and its end is drafted and passed."""
    for prompt, ignore_stop in itertools.product((chat(model, 0), chat(model, 25), [5, 6, 7] * 9), (False, True)):
        plain, nothing = answer(model, prompt, ("off", None), SAMPLINGS[sampling], ignore_stop=ignore_stop)
        assert nothing is None
        for setting in SETTINGS:
            drafted, found = answer(model, prompt, setting, SAMPLINGS[sampling], ignore_stop=ignore_stop)
            assert drafted == plain, setting
            assert found is not None and found.n_tokens >= len(drafted) - 1


def test_sessions_side_by_side(model: Model) -> None:
    """Modules share their buffers and the gate, not what they know of a row."""
    settings = [("mtp", 3), ("ngram", 3), ("auto", None), ("off", None), ("mtp", 1)]
    prompts = [chat(model, i) for i in (0, 10, 25, 30, 35)]
    alone = [answer(model, p, ("off", None), DRAWN, ignore_stop=True)[0] for p in prompts]
    sessions = [model.session(*s) for s in settings]
    streams = [
        s.generate(p, max_tokens=60, sampling=DRAWN, ignore_stop=True) for s, p in zip(sessions, prompts, strict=True)
    ]
    together = [list(ids) for ids in zip(*streams, strict=True)]
    assert [list(ids) for ids in zip(*together, strict=True)] == alone
    for session in sessions:
        session.close()


@pytest.mark.parametrize("setting", [("mtp", 3), ("ngram", 7), ("auto", None)])
def test_leaving_within_an_accepted_run_and_going_on(model: Model, setting: Setting) -> None:
    """As one does who has found a stop string: what was yielded is kept, and nothing else."""
    prompt, sampling = [5, 6, 7] * 9, GREEDY
    whole, _ = answer(model, prompt, ("off", None), sampling, ignore_stop=True)
    for n_taken in range(1, 9):
        with model.session(*setting) as session:
            ids = session.generate(prompt, max_tokens=60, sampling=sampling, ignore_stop=True)
            taken = list(itertools.islice(ids, n_taken))
            assert session.tokens == prompt + whole[:n_taken] and taken == whole[:n_taken]
            rest = list(session.generate((), max_tokens=60 - n_taken, sampling=sampling, ignore_stop=True))
            assert rest == whole[n_taken:]


@pytest.mark.parametrize("setting", [("mtp", 3), ("ngram", 7), ("auto", None)])
def test_a_second_turn_after_drafts_equals_a_fresh_one(model: Model, setting: Setting) -> None:
    """The row is cut and goes on in another way; pages, modules and lookup follow."""
    first, second = chat(model, 25), chat(model, 10)
    for keep in (len(first) + 20, len(first) - 3, 2):
        with model.session(*setting) as session, model.session("off") as plain:
            list(session.generate(first, max_tokens=40, sampling=DRAWN, ignore_stop=True))
            row = session.tokens[:keep] + second
            session.set_tokens(row)
            got = list(session.generate((), max_tokens=60, sampling=DRAWN))
            assert got == list(plain.generate(row, max_tokens=60, sampling=DRAWN))


@pytest.mark.parametrize("setting", [("mtp", 3), ("ngram", 7)])
def test_an_interrupted_answer_keeps_what_was_settled(model: Model, setting: Setting) -> None:
    prompt, sampling = [5, 6, 7] * 9, GREEDY
    whole, _ = answer(model, prompt, ("off", None), sampling, ignore_stop=True)
    for n_asked in range(20, 120, 7):
        asked = itertools.count()
        with model.session(*setting) as session:
            stop: Callable[[], bool] = lambda asked=asked, most=n_asked: next(asked) >= most  # noqa: E731
            first = list(session.generate(prompt, max_tokens=60, sampling=sampling, ignore_stop=True, stop=stop))
            assert session.finish_reason == "interrupted" and first == whole[: len(first)]
            rest = list(session.generate((), max_tokens=60 - len(first), sampling=sampling, ignore_stop=True))
            assert first + rest == whole


@pytest.mark.parametrize("n_prompt", [60, 63, 64])
@pytest.mark.parametrize("setting", [("mtp", 3), ("ngram", 7), ("auto", None)])
def test_the_end_of_the_context(bundled_model: Path, n_prompt: int, setting: Setting) -> None:
    """Drafts never need a position that is not there, at the end of a page and of the pool."""
    with Model.open(bundled_model, ctx=128) as model:
        prompt = ([5, 6, 7] * 30)[:n_prompt]
        plain, _ = answer(model, prompt, ("off", None), GREEDY, 1000, ignore_stop=True)
        assert len(plain) == 129 - n_prompt
        assert answer(model, prompt, setting, GREEDY, 1000, ignore_stop=True)[0] == plain


def test_drafts_do_not_take_the_last_pages_of_others(bundled_model: Path) -> None:
    """Two sessions fill the pool: one page each; drafts beyond the page are not made, and both answers end well."""
    with Model.open(bundled_model, ctx=128) as model, model.session("mtp") as a, model.session("mtp") as b:
        expected = list(model.session("off").generate([5, 6, 7] * 9, max_tokens=37, ignore_stop=True))
        for session in (a, b):
            got = list(session.generate([5, 6, 7] * 9, max_tokens=37, ignore_stop=True))
            assert len(session.tokens) == 64
            assert len(got) == len(expected)


def test_prompt_lookup_on_a_model_without_modules(opened: Callable[[str], Model]) -> None:
    model = opened("random")
    assert model.engine.drafting.n_modules == 0
    plain, _ = answer(model, REPEATING, ("off", None), GREEDY, 200, ignore_stop=True)
    drafted, found = answer(model, REPEATING, ("ngram", 7), GREEDY, 200, ignore_stop=True)
    assert drafted == plain and found is not None
    assert found.tokens_per_step is not None and found.tokens_per_step > 1.3  # its greedy answers go in circles
    with pytest.raises(UsageError, match="without prediction modules"):
        model.session("mtp")


def test_end_tokens_within_a_draft(opened: Callable[[str], Model]) -> None:
    """The script's end is foreseen by lookup, since it stands in the prompt; what follows it is not yielded."""
    model = opened("reply")
    said = list(model.session("off").generate("say\n"))
    prompt = [*model.tokenizer.encode("say\n"), *said, tinymodel.END, *model.tokenizer.encode("say\n")]
    for setting in (("ngram", 7), ("auto", None)):
        with model.session(*setting) as session:
            assert list(session.generate(prompt)) == said
            assert session.finish_reason == "stop" and session.tokens[-1] == tinymodel.END
            assert session.tokens[len(prompt) : -1] == said
            drafted = session.stats.drafted
            assert drafted is not None and drafted.n_tokens == len(said)  # the first comes with the prompt


def test_first_drafts_are_mostly_right(model: Model) -> None:
    """Held-out prompts, greedy and drawn: with the model's own random number a module draws what the model draws."""
    for sampling, least in ((GREEDY, 0.75), (Sampling(seed=1), 0.75)):
        found = Drafted()
        for index in range(0, len(ITEMS), 3):
            drafted = answer(model, chat(model, index), ("mtp", 3), sampling)[1]
            assert drafted is not None
            found.include(drafted)
        assert found.acceptance[0] is not None and found.acceptance[0] >= least, found


def drafts_of(session: Session, row: list[int], sampling: Sampling) -> list[int]:
    """What the modules expect behind `row`, whose last token is not evaluated."""
    drafter = session._drafter
    assert drafter is not None
    timeline = session._timeline

    def call() -> list[int]:
        if timeline.length > len(row) - 1:
            timeline.rewind(len(row) - 1)
        drafter.follow(row)
        return drafter.propose(100, timeline, sampling, 0)

    return compute_thread().run(call)


def test_modules_that_catch_up_say_what_modules_that_followed_say(model: Model) -> None:
    """After an answer with every step drafted, after one without a draft, and in a row that was just read."""
    prompt, sampling = chat(model, 25), GREEDY
    found = []
    for setting, n in ((("mtp", 3), 40), (("mtp", 1), 40), (("mtp", 3), 1)):
        with model.session(*setting) as session:
            tokens, _ = answer(model, prompt, ("off", None), sampling, 40, ignore_stop=True)
            if n == 1:
                list(session.generate([*prompt, *tokens[:-1]], max_tokens=1, sampling=sampling, ignore_stop=True))
            else:
                list(session.generate(prompt, max_tokens=n, sampling=sampling, ignore_stop=True))
            row = [*prompt, *tokens]
            assert session.tokens == row
            drafter = session._drafter
            assert drafter is not None
            drafter._most = drafter._n_modules = 3
            found.append(drafts_of(session, row, sampling))
    assert found[0] == found[1] == found[2] and len(found[0]) == 3


def test_modules_at_work_now_and_then(bundled_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are not looked at leave to the modules what those need: they say what they always say, bit for bit."""
    said = []
    with Model.open(bundled_model, draft="auto") as model:
        gate, plans, prompt = model.engine.gate, list[int](), chat(model, 25)

        def plan(n_behind: int, n_left: int) -> None:
            plans.append(n_behind)
            gate.n_modules_now = 3 * (len(plans) % 2)
            gate.is_quick, gate.is_trying = True, bool(gate.n_modules_now)
            gate.next_plan = gate.n_steps + 7

        monkeypatch.setattr(gate, "plan", plan)
        monkeypatch.setattr(gate, "lookup_drafts", lambda length: 0)
        for setting in (("mtp", 3), ("auto", None)):
            with model.session(*setting) as session:
                ids = list(session.generate(prompt, max_tokens=400, sampling=DRAWN, ignore_stop=True))
                drafter, drafted = session._drafter, session.stats.drafted
                assert drafter is not None and drafted is not None
                drafter._is_auto, drafter._lookup, drafter._n_modules = False, None, 3
                said.append((ids, drafts_of(session, [*prompt, *ids], DRAWN), drafter._shares))
    assert max(plans) >= 7 and 60 <= 2 * drafted.sources["mtp"] < 1.5 * drafted.n_steps, (plans, drafted)
    assert said[0] == said[1] and len(said[0][2]) == 3


def test_a_sidecar_of_another_model(bundled_model: Path, tmp_path: Path) -> None:
    """Beside the model it is left alone, and that is said; asked for by name it is an error."""
    path = tmp_path / bundled_model.name
    shutil.copy(bundled_model, path)
    rewrite(sidecar_path(bundled_model), sidecar_path(path), {"m2lite.mtp.trunk": "0" * 64})
    with Model.open(path, ctx=64) as model:
        assert model.engine.drafting.n_modules == 0
        assert "is not used" in (model.engine.drafting.warning or "") and "'0000" in model.engine.drafting.warning
        assert model.kv_bytes == model.engine.pool.n_bytes
    with pytest.raises(BadModelError, match="belong to trunk '0000"):
        Model.open(path, draft="mtp")
    with pytest.raises(BadModelError, match="belong to trunk '0000"):
        Model.open(path, mtp=sidecar_path(path))
    with Model.open(path, mtp=sidecar_path(bundled_model)) as model:
        assert model.engine.drafting.n_modules == 3


def test_a_damaged_sidecar(bundled_model: Path, tmp_path: Path) -> None:
    path = tmp_path / bundled_model.name
    shutil.copy(bundled_model, path)
    sidecar_path(path).write_bytes(sidecar_path(bundled_model).read_bytes()[:1000])
    with Model.open(path, ctx=64) as model:
        assert model.engine.drafting.n_modules == 0 and model.engine.drafting.warning
    with pytest.raises(BadModelError):
        Model.open(path, draft="mtp")


def test_bad_settings(bundled_model: Path, model_files: dict[str, Path]) -> None:
    for options, message in (
        ({"draft": "always"}, "Draft mode 'always' does not exist"),
        ({"draft_tokens": 8}, "8 draft tokens were asked for. Use 1 to 7"),
        ({"draft_tokens": 0}, "0 draft tokens"),
        ({"draft": "off", "mtp": "x.gguf"}, "--mtp was given with --draft off"),
        ({"mtp": "nowhere.gguf"}, r"nowhere.gguf does not exist"),
    ):
        with pytest.raises(UsageError, match=message):
            Model.open(bundled_model, **options)
    with pytest.raises(UsageError, match="there are no prediction modules"):
        Model.open(model_files["random"], draft="mtp")


def test_fewer_modules_take_less_memory(bundled_model: Path) -> None:
    with (
        Model.open(bundled_model, ctx=64, draft_tokens=1) as one,
        Model.open(bundled_model, ctx=64, draft="off") as none,
    ):
        layer = none.kv_bytes // none.config.n_layers
        assert one.kv_bytes == none.kv_bytes + layer == one.engine.pool.n_bytes
        assert one.engine.drafting.n_modules == 1


def test_counts() -> None:
    found = Drafted()
    found.add("mtp", 3, 3, 4)  # all right, and the token behind them
    found.add("mtp", 3, 1, 2)
    found.add("ngram", 2, 0, 1)
    found.add("", 0, 0, 1)
    found.add("mtp", 3, 2, 2)  # the answer ended with the second draft
    assert (found.n_steps, found.n_tokens, found.n_proposed, found.n_accepted) == (5, 10, 11, 6)
    assert found.reached == [4, 3, 1] and found.accepted == [3, 2, 1]
    assert found.sources == {"mtp": 3, "ngram": 1} and found.tokens_per_step == 2.0
    other = Drafted()
    other.add("ngram", 5, 5, 6)
    other.include(found)
    assert other.reached == [5, 4, 2, 1, 1] and other.n_steps == 6
