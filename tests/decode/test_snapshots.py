"""Rows on disk: what is read is what would have been computed, bit for bit, and what is not sound is not read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from m2lite import Model, Sampling
from m2lite.decode.conversation import Conversation
from m2lite.decode.session import Session
from m2lite.decode.snapshots import Snapshots, default_budget
from m2lite.model.cache import PAGE
from m2lite.storage.pages import PageStore

Opened = Callable[[str], Model]
ROW = [(7 * i * i + 3 * i) % 250 for i in range(5 * PAGE + 10)]


@pytest.fixture(autouse=True)
def cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def draw(session: Session, n: int = 8) -> list[int]:
    return list(session.generate((), max_tokens=n, sampling=Sampling(seed=1), ignore_stop=True))


def computed(model: Model, row: list[int]) -> Session:
    session = model.session()
    session.set_tokens(row)
    draw(session, 1)
    session.rewind(len(row))
    return session


def pages(model: Model, session: Session) -> list[npt.NDArray[np.uint8]]:
    """The trunk's part of the pages: the rest are prediction modules'."""
    n_bytes = model.config.n_layers * model.engine.pool.layer_bytes
    return [np.frombuffer(page, np.uint8)[:n_bytes].copy() for _, page in session.whole_pages(range(5))]


def test_what_is_read_is_what_was_computed(opened: Opened) -> None:
    model = opened("random")
    snapshots, first = Snapshots(model), computed(model, ROW)
    expected = draw(model_session(model, ROW))
    assert snapshots.save(first) == 5 and snapshots.save(first) == 0
    again = model.session()
    again.set_tokens(ROW)
    assert snapshots.restore(again) == 5 * PAGE
    assert all(map(np.array_equal, pages(model, again), pages(model, first)))
    assert draw(again) == expected and again.stats.n_reused == 5 * PAGE


def model_session(model: Model, row: list[int]) -> Session:
    session = model.session()
    session.set_tokens(row)
    return session


def test_a_common_beginning_is_shared(opened: Opened) -> None:
    model = opened("random")
    snapshots = Snapshots(model)
    snapshots.save(computed(model, ROW))
    other = [*ROW[: 3 * PAGE + 5], 9, 9, 9, *ROW[3 * PAGE :]]
    session = model_session(model, other)
    assert snapshots.restore(session) == 3 * PAGE
    expected = draw(model_session(model, other))
    assert draw(session) == expected
    assert snapshots.save(session) == 2
    # what the cache already holds beyond the disk's pages stays
    held = computed(model, ROW[: PAGE + 20])
    held.set_tokens([*ROW[: PAGE + 20], 1, 2, 3, *ROW])
    assert snapshots.restore(held) == PAGE + 20
    assert draw(held) == draw(model_session(model, held.tokens[:-8]))


def test_a_row_that_ends_with_a_page_computes_its_last_token(opened: Opened) -> None:
    model = opened("random")
    snapshots = Snapshots(model)
    snapshots.save(computed(model, ROW))
    session = model_session(model, ROW[: 2 * PAGE])
    assert snapshots.restore(session) == PAGE
    assert draw(session) == draw(model_session(model, ROW[: 2 * PAGE]))


def test_another_model_or_cache_finds_nothing(opened: Opened, model_files: dict[str, Path]) -> None:
    model = opened("random")
    snapshots = Snapshots(model)
    snapshots.save(computed(model, ROW))
    assert Snapshots(opened("reply")).store.directory != snapshots.store.directory
    with Model.open(model_files["random"], kv="q8_0") as other:
        assert Snapshots(other).restore(model_session(other, ROW)) == 0


@pytest.mark.parametrize("damage", ["cut", "bit", "longer", "empty", "header", "directory"])
def test_a_damaged_page_is_computed(opened: Opened, damage: str) -> None:
    model = opened("random")
    snapshots = Snapshots(model)
    snapshots.save(computed(model, ROW))
    path = snapshots.store.path(list(snapshots.keys(ROW))[2])
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 1
    elif damage == "header":
        data[0] ^= 1
    path.unlink()
    if damage == "directory":
        path.mkdir()
    else:
        path.write_bytes({"cut": data[:-1], "longer": data + b"x", "empty": b""}.get(damage, data))
    session = model_session(model, ROW)
    assert snapshots.restore(session) == (5 if damage == "longer" else 2) * PAGE
    assert draw(session) == draw(model_session(model, ROW))


def test_the_budget_is_kept(tmp_path: Path) -> None:
    store = PageStore(tmp_path / "a", 1000, budget_bytes=3500)
    other = PageStore(tmp_path / "b", 1000, budget_bytes=3500)
    page = memoryview(bytearray(1000))
    for n, each in enumerate((store, store, other, other)):
        assert each.write(f"k{n}", page)
    assert store.read("k0", page)  # used now
    assert store.trim() == 1032
    assert [store.has("k0"), store.has("k1"), other.has("k2"), other.has("k3")] == [True, False, True, True]
    assert PageStore(tmp_path / "a", 1000, 0).trim(lambda key: key == "k0") == 2 * 1032 and store.has("k0")


def test_a_place_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = PageStore(tmp_path / "file" / "x", 10, 100)
    assert not store.write("k", memoryview(bytearray(10))) and not store.read("k", memoryview(bytearray(10)))
    assert default_budget(tmp_path / "none" / "such") > 0


def test_a_chat_that_is_opened_again(bundled_model: Path) -> None:
    """With prediction modules, whose part of the pages nobody computed: the same answer, and nothing read twice."""
    asked = ["Tell me a story about a fox.", "Tell me a story about a bear.", "And now about a mouse?"]
    with Model.open(bundled_model) as model:
        talk, fresh = Conversation(model.session()), Conversation(model.session())
        talk.snapshots = Snapshots(model)
        for text in asked[:2]:
            list(talk.ask(text, sampling=Sampling(seed=1)))
            talk.keep()
        talk.session.close()
        again = Conversation(model.session())
        again.snapshots = Snapshots(model)
        again.restore(talk.messages, talk.said)
        fresh.restore(talk.messages, talk.said)
        for conversation in (again, fresh):
            list(conversation.ask(asked[2], sampling=Sampling(seed=1)))
        assert again.said.tokens == fresh.said.tokens
        assert again.answer.stats.n_reused >= 2 * PAGE and fresh.answer.stats.n_reused == 0
