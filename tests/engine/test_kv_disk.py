"""Pages on disk: what is read is what would have been computed, bit for bit, and what is not sound is not read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from m2lite import Model, Sampling, machine
from m2lite.dialogue.conversation import Conversation
from m2lite.engine import prefix_cache
from m2lite.engine.kv_disk import KVDisk, default_budget
from m2lite.engine.prefix_cache import page_keys
from m2lite.engine.thread import compute_thread
from m2lite.model import cache
from m2lite.model.cache import PAGE
from m2lite.storage.pages import PageStore
from tests.engine.asked import IDS

Opened = Callable[[str], Model]


pytestmark = pytest.mark.usefixtures("cache_home")


def answer(model: Model, ids: list[int], n: int = 8) -> tuple[list[int], int]:
    """What comes behind ids, and how many of them were not computed."""
    with model.session() as session:
        found = list(session.generate(ids, max_tokens=n, sampling=Sampling(seed=1), ignore_stop=True))
        return found, session.stats.n_reused


def saved(model: Model, ids: list[int] = IDS) -> KVDisk:
    """The pages of ids are on disk, and nothing of them is in memory."""
    model.use_disk()
    disk = model.loop.prefix_cache.disk
    assert disk is not None
    answer(model, ids, 1)
    model.loop.save(ids)
    model.loop.forget()
    return disk


def without_disk(model: Model, ids: list[int]) -> list[int]:
    disk, model.loop.prefix_cache.disk = model.loop.prefix_cache.disk, None
    model.loop.forget()
    found = answer(model, ids)[0]
    model.loop.forget()
    model.loop.prefix_cache.disk = disk
    return found


def pages(model: Model, ids: list[int]) -> list[npt.NDArray[np.uint8]]:
    """The trunk's part of the pages: the rest are prediction modules'."""
    pool = model.runner.pool

    def copy() -> list[npt.NDArray[np.uint8]]:
        timeline = model.loop.prefix_cache.fork(ids, len(ids))[0]
        found = [np.frombuffer(pool.page_view(page), np.uint8)[: pool.trunk_bytes].copy() for page in timeline.pages]
        timeline.release()
        return found

    return compute_thread().run(copy)


def test_free_memory_is_not_looked_at_for_each_page(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """But before any of it is taken; and none is got for pages that are not there."""
    model, looks, touched = opened("random"), list[int](), list[int]()
    pool = model.runner.pool
    saved(model)
    free, touch = machine.free_memory_bytes, pool.touch_next
    monkeypatch.setattr(cache, "_LARGE", 0)
    monkeypatch.setattr(pool, "_is_touched", bytearray(pool.n_pages))
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: looks.append(1) or free())
    monkeypatch.setattr(pool, "touch_next", lambda n: touched.append(n) or touch(n))
    n = len(IDS) // PAGE
    assert n > 2
    pages(model, IDS)
    assert (touched, len(looks)) == ([n], 1)
    model.loop.forget()
    monkeypatch.setattr(prefix_cache, "_TOUCHED", 2 * pool.page_bytes)
    touched.clear()
    pages(model, [*IDS, *IDS])
    assert sum(touched[:-1]) == n and set(touched[:-1]) <= {1, 2} and touched[-1] == 1


def test_what_is_read_is_what_was_computed(opened: Opened) -> None:
    model = opened("random")
    expected = answer(model, IDS)[0]
    computed = pages(model, IDS[: 5 * PAGE])
    model.use_disk()
    assert model.loop.save(IDS) == 5 and model.loop.save(IDS) == 0
    disk = model.loop.prefix_cache.disk
    assert disk is not None and disk.n_written == 5 * disk.trunk_bytes
    model.loop.forget()
    assert answer(model, IDS) == (expected, 5 * PAGE) and disk.n_read == disk.n_written
    assert len(computed) == 5 and all(map(np.array_equal, pages(model, IDS[: 5 * PAGE]), computed))


def test_a_common_beginning_is_shared(opened: Opened) -> None:
    model = opened("random")
    saved(model)
    other = [*IDS[: 3 * PAGE + 5], 9, 9, 9, *IDS[3 * PAGE :]]
    assert answer(model, other) == (without_disk(model, other), 3 * PAGE)
    answer(model, other)
    assert model.loop.save(other) == 2
    # what memory holds beyond the disk's pages stays
    model.loop.forget()
    answer(model, IDS[: PAGE + 20])
    changed = [*IDS[: PAGE + 20], 1, 2, 3, *IDS]
    found, n_reused = answer(model, changed)
    assert n_reused == PAGE + 20
    assert found == without_disk(model, changed)


def test_a_prompt_that_ends_with_a_page_computes_its_last_token(opened: Opened) -> None:
    model = opened("random")
    saved(model)
    assert answer(model, IDS[: 2 * PAGE]) == (without_disk(model, IDS[: 2 * PAGE]), PAGE)


def test_another_model_or_cache_finds_nothing(opened: Opened, model_files: dict[str, Path]) -> None:
    model = opened("random")
    disk = saved(model)
    other = opened("reply")
    other.use_disk()
    assert other.loop.prefix_cache.disk is not None
    assert other.loop.prefix_cache.disk.store.directory != disk.store.directory
    with Model.open(model_files["random"], kv="q8_0") as half:
        half.use_disk()
        assert answer(half, IDS)[1] == 0


def test_another_version_of_the_numbers_finds_nothing(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("random")
    saved(model)
    monkeypatch.setattr("m2lite.engine.kv_disk.NUMERICS_VERSION", 0)
    model.use_disk()
    assert answer(model, IDS)[1] == 0


def test_a_source_that_changed_finds_all(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comment in a kernel, another number of threads: the numbers are the same."""
    model = opened("random")
    saved(model)
    monkeypatch.setattr("m2lite.simd.jit.source_hash", lambda: "another")
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")
    model.use_disk()
    assert answer(model, IDS)[1] == 5 * PAGE


@pytest.mark.parametrize("damage", ["cut", "bit", "longer", "empty", "header", "info", "directory"])
def test_a_damaged_page_is_computed(opened: Opened, damage: str) -> None:
    model = opened("random")
    disk = saved(model)
    path = disk.store.path(disk.name(page_keys(IDS)[2]))
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 1
    elif damage in ("header", "info"):
        data[{"header": 0, "info": 30}[damage]] ^= 1
    path.unlink()
    if damage == "directory":
        path.mkdir()
    else:
        path.write_bytes({"cut": data[:-1], "longer": data + b"x", "empty": b""}.get(damage, data))
    assert answer(model, IDS) == (without_disk(model, IDS), 2 * PAGE)


def test_the_budget_is_kept(tmp_path: Path) -> None:
    store = PageStore(tmp_path / "a", budget_bytes=3500)
    other = PageStore(tmp_path / "b", budget_bytes=3500)
    page = memoryview(bytearray(1000))
    for n, each in enumerate((store, store, other, other)):
        assert each.write(f"k{n}", page)
    assert store.read("k0", page)  # used now
    assert store.trim() == 1040
    assert [store.has("k0"), store.has("k1"), other.has("k2"), other.has("k3")] == [True, False, True, True]
    assert PageStore(tmp_path / "a", 0).trim(lambda key: key == "k0") == 2 * 1040 and store.has("k0")


def test_a_place_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = PageStore(tmp_path / "file" / "x", 100)
    assert not store.write("k", memoryview(bytearray(10))) and not store.read("k", memoryview(bytearray(10)))
    assert default_budget(tmp_path / "none" / "such") > 0


def test_a_place_of_others_is_not_used(tmp_path: Path) -> None:
    store, page = PageStore(tmp_path / "a" / "b", 1 << 20), memoryview(bytearray(1000))
    assert store.write("k", page) and store.read("k", page)
    assert store.directory.stat().st_mode & 0o777 == store.directory.parent.stat().st_mode & 0o777 == 0o700
    store.directory.chmod(0o777)
    assert store.read("k", page) is None and not store.write("k2", page) and not store.has("k2")


def test_a_chat_that_is_opened_again(bundled_model: Path) -> None:
    """With prediction modules: the same answer, nothing read twice, and drafts are as often right."""
    asked = ["Tell me a story about a fox.", "Tell me a story about a bear.", "And now about a mouse?"]
    with Model.open(bundled_model) as model:
        model.use_disk()
        talk = Conversation(model.session())
        talk.is_kept_on_disk = True
        for text in asked[:2]:
            list(talk.ask(text, sampling=Sampling(seed=1)))
            talk.keep()
        list(talk.ask(asked[2], sampling=Sampling(seed=1)))
    with Model.open(bundled_model) as model:
        model.use_disk()
        again = Conversation(model.session())
        again.restore(talk.messages[:-2], talk.said)
        list(again.ask(asked[2], sampling=Sampling(seed=1)))
        assert again.said.tokens == talk.said.tokens
        assert again.answer.stats.n_reused >= 2 * PAGE
