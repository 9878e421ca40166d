"""Kernels are compiled before the first call: all that are needed, by whoever is there, and it is said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numba
import psutil
import pytest

from m2lite.kernels import ahead
from m2lite.simd import cache, claims, jit
from m2lite.simd.cache import KernelCache
from m2lite.simd.claims import CLOCK
from tests.children import PATIENCE_S
from tests.conftest import ROOT, Run

NEEDS = ahead.Needs(["Q4_0"], "Q4_0", "f16", has_modules=False, is_streamed=False, may_use_amx=True)


def twice(x: Any) -> Any:
    return x + x


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every look at the clock takes half a second."""
    ticks = count(step=0.5)
    monkeypatch.setattr(claims.time, "monotonic", lambda: next(ticks))
    yield
    monkeypatch.undo()
    CLOCK.restart()


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[ahead.Needs]:
    """The needs of processes that would have been started; what is needed is a small function for three types."""

    def units(_: ahead.Needs) -> dict[str, Any]:
        function = numba.njit(twice)
        function._cache = KernelCache(twice, tmp_path)
        return {name: lambda kind=kind: function(kind(1)) for name, kind in KINDS}

    found: list[ahead.Needs] = []
    monkeypatch.setattr(ahead, "units", units)
    monkeypatch.setattr(ahead, "_start", lambda needs: (found.append(needs), subprocess.Popen(["true"], stdin=-1))[1])
    return found


KINDS = (("int", int), ("float", float), ("complex", complex))


@pytest.mark.usefixtures("slow")
def test_others_are_started_and_progress_is_told_where_it_takes_long(started: list[ahead.Needs]) -> None:
    """And nothing of it where all is there."""
    told: list[tuple[int, int]] = []
    ahead.prepare(NEEDS, 3, lambda: None, lambda *at: told.append(at))
    assert told[-2:] == [(2, 3), (3, 3)] and started == [NEEDS] * 2
    told.clear()
    started.clear()
    ahead.prepare(NEEDS, 3, lambda: None, lambda *at: told.append(at))
    assert told == [] and started == []


def test_nothing_is_told_of_a_moment(started: list[ahead.Needs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims.time, "monotonic", lambda: 0.0)
    told: list[tuple[int, int]] = []
    ahead.prepare(NEEDS, 3, lambda: None, lambda *at: told.append(at))
    assert told == [] and started == []
    CLOCK.restart()


def test_whoever_stops_it_leaves_no_claim(started: list[ahead.Needs], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun by then is kept."""
    checks = iter([None, KeyboardInterrupt()])

    def check() -> None:
        if (error := next(checks)) is not None:
            raise error

    with pytest.raises(KeyboardInterrupt):
        ahead.prepare(NEEDS, 1, check)
    script = "import sys; from pathlib import Path; from m2lite.simd.claims import Claims; "
    script += "print([Claims(Path(sys.argv[1])).take('unit ' + name) for name in ('int', 'float', 'complex')])"
    command, env = [sys.executable, "-c", script, str(jit.CACHE_DIR)], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split("[")[1] == "True, True, True]\n" and started == []


SCRIPT = """
import sys
from m2lite.kernels import ahead
from m2lite.simd.cache import KernelCache

late, load = [], KernelCache.load_overload

def load_late(self, *args):
    late.append(self._name)
    return load(self, *args)

def prepare(*args):
    ahead_prepare(*args)
    KernelCache.load_overload = load_late

ahead_prepare, ahead.prepare = ahead.prepare, prepare
from m2lite.chat import loop
from m2lite import Model
from m2lite.dialogue.conversation import Conversation

with Model.open(None) as model:
    assert KernelCache.load_overload is load_late
    conversation = Conversation(model.session())
    for question in ("Hello", "What is the sum of 12 and 30?"):
        assert "".join(piece.text for piece in conversation.ask(question, max_tokens=24))
print(late)
"""


@pytest.mark.slow
def test_nothing_is_left_for_the_first_answer(command_env: dict[str, str]) -> None:
    """Of the model that travels with m2lite: no kernel is compiled, or loaded, behind what was prepared."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=command_env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.slow
def test_a_killed_program_leaves_nothing(command_env: dict[str, str], tmp_path: Path) -> None:
    """Those that compile for it end, too, and every kernel that is there is whole."""
    env = command_env | {"M2LITE_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "m2lite", "generate", "-p", "Hello", "-n", "1", "--temp", "0"]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None and b"compiling" in process.stderr.readline()
        others = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert psutil.wait_procs(others, PATIENCE_S)[1] == []
    kernels = list((tmp_path / "cache" / "kernels").glob("*/*.kernel"))
    assert kernels and all(cache._content(path) for path in kernels)
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


@pytest.mark.slow
def test_two_first_starts_at_once(run_m2lite: Run, command_env: dict[str, str], tmp_path: Path) -> None:
    """They share the work, give the same answer, and leave nothing to compile."""
    env = {"M2LITE_CACHE_DIR": str(tmp_path)}
    arguments = ("generate", "-p", "Hello", "-n", "4", "--temp", "0")
    command = [sys.executable, "-m", "m2lite", *arguments]
    with subprocess.Popen(command, env=command_env | env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as other:
        done = run_m2lite(*arguments, env=env)
        assert other.stdout is not None and other.stdout.read().decode() == done.stdout
    assert (done.returncode, other.returncode) == (0, 0)
    again = run_m2lite(*arguments, env=env)
    assert again.stdout == done.stdout and "compiling" not in again.stderr
