"""Pages are mapped before they are touched, and a reader that stops early lets go of the mapping."""

from __future__ import annotations

import mmap
import resource
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from m2lite.storage.prefault import Prefault

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux maps ahead")
N_BYTES = 48 * 1024**2 + 5000  # more than one step, and no whole number of pages


@pytest.fixture
def mapped(tmp_path: Path) -> mmap.mmap:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(N_BYTES))
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def touch(array: np.ndarray) -> int:
    """Page faults that reading a byte of every page takes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array[:: mmap.PAGESIZE].max()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_no_fault_is_left(mapped: mmap.mmap) -> None:
    array = np.frombuffer(mapped, np.uint8)
    half = array[: array.nbytes // 2]
    assert touch(half) > 10  # the measure sees faults: a fault maps 16 pages around it, or a large folio
    Prefault([array]).wait()
    assert touch(array) <= 5


def test_stop_lets_go_of_the_mapping(mapped: mmap.mmap) -> None:
    prefault = Prefault([np.frombuffer(mapped, np.uint8)])
    prefault.stop()
    mapped.close()  # raises BufferError while a view is held
    prefault.stop()  # a second time does nothing


def test_waiting_ends_when_asked(mapped: mmap.mmap, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(Prefault, "_map", lambda *_: goes_on.wait())  # a disk that does not answer
    prefault = Prefault([np.frombuffer(mapped, np.uint8)])
    asked = iter((False, False, True))
    prefault.wait(lambda: next(asked))
    assert prefault._thread.is_alive()
    goes_on.set()
    prefault.wait()
    assert not prefault._thread.is_alive()
