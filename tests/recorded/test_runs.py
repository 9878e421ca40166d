"""What the program said when runs.json was recorded, it says today: every run, id by id, through the same door.

Where a run has changed on purpose: `python -m tests.recorded --again NAME`, and say in the commit why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest

from m2lite.simd import jit
from tests import tinymodel
from tests.conftest import Run
from tests.recorded import doors
from tests.recorded.models import FORMATS, NAMES, hash_weights, write_models
from tests.recorded.record import RUNS, Case, Said, options_of, parts_of, read_json, text_of

RECORD = read_json(RUNS)
ENTRIES: dict[str, dict[str, Any]] = RECORD["runs"]
LOGPROB_DIGITS = 2e-5  # the record has five digits, and the logarithm is that of the machine's C library


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def own_caches(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is there that another run has left but compiled kernels: their place is chosen when `jit` is imported."""
    assert jit.CACHE_DIR
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def command(run_inline: Run) -> doors.Command:
    def run(*arguments: Any) -> str:
        done = run_inline(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("name", ENTRIES)
def test_a_run_says_what_it_said(name: str, paths: dict[str, Path], command: doors.Command, tmp_path: Path) -> None:
    entry = ENTRIES[name]
    said, happened = doors.run(entry["case"], paths[entry["case"]["model"]], tmp_path, command)
    for found, recorded in zip(said, entry["said"], strict=True):
        compare(found, recorded)
    assert happened >= set(entry["happened"])


def compare(found: Said, recorded: Said) -> None:
    noted, expected = found.pop("logprobs", []), recorded.get("logprobs", [])
    assert found == {key: value for key, value in recorded.items() if key != "logprobs"}
    for each, other in zip(noted, expected, strict=True):
        assert (each is None) == (other is None)
        if each is not None:
            assert each[0] == pytest.approx(other[0], abs=LOGPROB_DIGITS) and each[1:] == other[1:]


@pytest.mark.parametrize("name", NAMES)
def test_the_models_are_those_that_were_recorded(name: str, paths: dict[str, Path]) -> None:
    assert hash_weights(paths[name]) == RECORD["models"][name], (
        f"{name} is another model: what NumPy draws or gguf quantises has changed, or m2-tiny was trained again. "
        "No run of it can be compared. Record with the commit before: python -m tests.recorded --again '*'"
    )


@pytest.mark.parametrize("change", [{"seed": 4}, {"temperature": 1.7}, {"max_tokens": 39}])
def test_another_case_says_something_else(
    change: dict[str, float], paths: dict[str, Path], command: doors.Command, tmp_path: Path
) -> None:
    """So the comparison can fail."""
    entry = json.loads(json.dumps(ENTRIES["Q6_K turns"]))
    options_of(entry["case"])[0].update(change)
    said, _ = doors.run(entry["case"], paths["Q6_K"], tmp_path, command)
    with pytest.raises(AssertionError):
        compare(said[0], entry["said"][0])


# --- what the record holds


def steps(case: Case) -> list[str]:
    return [step["do"] for step in case.get("steps", ())]


def prompts(case: Case) -> list[str]:
    return [text_of(part["prompt"]) for part in parts_of(case) if "prompt" in part]


def any_option(is_so: Callable[[dict[str, Any]], bool]) -> Callable[[Case], bool]:
    return lambda case: any(is_so(options) for options in options_of(case))


def value(name: str, *values: Any) -> Callable[[Case], bool]:
    return any_option(lambda options: options.get(name) in values)


def given(name: str, low: float) -> Callable[[Case], bool]:
    return any_option(lambda options: options.get(name, low - 1) >= low)


# A value of a factor -> whether a case has it.
FACTORS: dict[str, Callable[[Case], bool]] = {
    **{f"door {name}": lambda case, name=name: case["door"] == name  # type: ignore[misc]
       for name in ("chat", "generate", "batch", "batch command")},
    **{f"draft {name}": lambda case, name=name: case["draft"][0] == name  # type: ignore[misc]
       for name in ("off", "ngram", "mtp", "auto")},
    **{f"kv {name}": lambda case, name=name: case["kv"] == name for name in ("f16", "q8_0")},  # type: ignore[misc]
    **{name: lambda case, name=name: name in steps(case)  # type: ignore[misc]
       for name in ("resume", "regenerate", "undo", "results", "restore")},
    "interrupted": lambda case: any("stop_after" in step for step in case.get("steps", ())),
    "several turns": lambda case: steps(case).count("ask") > 1,
    "several in flight": lambda case: case.get("inflight", 1) > 1,
    "short prompt": lambda case: any(len(text) < 20 for text in prompts(case)),
    "long prompt": lambda case: any(len(text) > 500 for text in prompts(case)),
    "repetitive prompt": lambda case: any(text.count("one two three") > 5 for text in prompts(case)),
    "no template": lambda case: case.get("no_template", False),
    "system message": lambda case: "system" in case,
    "tools": lambda case: "tools" in case,
    "thinking kept": lambda case: case.get("keep_thinking", False),
    "greedy": value("temperature", 0),
    "cool": value("temperature", 0.3, 0.5, 0.7),
    "hot": value("temperature", 1.3),
    "plain sampling": any_option(lambda options: "temperature" not in options),
    "top_k": given("top_k", 1),
    "no top_k, no top_p": value("top_k", 0),
    "top_p": value("top_p", 0.9),
    "min_p": given("min_p", 0.01),
    "presence penalty": given("presence_penalty", 0.01),
    "frequency penalty": given("frequency_penalty", 0.01),
    "frequency reward": any_option(lambda options: options.get("frequency_penalty", 0) < 0),
    "no thinking": value("think_tokens", 0),
    "thinking closed early": value("think_tokens", *range(1, 15)),
    "thinking closed late": given("think_tokens", 20),
    "no thinking budget": any_option(lambda options: "think_tokens" not in options),
    "schema": any_option(lambda options: "schema" in options),
    "stop texts": any_option(lambda options: "stop_texts" in options),
    "logprobs": given("logprobs", 0),
    "max_tokens": given("max_tokens", 1),
}  # fmt: skip


@pytest.mark.parametrize("factor", FACTORS)
def test_every_value_is_in_three_runs_and_in_one_of_a_random_model(factor: str) -> None:
    found = [entry["case"] for entry in ENTRIES.values() if FACTORS[factor](entry["case"])]
    assert len(found) >= 3
    assert factor == "draft mtp" or any(case["model"] in FORMATS for case in found)


def test_there_are_enough_runs_of_each_model() -> None:
    models = [entry["case"]["model"] for entry in ENTRIES.values()]
    assert all(models.count(name) >= 11 for name in FORMATS)
    assert len(models) - models.count("m2-tiny") >= 44 and len(models) >= 66


def answers() -> Iterator[tuple[Case, dict[str, Any], Said]]:
    """Every answer with its options."""
    for entry in ENTRIES.values():
        for options, said in zip(options_of(entry["case"]), entry["said"], strict=True):
            yield entry["case"], options, said


def test_ids_vary() -> None:
    said = [tuple(each["ids"]) for _, _, each in answers() if "ids" in each]
    assert sum(map(len, said)) > 10_000
    assert len({ids for ids in said if len(ids) > 5}) > 0.8 * len(said)
    for model in NAMES:
        ids = {token for case, _, each in answers() if case["model"] == model for token in each.get("ids", ())}
        assert len(ids) > 200, model
    assert sum(len(set(ids)) > 15 for ids in said) > 0.5 * len(said)


def test_nothing_is_recorded_that_is_a_fault() -> None:
    """More tokens than were asked for, or a limit close behind a thinking that was closed."""
    for case, options, said in answers():
        n, most, budget = n_tokens(said), options.get("max_tokens"), options.get("think_tokens")
        assert most is None or n <= (most if budget is None else most - 8), case
        assert budget is None or said["finish"] != "length" or n > budget + 16, case
        assert not budget or said["finish"] != "interrupted", case


def n_tokens(said: Said) -> int:
    return said["usage"][1] if "usage" in said else len(said["ids"])


def spelled(model: str, paths: dict[str, Path]) -> list[bytes]:
    """What each id of the model stands for; of a tag its name."""
    data = {letter: bytes([i]) for i, letter in enumerate(tinymodel.byte_letters())}
    tokens = gguf.GGUFReader(paths[model]).fields["tokenizer.ggml.tokens"].contents()
    return [b"".join(data.get(letter, letter.encode()) for letter in token) for token in tokens]


def test_answers_really_ended_as_their_cases_say(paths: dict[str, Path]) -> None:
    tokens = {name: spelled(name, paths) for name in NAMES}
    n = dict.fromkeys(("stop text", "schema", "closed", "closed late", "max_tokens", "end token", "context"), 0)
    for case, options, said in answers():
        budget, finish, ids = options.get("think_tokens"), said["finish"], said.get("ids")
        n["schema"] += "schema" in options and finish == "stop" and is_of_schema(said["text"][1])
        if ids is None:
            continue
        text, tags = b"".join(tokens[case["model"]][i] for i in ids), [tokens[case["model"]][i] for i in ids]
        if "stop_texts" in options:
            (stop,) = options["stop_texts"]
            assert stop.encode() in text and stop not in said["text"][1] and finish == "stop"
            n["stop text"] += 1
        elif "schema" not in options:
            n["end token"] += finish == "stop"
            n["max_tokens"] += finish == "length" and len(ids) == options.get("max_tokens")
            n["context"] += finish == "length" and options.get("max_tokens", 500) == 500
        if budget is not None and tags[budget + 1 : budget + 2] == [b"</think>"] and b"</think>" not in tags[:budget]:
            n["closed"] += 1
            n["closed late"] += budget >= 20
    assert all(count >= 5 for count in n.values()), n
    assert n["stop text"] >= 30 and n["schema"] >= 15 and n["closed"] >= 40, n


def is_of_schema(content: str) -> bool:
    found = json.loads(content)
    return set(found) == {"is_small", "kind", "n"} and found["kind"] in ("fox", "owl") and 0 <= found["n"] <= 999


def test_drafts_were_right_and_answers_were_preempted() -> None:
    happened = [(entry["case"], what) for entry in ENTRIES.values() for what in entry["happened"]]
    assert sum(what == "preemption" for _, what in happened) >= 3
    for mode in ("ngram", "mtp"):
        assert sum(what == "drafts right" and case["draft"][0] == mode for case, what in happened) >= 5
