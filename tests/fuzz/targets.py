"""One function per reader: it feeds bytes to the real reader and lets nothing pass but the errors that a user may see.

Every other exception, a hang and an allocation beyond what the bytes hold are findings. Knows no fuzzer.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from m2lite.errors import M2liteError
from m2lite.system.json_text import JsonError, parse_json, parse_object

Target = Callable[[bytes], None]
TARGETS: dict[str, Target] = {}
_ROOM = 1 << 20  # zeros behind a header whose tensors are not in the input


def target(function: Target) -> Target:
    """Into the table, and M2liteError is no finding."""

    @functools.wraps(function)
    def run(data: bytes) -> None:
        with contextlib.suppress(M2liteError, JsonError):
            function(data)

    TARGETS[function.__name__.removeprefix("fuzz_")] = run
    return run


@functools.cache
def folder() -> Path:
    """Of this process; in memory where the system has a place for that."""
    shared = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="m2lite-fuzz-", dir=shared if os.access(shared, os.W_OK) else None))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def put(name: str, data: bytes, room: int = 0) -> Path:
    """A file of its own for every input: an earlier one may still be mapped. `room` zeros follow, which take none."""
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.truncate(len(data) + room)
    return path


def check_text(value: object) -> None:
    """It can be written as JSON in UTF-8: what was read goes on into files."""
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


@target
def fuzz_json_text(data: bytes) -> None:
    value = parse_json(data, most_bytes=1 << 20, most_items=10_000)
    check_text(value)
    assert parse_json(json.dumps(value)) == value


# --- model files ---


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

    with open_gguf(put("model.gguf", data, _ROOM)) as gguf:
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

    trunk = _trunk()
    with open_gguf(put("mtp-model.gguf", data, _ROOM)) as sidecar, _reference_kernels():
        with contextlib.suppress(M2liteError):
            check_trunk(sidecar, trunk.gguf)
        bind_mtp(sidecar, trunk)


@functools.cache
def _trunk() -> Any:
    from m2lite.kernels import reference
    from m2lite.model.config import parse_config
    from m2lite.model.weights import bind_weights
    from m2lite.storage.gguf_reader import open_gguf
    from tests.fuzz.seeds import model_header

    gguf = open_gguf(put("trunk.gguf", model_header(), _ROOM))
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


# --- checkpoints ---


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


# --- our own files ---


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


# --- requests and results ---


@target
def fuzz_batch(data: bytes) -> None:
    """Lines of requests, as JSON and as questions."""
    from m2lite.batch.lines import Input
    from m2lite.dialogue.chat_request import ChatRequest
    from m2lite.sampling.draw import Sampling

    for name in ("in.jsonl", "in.txt"):
        lines = Input(str(put(name, data)), ChatRequest([], Sampling(seed=0)))
        checked = lines.check()
        check_text(checked.errors)
        for line in lines:
            check_text(line.custom_id)
            if line.request is not None:
                check_text([line.request.messages, line.request.tools, line.request.schema])


@target
def fuzz_results(data: bytes) -> None:
    """The output of a batch: it can be gone on with, sorted and merged, or it is refused and stays."""
    from m2lite.batch.results import Results, manifest_path, merge, read_results, result_line, status

    path = put("out.jsonl", data)
    manifest_path(path).write_text(json.dumps(MANIFEST))
    target_path = folder() / "all.jsonl"
    target_path.unlink(missing_ok=True)
    with contextlib.suppress(M2liteError):
        status(path)
    with contextlib.suppress(M2liteError):
        merge([path], target_path)
    good = [found.custom_id for found in read_results(path) if not found.is_failed]
    results = Results(path, MANIFEST, force=True, retry_failed=True)
    try:
        results.add(result_line("another", {}, None), 1)
        results.sort(sorted(good))
    finally:
        results.close()
    assert sorted(found.custom_id for found in read_results(path)) == sorted([*good, "another"])


@target
def fuzz_manifest(data: bytes) -> None:
    from m2lite.batch.results import Results, manifest_path, status

    path = put("out.jsonl", b"")
    manifest_path(path).write_bytes(data)
    with contextlib.suppress(M2liteError):
        check_text(status(path))
    with contextlib.suppress(M2liteError):
        Results(path, MANIFEST).close()
    Results(path, MANIFEST, force=True).close()


MANIFEST: dict[str, Any] = {"m2lite_batch": 1, "lines": 3, "model": "m", "shard": "1/1", "seed": 0}


# --- texts ---


@target
def fuzz_template(data: bytes) -> None:
    """A chat template as it comes with a file: compiled, and rendered in its child."""
    from m2lite.text.jinja import InChild, RenderError
    from m2lite.text.template import Template
    from tests.text.rendered import rendered

    template = Template(data.decode("utf-8", "replace"), "file")
    try:
        check_text(rendered(template, MESSAGES, [TOOL]))
    except RenderError:
        return
    finally:
        if isinstance(template._engine, InChild):
            template._engine.close()


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Größe?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1.0}}}]},
    {"role": "tool", "content": "3"},
]
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}}


@target
def fuzz_calls(data: bytes) -> None:
    """{"tools": [...], "text": "..."}: a request's tools, and what a model writes, whole and character by character."""
    from m2lite.text.calls import CallReader, parse_tool_calls
    from m2lite.text.messages import check_tools

    case = parse_object(data)
    tools, text = case.get("tools"), case.get("text")
    if not isinstance(text, str) or not isinstance(tools, list | None):
        return
    calls, errors = parse_tool_calls(text, check_tools(tools))[:2]
    check_text([calls, errors])
    reader = CallReader(check_tools(tools))
    pieces = [piece for character in text for piece in reader.push(character)] + reader.finish()
    told = "".join(piece.text for piece in pieces if piece.kind == "arguments")
    assert reader.calls == calls
    assert told.startswith("".join(json.dumps(each["function"]["arguments"], ensure_ascii=False) for each in calls))


@target
def fuzz_reply(data: bytes) -> None:
    """Any ids as a reply: a byte each, and what is above the bytes after 0xFF."""
    from m2lite.text.reply import ReplyStream

    tokenizer, ids = _tokenizer(), list[int]()
    bytes_left = iter(data[1:])
    for byte in bytes_left:
        ids.append(255 + next(bytes_left, 0) % 17 if byte == 255 else byte)
    tools = [{"type": "function", "function": TOOL}] if data[:1] > b"\x3f" else None
    stream = ReplyStream(tokenizer, data[:1] > b"\x7f", ("stop",) if data[:1] > b"\xbf" else (), tools)
    pieces = [piece for index in ids for piece in stream.push(index)] + stream.finish()
    reply = stream.reply()
    for kind, text in (("thinking", reply.thinking), ("content", reply.content)):
        assert "".join(piece.text for piece in pieces if piece.kind == kind) == text
    check_text(reply.message())


@functools.cache
def _tokenizer() -> Any:
    from m2lite.text.tokenizer import load_tokenizer

    return load_tokenizer(_trunk().gguf)


@target
def fuzz_schema(data: bytes) -> None:
    from m2lite.sampling.json_schema import load_schema

    check_text(load_schema(data, "schema.json"))


@target
def fuzz_tools(data: bytes) -> None:
    """A file of tools."""
    from m2lite.chat.tools import Limits, load_tools
    from m2lite.sampling.tool_choice import CallRules

    tools = load_tools([str(put("tools.json", data))], Limits(folder()))
    check_text(tools.schemas)
    for is_strict in (False, True):  # what its schemas ask of calls
        CallRules([each["function"] | {"strict": is_strict} for each in tools.schemas], "required").check()


@target
def fuzz_request(data: bytes) -> None:
    """A chat completion's body."""
    from m2lite.dialogue.chat_request import ChatRequest, parse_request
    from m2lite.sampling.draw import Sampling

    request = parse_request(parse_json(data), ChatRequest([], Sampling(seed=0)))
    check_text([request.messages, request.tools, request.schema, request.stop_texts])


@target
def fuzz_served(data: bytes) -> None:
    """What a client of the server sends."""
    from m2lite.dialogue.chat_request import ChatRequest
    from m2lite.sampling.draw import Sampling
    from m2lite.serve.chat_completions import read_chat

    request, form = read_chat(data, ChatRequest([], Sampling(seed=0)))
    check_text([request.messages, request.tools, request.schema, request.stop_texts, form.told])


@target
def fuzz_messages(data: bytes) -> None:
    """The same in Anthropic's form."""
    from m2lite.dialogue.chat_request import ChatRequest
    from m2lite.sampling.draw import Sampling
    from m2lite.serve.messages import read_message

    request, form = read_message(data, ChatRequest([], Sampling(seed=0)))
    check_text([request.messages, request.tools, request.schema, request.stop_texts, form.told])


@target
def fuzz_responses(data: bytes) -> None:
    """The same as items of OpenAI's responses."""
    from m2lite.dialogue.chat_request import ChatRequest
    from m2lite.sampling.draw import Sampling
    from m2lite.serve.responses import read_response

    request, form = read_response(data, ChatRequest([], Sampling(seed=0)))
    check_text([request.messages, request.tools, request.schema, request.stop_texts, form.told, form.echo])
    for name in form.names.inner:
        assert form.names.ours(*form.names.inner[name]) == name


@target
def fuzz_completions(data: bytes) -> None:
    """Raw prompts."""
    from m2lite.dialogue.chat_request import ChatRequest
    from m2lite.sampling.draw import Sampling
    from m2lite.serve.completions import read_completion

    request, form, prompts = read_completion(data, ChatRequest([], Sampling(seed=0)))
    check_text([request.stop_texts, request.schema, form.told, prompts])
