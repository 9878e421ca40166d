"""A real control group whose memory is less than what is asked for: refused with the numbers, before it is taken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import tinymodel
from m2lite import machine
from tests.children import PATIENCE_S

pytestmark = pytest.mark.slow

LIMIT = 900 << 20  # Python and Numba take a quarter of it


def _group_files() -> tuple[Path, str] | None:
    """A new group below our own, and the name of the file with its limit."""
    for root, own, limit, _, _ in machine._cgroups():
        group = root / own / f"m2lite-test-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            if (group / limit).exists():
                return group, limit
            group.rmdir()
    return None


@pytest.fixture
def group() -> Iterator[Path]:
    found = _group_files()
    if found is None:
        pytest.skip("this user may not make a control group with a limit on memory")
    path, limit = found
    try:
        (path / limit).write_text(str(LIMIT))
        yield path
    finally:
        path.rmdir()


def in_group(group: Path, env: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`m2lite ARGUMENTS`, begun by a process that has entered the group."""
    code = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.execv(sys.executable, sys.argv[2:])"
    command = [sys.executable, "-c", code, str(group / "cgroup.procs"), sys.executable, "-m", "m2lite"]
    return subprocess.run(
        [*command, *map(str, arguments)], env=env, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )


@pytest.mark.usefixtures("compiled")
def test_less_memory_than_the_context_needs(group: Path, command_env: dict[str, str], tmp_path: Path) -> None:
    """512 bytes a position: 2 m of them are 1 GiB. Without --ctx it takes what there is room for."""
    shape = tinymodel.Shape(n_ctx=1 << 21)
    model = tinymodel.write_model(tmp_path / "long.gguf", tinymodel.REPLY, shape=shape)
    done = in_group(group, command_env, "generate", model, "-p", "Hi", "--ctx", "2m")
    assert (done.returncode, done.stdout) == (5, ""), done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("m2lite: ") and "2,097,152" in last and re.search(r"needs [\d,.]+ (bytes|[GM]i?B)", last), (
        last
    )
    done = in_group(group, command_env, "generate", model, "-p", "Hi")
    assert (done.returncode, done.stdout) == (0, "Fine é\n"), done.stderr
    free = re.search(r"([\d.]+) (\w+) of memory free", done.stderr)
    assert free is not None
    assert float(free[1]) * {"GB": 1e9, "GiB": 1 << 30, "MB": 1e6, "MiB": 1 << 20}[free[2]] < LIMIT
