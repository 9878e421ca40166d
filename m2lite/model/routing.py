"""Which experts the tokens on each KV page chose: kept with the page where a model is streamed. Reads no file.

A sequence that begins with pages which are there chooses next what its last tokens chose, or much of it. So each
position has the ids of its experts beside its K and V: written, copied and thrown away with them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from m2lite.model.cache import PAGE, KVPool, Rows, Timeline
from m2lite.model.observer import Observer
from m2lite.storage.ledger import HALF_LIFE

N_RECALLED = 8 * PAGE  # positions at the end of a sequence: older ones weigh less than a sixteenth


class Routing:
    """The experts of all positions of one pool; what nobody has counted is 0 throughout, which no router chooses."""

    def __init__(self, pool: KVPool) -> None:
        c = pool.config
        self._first, self._page_bytes, self._n_experts = pool.page_address(0), pool.page_bytes, c.n_experts
        shape = pool.n_pages, c.n_layers, PAGE, c.n_experts_used
        self.ids = np.zeros(shape, c.expert_dtype)  # takes memory as it is written to

    def observe(self, rows: Rows) -> Observer:
        """What notes the rows' experts while they are computed."""
        pages, slots = rows.places()
        return _Noted(self.ids, (pages - self._first) // self._page_bytes, slots)

    def copy_page(self, source: int, target: int) -> None:
        self.ids[target] = self.ids[source]

    def page(self, page: int) -> bytes:
        """A page's, for the disk."""
        return bytes(self.ids[page].data)

    def load(self, page: int, content: bytes) -> None:
        """Of a page that comes from the disk; it is not known where the content is no such thing."""
        ids = self.ids[page]
        is_whole = len(content) == ids.nbytes
        ids[:] = np.frombuffer(content, ids.dtype).reshape(ids.shape) if is_whole else 0

    def recall(self, timeline: Timeline) -> tuple[npt.NDArray[np.float64], int]:
        """(float64 [n_layers x n_experts], n): the heat that the timeline's last tokens made, n of which are known."""
        first = max(0, timeline.length - N_RECALLED) // PAGE
        ids = self.ids[timeline.pages[first:]].swapaxes(0, 1)  # [n_layers, n_pages, PAGE, n_used]
        n_layers, n = len(ids), timeline.length - first * PAGE
        ids = ids.reshape(n_layers, -1, ids.shape[-1])[:, :n]
        is_known = (ids[..., 0] < ids[..., -1]) & (ids < self._n_experts).all(axis=-1)
        heat = np.where(is_known, 0.5 ** (np.arange(n)[::-1] / HALF_LIFE), 0.0)
        units = np.minimum(ids, self._n_experts - 1) + self._n_experts * np.arange(n_layers)[:, None, None]
        weights = np.broadcast_to(heat[..., None], ids.shape).ravel()
        total = np.zeros(n_layers * self._n_experts)
        np.add.at(total, units.ravel(), weights)
        return total, int(is_known.all(axis=0).sum())


class _Noted(Observer):
    """Of one call."""

    is_late = True

    def __init__(
        self, ids: npt.NDArray[np.unsignedinteger], pages: npt.NDArray[np.int64], slots: npt.NDArray[np.int32]
    ) -> None:
        self._ids, self._pages, self._slots = ids, pages, slots

    def chosen(self, layer: int, start: int, ids: npt.NDArray[np.int32]) -> None:
        n = len(ids)
        self._ids[self._pages[:n], layer, self._slots[:n]] = ids
