"""Fuzzing targets that read files: of models, of checkpoints, and our own."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from m2lite.errors import M2liteError
from m2lite.system.json_text import parse_object
from tests.fuzz.target import ROOM, check_text, folder, put, target


@target
def fuzz_gguf(data: bytes) -> None:
    """A whole file: every key and every tensor is looked at."""
    from m2lite.storage.gguf_reader import GGUFArray, open_gguf
    from m2lite.storage.identity import file_identity

    with open_gguf(put("model.gguf", data)) as gguf:
        for key, value in gguf.metadata.items():
            assert len(gguf.raw_value(key)) <= len(data)
            if isinstance(value, GGUFArray):
                for kind in (str, bytes, int, float, bool):
                    with contextlib.suppress(M2liteError):
                        assert len(value.items(kind)) <= len(data)
        for name in gguf.tensors:
            assert len(gguf.view(name)) == gguf.tensors[name].n_bytes
        file_identity(gguf)


@target
def fuzz_model(data: bytes) -> None:
    """The header of a model, with zeros for weights: sizes, tensors by name, tokenizer."""
    from m2lite.kernels import reference
    from m2lite.model.config import parse_config
    from m2lite.model.weights import bind_weights
    from m2lite.storage.gguf_reader import open_gguf
    from m2lite.storage.identity import trunk_identity
    from m2lite.text.tokenizer import load_tokenizer

    with open_gguf(put("model.gguf", data, ROOM)) as gguf:
        with contextlib.suppress(M2liteError):
            tokenizer = load_tokenizer(gguf)
            ids = tokenizer.encode("Größe <think>\n", control=True)
            assert all(0 <= index < tokenizer.n_vocab for index in ids)
            tokenizer.decode(range(min(600, tokenizer.n_vocab)))
        bind_weights(gguf, parse_config(gguf.metadata), reference)
        trunk_identity(gguf)


@target
def fuzz_sidecar(data: bytes) -> None:
    """The header of prediction modules, with zeros for weights, beside the model that `seeds` writes."""
    from m2lite.model.mtp import bind_mtp
    from m2lite.storage.gguf_reader import open_gguf
    from m2lite.storage.sidecar import check_trunk

    trunk = trunk_weights()
    with open_gguf(put("mtp-model.gguf", data, ROOM)) as sidecar, _reference_kernels():
        with contextlib.suppress(M2liteError):
            check_trunk(sidecar, trunk.gguf)
        bind_mtp(sidecar, trunk)


@functools.cache
def trunk_weights() -> Any:
    from m2lite.kernels import reference
    from m2lite.model.config import parse_config
    from m2lite.model.weights import bind_weights
    from m2lite.storage.gguf_reader import open_gguf
    from tests.fuzz.seeds import model_header

    gguf = open_gguf(put("trunk.gguf", model_header(), ROOM))
    return bind_weights(gguf, parse_config(gguf.metadata), reference)


@contextlib.contextmanager
def _reference_kernels() -> Iterator[None]:
    """Nothing is compiled."""
    before = os.environ.get("M2LITE_KERNELS")
    os.environ["M2LITE_KERNELS"] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["M2LITE_KERNELS"]
        else:
            os.environ["M2LITE_KERNELS"] = before


@target
def fuzz_imatrix(data: bytes) -> None:
    from m2lite.quant.imatrix import read_imatrix

    importance = read_imatrix(put("x.gguf", data))
    assert len(importance.digest) == 64
    for name, (sums, counts) in importance.entries.items():
        shape = (len(counts), 4, sums.size // len(counts))
        importance.check([SimpleNamespace(name=name, shape=shape)])
        row = importance.row(name, 0, shape[-1])
        assert row is not None and row.shape == (shape[-1],) and (row > 0).all()


@target
def fuzz_safetensors(data: bytes) -> None:
    from m2lite.quant.safetensors import SafetensorsFile

    shard = SafetensorsFile(put("model.safetensors", data))
    try:
        for tensor in shard.tensors.values():
            assert len(shard.read(tensor.offset, tensor.n_bytes)) == tensor.n_bytes <= len(data)
        check_text(shard.identify()._asdict())
    finally:
        shard.close()


@target
def fuzz_config(data: bytes) -> None:
    """config.json of a checkpoint."""
    from m2lite.quant.checkpoint import Checkpoint, load_json
    from m2lite.quant.config import parse_config

    path = put("config.json", data)
    raw = load_json(path.parent, path.name)
    with contextlib.suppress(M2liteError):
        Checkpoint(path.parent, raw, [])
    assert all(0 < n <= 1 << 24 for n in parse_config(raw).dims().values())


@target
def fuzz_tokenizer(data: bytes) -> None:
    """tokenizer.json of a checkpoint, and what becomes of it."""
    from m2lite.quant.header import pack_key
    from m2lite.quant.vocabulary import vocabulary_keys

    path = put("tokenizer.json", data)
    for key in vocabulary_keys(path.parent, 300):
        pack_key(key)


@target
def fuzz_texts(data: bytes) -> None:
    """tokenizer_config.json and generation_config.json, an object of both."""
    from m2lite.quant.header import pack_key
    from m2lite.quant.vocabulary import sampling_keys, vocabulary_keys
    from tests.fuzz.seeds import tokenizer_seed

    parts = parse_object(data)
    put("tokenizer.json", tokenizer_seed())
    for name in ("tokenizer_config.json", "generation_config.json"):
        path = put(name, json.dumps(parts.get(name, {})).encode())
    for key in [*vocabulary_keys(path.parent, 300), *sampling_keys(path.parent, [])]:
        pack_key(key)


@target
def fuzz_pieces(data: bytes) -> None:
    """tokenizer.model of a checkpoint."""
    from m2lite.quant.pieces import parse_model

    pieces = parse_model(data, 600)
    assert len(pieces.tokens) == len(pieces.scores) == len(pieces.types) == 600
    check_text(pieces.tokens)


@target
def fuzz_journal(data: bytes) -> None:
    from m2lite.quant.journal import Journal, Ticket

    with Journal(put("x.gguf.journal", data)) as journal:
        assert all(Path(name).name == name for name in journal.files_before())
        ticket = Ticket("ab", (), 9, {"type": "f32"}, ("x.gguf",))
        with contextlib.suppress(M2liteError):
            journal.resume(ticket)
        journal.begin(ticket)


@target
def fuzz_page(data: bytes) -> None:
    from m2lite.storage.pages import PageStore

    store, into = PageStore(folder(), 1 << 20), memoryview(bytearray(64))
    put("key.page", data)
    info, found = store.info("key"), store.read("key", into)
    if found is not None:
        n_bytes, read_info, note = found
        n_head = 40 if data[:8] == b"m2litek2" else 44
        assert data[24:40] == info == read_info and data[n_head:] == bytes(into[:n_bytes]) + note


@target
def fuzz_heat(data: bytes) -> None:
    from m2lite.storage.heat import load_heat

    heat = load_heat(put("heat.npy", data), 2, 8)
    assert heat is None or (heat.shape == (2, 8) and np.isfinite(heat).all())


@target
def fuzz_drafts(data: bytes) -> None:
    """What earlier processes learnt of drafts: whatever it says, a planner can go on with it."""
    from m2lite.drafting.chances import Chances
    from m2lite.drafting.cost import CallCost, Sizes
    from m2lite.drafting.kept import load_kept
    from m2lite.drafting.planner import Planner

    sizes = Sizes(1 << 20, 1 << 14, 2, 8, 2)
    planner = Planner(3, CallCost(sizes, sizes), Chances(3))
    load_kept(put("drafts.json", data), planner)
    for n in (1, 5):
        planner.plan(n, [0, 10, 20, 30])
        planner.cost.saw(n, 0, 4 * n, 1e-3)
        planner.cost.saw_module(n, n, 1e-4)
        planner.choose([[0.9] * 7] * n, n, 64)
        assert 0 <= planner.depth <= 3 and np.isfinite([planner.cost.call(n, 3), planner.cost.level]).all()


@target
def fuzz_tuning(data: bytes) -> None:
    """What was found for this machine: nothing, or values of the table."""
    from m2lite.engine.tuned import load_tuning
    from m2lite.simd.tuning import PARAMETERS, WORKS

    found = load_tuning(put("tuning/x.json", data))
    assert found.warning == "" or not found.changes
    for name, value in found.values.items():
        assert type(value) is int and value in PARAMETERS[name].values
    for ratios in (found.gains, *(change.ratios for change in found.changes)):
        assert set(ratios) <= set(WORKS) and np.isfinite(list(ratios.values())).all()
    check_text([found.date, found.read_bytes_per_s])
    assert np.isfinite(found.read_bytes_per_s)


@target
def fuzz_chat(data: bytes) -> None:
    """A saved chat: what is read can be read again once it is written, and can be gone on with."""
    from m2lite.chat.chat import export_markdown, said_of
    from m2lite.chat.store import SavedChat, read_session

    saved = read_session(put("m2lite/chats/x.jsonl", data))
    check_text([saved.messages, saved.answer, saved.title, saved.n_turns])
    said_of(saved)
    export_markdown(saved.messages)
    with _data_home():
        chat = SavedChat("x")
        try:
            messages = [*chat.saved.messages, {"role": "user", "content": "more"}]
            chat.save(messages)
        finally:
            chat.close()
        assert read_session(chat.path).messages == messages


@contextlib.contextmanager
def _data_home() -> Iterator[None]:
    before = os.environ.get("XDG_DATA_HOME")
    os.environ["XDG_DATA_HOME"] = str(folder())
    try:
        yield
    finally:
        del os.environ["XDG_DATA_HOME"]
        if before is not None:
            os.environ["XDG_DATA_HOME"] = before
        for path in (folder() / "m2lite" / "chats").glob("x.jsonl.damaged*"):
            path.unlink()


@target
def fuzz_settings(data: bytes) -> None:
    from m2lite.settings import resolve_settings

    settings = resolve_settings({}, {}, put("config.toml", data))
    for name in ("threads", "ctx", "ram", "kv_disk", "top_k", "max_tokens", "seed"):
        value = settings[name]
        assert value is None or 0 <= value < 1 << 64
