"""Prediction modules after a hit in the prefix cache: as often right as after computing, or said to be off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from m2lite import Model
from m2lite.chat.status import describe
from m2lite.dialogue.conversation import Conversation
from m2lite.engine.request import Request
from m2lite.engine.thread import compute_thread
from m2lite.model.cache import PAGE
from tests.engine.asked import GREEDY, SYSTEM, requests_of

pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture(scope="module")
def tiny(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model, draft="off", ctx=1024) as model:
        yield model


@dataclass
class Drafts:
    n_accepted: int = 0
    n_proposed: int = 0
    n_off: int = 0
    n_reused: list[int] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.n_accepted / self.n_proposed


def drafts_of(model: Model, requests: Sequence[Request], meanwhile: Callable[[Any], None] = lambda _: None) -> Drafts:
    found = Drafts()
    for request in requests:
        handle = model.submit(request)
        meanwhile(handle)
        stats = handle.result().stats
        assert stats.drafted is not None
        found.n_accepted += stats.drafted.n_accepted
        found.n_proposed += stats.drafted.n_proposed
        found.n_off = max(found.n_off, stats.drafted.n_modules_off)
        found.n_reused.append(stats.n_reused)
    return found


@pytest.mark.parametrize("n_drafts", [1, 3])
@pytest.mark.slow
def test_drafts_are_as_often_right_after_a_hit(bundled_model: Path, tiny: Model, n_drafts: int) -> None:
    """From memory and from the disk exactly as after computing, and nearly so after preemption, which parts steps."""
    requests = requests_of(tiny, 100, SYSTEM)
    with Model.open(bundled_model, draft="mtp", draft_tokens=n_drafts, ctx=512, sequences=8) as model:
        model.use_disk()
        computed = Drafts()
        for request in requests:
            disk, model.loop.prefix_cache.disk = model.loop.prefix_cache.disk, None
            model.loop.forget()
            each = drafts_of(model, [request])
            assert each.n_reused == [0]
            model.loop.prefix_cache.disk = disk
            model.loop.save(request.prompt)
            computed.n_accepted, computed.n_proposed = (
                computed.n_accepted + each.n_accepted, computed.n_proposed + each.n_proposed
            )  # fmt: skip
        assert computed.n_proposed > 200 and computed.share > 0.3
        model.loop.forget()
        from_disk = drafts_of(model, requests)
        from_memory = drafts_of(model, requests)
        for found in (from_disk, from_memory):
            assert (found.n_accepted, found.n_proposed, found.n_off) == (computed.n_accepted, computed.n_proposed, 0)
        lengths = [len(request.prompt) for request in requests]
        for n, length in zip(from_memory.n_reused, lengths, strict=True):
            assert length - 1 - 2 * n_drafts <= n <= length - 1 - n_drafts
        assert from_disk.n_reused[0] == lengths[0] // PAGE * PAGE - n_drafts >= 2 * PAGE
        scheduler = model.loop.scheduler

        def preempt(handle: Any) -> None:
            while len(handle.completion.tokens) < 20:
                model.loop.drive()
            handles.append(model.submit(Request(prompt=[1, 2, 3], max_tokens=1, ignore_stop=True, draft="off")))
            compute_thread().run(turn)

        def turn() -> None:
            model.loop._take_inbox()
            scheduler._admit()
            assert len(scheduler.running) == 2
            scheduler.running.reverse()  # as if it had come last
            assert scheduler._preempt()

        handles: list[Any] = []
        model.loop.forget()
        model.loop.prefix_cache.disk = None
        again = drafts_of(model, requests, preempt)
        assert model.loop.counts.n_preempted == len(requests) and again.n_off == 0
        assert abs(again.share - computed.share) < 0.01 + 8 / computed.n_proposed


def test_drafts_after_a_hit_of_any_length(bundled_model: Path, tiny: Model) -> None:
    """Wherever a page ends: the modules go on as if all had been computed."""
    (request, *_) = requests_of(tiny, 40, SYSTEM)
    with Model.open(bundled_model, draft="mtp", draft_tokens=3, ctx=512) as model:
        computed = drafts_of(model, [request])
        for n in (1, 2, 3, 4, 5, *range(PAGE - 4, PAGE + 6), 2 * PAGE, 2 * PAGE + 2, len(request.prompt) - 1):
            model.loop.forget()
            before = Request(prompt=request.prompt[:n], max_tokens=1, ignore_stop=True, sampling=GREEDY)
            model.submit(before).result()
            found = drafts_of(model, [request])
            assert n - 2 * 3 <= found.n_reused[0] <= n
            assert (found.n_accepted, found.n_proposed, found.n_off) == (computed.n_accepted, computed.n_proposed, 0), n


def test_modules_that_pages_lack_are_said_to_be_off(bundled_model: Path, tiny: Model) -> None:
    """Pages of a process that had none: the answer is the same, and its statistics say that modules are off."""
    (request, *_) = requests_of(tiny, 30, SYSTEM)
    with Model.open(bundled_model, draft="off", ctx=512) as model:
        model.use_disk()
        expected = model.submit(request).result().tokens
        assert model.loop.save(request.prompt) >= 2
    for draft in ("mtp", "auto"):
        with Model.open(bundled_model, draft=draft, ctx=512) as model:
            model.use_disk()
            done = model.submit(request).result()
            drafted = done.stats.drafted
            assert drafted is not None and done.tokens == expected and done.stats.n_reused >= 2 * PAGE
            assert drafted.n_modules_off == drafted.as_dict()["modules_off"] == 3
            assert drafted.sources.get("mtp", 0) == 0
            model.loop.forget()
            model.loop.prefix_cache.disk = None
            drafted = model.submit(request).result().stats.drafted
            assert drafted is not None and drafted.n_modules_off == 0


def test_stats_say_which_modules_are_off(bundled_model: Path) -> None:
    """In a chat whose beginning a process without modules computed."""
    with Model.open(bundled_model, draft="mtp", ctx=1024) as model:
        with model.session("off") as session:
            list(Conversation(session, SYSTEM).ask("Hello", sampling=GREEDY, max_tokens=5))
        with model.session() as session:
            conversation = Conversation(session, SYSTEM)
            list(conversation.ask("Hello", sampling=GREEDY, max_tokens=5))
            assert "3 MTP modules do not draft: the prompt was cached without their K and V" in describe(conversation)
        model.loop.forget()
        with model.session() as session:
            conversation = Conversation(session, SYSTEM)
            list(conversation.ask("Hello", sampling=GREEDY, max_tokens=5))
            assert "do not draft" not in describe(conversation)
