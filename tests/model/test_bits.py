"""The same bits for any chunk, number of threads, batch mates, rewind, fork and kernels: promise 1, at the logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import tinymodel
from m2lite.kernels import fast, reference
from m2lite.model.buffers import Pieces
from m2lite.model.forward import forward
from m2lite.model.weights import use_tiles
from m2lite.simd import jit
from m2lite.simd.tuning import PARAMETERS, VALUES
from tests.forms import FORMS, run_form
from tests.model.engine import F32, Engine
from tests.model.logits_hash import drawn_ids, hash_logits


@pytest.fixture(scope="module", params=["bundled f16", "random f16", "bundled q8_0", "random q8_0"])
def engine(request: pytest.FixtureRequest, bundled_model: Path, model_files: dict[str, Path]) -> Engine:
    name, kv = request.param.split()
    return Engine(bundled_model if name == "bundled" else model_files["random"], kv=kv)


@pytest.fixture(scope="module")
def tokens(engine: Engine) -> list[int]:
    ids: list[int] = np.random.default_rng(7).integers(0, engine.config.n_vocab, 150).tolist()
    return ids


@pytest.fixture(scope="module")
def expected(engine: Engine, tokens: list[int]) -> F32:
    """Logits of 150 tokens, one at a time."""
    timeline = engine.pool.timeline()
    return np.concatenate([engine.run(timeline, [t]) for t in tokens])


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    yield
    jit.start(2)


def same(a: F32, b: F32) -> bool:
    return a.tobytes() == b.tobytes()


@pytest.mark.parametrize("chunk", [2, 5, 7, 8, 64, 128])
def test_prefill_in_chunks_equals_single_steps(engine: Engine, tokens: list[int], expected: F32, chunk: int) -> None:
    timeline = engine.pool.timeline()
    parts = [engine.run(timeline, tokens[i : i + chunk]) for i in range(0, len(tokens), chunk)]
    assert same(np.concatenate(parts), expected)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_threads_do_not_matter(engine: Engine, tokens: list[int], expected: F32, n_threads: int) -> None:
    jit.start(n_threads)
    assert same(engine.logits(tokens[:128]), expected[:128])


def test_parallel_regions_equal_serial_kernels(
    engine: Engine, tokens: list[int], expected: F32, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model this small runs without parallel regions; force them everywhere."""
    monkeypatch.setitem(VALUES, "alone_macs", 0)
    timeline = engine.pool.timeline()
    parts = [engine.run(timeline, tokens[:70]), engine.run(timeline, tokens[70:71]), engine.run(timeline, tokens[71:])]
    assert same(np.concatenate(parts), expected)


def test_no_value_that_differs_between_machines_matters(
    engine: Engine, tokens: list[int], expected: F32, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each value of each parameter, with parallel regions everywhere."""
    monkeypatch.setitem(VALUES, "alone_macs", 0)
    for row in PARAMETERS.values():
        for value in row.values:
            with monkeypatch.context() as patch:
                patch.setitem(VALUES, row.name, value)
                use_tiles(engine.weights)
                timeline = engine.pool.timeline()
                parts = [engine.run(timeline, tokens[first:end]) for first, end in ((0, 101), (101, 102), (102, 150))]
                timeline.release()
            assert same(np.concatenate(parts), expected), (row.name, value)
    use_tiles(engine.weights)


def test_batch_mates_do_not_matter(engine: Engine, tokens: list[int], expected: F32) -> None:
    """Two timelines that share 100 positions, in one call, against two runs on their own."""
    first = engine.pool.timeline()
    engine.run(first, tokens[:100])
    second = first.fork()
    other = tokens[::-1][:20]
    together = engine.run_rows([(first, tokens[100:130]), (second, other)])
    assert same(together[:30], expected[100:130])
    assert same(together[30:], engine.logits(tokens[:100] + other)[100:])
    step = engine.run_rows([(second, [3]), (first, [tokens[130]])], outputs="last")
    assert same(step[1:], expected[130:131])
    assert same(step[:1], engine.logits([*tokens[:100], *other, 3])[-1:])
    first.release()
    second.release()


def test_rewind_equals_fresh(engine: Engine, tokens: list[int], expected: F32) -> None:
    timeline = engine.pool.timeline()
    engine.run(timeline, tokens[:90])
    engine.run(timeline, tokens[::-1][:30])
    timeline.rewind(90)
    assert same(engine.run(timeline, tokens[90:]), expected[90:])
    timeline.rewind(3)
    assert same(engine.run(timeline, tokens[3:100]), expected[3:100])
    timeline.release()


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("n_before", [1000, 1023, 1024])
def test_chunks_across_a_block_of_attention_equal_single_steps(
    model_files: dict[str, Path], n_before: int, kv: str
) -> None:
    """Attention merges pages within 1,024 positions first: a chunk may end, begin and turn on either side."""
    engine = Engine(model_files["random"], kv=kv)
    tokens = [i * 37 % engine.config.n_vocab for i in range(n_before + 60)]
    timeline = engine.pool.timeline()
    for first in range(0, n_before, 128):
        engine.run(timeline, tokens[first : min(first + 128, n_before)])
    steps = np.concatenate([engine.run(timeline, [t]) for t in tokens[n_before:]])
    timeline.rewind(n_before)
    assert same(engine.run(timeline, tokens[n_before:]), steps)


def test_numpy_reference_gives_the_same_bits(engine: Engine, tokens: list[int], expected: F32) -> None:
    slow = Engine(engine.gguf.path, kernels=reference, kv=engine.pool.kv)
    timeline = slow.pool.timeline()
    assert same(slow.run(timeline, tokens[:66]), expected[:66])
    assert same(slow.run(timeline, tokens[66:68]), expected[66:68])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_vector_forms_do_not_matter(bundled_model: Path, form: str) -> None:
    done = run_form(form, "model/logits_hash.py", bundled_model)
    expected = [form, hash_logits(bundled_model), drawn_ids(bundled_model)]
    assert done.stdout.splitlines() == expected, done.stderr[-2000:]


@pytest.mark.parametrize("pieces", [Pieces(1 << 30, 1, 25e9), Pieces(7, 3, 1e5), Pieces(16, 40, 1.0)])
def test_pieces_of_a_layer_do_not_matter(model_files: dict[str, Path], tokens: list[int], pieces: Pieces) -> None:
    """Long chunks go through a layer piece by piece; here through few buffers for experts, too, where one has most."""
    ids = [t % 50 for t in tokens[:40]]
    expected, looks = Engine(model_files["random"]).logits(ids), list[int]()
    for kernels in (fast, reference):
        engine = Engine(model_files["random"], n_rows=40, kernels=kernels, pieces=pieces)
        assert engine.buffers.n_pairs == max(40, 8 * engine.config.n_experts_used) < 40 * engine.config.n_experts_used
        assert same(engine.logits(ids), expected)
        rows, timeline = engine.pool.rows, engine.pool.timeline()
        forward(engine.weights, engine.pool, engine.buffers, rows([(timeline, ids)]), check=lambda: looks.append(0))
    n_layers = engine.config.n_layers
    assert len(looks) >= 2 * n_layers * (40 // min(40, pieces.n_rows))


def test_odd_dimensions_equal_the_reference(tmp_path: Path) -> None:
    """Nothing is a power of two or a multiple of 16 that need not be: 12 experts, heads of 48, 5 rotated pairs."""
    shape = tinymodel.Shape(
        n_layers=3,
        n_embd=96,
        n_heads=6,
        n_kv_heads=2,
        head_dim=48,
        rotary_dim=10,
        n_experts=12,
        n_experts_used=5,
        n_ff=160,
    )
    path = tinymodel.write_model(tmp_path / "odd.gguf", shape=shape)
    ids = [i * 31 % tinymodel.N_VOCAB for i in range(70)]
    compiled, slow = Engine(path), Engine(path, kernels=reference)
    assert same(compiled.logits(ids), slow.logits(ids))


@pytest.mark.parametrize("kernels", [fast, reference])
def test_scratch_memory_may_hold_anything(model_files: dict[str, Path], kernels: ModuleType) -> None:
    """Buffers are not cleared: whatever they hold before a call, signalling NaN included, must not matter."""
    expected = Engine(model_files["random"]).logits([1, 2, 3])
    dirty = Engine(model_files["random"], n_rows=8, kernels=kernels)
    for name in set(dirty.buffers._arrays) - {"pair_order", "router_scores"}:
        dirty.buffers.array(name).reshape(-1).view(np.uint8).reshape(-1, 4)[:] = [0x01, 0x00, 0x80, 0x7F]
    dirty.buffers.array("router_scores")[:, : dirty.config.n_experts] = np.nan
    assert same(dirty.logits([1, 2, 3]), expected)
