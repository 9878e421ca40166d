"""A mapped file that is cut: zeros and a count instead of the end of the process."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from m2lite.storage.guard import Guard
from tests.children import PATIENCE_S

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the handler")
N_PAGES = 8


def mapped(path: Path) -> tuple[np.ndarray, Guard]:
    path.write_bytes(b"x" * (N_PAGES * mmap.PAGESIZE))
    with path.open("rb") as file:
        array = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
    return array, Guard(array.ctypes.data, array.nbytes)


def test_what_was_cut_reads_as_zeros_and_is_counted(tmp_path: Path) -> None:
    array, guard = mapped(tmp_path / "file")
    other, other_guard = mapped(tmp_path / "other")
    assert array.sum() == array.nbytes * ord("x") and guard.n_faults == 0
    os.truncate(tmp_path / "file", 3 * mmap.PAGESIZE)
    assert array.sum() == 3 * mmap.PAGESIZE * ord("x") and guard.n_faults == 1
    assert array[-1] == 0 and guard.n_faults == 1  # the rest went at once
    assert other.sum() == other.nbytes * ord("x") and other_guard.n_faults == 0
    for each in (guard, other_guard, guard):
        each.release()
    assert guard.n_faults == 0


LEFT = """
import mmap, os, sys
import numpy as np
from m2lite.storage.guard import Guard
with open(sys.argv[1], "r+b") as file:
    array = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
    guard = Guard(array.ctypes.data, array.nbytes)
    getattr(guard, sys.argv[2])()
    os.ftruncate(file.fileno(), 0)
array.max()
"""


@pytest.mark.parametrize(("how", "code", "said"), [("leave", 4, "was cut, or its disk fails"), ("release", -7, "")])
def test_what_nobody_asks_for_ends_the_process(tmp_path: Path, how: str, code: int, said: str) -> None:
    """With a word if it was ours; what is not ours meets the handler that was there before."""
    path = tmp_path / "file"
    path.write_bytes(bytes(mmap.PAGESIZE))
    done = subprocess.run(
        [sys.executable, "-c", LEFT, str(path), how], capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert done.returncode == code and said in done.stderr and (said or not done.stderr)
