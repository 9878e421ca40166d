"""Kernels that are called by address: compiled once, found again by name, and shared by threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core.types import float32, int64

from m2lite.simd import cache, far, jit
from m2lite.simd.cache import KernelCache
from m2lite.simd.far import Far
from m2lite.simd.memory import read_f32, write_f32
from m2lite.simd.split import Split
from tests.conftest import ROOT


@pytest.fixture
def addressed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was compiled, or loaded, as far kernels."""
    found: list[str] = []

    def address_of(function: Any, signature: Any, *, parallel: bool = False) -> int:
        found.append(function.__name__)
        return jit.address_of(function, signature, parallel=parallel)

    monkeypatch.setattr(far, "address_of", address_of)
    return found


def scaled(x: Any, y: Any, n: Any) -> Any:
    return x * n + np.int64(y)


def test_one_compilation_serves_all_callers(addressed: list[str]) -> None:
    """With whatever integers they call it."""
    kernel = far.far(returns=int64, y=float32)(scaled)
    one, other = (jit.kernel(jit.specialise(template, name, kernel=kernel)) for template, name in CALLERS)
    assert (one(3), other(np.int32(4)), kernel(5, 2.5, 2)) == (3 * 7 + 1, 4 * 4 + 2, 12)
    assert addressed == ["scaled"]


kernel: Any = None  # `specialise` fills it in


def _seven(x):  # type: ignore[no-untyped-def]
    return kernel(x, 1.5, 7)


def _itself(x):  # type: ignore[no-untyped-def]
    return kernel(x, 2, np.uint64(x))


CALLERS = ((_seven, "seven_of_test"), (_itself, "itself_of_test"))


def share(part, n_parts, out, n, value):  # type: ignore[no-untyped-def]
    for i in range(part * n // n_parts, (part + 1) * n // n_parts):
        write_f32(out + 4 * i, read_f32(out + 4 * i) + value * np.float32(i))


def chunk(part, n_parts, thread, after, out, n, value):  # type: ignore[no-untyped-def]
    if after <= part:
        return
    for i in range(part * n // n_parts, (part + 1) * n // n_parts):
        write_f32(out + 4 * i, read_f32(out + 4 * i) + value * np.float32(i))


def end(n_parts, out, n, value):  # type: ignore[no-untyped-def]
    write_f32(out, np.float32(-n_parts))


@pytest.mark.parametrize("in_chunks", [False, True])
@pytest.mark.parametrize("has_end", [False, True])
def test_shares_cover_the_work_once(in_chunks: bool, has_end: bool) -> None:
    """With one thread, with two, and called from another kernel; arguments of both kinds arrive."""
    jit.start(2)
    make = far.far(value=float32)
    split = Split(make(chunk if in_chunks else share), in_chunks=in_chunks, end=make(end) if has_end else None)
    for n_parts in (1, 2):
        out = np.ones(101, np.float32)
        split(n_parts, out.ctypes.data, len(out), 0.5)
        expected = 1 + np.arange(101, dtype=np.float32) / 2
        if has_end and n_parts > 1:
            expected[0] = -n_parts
        assert np.array_equal(out, expected), n_parts


SCRIPT = """
import sys
from pathlib import Path
from m2lite.simd import cache, far, jit
from numba.core.types import int64

jit.CACHE_DIR = Path(sys.argv[1])

@far.far(returns=int64)
def half_of_script(x):
    return x // 2

@jit.kernel
def caller_of_script(x):
    return half_of_script(x) + 1

print(caller_of_script(int(sys.argv[2])), sum(caller_of_script.stats.cache_hits.values()))
"""


def test_code_from_the_cache_finds_what_it_calls(tmp_path: Path) -> None:
    """In another process, whose sources lie elsewhere: nothing is compiled again."""
    outputs = []
    for number in ("10", "20"):
        script = tmp_path / number / "script.py"
        script.parent.mkdir()
        script.write_text(SCRIPT)
        command, env = [sys.executable, script, tmp_path, number], os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.split())
    assert outputs == [["6", "0"], ["11", "1"]]


def test_a_kernel_is_no_part_of_what_calls_it(tmp_path: Path) -> None:
    called = Far(scaled, int64, {"y": float32}, False)
    caller = jit.kernel(jit.specialise(_seven, "seven_of_part", kernel=called))
    caller._cache = KernelCache(caller.py_func, tmp_path)
    assert caller(1) == 8
    (path,) = tmp_path.glob("*.kernel")
    names, _ = cache._content(path)
    assert names == [called.symbol]
