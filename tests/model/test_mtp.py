"""The bundled model and its prediction modules: against transformers and the training code, and drafting for real."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest

from m2lite.errors import BadModelError
from m2lite.model.mtp import ModuleScratch, Mtp, bind_mtp, module_logits, run_module, trunk_states
from m2lite.storage.gguf_reader import open_gguf
from tests.golden.compare import Agreement, compare
from tests.golden.golden import DIRECTORY
from tests.model.engine import Engine, states_before
from tests.model.test_refused import rewrite

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = dict(np.load(DIRECTORY / "m2-tiny.npz"))


@pytest.fixture(scope="module")
def sidecar(bundled_model: Path) -> Path:
    return bundled_model.with_name(f"mtp-{bundled_model.name}")


def as_float32(source: Path, target: Path) -> Path:
    """The same weights in a file of float32."""
    reader = gguf.GGUFReader(source)
    kinds = {t.name: t.tensor_type for t in reader.tensors}
    f32 = gguf.GGMLQuantizationType.F32
    return rewrite(source, target, {}, lambda name, v: gguf.quants.dequantize(v, kinds[name]), types=lambda _: f32)


def open_pair(model: Path, sidecar: Path) -> tuple[Engine, Mtp]:
    engine = Engine(model, n_positions=1024, n_rows=256, n_extra_layers=3)
    return engine, bind_mtp(open_gguf(sidecar), engine.weights)


def run_all(engine: Engine, mtp: Mtp, tokens: Sequence[int]) -> list[Agreement]:
    """Trunk and modules, teacher-forced, against the golden logits."""
    timeline = engine.pool.timeline()
    every = int(GOLDEN["every"])  # the golden file keeps the logits of every so many positions
    found = [compare(GOLDEN["trunk"], engine.run(timeline, tokens)[::every])]
    scratch, n = ModuleScratch(engine.buffers), len(tokens)
    address = trunk_states(mtp, engine.buffers, n)
    for k in range(3):
        states = states_before(engine, address, n)
        rows = engine.pool.rows_at([(timeline, 0, tokens)])
        address = run_module(mtp, k, engine.pool, engine.buffers, scratch, rows, int(states.ctypes.data))
        found.append(compare(GOLDEN[f"mtp_{k + 1}"], module_logits(mtp, k, engine.buffers, 0, n)[::every]))
    return found


def test_quantized_files_agree_with_transformers_and_the_training_code(bundled_model: Path, sidecar: Path) -> None:
    """Modules get twice the room: each takes the rounding of the one before it, and a draft is verified anyway."""
    trunk, *modules = run_all(*open_pair(bundled_model, sidecar), GOLDEN["tokens"].tolist())
    assert trunk.mean_kl <= 1e-3, trunk
    for module in modules:
        assert module.mean_kl <= 2e-3, module


def test_float32_files_agree_with_transformers_and_the_training_code(
    bundled_model: Path, sidecar: Path, tmp_path: Path
) -> None:
    model, modules = as_float32(bundled_model, tmp_path / "m.gguf"), as_float32(sidecar, tmp_path / "mtp-m.gguf")
    for found in run_all(*open_pair(model, modules), GOLDEN["tokens"].tolist()):
        assert found.mean_kl <= 1e-5 and found.max_kl <= 1e-3 and found.top1 >= 0.995, found


def test_modules_in_chunks_equal_modules_at_once(bundled_model: Path, sidecar: Path) -> None:
    engine, mtp = open_pair(bundled_model, sidecar)
    tokens = GOLDEN["tokens"].tolist()
    timeline = engine.pool.timeline()
    engine.run(timeline, tokens)
    scratch = ModuleScratch(engine.buffers)
    states = states_before(engine, trunk_states(mtp, engine.buffers, len(tokens)), len(tokens))

    def run(cuts: list[int]) -> bytes:
        parts = []
        for first, last in pairwise([0, *cuts, len(tokens)]):
            rows = engine.pool.rows_at([(timeline, first, tokens[first:last])])
            run_module(mtp, 0, engine.pool, engine.buffers, scratch, rows, int(states[first:].ctypes.data))
            parts.append(module_logits(mtp, 0, engine.buffers, 0, rows.n).copy())
        return np.concatenate(parts).tobytes()

    assert run([]) == run([1, 2, 10, 31, 64])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("minimax-m2.nextn_predict_layers", 0, "nextn_predict_layers is 0, expected 1 to 16"),
        ("m2lite.mtp.concat", "hidden,embedding", r"m2lite\.mtp\.concat is 'hidden,embedding'"),
        ("m2lite.mtp.hidden", "middle", r"m2lite\.mtp\.hidden is 'middle'"),
    ],
)
def test_damaged_sidecars_are_refused(
    bundled_model: Path, sidecar: Path, tmp_path: Path, key: str, value: object, message: str
) -> None:
    engine = Engine(bundled_model, n_rows=8)
    path = rewrite(sidecar, tmp_path / "mtp.gguf", {key: value})
    with pytest.raises(BadModelError, match=message):
        bind_mtp(open_gguf(path), engine.weights)


@pytest.mark.parametrize("key", ["m2lite.mtp.zero_at_0", "m2lite.mtp.shared_norm"])
def test_flags_of_another_type_are_refused(bundled_model: Path, sidecar: Path, tmp_path: Path, key: str) -> None:
    engine = Engine(bundled_model, n_rows=8)
    data = bytearray(sidecar.read_bytes())
    data[data.index(key.encode()) + len(key)] = 0  # UINT8 instead of BOOL, of the same size
    path = tmp_path / "mtp.gguf"
    path.write_bytes(data)
    with pytest.raises(BadModelError, match=rf"{key} is \d, expected true or false"):
        bind_mtp(open_gguf(path), engine.weights)


def test_the_main_file_is_no_sidecar(bundled_model: Path) -> None:
    engine = Engine(bundled_model, n_rows=8)
    with pytest.raises(BadModelError, match="This is no MTP sidecar"):
        bind_mtp(open_gguf(bundled_model), engine.weights)


def test_a_sidecar_is_no_model(sidecar: Path) -> None:
    with pytest.raises(BadModelError, match="holds prediction modules only"):
        Engine(sidecar, n_rows=8)
