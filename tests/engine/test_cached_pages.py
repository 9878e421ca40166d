"""The prefix cache alone: whose pages are found, shared, copied and given back."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from m2lite.engine.prefix_cache import PrefixCache, n_common, page_keys
from m2lite.model.cache import PAGE, KVPool, Timeline
from m2lite.model.config import Config, parse_config
from m2lite.storage.gguf_reader import open_gguf


def test_keys_are_of_whole_pages() -> None:
    ids = list(range(200))
    keys = page_keys(ids)
    assert len(keys) == 3 and keys[:2] == page_keys(ids[:128]) and page_keys(ids[:63]) == []
    assert page_keys([*ids[:100], 7, *ids[101:]])[0] == keys[0]
    assert not set(page_keys([7, *ids[1:]])) & set(keys)
    assert page_keys(ids, keys[:2]) == keys


@pytest.fixture(scope="module")
def config(bundled_model: Path) -> Config:
    with open_gguf(bundled_model) as gguf:
        return parse_config(gguf.metadata)


def compute(pool: KVPool, timeline: Timeline, ids: Sequence[int], n: int) -> None:
    """The timeline goes on to n positions; each holds a hash of the ids up to it, as K and V follow from them."""
    at = timeline.length
    timeline.make_room(n - at)
    for i in range(at, n):
        slot = 8 * (i % PAGE)
        pool.page_view(timeline.pages[i // PAGE])[slot : slot + 8] = digest(ids[: i + 1])
    timeline.length = n


def digest(ids: Sequence[int]) -> bytes:
    return hashlib.sha256(np.array(ids, np.int32).tobytes()).digest()[:8]


def assert_right(pool: KVPool, timeline: Timeline, ids: Sequence[int]) -> None:
    assert timeline.length <= len(ids) and len(timeline.pages) == -(-timeline.length // PAGE)
    for i in {*range(0, timeline.length, 13), timeline.length - 1} - {-1}:
        slot = 8 * (i % PAGE)
        assert bytes(pool.page_view(timeline.pages[i // PAGE])[slot : slot + 8]) == digest(ids[: i + 1]), i


def publish(cache: PrefixCache, pool: KVPool, ids: list[int]) -> None:
    """As a sequence that computes ids, and ends."""
    timeline = cache.fork(ids, len(ids) - 1)[0]
    compute(pool, timeline, ids, len(ids))
    cache.publish(timeline, ids, page_keys(ids), 0, 0)
    cache.publish_end(timeline, ids, page_keys(ids), 0)
    timeline.release()


def test_a_part_of_a_page_is_forked(config: Config) -> None:
    """Whoever goes on from it has a copy; the page that it came from stays as it was."""
    pool = KVPool(config, 16 * PAGE)
    cache = PrefixCache(pool)
    ids = [1] * 100
    publish(cache, pool, ids)
    assert len(cache) == 2
    other = [*ids[:80], *[2] * 40]
    forks = [cache.fork(each, len(each) - 1)[0] for each in (other, ids)]
    assert [fork.length for fork in forks] == [80, 99] and forks[0].pages == forks[1].pages
    compute(pool, forks[0], other, len(other))
    assert forks[0].pages[0] == forks[1].pages[0] and forks[0].pages[1] != forks[1].pages[1]
    assert_right(pool, forks[0], other)
    assert_right(pool, forks[1], ids)
    assert cache.length(ids) == 100 and cache.length(other) == 80


def test_what_goes_first(config: Config) -> None:
    """The longest unused; what was hit more than once goes last; no page goes before those behind it."""
    pool = KVPool(config, 8 * PAGE)
    cache = PrefixCache(pool)
    ids = {name: [n] * (2 * PAGE) for n, name in enumerate("abcd")}
    for each in ids.values():
        publish(cache, pool, each)
    assert pool.n_free == 0 and cache.n_reclaimable == 8
    for name in "aab":  # twice, and once
        cache.fork(ids[name], 2 * PAGE)[0].release()
    held = cache.fork(ids["c"], 2 * PAGE)[0]
    assert cache.n_reclaimable == 6
    left = list[str]()
    while cache.evict():
        left.append("".join(name * (cache.length(each) // PAGE) for name, each in ids.items()))
    assert left == ["aabbccd", "aabbcc", "aabcc", "aacc", "acc", "cc"] and cache.n_evicted == 6
    held.release()
    assert cache.evict() and cache.evict() and not cache.evict() and pool.n_free == 8 * PAGE


def test_two_that_computed_the_same_share_it(config: Config) -> None:
    """And the page that knows more of the prediction modules stays."""
    pool = KVPool(config, 8 * PAGE)
    cache, ids = PrefixCache(pool), [1] * (2 * PAGE)
    one, two, three = (pool.timeline() for _ in range(3))
    for timeline, n_followed in ((one, 0), (two, PAGE), (three, 0)):
        compute(pool, timeline, ids, len(ids))
        cache.publish(timeline, ids, page_keys(ids), 0, n_followed)
    assert two.pages == three.pages and one.pages != two.pages and one.pages[1] == two.pages[1]
    one.release()
    assert pool.n_free == 6 * PAGE and cache.fork(ids, len(ids))[1] == PAGE


# What was asked for and computed, as pages of one number each, and a tail.
SOME_IDS = st.tuples(st.lists(st.integers(1, 2), max_size=3), st.integers(1, 3), st.integers(1, PAGE - 1)).map(
    lambda drawn: [n for n in drawn[0] for _ in range(PAGE)] + [drawn[1]] * drawn[2]
)
OPERATION = st.one_of(
    st.tuples(st.just("begin"), SOME_IDS),
    st.tuples(st.just("begin"), SOME_IDS),
    st.tuples(st.just("publish"), st.integers(0, 9)),
    st.tuples(st.just("end"), st.integers(0, 9)),
    st.tuples(st.just("end"), st.integers(0, 9)),
    st.tuples(st.just("go on"), st.integers(0, 9)),
    st.tuples(st.just("evict"), st.integers(1, 5)),
)


# Who holds a page that stands behind another's, while its own before that has been exchanged.
BEHIND = [("begin", [2] * PAGE + [1] * (PAGE + 1)), ("begin", [2] * PAGE + [1]), ("publish", 0), ("end", 3)]


@example(n_pages=64, is_evicting=False, operations=BEHIND)
@settings(max_examples=150, deadline=None)
@given(
    n_pages=st.sampled_from([5, 9, 64]),
    is_evicting=st.booleans(),
    operations=st.lists(OPERATION, min_size=5, max_size=40),
)
def test_against_a_set_of_prefixes(
    config: Config, n_pages: int, is_evicting: bool, operations: list[tuple[str, Any]]
) -> None:
    """What is found was published, and holds what it should; all that was published is found while nothing has left."""
    n_pages = n_pages if is_evicting else 256
    pool = KVPool(config, n_pages * PAGE)
    cache = PrefixCache(pool)
    whole, ends = {()}, {(): {()}}  # prefixes of whole pages; behind each, the ends of sequences and whole pages
    running = list[tuple[Timeline, list[int]]]()
    for what, value in operations:
        if what == "begin":
            timeline, n_followed = cache.fork(value, len(value) - 1)
            assert n_followed <= timeline.length < len(value)
            assert_right(pool, timeline, value)
            if not is_evicting:
                assert timeline.length == expected_length(whole, ends, value, len(value) - 1)
            if not pool.has_free(timeline.pages_needed(len(value) - timeline.length)):
                timeline.release()
                continue
            compute(pool, timeline, value, len(value))
            running.append((timeline, value))
        elif what == "evict":
            for _ in range(value if is_evicting else 0):
                cache.evict()
        elif running:
            timeline, ids = running[value % len(running)]
            if what == "go on":
                more = [*ids, *[4] * (value + 1) * 9]
                if pool.has_free(timeline.pages_needed(len(more) - len(ids))):
                    compute(pool, timeline, more, len(more))
                    running[value % len(running)] = timeline, more
                continue
            keys, n_whole = page_keys(ids), len(ids) // PAGE
            cache.publish(timeline, ids, keys, 0, value * 30)
            for n in range(1, n_whole + 1):
                whole.add(tuple(ids[: n * PAGE]))
                ends.setdefault(tuple(ids[: (n - 1) * PAGE]), set()).add(tuple(ids[(n - 1) * PAGE : n * PAGE]))
            if what == "end":
                cache.publish_end(timeline, ids, keys, value * 30)
                ends.setdefault(tuple(ids[: n_whole * PAGE]), set()).add(tuple(ids[n_whole * PAGE :]))
                timeline.release()
                running.remove((timeline, ids))
        for timeline, ids in running:
            assert_right(pool, timeline, ids)
        held = Counter(page for timeline, _ in running for page in timeline.pages)
        in_use = {page for page in range(pool.n_pages) if pool.n_users(page)}
        assert all(pool.n_users(page) == held[page] + (page in cache._by_page) for page in in_use)
        assert pool.n_free == PAGE * (pool.n_pages - len(in_use))
    n_reclaimable, n_there = cache.n_reclaimable, len(cache)
    assert sum(cache.evict() for _ in range(n_there + 1)) == n_reclaimable
    for timeline, _ in running:
        timeline.release()
    while cache.evict():
        pass
    assert len(cache) == 0 and pool.n_free == n_pages * PAGE


def expected_length(whole: set[Any], ends: dict[Any, Any], ids: list[int], n_most: int) -> int:
    n = max(n for n in range(n_most // PAGE + 1) if tuple(ids[: n * PAGE]) in whole)
    rest = ids[n * PAGE : min(n_most, (n + 1) * PAGE)]
    return n * PAGE + max((n_common(rest, end) for end in ends.get(tuple(ids[: n * PAGE]), ())), default=0)
