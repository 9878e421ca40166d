"""KV pages: room, rewind, fork and copy on write, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tinymodel
from m2lite import machine
from m2lite.errors import ContextError, ResourceError, UsageError
from m2lite.kernels import fast, reference
from m2lite.model import cache as cache_module
from m2lite.model.cache import PAGE, KVPool, kv_layer_bytes
from tests.model.engine import Engine


@pytest.fixture
def engine(model_files: dict[str, Path]) -> Engine:
    return Engine(model_files["random"], n_positions=4 * PAGE)


def test_pages_are_taken_as_needed_and_given_back(engine: Engine) -> None:
    pool, timeline = engine.pool, engine.pool.timeline()
    assert pool.n_free == 4 * PAGE
    engine.run(timeline, [1] * PAGE)
    assert pool.n_free == 3 * PAGE
    engine.run(timeline, [1])
    assert pool.n_free == 2 * PAGE
    timeline.rewind(PAGE)
    assert pool.n_free == 3 * PAGE
    timeline.release()
    assert pool.n_free == 4 * PAGE


def test_a_fork_copies_a_page_only_when_it_writes(engine: Engine) -> None:
    pool, timeline = engine.pool, engine.pool.timeline()
    engine.run(timeline, [1] * 70)
    other = timeline.fork()
    assert pool.n_free == 2 * PAGE and other.pages == timeline.pages
    engine.run(other, [2])
    assert other.pages[0] == timeline.pages[0] and other.pages[1] != timeline.pages[1]
    assert pool.n_free == PAGE
    timeline.release()
    assert pool.n_free == 2 * PAGE
    other.release()
    assert pool.n_free == 4 * PAGE


def test_no_room_is_said_before_anything_is_taken(engine: Engine) -> None:
    timeline = engine.pool.timeline()
    with pytest.raises(ContextError, match="257 more tokens need 5 pages") as caught:
        engine.pool.rows([(timeline, np.ones(257, np.int32))])
    assert (caught.value.needed, caught.value.free, caught.value.limit) == (257, 4 * PAGE, 4 * PAGE)
    assert engine.pool.n_free == 4 * PAGE and timeline.length == 0


@pytest.mark.parametrize("ids", [[-1], [10**6], [272], [], [1.5], [[1]], [2**40]])
def test_token_ids_are_checked(engine: Engine, ids: list[object]) -> None:
    with pytest.raises(UsageError):
        engine.pool.rows([(engine.pool.timeline(), np.asarray(ids))])


def test_a_failed_call_leaves_the_timeline_as_it_was(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = engine.pool.timeline()
    before = engine.run(timeline, [5, 6, 7])
    rows = engine.pool.rows([(timeline, np.asarray([8]))])
    assert rows.n == 1 and timeline.length == 3
    timeline.rewind(3)
    assert engine.run(timeline, [9])[-1].tobytes() == engine.logits([5, 6, 7, 9])[-1].tobytes()
    assert before.shape == (3, engine.config.n_vocab)


@pytest.mark.parametrize(("kv", "n_bytes"), [("f16", 2 * 64 * 2), ("q8_0", 2 * 64 * 34 // 32)])
def test_bytes_of_a_position(engine: Engine, kv: str, n_bytes: int) -> None:
    """K and V of two heads of 32, in two layers; the kernels' layout is as large as the pool counts."""
    pool = KVPool(engine.config, 3 * PAGE, kv)
    assert pool.n_bytes == 3 * PAGE * 2 * n_bytes
    assert pool.layer_bytes == PAGE * kv_layer_bytes(engine.config, kv) == PAGE * n_bytes
    assert pool.layer_bytes == 2 * reference.kv_head_bytes(32, int(kv == "q8_0"))


def test_heads_that_are_no_whole_blocks_are_refused_for_q8_0(engine: Engine) -> None:
    odd = replace(engine.config, head_dim=48)
    KVPool(odd, 64, "f16")
    with pytest.raises(UsageError, match="blocks of 32; this model's heads have 48"):
        KVPool(odd, 64, "q8_0")


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_the_longest_context(tmp_path: Path, kv: str) -> None:
    """All 196,608 positions of M2 in a model of one narrow head: addresses, tables and angles, against the twin."""
    n = 196_608
    shape = tinymodel.Shape(n_heads=2, n_kv_heads=1, n_ctx=n)
    path = tinymodel.write_model(tmp_path / "long.gguf", shape=shape)
    logits = []
    for kernels in (fast, reference):
        engine = Engine(path, n, n_rows=2, kernels=kernels, kv=kv)
        pool, timeline = engine.pool, engine.pool.timeline()
        timeline.make_room(n - 1)
        layer = reference.page_dtype(32, int(kv == "q8_0"))
        memory = reference.array_at(pool.page_address(0), layer, (pool.n_pages, 2))
        assert memory.nbytes == pool.n_bytes
        random = np.random.default_rng(3)
        for name in memory.dtype.names:
            values = random.standard_normal(memory[name].shape, np.float32)
            memory[name] = values * 50 if memory[name].dtype == np.int8 else values
        timeline.length = n - 2
        logits.append(engine.run(timeline, [5, 6]))
        assert pool.angles.shape == (n, 16) and timeline.length == n
        with pytest.raises(ContextError):
            engine.run(timeline, [7])
    assert logits[0].tobytes() == logits[1].tobytes()


def test_unknown_kv_type_and_empty_pool_are_refused(engine: Engine) -> None:
    with pytest.raises(UsageError, match="KV type 'q2'"):
        KVPool(engine.config, 64, "q2")
    with pytest.raises(UsageError, match="0 positions"):
        KVPool(engine.config, 0)


def test_positions_beyond_the_models_context_are_refused(engine: Engine) -> None:
    limit = engine.config.n_ctx_train
    assert engine.pool.rows([(engine.pool.timeline(limit - 1), np.asarray([1]))]).n == 1
    with pytest.raises(ContextError, match="beyond the model's context of 4,096"):
        engine.pool.rows([(engine.pool.timeline(limit), np.asarray([1]))])


def test_memory_that_cannot_be_had(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before the page is written to; what was there stays, and goes on when there is memory again."""
    monkeypatch.setattr(cache_module, "_LARGE", 0)
    pool = engine.pool
    timeline = pool.timeline()
    rows = pool.rows([(timeline, [1] * 60)])
    timeline.length = rows.lengths[0][1]
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 100)
    with pytest.raises(ResourceError, match=r"grows by 64 positions, which take [\d.]+ KiB; 100 B of"):
        pool.rows([(timeline, [1] * 10)])
    assert timeline.length == 60 and pool.n_free == 192
    pool.rows([(timeline, [1] * 4)])  # of the page that is there
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 1 << 40)
    pool.rows([(timeline, [1] * 10)])
    assert pool.n_free == 128
