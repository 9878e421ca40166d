"""`m2lite tune`: what is kept, what is left alone, and what a person is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from m2lite import Model, bench, tune, zeros
from m2lite.engine import tuned
from m2lite.engine.ratios import LEAST_NOISE, is_won, may_win, noise_of, summary
from m2lite.engine.tuned import Change, Tuning, load_tuning
from m2lite.errors import UsageError
from m2lite.simd import crowd, jit, tuning
from m2lite.tune import N_PAIRS
from tests.conftest import Run

NOISE = {"decode": 0.01, "prompt": 0.02}


@pytest.fixture(autouse=True)
def defaults_afterwards() -> Iterator[None]:
    yield
    tuning.use({})
    jit.start(2)


def test_the_noise_is_how_far_the_exact_interval_reaches() -> None:
    ratios = [0.5, 0.6, 0.7, 0.98, *[1.0] * 7, 1.01, 1.3, 1.4, 1.5]  # of 15 values the fourth to the twelfth: 96.5 %
    assert summary(ratios[::-1]) == (0.98, 1.0, 1.01) and noise_of(ratios) == pytest.approx(0.02)
    assert summary([1.0, 3.0, 2.0]) == (1.0, 2.0, 3.0)
    assert noise_of([1.0] * 9) == LEAST_NOISE


@pytest.mark.parametrize(
    ("decode", "prompt", "wins", "may"),
    [
        ((1.02, 1.03, 1.04), (0.99, 1.0, 1.01), True, True),
        ((1.005, 1.03, 1.04), (0.99, 1.0, 1.01), False, True),  # not all of the interval is above the noise
        ((1.02, 1.03, 1.04), (0.9, 0.95, 0.97), False, False),  # at the cost of the other work
        ((1.0, 1.004, 1.01), (1.0, 1.009, 1.02), False, False),
        ((0.9, 1.006, 1.1), (0.9, 1.0, 1.1), False, True),
        ((0.98, 0.985, 1.0), (1.03, 1.04, 1.05), False, True),
    ],
)
def test_what_is_kept_wins_beyond_the_noise_and_loses_nowhere(decode: Any, prompt: Any, wins: bool, may: bool) -> None:
    found = {"decode": decode, "prompt": prompt}
    assert (is_won(found, NOISE), may_win(found, NOISE)) == (wins, may)


class Machine:
    """Runs that take as long as `speed` of the values in force says, on a clock of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, speed: Callable[[str], float]) -> None:
        self.now, self.n_runs, self.busy = 0.0, 0, lambda: 0.0
        self.others = 0.0
        self._speed, self._rng = speed, np.random.default_rng(3)
        monkeypatch.setattr(tune, "time_run", self.run)
        monkeypatch.setattr(tune, "read_plain", lambda n: 4e10)
        monkeypatch.setattr("m2lite.machine.n_usable_cores", lambda: 2)
        monkeypatch.setattr(tune, "monotonic", lambda: self.now)
        monkeypatch.setattr(tune, "sleep", self.wait)
        monkeypatch.setattr(tune, "processor_seconds", lambda: crowd.Used(self.others, 2, 0.0))

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.others += seconds * self.busy()

    def run(self, session: Any, test: bench.Test, seed: int, ids_seed: int, stop: Callable[[], bool]) -> float | None:
        if stop():
            return None
        self.n_runs += 1
        seconds = test.n / self._speed(test.kind) * float(self._rng.normal(1, 0.002))
        self.wait(seconds)
        return seconds


MODEL: Any = SimpleNamespace(
    runner=SimpleNamespace(stream=None, n_threads=2, use_tiles=lambda: None),
    session=lambda: None,
    wait_mapped=lambda stop: None,
    n_threads=2,
    ctx=4096,
)


NOTHING = Tuning()


def run(known: Tuning = NOTHING, stop: Callable[[], bool] = lambda: False, **options: Any) -> tuple[Tuning, Any]:
    lines, kept = list[str](), list[Tuning]()
    settings: Any = {"minutes": 60, "has_threads": False} | options
    found = tune.run_tune(MODEL, known, note=lines.append, stop=stop, keep=kept.append, **settings)
    return found, SimpleNamespace(lines=lines, text="\n".join(lines), kept=kept)


def test_a_value_that_is_faster_is_kept_and_the_log_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def speed(kind: str) -> float:
        return 100 * (1 + 0.05 * (tuning.VALUES["tiles_ahead"] == 4) - 0.5 * (tuning.VALUES["threads_percent"] < 100))

    Machine(monkeypatch, speed)
    found, log = run()
    assert found.values == {"tiles_ahead": 4} and log.kept[-1].values == found.values
    assert found.gains["decode"][1] == pytest.approx(1.05, abs=0.01)
    assert dict(tuning.VALUES) == tuning.DEFAULTS | found.values, "in force when it is over"
    for row in tuning.PARAMETERS.values():
        assert f"{row.name} " in log.text
    assert "tiles_ahead is 4 from now on" in log.text and "noise" in log.lines[0]
    assert "tiles_ahead 2 -> 4" in "\n".join(tune.format_tuning(found))


def test_where_nothing_wins_the_defaults_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda kind: 100)
    found, _ = run()
    assert found.values == {} and tune.format_tuning(found) == ["nothing that was tried is faster than the defaults"]
    n_values = sum(len(row.values) * len(row.works) for row in tuning.PARAMETERS.values())
    assert machine.n_runs < 2 * n_values * (N_PAIRS[0] + 2) + 2 * 2 * N_PAIRS[-1], "few pairs where nothing can win"


def test_what_gains_in_one_work_and_loses_in_the_other_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, lambda kind: 100 * (1 + (0.2 if kind == "decode" else -0.2) * tuning.VALUES["first_cache"]))
    assert run()[0].values == {}


def test_values_that_win_only_together_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def speed(kind: str) -> float:
        values = tuning.VALUES["first_cache"], tuning.VALUES["tiles_ahead"]
        return {(0, 2): 100, (1, 1): 111}.get(values, 80)

    Machine(monkeypatch, speed)
    found, log = run()
    assert found.values == {"first_cache": 1, "tiles_ahead": 1} == log.kept[-1].values
    assert "first_cache 0 -> 1, tiles_ahead 2 -> 1: " in log.text


def test_a_value_that_is_kept_and_loses_now_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Tuning([Change("chunks", 32, {"decode": (1.1, 1.1, 1.1)})], {}, 4e10, "long ago")
    Machine(monkeypatch, lambda kind: 100 - (tuning.VALUES["chunks"] == 32) * 20)
    assert run(known)[0].values == {}
    slow = Tuning(known.changes, {}, 1e10, "elsewhere")
    Machine(monkeypatch, lambda kind: 100)
    found, log = run(slow)
    assert found.values == {} and "memory of 10.0 GB/s: not used" in log.text
    assert run(known)[0].values in ({}, {"chunks": 32})


def test_threads_that_are_given_are_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, lambda kind: 100)
    assert "threads_percent" not in run(has_threads=True)[1].text
    text = run()[1].text
    assert "threads_percent 100 -> 25" in text and "-> 75" not in text, "1 of 2 cores either way"


@pytest.mark.parametrize("why", ["the time is over", "interrupted"])
def test_what_was_found_stays_when_it_ends_early(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    machine = Machine(monkeypatch, lambda kind: 100 * (1 + 0.05 * (tuning.VALUES["tiles_ahead"] == 4)))
    seconds = 132  # in the middle of the values of tiles_ahead
    is_late = lambda: why == "interrupted" and machine.now > seconds  # noqa: E731
    found, log = run(stop=is_late, minutes=60 if why == "interrupted" else seconds / 60)
    assert "tiles_ahead 2 -> 4" in log.text and "tiles_ahead 2 -> 8" not in log.text
    assert found.values == {"tiles_ahead": 4} == log.kept[-1].values and not found.gains
    assert log.lines[-1] == f"not all was tried: {why}"


def test_pairs_that_others_disturbed_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda kind: 100 - 50 * machine.busy() * (tuning.VALUES["tiles_ahead"] == 2))
    machine.busy = lambda: 1.0 if 60 < machine.now < 80 else 0.0
    assert run()[0].values == {}, "which looks faster while others are busy"
    machine.now, machine.busy = 0.0, lambda: 1.0 if machine.now > 60 else 0.0
    _, log = run()
    assert log.lines[-1] == "not all was tried: other programs use 1.0 cores"
    n = machine.n_runs
    with pytest.raises(UsageError, match=r"Other programs use 1\.0 of 2 cores"):
        run()
    assert machine.n_runs == n


def test_a_model_that_is_streamed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODEL.runner, "stream", object())
    monkeypatch.setattr(MODEL, "path", "x.gguf", raising=False)
    with pytest.raises(UsageError, match="does not fit"):
        run()


def test_the_model_of_zeros_has_m2s_widths_and_takes_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "zeros.gguf"
    zeros.write_zeros(path)
    assert path.stat().st_size > 1e9 and 512 * path.stat().st_blocks < 30e6
    monkeypatch.setattr(zeros, "N_LAYERS", 1)
    zeros.write_zeros(path)
    with Model.open(path, ctx=256, draft="off") as model:
        assert (model.config.n_embd, model.config.n_ff, model.config.n_q) == (3072, 1536, 6144)
        found = [model.logits([n])[0] for n in range(3)]
        assert all(np.isfinite(each).all() for each in found)


def test_the_command(run_inline: Run, bundled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the real thing: whatever wins, the file is this machine's, and the log beside it says what was tried."""
    monkeypatch.setattr(tuned, "machine_cache_dir", lambda: tmp_path)  # no other test uses what is found
    monkeypatch.setattr(tune, "_others", lambda began, used: None)  # whoever else runs here
    for name, value in {"N_PAIRS": (2, 3), "_DECODE_S": 0.01, "_PROMPT_S": 0.01}.items():
        monkeypatch.setattr(tune, name, value)
    done = run_inline("tune", bundled_model)
    assert done.returncode == 0, done.stderr
    found = load_tuning()
    assert found.warning == "" and found.date and found.read_bytes_per_s > 1e8
    path = Path(done.stdout.split("kept in ")[1].split(";")[0])
    log = path.with_suffix(".log").read_text()
    assert "m2-tiny.gguf" in log and all(f"{name} " in log for name in tuning.PARAMETERS)
    doctor = run_inline("doctor", env={"M2LITE_TUNING": "on"})
    assert f"{path} of {found.date}" in doctor.stdout and "tiles_ahead" in doctor.stdout
