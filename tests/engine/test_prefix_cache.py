"""What was computed once is found again: by whom, how much, bit for bit, and what goes first when room is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2lite import Model
from m2lite.dialogue.conversation import Conversation
from m2lite.engine.batch import Batch
from m2lite.engine.kv_disk import KVDisk
from m2lite.engine.prefix_cache import n_common
from m2lite.engine.request import Request
from m2lite.engine.thread import Stopped, compute_thread
from m2lite.model.cache import PAGE
from m2lite.simd import jit
from m2lite.storage import durable
from m2lite.storage.pages import PageStore
from tests.children import PATIENCE_S
from tests.engine.asked import GREEDY, IDS, QUESTIONS, SYSTEM, chat_ids

Opened = Callable[[str], Model]


pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture(scope="module")
def tiny(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model, draft="off", sequences=32, ctx=1024) as model:
        yield model


def disk_of(model: Model) -> KVDisk:
    disk = model.loop.prefix_cache.disk
    assert disk is not None
    return disk


# Computed once


@pytest.mark.parametrize("n_inflight", [1, 4, 32])
def test_shared_beginning_is_computed_once(tiny: Model, n_inflight: int) -> None:
    """500 prompts with the same 300 tokens in front: those are computed once, whatever comes when."""
    tiny.loop.forget()
    rows = [chat_ids(tiny, f"Question {n}?", "You answer in one word. " * 40) for n in range(500)]
    n_same = next(i for i in range(len(rows[0])) if len({row[i] for row in rows}) > 1)
    assert n_same > 250
    batch = Batch(tiny, n_inflight)
    requests = (Request(prompt=row, rng_stream=n, sampling=GREEDY, max_tokens=2) for n, row in enumerate(rows))
    done = list(batch.run(requests))
    assert len(done) == 500 and all(end.error is None for end in done)
    assert batch.counts.n_prompt <= n_same + sum(len(row) - n_same for row in rows)
    assert batch.counts.n_prompt >= n_same and batch.counts.n_cached >= 499 * n_same


def test_beginnings_of_several_kinds_and_lengths(tiny: Model) -> None:
    """A tree: what two prompts have in common is computed once, at whatever place they part."""
    words = ["red", "green", "blue"]
    texts = [f"{a} " * 60 + f"{b} " * 40 + f"{c} " * 20 for a in words for b in words for c in words]
    rows = [chat_ids(tiny, text) for text in texts]
    prefixes = {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}
    requests = [Request(key=str(n), prompt=row, sampling=GREEDY, max_tokens=3) for n, row in enumerate(rows)]
    tiny.loop.forget()
    batch = Batch(tiny, 27)
    done = {end.request.key: end.completion for end in batch.run(requests)}
    assert batch.counts.n_prompt + batch.counts.n_cached == sum(map(len, rows))
    assert batch.counts.n_prompt <= len(prefixes) + 27 * 16  # a few tokens are cheaper to compute than to wait for
    for request in requests[::5]:
        tiny.loop.forget()
        answer = done[request.key]
        assert answer is not None and answer.tokens == tiny.submit(request).result().tokens


@pytest.mark.parametrize("keeps_thinking", [False, True])
def test_the_next_turn_of_a_chat(tiny: Model, keeps_thinking: bool) -> None:
    """All that it has in common with what was said is there; the template drops the thinking of earlier turns."""
    tiny.loop.forget()
    talk = Conversation(tiny.session())
    talk.keep_thinking = keeps_thinking
    for n, text in enumerate(QUESTIONS[:4]):
        before, n_before = talk.session.tokens, tiny.loop.counts.n_prompt
        list(talk.ask(text, sampling=GREEDY))
        row = talk.encode(talk.messages[:-1])
        n_same = n_common(before, row)
        # The token that ends an answer was drawn, not computed.
        assert talk.answer.stats.n_reused == min(n_same, max(0, len(before) - 1)) and (n_same > 30 or not n)
        assert tiny.loop.counts.n_prompt - n_before == len(row) - talk.answer.stats.n_reused
        assert not keeps_thinking or not n or n_same == len(before)
        tiny.loop.forget()
        fresh = tiny.submit(Request(prompt=row, sampling=GREEDY, rng_stream=n << 32)).result()
        assert fresh.tokens == talk.said.tokens
        tiny.loop.forget()
        tiny.submit(Request(prompt=row, given=fresh.tokens, sampling=GREEDY, max_tokens=len(fresh.tokens) + 1)).result()


# On disk, in another process

PROCESS = """
import hashlib, json, sys
from m2lite import Model, Sampling
from m2lite.engine.request import Request
from m2lite.engine.thread import compute_thread

with Model.open(sys.argv[1], draft="mtp", ctx=512) as model:
    model.use_disk()
    ids, disk, pool = json.loads(sys.argv[2]), model.loop.prefix_cache.disk, model.runner.pool
    done = model.submit(Request(prompt=ids, sampling=Sampling(1.0, seed=3), max_tokens=20)).result()

    def hashes():
        timeline = model.loop.prefix_cache.fork(ids, len(ids) - 1)[0]
        found = [hashlib.sha256(pool.page_view(page)).hexdigest() for page in timeline.pages[: len(ids) // 64]]
        timeline.release()
        return found

    found = compute_thread().run(hashes)
    drafted = done.stats.drafted
    sys.stdout.write(json.dumps({
        "tokens": done.tokens, "n_reused": done.stats.n_reused, "pages": found, "n_saved": model.loop.save(ids),
        "n_read": disk.n_read, "n_written": disk.n_written, "page_bytes": disk.page_bytes,
        "drafted": drafted.as_dict(),
    }))
"""


def process(model: Path, ids: Sequence[int], env: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, model, json.dumps(ids)],
        env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_same_prompt_in_a_new_process(
    bundled_model: Path, tiny: Model, command_env: dict[str, str], tmp_path: Path
) -> None:
    """Its whole pages are read, K and V of the prediction modules included: bit for bit what would be computed."""
    ids = chat_ids(tiny, QUESTIONS[0], SYSTEM)
    n_pages = len(ids) // PAGE
    assert n_pages >= 2
    places = {"XDG_CACHE_HOME": str(tmp_path), "M2LITE_CACHE_DIR": str(jit.CACHE_DIR.parent.parent)}  # kernels stay
    first, second = (process(bundled_model, ids, command_env | places) for _ in range(2))
    assert first["n_reused"] == 0 and first["n_read"] == 0 and first["n_saved"] == n_pages
    assert first["n_written"] == n_pages * first["page_bytes"]
    assert second["n_reused"] == PAGE * n_pages - 3  # where the modules can go on as if all had been computed
    assert second["n_read"] == first["n_written"] and second["n_saved"] == second["n_written"] == 0
    assert len(first["pages"]) == n_pages
    for name in ("tokens", "pages", "drafted"):
        assert first[name] == second[name], name
    assert sum(path.stat().st_size for path in tmp_path.glob("m2lite/kv/*/*.page")) >= first["n_written"]


def test_a_chat_after_a_restart(bundled_model: Path, tmp_path: Path) -> None:
    """It says the same, and of all turns before only what fills no page is computed."""
    asked, talks = QUESTIONS[:3], list[Conversation]()
    for n in (0, 1):
        with Model.open(bundled_model, draft="mtp", ctx=1024) as model:
            model.use_disk()
            talk = Conversation(model.session())
            talk.is_kept_on_disk = talk.keep_thinking = True
            if n:
                talk.restore(talks[0].messages[:-2], talks[0].said)
            for text in asked[2 * n :]:
                list(talk.ask(text, sampling=GREEDY))
                talk.keep()
            talks.append(talk)
            if not n:
                n_saved = len(list(tmp_path.glob("m2lite/kv/*/*.page")))
    before, after = talks
    assert after.said.tokens == before.said.tokens
    n_there = len(before.encode(before.messages[:-2])) // PAGE * PAGE  # all but the last question
    assert n_saved > n_there // PAGE >= 4
    assert after.answer.stats.n_reused == n_there - 3  # where three modules can go on
    drafted = after.answer.stats.drafted
    assert drafted is not None and drafted.n_modules_off == 0


def test_only_what_two_requests_had_is_saved(tiny: Model) -> None:
    """Of a batch: the common beginnings, not each line's own."""
    tiny.loop.forget()
    tiny.use_disk()
    common, lone = [3] * (2 * PAGE + 5), [4] * (3 * PAGE)
    tails = [[10 + n] * (2 * PAGE) for n in range(3)]
    rows = [*(common + tail for tail in tails), lone]
    list(Batch(tiny, 4).run(Request(prompt=row, sampling=GREEDY, max_tokens=1) for row in rows))
    disk = disk_of(tiny)
    assert tiny.loop.save_shared() == 2 and disk.n_written == 2 * disk.page_bytes
    tiny.loop.forget()
    reused = [tiny.submit(Request(prompt=row, max_tokens=1)).result().stats.n_reused for row in (rows[0], lone)]
    assert reused == [2 * PAGE, 0]
    tiny.loop.prefix_cache.disk = None


def test_a_stop_of_one_answer_stops_nobody_else(opened: Opened) -> None:
    """Whoever reads pages later is not asked whether an earlier answer shall stop."""
    model = opened("random")
    expected = model.logits(IDS, len(IDS) - 1)
    model.use_disk()
    assert model.loop.save(IDS[: len(IDS) - 1]) == 0  # logits keep nothing
    model.submit(Request(prompt=IDS, max_tokens=1)).result()
    assert model.loop.save(IDS) == 5
    model.loop.forget()
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    handle = model.submit(Request(prompt=IDS, max_tokens=1))
    with pytest.raises(Stopped):
        model.loop.drive(stop)
    assert 0 < disk_of(model).n_read < 5 * disk_of(model).page_bytes
    assert np.array_equal(model.logits(IDS, len(IDS) - 1), expected)
    assert disk_of(model).n_read == 5 * disk_of(model).page_bytes
    assert handle.result().stats.n_reused == 5 * PAGE


def test_pages_are_read_as_far_as_there_is_room(model_files: dict[str, Path]) -> None:
    """None makes room for one behind it, and nothing is read in vain."""
    with Model.open(model_files["random"], ctx=6 * PAGE, draft="off") as model:
        model.use_disk()
        pool, cache, disk = model.runner.pool, model.loop.prefix_cache, disk_of(model)
        model.submit(Request(prompt=IDS, max_tokens=1)).result()
        assert model.loop.save(IDS) == 5
        model.loop.forget()

        def fork_with(n_free: int) -> tuple[int, int]:
            other, disk.n_read = pool.timeline(), 0
            other.make_room((pool.n_pages - n_free) * PAGE)
            timeline = cache.fork(IDS, len(IDS) - 1)[0]
            found = timeline.length // PAGE, disk.n_read // disk.page_bytes
            for each in (timeline, other):
                for page in each.pages:
                    pool.release_page(page)
            return found

        assert [compute_thread().run(lambda n=n: fork_with(n)) for n in (0, 2, 2, 4)] == [
            (0, 0), (2, 2), (2, 0), (4, 2),
        ]  # fmt: skip
        compute_thread().run(cache.clear)
        assert pool.n_free == 6 * PAGE


WRITER = """
import hashlib, random, sys
from pathlib import Path
from m2lite.storage.pages import PageStore

store, chooser, n_read = PageStore(Path(sys.argv[1]) / sys.argv[3], 40_000), random.Random(int(sys.argv[2])), 0
into = memoryview(bytearray(4000))
for step in range(400):
    key = chooser.randrange(30)
    page = hashlib.sha256(str(key).encode()).digest() * (20 + key)
    assert store.write(f"k{key}", memoryview(page), bytes([key]) * 16, b"" if key % 2 else bytes([key]) * 48)
    if step % 3 == 0:
        store.trim()
    other = chooser.randrange(30)
    found = store.read(f"k{other}", into)
    if found is not None:
        n_read += 1
        n, info, note = found
        assert info == bytes([other]) * 16 and note == (b"" if other % 2 else info * 3)
        assert into[:n] == hashlib.sha256(str(other).encode()).digest() * (20 + other)
    assert store.info(f"k{other}") in (None, bytes([other]) * 16)
sys.stdout.write(str(n_read))
"""


def test_processes_write_and_trim_one_directory_at_once(command_env: dict[str, str], tmp_path: Path) -> None:
    """What each reads is whole, whatever the others delete; the budget is kept, and nothing half-written stays."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path, str(n), "ab"[n // 2]],
            env=command_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for n in range(3)
    ]  # fmt: skip
    ends = [(*child.communicate(timeout=PATIENCE_S), child.returncode) for child in processes]
    for out, err, code in ends:
        assert code == 0, err
        assert int(out) > 20
    PageStore(tmp_path / "a", 40_000).trim()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40_000
    assert len(files) > 10 and all(path.suffix == ".page" for path in files)


def test_a_page_that_is_trimmed_before_it_has_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written again."""
    store, opened, create = PageStore(tmp_path / "a", 1000), list[Path](), durable.fsops.open

    def open_and_lose(path: Path, *args: Any) -> int:
        fd = create(path, *args)
        if not opened:
            path.unlink()
        opened.append(path)
        return fd

    monkeypatch.setattr(durable.fsops, "open", open_and_lose)
    assert store.write("k", memoryview(b"x" * 100)) and len(opened) == 2
    assert store.read("k", memoryview(bytearray(100))) == (100, bytes(16), b"")
