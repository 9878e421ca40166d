"""The ids of answers by what stood before them and what they say: for clients that send them back as messages.

A message that is rendered again has other ids than the answer had (arguments are written anew, line breaks taken off),
so each turn's hit in the prefix cache would end where the last answer began. A client that leaves out the thinking of a
call still sends its id, which nobody else knows: by that the answer is found, too. The ids of prompts are kept, so that
only what is new in a conversation is rendered. Knows ids and messages, no requests.
"""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # this imports Numba
    from m2lite.engine.kv_disk import KVDisk

MOST_BYTES = 64 << 20
_ENTRY_BYTES = 200  # beside the ids
_TAIL = 64  # ids at the end of a row that may yet be taken off it


class _KeptIds:
    """Ids by key, the longest unused of which go first. May be used on several threads."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._n_bytes = most_bytes, 0
        self._found: OrderedDict[bytes, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, key: bytes, ids: array[int]) -> None:
        with self._lock:
            self._drop(key)
            self._found[key] = ids
            self._n_bytes += _size(ids)
            while self._n_bytes > self._most_bytes:
                self._drop(next(iter(self._found)))

    def get(self, key: bytes) -> array[int] | None:
        with self._lock:
            ids = self._found.get(key)
            if ids is not None:
                self._found.move_to_end(key)
        return ids

    def _drop(self, key: bytes) -> None:
        ids = self._found.pop(key, None)
        self._n_bytes -= 0 if ids is None else _size(ids)


class KeptAnswers:
    """Answers' ids. May be used on several threads."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._ids = _KeptIds(most_bytes)
        self.disk: KVDisk | None = None  # below it

    def keep(self, row: Sequence[int], message: Mapping[str, Any], ids: Sequence[int]) -> list[bytes]:
        """`message` is what `ids` behind `row` said; returns the keys for `save`."""
        key, by_call = _key(hashlib.sha256(_bytes(row)), message), _key_by_call(message)
        self._ids.add(key, array("i", ids))
        if by_call is None:
            return [key]
        self._ids.add(by_call, array("i", key))
        return [key, by_call]

    def save(self, keys: Iterable[bytes]) -> None:
        """Also on disk, where pages are."""
        for key in keys:
            ids = self._ids.get(key)
            if ids is not None and self.disk is not None:
                self.disk.write_answer(key, memoryview(ids).cast("B"))

    def get(self, key: bytes) -> array[int] | None:
        ids = self._ids.get(key)
        data = self.disk.read_answer(key) if ids is None and self.disk is not None else None
        if data is not None and len(data) % 4 == 0:
            ids = array("i", data)
            self._ids.add(key, ids)
        return ids

    def get_by_call(self, message: Mapping[str, Any]) -> array[int] | None:
        """The answer that called so, whatever stood before it, where its thinking is left out."""
        by_call = None if message.get("reasoning_content") else _key_by_call(message)
        key = None if by_call is None else self.get(by_call)
        return None if key is None else self.get(key.tobytes())

    def recall(self) -> Recalling:
        """To be asked about the answers of one row, in their order."""
        return Recalling(self)


class Recalling:
    """One walk along a row that only grows, but for a few ids at its end."""

    def __init__(self, kept: KeptAnswers) -> None:
        self._kept, self._hash, self._n_hashed = kept, hashlib.sha256(), 0
        self.n_known = self.n_unknown = 0  # answers

    def __call__(self, row: Sequence[int], message: Mapping[str, Any]) -> Sequence[int] | None:
        n_settled = max(self._n_hashed, len(row) - _TAIL)
        self._hash.update(_bytes(row[self._n_hashed : n_settled]))
        self._n_hashed = n_settled
        whole = self._hash.copy()
        whole.update(_bytes(row[n_settled:]))
        ids = self._kept.get(_key(whole, message))
        if ids is None:
            ids = self._kept.get_by_call(message)
        self.n_known += ids is not None
        self.n_unknown += ids is None
        return ids


class KeptPrompts:
    """The ids of the prompts of earlier requests, by the messages and tools that they were made of."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._ids = _KeptIds(most_bytes)

    def keys(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> list[bytes]:
        """keys[n]: of the first n messages."""
        whole = hashlib.sha256(json.dumps(tools).encode())
        found = [whole.digest()]
        for message in messages:
            whole.update(json.dumps(message).encode() + b"\0")
            found.append(whole.digest())
        return found

    def keep(self, key: bytes, ids: Sequence[int]) -> None:
        self._ids.add(key, array("i", ids))

    def get(self, key: bytes) -> array[int] | None:
        return self._ids.get(key)


def _key(row: Any, message: Mapping[str, Any]) -> bytes:
    row.update(b"\0" + said(message))
    digest: bytes = row.digest()
    return digest


def _key_by_call(message: Mapping[str, Any]) -> bytes | None:
    """By the id of its first call, and what it says beside its thinking."""
    call_id = next((call.get("id") for call in message.get("tool_calls") or []), None)
    if not isinstance(call_id, str):
        return None
    return _key(hashlib.sha256(f"call {call_id}".encode()), {**message, "reasoning_content": ""})


def said(message: Mapping[str, Any]) -> bytes:
    """What the message says, however a client writes it: blanks around texts and ids of calls do not count."""
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls") or []]
    thinking, content = message.get("reasoning_content") or "", message.get("content") or ""
    told = [str(thinking).strip(), str(content).strip(), calls]
    return json.dumps(told, sort_keys=True).encode()


def _bytes(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()


def _size(ids: array[int]) -> int:
    return 4 * len(ids) + _ENTRY_BYTES
