"""Fuzzing targets that read what people, clients and models write: requests, results, templates, calls."""

from __future__ import annotations

import contextlib
import functools
import json
from typing import Any

from m2lite.errors import M2liteError
from m2lite.system.json_text import parse_json, parse_object
from tests.fuzz.target import check_text, folder, put, target
from tests.fuzz.target_files import trunk_weights


@target
def fuzz_json_text(data: bytes) -> None:
    value = parse_json(data, most_bytes=1 << 20, most_items=10_000)
    check_text(value)
    assert parse_json(json.dumps(value)) == value


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

    return load_tokenizer(trunk_weights().gguf)


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
