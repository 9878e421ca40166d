"""Matrix instructions: the bits of the other forms for any number of rows, and when they are used at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from m2lite.formats.table import FORMATS
from m2lite.kernels import amx, amx_tiles, dot, fast, reference
from m2lite.simd import jit
from tests.forms import run_form
from tests.kernels import cases

REASON = amx.why_not()
where_they_are = pytest.mark.skipif(REASON is not None, reason=f"no matrix instructions here: {REASON}")


@where_they_are
@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if row.tile])
def test_any_number_of_rows_equals_the_twin(name: str) -> None:
    """Rows from the first to the last that share a pass, blocks that leave a part of STEPS, extreme integers."""
    rng = np.random.default_rng(6)
    multiply, unit = amx_tiles.rows_function(name), dot.step_of(name)
    for worst in (False, True):
        n = 11 * 32 if unit == 32 else 2 * unit
        w = cases.weights_of(rng, name, (16, n), worst)
        for n_x in (*range(1, 34), 47, 64, 65, 80, 97, 127, amx_tiles.MOST_ROWS):
            x = rng.standard_normal((n_x, n)).astype(np.float32)
            panel = np.zeros(dot.panel_bytes("int8", n_x, n), np.uint8)
            reference.pack(1, panel.ctypes.data, x.ctypes.data, 4 * n, n_x, n // 32, 1)
            out, at, stride = np.full((n_x, 16), np.nan, np.float32), w.ctypes.data, w.shape[-1]
            multiply(at, stride, 16, n // 32, panel.ctypes.data, n_x, out.ctypes.data, 64, at)
            key = reference.tile_address(name, "int8")
            assert out.tobytes() == reference.product(key, at, stride, 16, n // 32, panel.ctypes.data, n_x).tobytes()


@where_they_are
def test_products_are_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    for name, n_out, n_x in (("Q4_0", 37, 64), ("Q8_0", 5, 130), ("Q6_K", 48, 97)):
        n = 2 * dot.step_of(name) if name == "Q6_K" else 160
        w, x = cases.weights_of(rng, name, (n_out, n)), rng.standard_normal((n_x, n)).astype(np.float32)
        panel = np.zeros(dot.panel_bytes("int8", n_x, n), np.uint8)
        fast.pack(1, panel.ctypes.data, x.ctypes.data, 4 * n, n_x, n // 32, 1)
        found, tiles = [], set()
        for is_allowed in (True, False):
            monkeypatch.setattr(amx, "_is_allowed", is_allowed)
            tile, out = fast.tile_address(name, "int8"), np.zeros((n_x, n_out), np.float32)
            shape = (w.shape[-1], n_out, n // 32)
            fast.matmul(
                1,
                out.ctypes.data,
                4 * n_out,
                tile,
                w.ctypes.data,
                *shape,
                panel.ctypes.data,
                dot.panel_bytes("int8", 1, n),
                n_x,
            )
            found.append(out.tobytes())
            tiles.add(tile)
        assert found[0] == found[1] and len(tiles) == 2


@where_they_are
def test_permission_holds_for_threads_that_are_there_already() -> None:
    code = (
        "import threading; from m2lite.kernels import amx_trial as trial; asked, found = threading.Event(), []\n"
        "thread = threading.Thread(target=lambda: (asked.wait(), found.append(trial.multiplies()))); thread.start()\n"
        "assert trial.ask_permission(); asked.set(); thread.join(); assert found == [True]\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_none_where_kernels_are_compiled_for_a_lesser_processor(tmp_path: Path) -> None:
    script = tmp_path / "said.py"
    script.write_text("from m2lite.kernels import amx\nprint(amx.said(True), amx.is_used())\n")
    done = run_form("avx2", str(script))
    assert done.stdout.startswith("no matrix instructions (AMX): the processor has none") and "False" in done.stdout


def test_none_where_they_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "_is_allowed", True)
    amx.allow(False)
    assert not amx.is_used()
    assert amx.said(False) == "no matrix instructions (AMX): switched off"


ENDS = {
    "raise SystemExit(0)": True,
    "raise SystemExit(2)": False,
    f"import os; os.kill(os.getpid(), {signal.SIGILL:d})": False,
    f"import os; os.kill(os.getpid(), {signal.SIGKILL:d})": None,
    "import no_such_module": None,
}


@pytest.mark.parametrize(("code", "answer"), ENDS.items())
def test_a_trial_is_what_its_process_ended_with(tmp_path: Path, code: str, answer: bool | None) -> None:
    script = tmp_path / "trial.py"
    script.write_text(code)
    assert amx.try_them(script) is answer


@pytest.mark.parametrize("answer", [True, False, None])
def test_a_trial_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: bool | None) -> None:
    """What could not be told is tried again; another processor or a newer system has an answer of its own."""
    tried = []
    monkeypatch.setattr(jit, "CACHE_DIR", tmp_path)
    monkeypatch.setattr(amx, "try_them", lambda script: tried.append(script) or answer)
    monkeypatch.setattr(amx, "_processor", lambda: "one")
    assert [amx._works(), amx._works()] == [answer is True] * 2
    assert len(tried) == (2 if answer is None else 1)
    monkeypatch.setattr(amx, "_processor", lambda: "another")
    assert amx._works() is (answer is True) and len(tried) == (3 if answer is None else 2)


def test_none_where_nothing_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> str:
        raise OSError

    monkeypatch.setattr(amx, "_processor", fails)
    assert not amx._works()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the system does not describe its processor")
def test_a_processor_has_one_name() -> None:
    assert amx._processor() == amx._processor() and len(amx._processor()) == 16
    assert os.sep not in amx._processor()
