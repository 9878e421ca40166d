"""KV pages: room, rewind, fork and copy on write, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from m2lite.errors import ContextError, UsageError
from m2lite.model.cache import PAGE
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


def test_unknown_kv_type_and_empty_pool_are_refused(engine: Engine) -> None:
    from m2lite.model.cache import KVPool

    with pytest.raises(UsageError, match="KV type 'q2'"):
        KVPool(engine.config, 64, "q2")
    with pytest.raises(UsageError, match="0 positions"):
        KVPool(engine.config, 0)


def test_positions_beyond_the_models_context_are_refused(engine: Engine) -> None:
    limit = engine.config.n_ctx_train
    assert engine.pool.rows([(engine.pool.timeline(limit - 1), np.asarray([1]))]).n == 1
    with pytest.raises(ContextError, match="beyond the model's context of 4,096"):
        engine.pool.rows([(engine.pool.timeline(limit), np.asarray([1]))])
