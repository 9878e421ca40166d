"""Hashes of the logits that the program computes, by model and type of the KV cache. Ids in, bits out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from m2lite.model.mtp import ModuleScratch, bind_mtp, module_logits, run_module, trunk_states
from m2lite.storage.gguf_reader import open_gguf
from tests.model.engine import Engine, states_before
from tests.recorded.models import MODULES

N_IDS, CHUNK = 200, 128  # four pages, the last of them not full
KV = ("f16", "q8_0")


def fixed_ids(n_vocab: int) -> list[int]:
    """The same in every version: by a formula, and no library's random numbers."""
    return [(i * i * 31 + i * 7 + 3) % n_vocab for i in range(N_IDS)]


def hash_logits(path: Path, kv: str) -> str:
    """xxh3-128 of float32 [200, V], little-endian."""
    engine = Engine(path, kv=kv)
    ids, timeline = fixed_ids(engine.config.n_vocab), engine.pool.timeline()
    digest = xxhash.xxh3_128()
    for first in range(0, N_IDS, CHUNK):
        digest.update(engine.run(timeline, ids[first : first + CHUNK]).astype("<f4").tobytes())
    return digest.hexdigest()


def hash_modules(path: Path, kv: str) -> Iterator[str]:
    """Of each prediction module in turn, behind the trunk and the modules before it."""
    engine = Engine(path, n_rows=N_IDS, n_extra_layers=3, kv=kv)
    mtp = bind_mtp(open_gguf(MODULES), engine.weights)
    ids, timeline = fixed_ids(engine.config.n_vocab), engine.pool.timeline()
    engine.run(timeline, ids)
    scratch, address = ModuleScratch(engine.buffers), trunk_states(mtp, engine.buffers, N_IDS)
    for k in range(len(mtp.modules)):
        states = states_before(engine, address, N_IDS)
        rows = engine.pool.rows_at([(timeline, 0, ids)])
        address = run_module(mtp, k, engine.pool, engine.buffers, scratch, rows, int(states.ctypes.data))
        logits = module_logits(mtp, k, engine.buffers, 0, N_IDS)
        yield xxhash.xxh3_128_hexdigest(np.ascontiguousarray(logits, "<f4").tobytes())


def hash_all(paths: dict[str, Path]) -> dict[str, str]:
    """By "model kv", and "m2-tiny kv module k"."""
    found = {f"{name} {kv}": hash_logits(path, kv) for name, path in paths.items() for kv in KV}
    for kv in KV:
        for k, each in enumerate(hash_modules(paths["m2-tiny"], kv)):
            found[f"m2-tiny {kv} module {k}"] = each
    return found
