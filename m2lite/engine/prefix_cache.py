"""Pages of KV by the tokens that they were computed from: what was computed once is found again. The only such place.

A page's key is a hash of all tokens up to its end, so requests that begin alike share pages, whoever computed them: a
chat's next turn, a batch's common beginning and an answer that was preempted are the same hit. Pages that no sequence
holds stay until their memory is needed. Knows token ids and pages, no request and no model. Belongs to the compute
thread.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from m2lite.model.cache import PAGE

if TYPE_CHECKING:  # these import Numba
    from m2lite.engine.kv_disk import KVDisk
    from m2lite.model.cache import KVPool, Timeline

ROOT = b""
_TOUCHED = 64 << 20  # bytes of pages whose memory is got at once: a stop is heard between
_TRIED = 16  # pages behind the same beginning that are compared token by token, the latest first


def page_keys(ids: Sequence[int], known: Sequence[bytes] = ()) -> list[bytes]:
    """Of each whole page of `ids`, a hash of all tokens up to its end; `known` are those of its first pages."""
    found, start = list(known), len(known) * PAGE
    data, key = array("i", ids[start:]).tobytes(), found[-1] if found else ROOT
    for end in range(4 * PAGE, len(data) + 1, 4 * PAGE):
        key = hashlib.sha256(key + data[end - 4 * PAGE : end]).digest()
        found.append(key)
    return found


def n_common(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items both begin with."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


@dataclass(eq=False, slots=True)
class CachedPage:
    """A page that requests may begin with: whole, or the end of a sequence."""

    key: bytes  # of a whole page; ROOT else
    parent: CachedPage | None
    ids: tuple[int, ...]  # of its positions
    page: int  # of the pool
    n_followed: int = 0  # of them, positions that have the K and V of all prediction modules in use
    n_hits: int = 0
    children: list[CachedPage] = field(default_factory=list)


class PrefixCache:
    """Of one pool. Holds pages as a sequence does, and gives back those that nobody else holds when they are needed."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._whole = dict[bytes, CachedPage]()
        self._first = list[CachedPage]()  # that begin a sequence
        self._by_page = dict[int, CachedPage]()
        # The longest unused first; those that were hit more than once apart: they go last.
        self._once, self._often = OrderedDict[CachedPage, None](), OrderedDict[CachedPage, None]()
        self.n_evicted = 0  # pages, ever
        self.disk: KVDisk | None = None  # below it
        self.loaded: Callable[[Timeline], None] = lambda timeline: None  # hears of beginnings that came from there
        self.check: Callable[[], None] = lambda: None  # may raise between two pages that are read
        pool.reclaim = self.evict

    def __len__(self) -> int:
        return len(self._by_page)

    @property
    def n_positions(self) -> int:
        """Of its pages, those that a sequence holds, too, among them. May be asked on any thread."""
        return len(self._by_page) * PAGE

    @property
    def n_reclaimable(self) -> int:
        """Pages that nobody else holds, nor any behind them."""
        held = set[int]()
        for page, each in self._by_page.items():
            up: CachedPage | None = each if self._pool.is_shared(page) else None
            while up is not None and up.page not in held:
                held.add(up.page)
                up = up.parent
        return len(self._by_page) - len(held)

    def depth(self, keys: Sequence[bytes]) -> int:
        """How many whole pages of a sequence with these keys are here."""
        return next((n for n, key in enumerate(keys) if key not in self._whole), len(keys))

    def length(self, ids: Sequence[int]) -> int:
        """How many of `ids` are here, from the first on."""
        return self._find(ids, page_keys(ids), len(ids))[1]

    def fork(self, ids: Sequence[int], n_most: int, keys: Sequence[bytes] | None = None) -> tuple[Timeline, int]:
        """A timeline that holds as much of `ids` as is here or on disk, up to n_most positions.

        Behind it, how many of them have the prediction modules' K and V.
        Its last page may be shared in part: it is copied when it is written to.
        """
        keys = page_keys(ids) if keys is None else keys
        n_loaded = 0
        if self.disk is not None:
            n_loaded = self._load(ids, keys[: n_most // PAGE])
        path, n = self._find(ids, keys, n_most)
        timeline = self._pool.timeline()
        for each in path:
            timeline.share(each.page)
        timeline.length = n
        self._use(path, is_part=n % PAGE > 0)
        if n_loaded:
            self.loaded(timeline)
        n_whole = next((n for n, each in enumerate(path) if each.n_followed < PAGE), len(path))
        n_followed = n_whole * PAGE + (path[n_whole].n_followed if n_whole < len(path) else 0)
        return timeline, min(n_followed, timeline.length)

    def _find(self, ids: Sequence[int], keys: Sequence[bytes], n_most: int) -> tuple[list[CachedPage], int]:
        """The pages that `ids` begin with, up to n_most positions, and how many of their positions count."""
        path = [self._whole[key] for key in keys[: min(self.depth(keys), n_most // PAGE)]]
        start = len(path) * PAGE
        siblings, rest = path[-1].children if path else self._first, tuple(ids[start : min(start + PAGE, n_most)])
        best = max(siblings[: -_TRIED - 1 : -1], key=lambda each: n_common(each.ids, rest), default=None)
        n_rest = 0 if best is None else n_common(best.ids, rest)
        if best is not None and n_rest:
            path.append(best)
        return path, start + n_rest

    def _load(self, ids: Sequence[int], keys: Sequence[bytes]) -> int:
        """Pages that are on disk and not here, as long as there is room; how many came."""
        assert self.disk is not None
        n_there = n = self.depth(keys)
        held, n_touched = self._pool.timeline(), n  # held, so that no page makes room for one behind it
        parent = self._whole[keys[n_there - 1]] if n_there else None
        try:
            for key in keys[:n_there]:
                held.share(self._whole[key].page)
            for index in range(n_there, len(keys)):
                self.check()
                if not self._pool.has_free(1):
                    break
                if index == n_touched:  # to look at what is free takes as long as to read a page
                    n_next = self.disk.n_there(keys[index : index + max(1, _TOUCHED // self._pool.page_bytes)])
                    n_next = max(1, min(n_next, self._pool.n_free // PAGE))
                    self._pool.touch_next(n_next)
                    n_touched += n_next
                page = self._pool.take_page()
                view = self._pool.page_view(page)
                is_there, has_drafts = self.disk.read(keys[index], page)
                if not is_there:
                    np.frombuffer(view, np.uint8)[:] = 0  # what came may be no numbers
                    self._pool.release_page(page)
                    break
                parent = self._add(keys[index], parent, tuple(ids[index * PAGE : (index + 1) * PAGE]), page)
                parent.n_followed = PAGE if has_drafts else 0
                held.share(page)
                self._pool.release_page(page)
                n = index + 1
        finally:
            held.release()
        return n - n_there

    def pin(self, keys: Sequence[bytes]) -> list[tuple[bytes, int, bool]]:
        """(key, page, has_drafts) of whole pages that the disk lacks; nobody takes them away before `unpin`."""
        assert self.disk is not None
        pages = [self._whole[key] for key in keys[: self.depth(keys)]]
        found = [(each.key, each.page, each.n_followed == PAGE) for each in pages]
        found = [each for each in found if not self.disk.has(each[0], each[2])]
        for _, page, _ in found:
            self._pool.share_page(page)
        return found

    def unpin(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._pool.release_page(page)

    def shared_keys(self) -> list[list[bytes]]:
        """Of each beginning that at least two requests had, the keys of its whole pages."""
        shared = [each for each in self._whole.values() if each.n_hits]
        ends = [each for each in shared if not any(child.key and child.n_hits for child in each.children)]
        found = list[list[bytes]]()
        for end in ends:
            path, each = list[bytes](), end
            while each is not None:
                path.append(each.key)
                each = each.parent  # type: ignore[assignment]
            found.append(path[::-1])
        return found

    def _use(self, path: Sequence[CachedPage], is_part: bool) -> None:
        """`is_part`: not all of the last page is used, which is no hit of a whole one."""
        for each in reversed(path):  # who holds others is used last
            each.n_hits += not (is_part and each.key and each is path[-1])
            self._once.pop(each, None)
            (self._often if each.n_hits > 1 else self._once)[each] = None
            self._often.move_to_end(each) if each.n_hits > 1 else self._once.move_to_end(each)

    def publish(
        self, timeline: Timeline, ids: Sequence[int], keys: Sequence[bytes], n_first: int, n_followed: int
    ) -> None:
        """The timeline's whole pages from index n_first on are for others, too.

        n_followed: positions that have the K and V of all prediction modules in use.
        """
        parent = self._whole.get(keys[n_first - 1]) if n_first else None
        for index in range(n_first, min(len(keys), timeline.length // PAGE)):
            if index and parent is None:
                return  # its beginning was given back meanwhile
            start, page, there = index * PAGE, timeline.pages[index], self._whole.get(keys[index])
            n_own = max(0, min(PAGE, n_followed - start))
            if there is None:
                there = self._add(keys[index], parent, tuple(ids[start : start + PAGE]), page)
            elif there.page != page and there.n_followed >= n_own:
                timeline.replace(index, there.page)  # two have computed the same
            elif there.page != page:
                self._exchange(there, page)
            there.n_followed = max(there.n_followed, n_own)
            parent = there

    def publish_end(self, timeline: Timeline, ids: Sequence[int], keys: Sequence[bytes], n_followed: int) -> None:
        """So is its last page, which is not whole."""
        n_whole = timeline.length // PAGE
        parent = self._whole.get(keys[n_whole - 1]) if n_whole else None
        own = tuple(ids[n_whole * PAGE : timeline.length])
        if not own or (n_whole and parent is None) or timeline.pages[n_whole] in self._by_page:
            return
        siblings = self._first if parent is None else parent.children
        if not any(n_common(each.ids, own) == len(own) for each in siblings):
            n_own = max(0, min(len(own), n_followed - n_whole * PAGE))
            self._add(ROOT, parent, own, timeline.pages[n_whole]).n_followed = n_own

    def _add(self, key: bytes, parent: CachedPage | None, ids: tuple[int, ...], page: int) -> CachedPage:
        if page in self._by_page:
            self._remove(self._by_page[page])
        new = CachedPage(key, parent, ids, page)
        (self._first if parent is None else parent.children).append(new)
        if key:
            self._whole[key] = new
        self._by_page[page] = new
        self._once[new] = None
        self._pool.share_page(page)
        return new

    def _exchange(self, each: CachedPage, page: int) -> None:
        """It is `page` from now on, which holds the same."""
        if page in self._by_page:
            self._remove(self._by_page[page])
        self._pool.share_page(page)
        self._pool.release_page(each.page)
        del self._by_page[each.page]
        self._by_page[page], each.page = each, page

    def _remove(self, each: CachedPage) -> None:
        for child in list(each.children):
            self._remove(child)
        (self._first if each.parent is None else each.parent.children).remove(each)
        self._whole.pop(each.key, None)
        del self._by_page[each.page]
        self._once.pop(each, None)
        self._often.pop(each, None)
        self._pool.release_page(each.page)

    def evict(self) -> bool:
        """Give back the page that is missed least; False where every page is in use."""
        for pages in (self._once, self._often):
            for each in pages:
                if not each.children and not self._pool.is_shared(each.page):
                    self._remove(each)
                    self.n_evicted += 1
                    return True
        return False

    def unshare_end(self, timeline: Timeline) -> bool:
        """The timeline's last page is its own, where only the cache holds it too: it can go on without a copy."""
        each = self._by_page.get(timeline.pages[-1]) if timeline.pages else None
        if each is None or each.children or self._pool.n_users(each.page) != 2:
            return False
        self._remove(each)
        return True

    def clear(self) -> None:
        """Forget everything; pages that sequences hold stay theirs."""
        for each in list(self._first):
            self._remove(each)
