"""Sums of squares: against the reference forward, for any chunking and threads, and what cannot be summed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

from m2lite import Model
from m2lite.engine.thread import compute_thread
from m2lite.errors import M2liteError
from m2lite.kernels import reference
from m2lite.measure.importance import Collected, SquareSums, collect_importance, format_importance
from m2lite.simd.tuning import DEFAULTS, VALUES
from tests.model.engine import Engine
from tests.model.test_refused import rewrite

Opened = Callable[[str], Model]
N_CTX = 70
TOKENS = [int(i) for i in np.random.default_rng(3).integers(0, 256, 2 * N_CTX + 50)]


@pytest.fixture(scope="module")
def collected(opened: Opened) -> Collected:
    return collect_importance(opened("random"), TOKENS, N_CTX)


def assert_same(a: Collected, b: Collected) -> None:
    assert list(a.sums) == list(b.sums)
    for name, (sums, counts) in a.sums.items():
        assert sums.tobytes() == b.sums[name][0].tobytes(), name
        assert counts.tobytes() == b.sums[name][1].tobytes(), name


def count_free(model: Model) -> int:
    """Free KV positions, asked behind all jobs that are queued."""
    return compute_thread().run(lambda: model.runner.pool.n_free)


def test_sums_are_those_of_the_reference_forward(collected: Collected, model_files: dict[str, Path]) -> None:
    """The same observer of the NumPy twins of all kernels, one call per chunk."""
    engine = Engine(model_files["random"], kernels=reference)
    model = SimpleNamespace(gguf=engine.gguf, config=engine.config, n_rows=128)
    squares = SquareSums(model)  # type: ignore[arg-type]
    for first in (0, N_CTX):
        engine.logits(TOKENS[first : first + N_CTX], observer=squares)
    assert (collected.n_ctx, collected.n_chunks, collected.n_chunks_asked) == (N_CTX, 2, 2)
    assert_same(collected, Collected(squares.sums, N_CTX, 2, 2))


def test_sums_of_llama_imatrix(opened: Opened) -> None:
    """What llama-imatrix -c 128 (llama.cpp in llama-cpp-python 0.3.36) writes for this file and this text.

    K and V lie in f16 there too, but are rounded after another order of sums: 0.2 % behind the attention, where values
    of many positions are averaged. A score that is nearly even may send a token to another expert: 16 of 8704 here.
    """
    found = collect_importance(opened("random"), " ".join(str(i * i) for i in range(700)), 128)
    assert found.n_chunks == 34
    totals = {
        "attn_q": 278527.086,
        "attn_output": 192912.619,
        "ffn_gate_inp": 278527.517,
        "ffn_gate_exps": 557055.055,
        "ffn_down_exps": 108449.423,
    }
    assert {n: found.sums[f"blk.1.{n}.weight"][0].sum() for n in totals} == pytest.approx(totals, rel=2e-3)
    columns = {"attn_q": 3444.073, "attn_output": 512.875, "ffn_gate_inp": 4909.593}
    assert {n: found.sums[f"blk.1.{n}.weight"][0][0, 5] for n in columns} == pytest.approx(columns, rel=5e-3)
    counts = found.sums["blk.1.ffn_gate_exps.weight"][1]
    assert np.abs(counts - [0, 1628, 4262, 2172, 0, 150, 2, 490]).sum() <= 40 and counts.sum() == 2 * 34 * 128
    assert found.unreached["blk.1"] == (0, 4)


def test_names_shapes_and_counts(collected: Collected, opened: Opened) -> None:
    tensors, n = opened("random").gguf.tensors, 2 * N_CTX
    layers = {name: info.shape for name, info in tensors.items() if name.startswith("blk.") and len(info.shape) > 1}
    assert set(collected.sums) == set(layers)  # not the head, as in llama-imatrix
    for name, shape in layers.items():
        sums, counts = collected.sums[name]
        assert sums.shape == (len(counts), shape[-1])
        assert len(counts) == (shape[0] if len(shape) == 3 else 1)
        assert counts.sum() == n * (2 if len(shape) == 3 else 1)  # two experts per token
        assert np.array_equal(sums.sum(axis=1) == 0, counts == 0)
    for one, other in (("attn_q", "attn_k"), ("attn_q", "attn_v"), ("ffn_gate_exps", "ffn_up_exps")):
        assert collected.sums[f"blk.1.{one}.weight"] is collected.sums[f"blk.1.{other}.weight"]
    # The same rows go to the router once and to two experts each.
    router = collected.sums["blk.0.ffn_gate_inp.weight"][0].sum()
    assert collected.sums["blk.0.ffn_gate_exps.weight"][0].sum() == pytest.approx(2 * router)


def test_rows_and_threads_change_nothing(
    collected: Collected, opened: Opened, model_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened("random")
    for n_rows in (7, 64):
        with monkeypatch.context() as patch:
            patch.setattr(model, "n_rows", n_rows)
            assert_same(collect_importance(model, TOKENS, N_CTX), collected)
    for table in (DEFAULTS, VALUES):
        monkeypatch.setitem(table, "alone_macs", 0)
    for threads in (1, 2):
        with Model.open(model_files["random"], ctx=128, threads=threads) as other:
            assert_same(collect_importance(other, TOKENS, N_CTX), collected)


def test_sums_of_chunks_add_up(collected: Collected, opened: Opened) -> None:
    first = collect_importance(opened("random"), TOKENS, N_CTX, n_chunks=1)
    second = collect_importance(opened("random"), TOKENS[N_CTX:], N_CTX, n_chunks=1)
    for name, (sums, counts) in collected.sums.items():
        assert np.array_equal(first.sums[name][1] + second.sums[name][1], counts)
        assert np.allclose(first.sums[name][0] + second.sums[name][0], sums, rtol=1e-12, atol=0)


def test_the_model_answers_as_before(opened: Opened) -> None:
    model = opened("random")
    before, n_free = model.logits(TOKENS[:50]), count_free(model)
    collect_importance(model, TOKENS, N_CTX, n_chunks=1)
    assert count_free(model) == n_free
    assert model.logits(TOKENS[:50]).tobytes() == before.tobytes()


@pytest.fixture(scope="module")
def unlikely(model_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Experts 3 and 5 of layer 1 are never chosen; no other is preferred."""

    def edit(name: str, values: np.ndarray) -> np.ndarray:
        if name.endswith("exp_probs_b.bias"):
            values[:] = 0
        if name == "blk.1.exp_probs_b.bias":
            values[[3, 5]] = -100
        return values

    path = rewrite(model_files["random"], tmp_path_factory.mktemp("unlikely") / "m.gguf", {}, edit)
    with Model.open(path, ctx=128) as model:
        yield model


def test_experts_that_no_token_reached_are_named(unlikely: Model) -> None:
    found = collect_importance(unlikely, TOKENS, N_CTX)
    assert found.unreached == {"blk.1": (3, 5)}
    assert found.n_experts == 16
    text = format_importance(found)
    assert "2 of 16 (12.50%)" in text and "  blk.1: 3, 5" in text
    counts = {name: (np.zeros((9, 4)), np.arange(9) % 9) for name in ("blk.0.ffn_gate_exps.weight", "blk.0.attn_q")}
    text = format_importance(Collected(counts, 8, 1, 1))
    assert text.splitlines()[1:] == ["experts that no token reached: 1 of 9 (11.11%)", "  blk.0: 0"]
    many = {"blk.7.ffn_gate_exps.weight": (np.zeros((40, 4)), np.zeros(40, np.int64))}
    assert format_importance(Collected(many, 8, 1, 1)).endswith("12, 13, 14, 15 and 24 more")


def test_a_fused_qkv_is_summed_under_its_own_name(
    collected: Collected, model_files: dict[str, Path], tmp_path: Path
) -> None:
    parts = {t.name: np.array(t.data) for t in gguf.GGUFReader(model_files["random"]).tensors}

    def fuse(name: str, values: np.ndarray) -> np.ndarray | None:
        if name.endswith(("attn_k.weight", "attn_v.weight")):
            return None
        if name.endswith("attn_q.weight"):
            return np.concatenate([parts[name.replace("attn_q", which)] for which in ("attn_q", "attn_k", "attn_v")])
        return values

    path = rewrite(model_files["random"], tmp_path / "fused.gguf", {}, fuse, {"attn_q.weight": "attn_qkv.weight"})
    with Model.open(path, ctx=128) as model:
        found = collect_importance(model, TOKENS, N_CTX)
    assert not any(".attn_k." in name or ".attn_q." in name for name in found.sums)
    expected = collected.sums["blk.1.attn_q.weight"][0]
    assert found.sums["blk.1.attn_qkv.weight"][0].tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("blk.1.attn_norm.weight", r"^blk\.1\.attn_q\.weight: the squares of its inputs do not add up"),
        ("blk.0.ffn_up_exps.weight", r"^blk\.0\.ffn_down_exps\.weight: the squares of its inputs of expert 0 do not"),
    ],
)
def test_sums_beyond_float32_are_refused_with_the_tensor(
    model_files: dict[str, Path], tmp_path: Path, tensor: str, message: str
) -> None:
    """Inputs of 1e20 are finite, but llama.cpp's files hold float32 squares."""
    f32 = gguf.GGMLQuantizationType.F32

    def edit(name: str, values: np.ndarray) -> np.ndarray:
        if name.endswith("exps.weight"):
            values = gguf.quants.dequantize(values, gguf.GGMLQuantizationType.Q4_0)
        elif values.dtype == np.uint8:
            values = gguf.quants.dequantize(values, gguf.GGMLQuantizationType.Q8_0)
        return values * np.float32(1e20) if name == tensor else values

    path = rewrite(model_files["random"], tmp_path / "large.gguf", {}, edit, types=lambda _: f32)
    with Model.open(path, ctx=128) as model:
        with pytest.raises(M2liteError, match=message):
            collect_importance(model, TOKENS, N_CTX)
        assert count_free(model) == 128


def test_stopping_keeps_what_was_read(opened: Opened) -> None:
    model, heard = opened("random"), []
    found = collect_importance(model, TOKENS, 40, progress=lambda *n: heard.append(n), stop=lambda: len(heard) == 2)
    assert heard == [(1, 4), (2, 4)] and (found.n_chunks, found.n_chunks_asked) == (2, 4)
    assert_same(found, collect_importance(model, TOKENS, 40, n_chunks=2))
    assert "2 of 4 chunks of 40 tokens" in format_importance(found)
    assert collect_importance(model, TOKENS, 40, stop=lambda: True).sums == {}


def test_prediction_modules_are_not_mixed_in(opened: Opened) -> None:
    """A matrix of another file (a sidecar's) has no name among the model's tensors, and no sum."""
    tap = SquareSums(opened("random"))
    matrix = opened("endless").weights.layers[0].attn_q
    x = np.ones((3, matrix.n_in), np.float32)
    tap.dense((matrix,), int(x.ctypes.data), matrix.n_in, 3)
    assert tap.sums == {}
