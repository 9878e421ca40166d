"""Importance matrices and quantized models at file operations that fail or end the process."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from m2lite.errors import ResourceError
from m2lite.quant import job as job_module
from m2lite.quant.convert import Conversion
from m2lite.quant.imatrix import Importance, read_imatrix, write_imatrix
from m2lite.quant.quantize import quantize
from tests.faults.disk import Dead, at_every_call, faults

ENTRIES = {"blk.0.a": (np.ones((1, 64)), np.ones(1)), "blk.0.e": (np.ones((2, 64)), np.array([3.0, 0.0]))}
OLD, NEW = Importance(ENTRIES, ("old",), 1, 64), Importance(ENTRIES, ("new text",), 2, 64)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_importance_matrix_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    def prepare(folder: Path) -> None:
        if overwrite:
            write_imatrix(folder / "x.gguf", OLD)

    def job(folder: Path) -> None:
        write_imatrix(folder / "x.gguf", NEW, overwrite=overwrite)

    def check(folder: Path, is_done: bool, is_dead: bool) -> None:
        path = folder / "x.gguf"
        if path.exists():
            assert read_imatrix(path).datasets in ([("new text",)] if is_done else [("old",), ("new text",)])
        else:
            assert not is_done and not overwrite
        assert is_dead or not (folder / "x.gguf.part").exists()
        write_imatrix(path, NEW, overwrite=True)
        assert read_imatrix(path).digest == NEW.digest and [file.name for file in folder.iterdir()] == ["x.gguf"]

    assert at_every_call(tmp_path, monkeypatch, prepare, job, check) > 10


def split(f32: Conversion, folder: Path) -> Conversion:
    return quantize(f32.path, folder / "x.gguf", "q8_0", split_max_bytes=120_000)


@pytest.mark.parametrize("code", [None, errno.ENOSPC])
def test_a_quantization_into_parts_and_a_sidecar(
    f32: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    """At every call but those in the middle of a tensor, which tests/quant/test_job.py tries on small ones."""
    monkeypatch.setattr(job_module, "BATCH_BYTES", 60_000)
    (tmp_path / "whole").mkdir()
    with faults(monkeypatch, most=1 << 30) as disk:
        done = split(f32, tmp_path / "whole")
    assert len(done.paths) > 2 and done.mtp_path is not None
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    names = disk.names
    places = [n for n in range(1, len(names)) if names[n] != "pwrite" or names[n - 1] != "pwrite"]
    for number in places[:: 1 if code is None else 3]:
        folder = tmp_path / f"{number}"
        folder.mkdir()
        with (
            faults(monkeypatch, number + 1, code, most=1 << 30),
            pytest.raises(Dead if code is None else ResourceError),
        ):
            split(f32, folder)
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert all(data == whole[name] for name, data in found.items() if name.endswith(".gguf")), number
        if found != whole:
            with faults(monkeypatch, most=1 << 30):
                split(f32, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole, number
