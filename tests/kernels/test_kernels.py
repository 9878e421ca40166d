"""Compiled kernels against their NumPy twins, bit for bit, in every vector form that this processor can run."""

from __future__ import annotations

import re
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir

from m2lite.kernels import dot, dots, emit, fast, jit, reference, tiles
from m2lite.storage.blocks import FORMATS
from m2lite.storage.integers import INTEGERS
from tests.forms import FORMS, run_form, run_script
from tests.kernels import cases


def test_every_kernel_has_a_twin() -> None:
    for name in fast.__all__:
        assert callable(getattr(reference, name)), name


def test_compiled_kernels_equal_their_twins() -> None:
    assert cases.differences() == []


@pytest.mark.slow
def test_compiled_kernels_equal_their_twins_in_every_format() -> None:
    assert cases.differences(cases.ALL) == []


def test_every_format_runs() -> None:
    assert set(dot.WEIGHTS) == set(FORMATS)
    assert set(tiles.TILES) == set(INTEGERS)
    for name, fmt in FORMATS.items():
        form = dot.WEIGHTS[name]
        assert form.step % fmt.n_weights == 0 and form.step_bytes == fmt.row_bytes(form.step)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_other_vector_forms_equal_the_twins(form: str) -> None:
    done = run_form(form, "kernels/cases.py", *(["all"] if form == "avx2" else []))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.startswith(f"{form}: 0 differences")


def test_neon_form_compiles_to_sdot(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot run here; that LLVM accepts it and picks the instruction can be seen."""
    monkeypatch.setattr(dots, "FORM", "neondot")
    module = ir.Module()
    vector = emit.V_I32
    function = ir.Function(module, ir.FunctionType(vector, [vector, vector, emit.I32]), "dot")
    builder = ir.IRBuilder(function.append_basic_block())
    acc, u, s = function.args
    builder.ret(dots.dot4(builder, dots.dot4(builder, acc, u, s), u, s))
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple("aarch64-linux-gnu").create_target_machine(features="+dotprod")
    assembly = machine.emit_assembly(llvm.parse_assembly(str(module)))
    assert assembly.count("sdot") == 4 * 2  # four registers each


def test_no_kernel_reads_or_writes_beyond_its_memory() -> None:
    check_guards()


@pytest.mark.slow
def test_no_unpacker_reads_beyond_its_block() -> None:
    check_guards("all")


def check_guards(*arguments: str) -> None:
    done = run_script("kernels/guards.py", *arguments)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.strip() == "no stray access"


@pytest.mark.parametrize(
    ("features", "form"),
    [
        ({"avx512f", "avx512bw", "avx512vnni", "avx512vl", "avx2"}, "avx512vnni"),
        ({"avx512f", "avx512vl", "avx512vnni", "avx2"}, "avxvnni"),
        ({"avx2", "avxvnni"}, "avxvnni"),
        ({"avx2", "fma"}, "avx2"),
        ({"neon", "dotprod"}, "neondot"),
        ({"sse4.2"}, "portable"),
        (set(), "portable"),
    ],
)
def test_form_follows_the_features(features: set[str], form: str) -> None:
    assert emit.choose_form(frozenset(features)) == form


def test_router_survives_nan() -> None:
    """NaN scores are reported, and every id is still in range: nothing may index outside an array."""
    n_rows, n_experts, n_used = 3, 20, 8
    for module in (fast, reference):
        scores = np.zeros((n_rows, 32), np.float32)
        scores[0] = np.nan
        scores[1, ::2] = np.nan
        bias, ids = np.zeros(32, np.float32), np.full((n_rows, n_used), -7, np.int32)
        weights = np.zeros((n_rows, n_used), np.float32)
        arrays = [a.ctypes.data for a in (scores, bias, ids, weights)]
        n_bad = module.route(arrays[0], arrays[1], n_rows, n_experts, 32, n_used, arrays[2], arrays[3])
        assert n_bad == 2
        assert ids.min() >= 0 and ids.max() < n_experts
        assert all(len(set(row)) == n_used for row in ids.tolist())


def test_router_breaks_ties_by_the_lowest_id() -> None:
    scores, bias = np.zeros((1, 16), np.float32), np.zeros(16, np.float32)
    bias[9] = 1
    ids, weights = np.zeros((1, 4), np.int32), np.zeros((1, 4), np.float32)
    fast.route(scores.ctypes.data, bias.ctypes.data, 1, 16, 16, 4, ids.ctypes.data, weights.ctypes.data)
    assert ids.tolist() == [[0, 1, 2, 9]]
    assert weights.tolist() == [[0.25] * 4]


def test_kernel_cache_is_private_and_named_by_its_sources(tmp_path: Path) -> None:
    assert jit.CACHE_DIR.stat().st_mode & 0o077 == 0
    assert len(jit.CACHE_DIR.name) == 16
    open_to_all = tmp_path / "shared"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    assert not jit._owned_private(open_to_all)


def test_kernel_cache_knows_every_file_with_kernels() -> None:
    """An edit in a file that no hash covers would leave compiled code behind that is no longer there in the source."""
    package = Path(jit.__file__).parent.parent
    with_kernels = {
        path
        for path in package.glob("**/*.py")
        if re.search(
            r"^from m2lite\.kernels\.(jit|simd) import [^#]*\b(kernel|intrinsic|fma)\b", path.read_text(), re.M
        )
    }
    assert len(with_kernels) > 5
    assert with_kernels <= set(jit.source_files())


def test_exp_is_accurate() -> None:
    x = np.linspace(-87, 88, 200_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(reference.exp32(x) / exact - 1)) < 4e-7
    assert reference.exp32(np.array([-np.inf, -1000, -87.5], np.float32)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("n_threads", "n_cores", "others", "wanted"),
    [(2, 2, 0.0, 2), (2, 2, 0.25, 2), (2, 2, 1.0, 1), (2, 2, 5.0, 1), (8, 8, 3.0, 5), (4, 64, 20.0, 4), (1, 2, 2.0, 1)],
)
def test_threads_leave_cores_to_others(n_threads: int, n_cores: int, others: float, wanted: int) -> None:
    assert jit.Crowd(n_threads).wanted(others * 0.15, 0.15, n_cores) == wanted


def test_threads_come_back_when_others_go(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, used = [0.0], [0.0]
    monkeypatch.setattr(jit.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(jit, "_processor_seconds", lambda: jit.Used(used[0], 2))
    crowd, seen = jit.Crowd(2), []
    for others in (0.0, 1.0, 1.0, 0.0, 0.0):
        clock[0] += jit.Crowd.WINDOW_S
        used[0] += others * jit.Crowd.WINDOW_S
        crowd.look()
        seen.append(crowd.n_active)
    assert seen == [2, 1, 1, 2, 2]
