"""A model file that is cut or written to at any moment of loading and computing: told in words, never a signal."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m2lite import Model, Sampling
from m2lite.engine import model as session_module
from m2lite.engine import runner as engine_module
from m2lite.errors import BadModelError
from m2lite.model import weights as weights_module
from m2lite.storage import gguf_reader
from m2lite.storage.sidecar import sidecar_path
from tests.conftest import Run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the handler")

# Where in the code the file is cut: before the call.
MOMENTS: dict[str, tuple[Any, str]] = {
    "header": (gguf_reader, "parse_header"),
    "config": (session_module, "parse_config"),
    "tokenizer": (session_module, "load_tokenizer"),
    "template": (session_module, "load_template"),
    "weights": (weights_module, "bind_weights"),
    "kernels": (engine_module.ModelRunner, "_load_kernels"),
    "end": (engine_module.ModelRunner, "fit"),
}


@pytest.fixture
def model(model_files: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(model_files["reply"], tmp_path / "model.gguf"))


def before(monkeypatch: pytest.MonkeyPatch, moment: str, change: Callable[[], None]) -> None:
    """`change()` just before the moment, the first time."""
    owner, name = MOMENTS[moment]
    real, todo = getattr(owner, name), [change]

    def call(*arguments: Any, **options: Any) -> Any:
        while todo:
            todo.pop()()
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("n_left", [0, 5000, 200_000])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_file_that_is_cut_while_it_loads(
    model: Path, monkeypatch: pytest.MonkeyPatch, moment: str, n_left: int
) -> None:
    before(monkeypatch, moment, lambda: os.truncate(model, n_left))
    with pytest.raises(BadModelError, match=rf"model file changed on disk \(\d+ bytes when opened, {n_left} now\)"):
        Model.open(model, ctx=64, draft="off").close()


@pytest.mark.parametrize("moment", ["header", "weights", "end"])
def test_a_file_that_is_written_to_while_it_loads(model: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    def grow() -> None:
        with model.open("ab") as file:
            file.write(b"more")

    before(monkeypatch, moment, grow)
    with pytest.raises(BadModelError, match="model file changed on disk"):
        Model.open(model, ctx=64, draft="off").close()


@pytest.mark.parametrize("load", ["auto", "mmap", "direct"])
def test_a_file_that_is_cut_within_a_call(model: Path, monkeypatch: pytest.MonkeyPatch, load: str) -> None:
    """After the check before it: zeros are computed with, and the answer is thrown away."""
    with Model.open(model, ctx=64, draft="off", load=load, heat=False) as opened:
        if load != "direct":
            opened.runner.weights.gguf.drop_cache()
        forward = opened.runner._forward

        def cut(*arguments: Any) -> Any:
            os.truncate(model, 5000)
            return forward(*arguments)

        monkeypatch.setattr(opened.runner, "_forward", cut)
        with opened.session() as session, pytest.raises(BadModelError, match="model file changed on disk"):
            list(session.generate([1, 2, 3], max_tokens=3, sampling=Sampling(0.0, seed=0)))


def test_prediction_modules_that_are_cut(bundled_model: Path, tmp_path: Path) -> None:
    """They are mapped, too, and drafts of zeros are no drafts."""
    path = Path(shutil.copy(bundled_model, tmp_path / "m.gguf"))
    beside = Path(shutil.copy(sidecar_path(bundled_model), tmp_path / "mtp-m.gguf"))
    with Model.open(path, ctx=128, draft="mtp") as opened, opened.session() as session:
        answer = session.generate("Once upon a time", max_tokens=60, sampling=Sampling(0.0, seed=0), ignore_stop=True)
        next(answer)
        os.truncate(beside, 5000)
        with pytest.raises(BadModelError, match=r"mtp-m\.gguf: model file changed on disk"):
            list(answer)


def test_the_command_ends_with_its_code(run_inline: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before(monkeypatch, "weights", lambda: os.truncate(model, 5000))
    done = run_inline("generate", model, "-p", "Hi", "-n", "2")
    assert done.returncode == 4 and "model file changed on disk" in done.stderr


def test_inspect_reads_no_zeros(run_inline: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from m2lite.text import tokenizer

    real = tokenizer.load_tokenizer

    def cut(*arguments: Any) -> Any:
        os.truncate(model, 5000)
        return real(*arguments)

    monkeypatch.setattr(tokenizer, "load_tokenizer", cut)
    done = run_inline("inspect", model)
    assert done.returncode == 4 and "model file changed on disk" in done.stderr
