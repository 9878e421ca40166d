"""OpenAI's chat completions: POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from m2lite import __version__
from m2lite.dialogue.chat_request import FIELDS, ChatRequest, parse_request, response_logprobs
from m2lite.errors import UsageError
from m2lite.model.numerics import NUMERICS_VERSION
from m2lite.serve.errors import Refused, error_body
from m2lite.serve.events import (
    AnswerEnd,
    AnswerEvent,
    Beat,
    CallArguments,
    CallBegin,
    Drawn,
    Reading,
    Text,
    WholeAnswer,
)
from m2lite.serve.replies import PING, EventStream, sse, whole_answer
from m2lite.serve.server import Answering, AnswerRequest, Server
from m2lite.system.json_text import JsonError, parse_object

_OWN = ("stream", "stream_options", "return_token_ids", "return_progress", "reasoning_effort", "thinking")
_MOST_ITEMS = 1_000_000  # of all arrays and objects of a body


@dataclass(frozen=True)
class _Form:
    """How the answer is given."""

    is_stream: bool = False
    has_usage: bool = False  # in a last chunk of its own
    has_ids: bool = False
    has_progress: bool = False


def routes(server: Server) -> list[Route]:
    async def answer(request: Request) -> Response:
        return await _answer(server, request)

    paths = ("/v1/chat/completions", "/chat/completions")
    return [Route(path, answer, methods=["POST"]) for path in paths]


async def _answer(server: Server, request: Request) -> Response:
    data = await request.body()
    chat, form = await server.off_loop(lambda: _parse(data, server.defaults()))
    answering = await server.begin(AnswerRequest(chat=chat))
    if form.is_stream:
        return EventStream(answering, lambda events: _chunks(answering, form, events, request.state.request_id))
    return JSONResponse(_body(answering, form, await whole_answer(request, answering)))


def _parse(data: bytes, defaults: ChatRequest) -> tuple[ChatRequest, _Form]:
    try:
        body = parse_object(data, most_items=_MOST_ITEMS)
    except JsonError as error:
        raise Refused(400, "invalid_json", f"The body is no JSON ({error}).", "Correct it.") from None
    form = _Form(
        is_stream=_is_true(body, "stream"),
        has_usage=_is_true(body.get("stream_options") or {}, "include_usage"),
        has_ids=_is_true(body, "return_token_ids"),
        has_progress=_is_true(body, "return_progress"),
    )
    thinking = _thinking(body)
    known = {name: value for name, value in body.items() if name in FIELDS and name not in _OWN}
    return parse_request(known | thinking, defaults), form


def _is_true(body: Any, name: str) -> bool:
    value = body.get(name) if isinstance(body, Mapping) else body
    if not isinstance(value, bool | None):
        raise UsageError(f"{name} is {value!r}.", "Use true or false.")
    return bool(value)


def _thinking(body: Mapping[str, Any]) -> dict[str, Any]:
    """`think_budget`, where it is asked for in another client's words."""
    thinking = body.get("thinking")
    kind = thinking.get("type") if isinstance(thinking, Mapping) else None
    if body.get("reasoning_effort") == "none" or kind == "disabled":
        return {"think_budget": 0}
    budget = thinking.get("budget_tokens") if isinstance(thinking, Mapping) else None
    return {} if budget is None else {"think_budget": budget}


def _head(answering: Answering, kind: str) -> dict[str, Any]:
    server = answering.server
    return {
        "id": f"chatcmpl-{answering.id}",
        "object": kind,
        "created": answering.created,
        "model": server.name,
        "system_fingerprint": f"m2lite-{__version__}-{NUMERICS_VERSION}-{server.model.kv}",
    }


def _usage(end: AnswerEnd) -> dict[str, Any]:
    stats, n_out = end.completion.stats, len(end.completion.tokens)
    return {
        "prompt_tokens": stats.n_prompt,
        "completion_tokens": n_out,
        "total_tokens": stats.n_prompt + n_out,
        "prompt_tokens_details": {"cached_tokens": stats.n_reused},
        "completion_tokens_details": {"reasoning_tokens": end.n_thinking},
    }


def _own(answering: Answering, end: AnswerEnd) -> dict[str, Any]:
    """What only m2lite tells: what the same answer can be had again with, and what was odd about its calls."""
    errors = end.completion.reply.errors
    return {"m2lite": {"seed": answering.seed}} | ({"m2lite_warnings": errors} if errors else {})


def _logprobs(answering: Answering, drawn: Drawn) -> dict[str, Any]:
    if answering.asked.chat.logprobs is None:
        return {"logprobs": None}
    return {"logprobs": response_logprobs(drawn.logprobs, answering.server.model.tokenizer)}


def _body(answering: Answering, form: _Form, found: WholeAnswer) -> dict[str, Any]:
    end = found.end
    assert end is not None
    message: dict[str, Any] = {"role": "assistant", "content": found.content, "refusal": None}
    if found.thinking:
        message |= _thoughts(found.thinking)
    if found.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in found.calls
        ]
    choice = {
        "index": 0, "message": message, **_logprobs(answering, Drawn(found.ids, found.logprobs)),
        "finish_reason": end.reason,
    }  # fmt: skip
    head = _head(answering, "chat.completion")
    if form.has_ids:
        choice["token_ids"], head["prompt_token_ids"] = found.ids, list(answering.prompt)
    return {**head, "choices": [choice], "usage": _usage(end), **_own(answering, end)}


def _thoughts(text: str) -> dict[str, str]:
    """Under both names that clients look for."""
    return {"reasoning_content": text, "reasoning": text}


async def _chunks(
    answering: Answering, form: _Form, events: AsyncIterator[AnswerEvent], request_id: str
) -> AsyncIterator[bytes]:
    head = _head(answering, "chat.completion.chunk")
    if form.has_usage:
        head["usage"] = None

    def chunk(delta: dict[str, Any], drawn: Drawn | None = None, reason: str | None = None) -> dict[str, Any]:
        drawn = drawn or Drawn([], [])
        choice = {"index": 0, "delta": delta, **_logprobs(answering, drawn), "finish_reason": reason}
        if form.has_ids:
            choice["token_ids"] = drawn.ids
        return {**head, "choices": [choice]}

    first = chunk({"role": "assistant", "content": ""})
    yield sse(first | ({"prompt_token_ids": list(answering.prompt)} if form.has_ids else {}))
    try:
        async for event in events:
            match event:
                case Reading():
                    if form.has_progress:
                        progress = {"total": event.n_total, "cache": event.n_cached, "processed": event.n_done}
                        yield sse({**head, "choices": [], "prompt_progress": progress})
                case Text(kind="thinking"):
                    yield sse(chunk(_thoughts(event.text), event.drawn))
                case Text():
                    yield sse(chunk({"content": event.text}, event.drawn))
                case CallBegin():
                    function = {"name": event.name, "arguments": ""}
                    call = {"index": event.number, "id": event.id, "type": "function", "function": function}
                    yield sse(chunk({"tool_calls": [call]}, event.drawn))
                case CallArguments():
                    function = {"arguments": event.text}
                    yield sse(chunk({"tool_calls": [{"index": event.number, "function": function}]}))
                case Beat():
                    yield PING
                case AnswerEnd():
                    last = chunk({}, event.drawn, event.reason) | _own(answering, event)
                    yield sse(last)
                    if form.has_usage:
                        yield sse({**head, "choices": [], "usage": _usage(event)})
    except Exception as error:
        yield sse(error_body("openai", error, request_id))
    yield sse("[DONE]")
