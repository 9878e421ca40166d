"""Drafts on the command line: options, what is said of them, and modules made of the last layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m2lite import Model
from m2lite.bench_drafts import format_drafts, settings_of
from m2lite.storage.gguf_reader import open_gguf
from m2lite.storage.sidecar import sidecar_path
from m2lite.workloads import WORKLOADS
from tests.conftest import Run
from tests.quant import checkpoints

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long

STORY = ("-p", "Tell me a short story about a fox and a lantern.", "--seed", "7", "-n", "60", "--json")


def generate(run: Run, *arguments: str | Path) -> dict[str, Any]:
    done = run("generate", *arguments)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_all_settings_give_one_answer(run_inline: Run, bundled_model: Path) -> None:
    plain = generate(run_inline, bundled_model, *STORY, "--draft", "off")
    assert plain["stats"]["draft"] is None
    for options in (("mtp",), ("mtp", "--draft-tokens", "1"), ("ngram", "--draft-tokens", "7"), ("auto",)):
        drafted = generate(run_inline, bundled_model, *STORY, "--draft", *options)
        assert drafted["tokens"] == plain["tokens"]
        draft = drafted["stats"]["draft"]
        assert 0 <= draft["accepted"] <= draft["proposed"] and 0 < draft["steps"] < len(plain["tokens"])
        if options[0] == "mtp":
            n = 1 if "1" in options else 3
            assert len(draft["acceptance"]) == n and draft["acceptance"][0] > 0.5 and draft["sources"]["mtp"] > 0
            assert draft["tokens_per_step"] > 1 + 0.5 * draft["acceptance"][0]


def test_the_start_line_says_what_drafts(run_inline: Run, bundled_model: Path) -> None:
    for options, expected in (
        ((), "drafts auto: prompt lookup and 3 MTP modules"),
        (("--draft-tokens", "2"), "drafts auto: prompt lookup and 2 MTP modules"),
        (("--draft", "mtp"), "drafts mtp: 3 MTP modules"),
        (("--draft", "ngram"), "drafts ngram: prompt lookup"),
        (("--draft", "off"), "drafts off"),
    ):
        done = run_inline("generate", bundled_model, "-p", "Hi", "-n", "1", *options)
        assert f" · {expected} · " in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--draft", "always"), "--draft is 'always': expected auto or mtp or ngram or off"),
        (("--draft-tokens", "8"), "8 draft tokens were asked for. Use 1 to 7"),
        (("--draft", "mtp"), "there are no prediction modules"),
        (("--mtp", "nowhere.gguf"), "nowhere.gguf does not exist"),
        (("--draft", "off", "--mtp", "x.gguf"), "--mtp was given with --draft off"),
    ],
)
def test_bad_options(run_inline: Run, model_files: dict[str, Path], options: tuple[str, ...], message: str) -> None:
    done = run_inline("generate", model_files["reply"], "-p", "Hi", *options)
    assert done.returncode == 2 and message in done.stderr


def test_bench_compares_all_settings(run_inline: Run, bundled_model: Path) -> None:
    done = run_inline("bench", bundled_model, "--draft", "-n", "16", "-r", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [w["name"] for w in found["workloads"]] == [w.name for w in WORKLOADS]
    names = ["off", "ngram 1", "ngram 2", "ngram 3", "mtp 1", "mtp 2", "mtp 3", "auto"]
    for workload in found["workloads"]:
        assert [row["setting"] for row in workload["settings"]] == names
        assert workload["settings"][0]["ratio"] == 1 and all(row["tokens_per_s"] > 0 for row in workload["settings"])
        assert ("note" in workload) == (workload["name"] in ("code edit", "JSON"))
        for row in workload["settings"]:  # whoever came before has read no prompt for them
            if row["setting"].startswith("mtp"):
                assert row["draft"]["proposed"] >= row["draft"]["steps"] / 2, (workload["name"], row)
    shown = format_drafts(found)
    assert "code edit" in shown and "replies of this workload are given" in shown and "mtp 3" in shown
    assert run_inline("bench", bundled_model, "--draft", "--mtp", "x.gguf").returncode == 2


def test_bench_without_modules(model_files: dict[str, Path]) -> None:
    with Model.open(model_files["random"], ctx=64) as model:
        assert [str(s) for s in settings_of(model)] == ["off", "ngram 1", "ngram 2", "ngram 3", "auto"]


def test_modules_made_of_the_last_layer(run_inline: Run, tmp_path: Path) -> None:
    """They are valid, foresee little, and change no answer."""
    weights = {n: w for n, w in checkpoints.small().items() if ".mtp." not in n and "mtp_layers" not in n}
    source = checkpoints.write(tmp_path / "hf", weights)
    out = tmp_path / "out.gguf"
    done = run_inline("convert", source, "-o", out, "--type", "q8_0", "--init-mtp", "2")
    assert done.returncode == 0, done.stderr
    assert "2 prediction modules" in done.stdout
    with open_gguf(out) as model, open_gguf(sidecar_path(out)) as sidecar:
        assert sidecar.metadata["minimax-m2.nextn_predict_layers"] == 2
        assert (sidecar.view("blk.2.ffn_up_exps.weight") == model.view("blk.1.ffn_up_exps.weight")).all()
        assert (sidecar.view("blk.3.attn_norm.weight") == model.view("blk.1.attn_norm.weight")).all()
    answers = [
        generate(run_inline, out, "-p", "abc", "--no-template", "--seed", "1", "-n", "20", "--json", "--draft", draft)
        for draft in ("off", "mtp")
    ]
    assert answers[0]["tokens"] == answers[1]["tokens"] and answers[1]["stats"]["draft"]["proposed"] > 0


def test_modules_are_not_made_where_there_are_some(run_inline: Run, tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "hf", checkpoints.small())
    done = run_inline("convert", source, "-o", tmp_path / "out.gguf", "--init-mtp", "2")
    assert done.returncode == 2 and "has prediction modules" in done.stderr
    assert not (tmp_path / "out.gguf").exists()
