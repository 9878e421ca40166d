"""The user's NUMBA_* variables: what counts, what is taken out and told."""

from __future__ import annotations

import pytest

from m2lite.system.numba_environment import check_environment


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("NUM_THREADS", "4", ""),
        ("NUM_THREADS", "0", "expected a number from 1 to 1024"),
        ("NUM_THREADS", "²", "expected a number from 1 to 1024"),
        ("NUM_THREADS", "100000", "expected a number from 1 to 1024"),
        ("THREADING_LAYER", "tbb", ""),
        (
            "THREADING_LAYER",
            "\x1b[31m",
            "NUMBA_THREADING_LAYER=\\x1b[31m is not used: expected omp or",
        ),
        ("CPU_NAME", "generic", ""),
        ("CPU_FEATURES", "+avx2", ""),
        ("CACHE_DIR", "/x", ""),
        ("DISABLE_JIT", "1", "NUMBA_DISABLE_JIT=1 is not used"),
        ("ENABLE_AVX", "0", "NUMBA_ENABLE_AVX=0 is not used"),
        ("OPT", "0", "NUMBA_OPT=0 is not used"),
    ],
)
def test_settle(name: str, value: str, told: str) -> None:
    environ = {f"NUMBA_{name}": value, "PATH": "/bin"}
    found = check_environment(environ)
    assert len(found) == len(told[:1]) and all(told in each for each in found)
    assert environ == {"PATH": "/bin"} | ({} if told else {f"NUMBA_{name}": value})
