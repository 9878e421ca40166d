"""OpenAI's chat completions: POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from m2lite.dialogue.chat_request import FIELDS, ChatRequest, parse_request, response_logprobs
from m2lite.errors import UsageError
from m2lite.serve.answering import Answering, AnswerRequest
from m2lite.serve.bodies import read_flag, read_object, wants_usage
from m2lite.serve.errors import error_body
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
from m2lite.serve.normal import merge_system, shortened, usable_tools
from m2lite.serve.replies import PING, EventStream, completion_head, own_fields, sse, whole_answer
from m2lite.serve.server import Server

# Fields that are read here and not by `parse_request`.
_OWN = frozenset(
    {
        "stream", "stream_options", "return_token_ids", "return_progress", "reasoning_effort", "reasoning", "thinking",
        "enable_thinking", "chat_template_kwargs",
    }
)  # fmt: skip
# Fields that cannot change the answer: nobody is told that they are ignored.
_SILENT = frozenset(
    {
        "user", "store", "metadata", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
        "verbosity", "cache_prompt", "include_reasoning", "separate_reasoning", "cache_control", "id_slot",
        "provider", "timings_per_token",
    }
)  # fmt: skip
# Fields whose value would change the answer.
_REFUSED = (
    "logit_bias", "functions", "function_call", "audio", "grammar", "guided_regex", "guided_grammar", "chat_template",
)  # fmt: skip


@dataclass(frozen=True)
class _Form:
    """How the answer is given."""

    is_stream: bool = False
    has_usage: bool = False  # in a last chunk of its own
    has_ids: bool = False
    has_progress: bool = False
    told: tuple[str, ...] = ()  # what was ignored


def routes(server: Server) -> list[Route]:
    async def answer(request: Request) -> Response:
        return await _answer(server, request)

    paths = ("/v1/chat/completions", "/chat/completions")
    return [Route(path, answer, methods=["POST"]) for path in paths]


async def _answer(server: Server, request: Request) -> Response:
    data = await request.body()
    chat, form = await server.off_loop(lambda: read_chat(data, server.defaults()))
    answering = await server.begin(AnswerRequest(chat=chat))
    if form.is_stream:
        return EventStream(answering, lambda events: _chunks(server, answering, form, events, request.state.request_id))
    return JSONResponse(_body(server, answering, form, await whole_answer(request, answering)))


def parse_chat(body: Mapping[str, Any], defaults: ChatRequest) -> tuple[ChatRequest, list[str]]:
    """What a body asks for, and what of it is ignored, a sentence each."""
    known = {name: value for name, value in body.items() if name in FIELDS and name not in _OWN}
    known["messages"] = merge_system(body.get("messages"))
    tools, skipped = usable_tools(body.get("tools"))
    if tools or "tools" in known:
        known["tools"] = tools
    told = [f"Tools of type {kind!r} cannot be called here and were left out." for kind in dict.fromkeys(skipped)]
    for name, value in body.items():
        if value is None or value in ({}, [], "") or name in FIELDS or name in _OWN or name in _SILENT:
            continue
        if name in _REFUSED:
            raise UsageError(f"The field {name!r} is not supported.", "Leave it out.")
        told.append(f"The field {name!r} is not known and was ignored.")
    values = body.get("chat_template_kwargs")
    for name in values if isinstance(values, Mapping) else ():
        if name != "enable_thinking":
            told.append(f"The field {name!r} of chat_template_kwargs is not known and was ignored.")
    return parse_request(known | _thinking(body), defaults), shortened(told)


def read_chat(data: bytes, defaults: ChatRequest) -> tuple[ChatRequest, _Form]:
    """What a client asks for, and in what form."""
    body = read_object(data)
    has_usage = wants_usage(body)
    chat, told = parse_chat(body, defaults)
    return chat, _Form(
        is_stream=read_flag(body, "stream"),
        has_usage=has_usage,
        has_ids=read_flag(body, "return_token_ids"),
        has_progress=read_flag(body, "return_progress"),
        told=tuple(told),
    )


def _thinking(body: Mapping[str, Any]) -> dict[str, Any]:
    """`think_budget`, in whatever words clients ask for it; of efforts the model knows none but its own."""
    thinking, reasoning = body.get("thinking"), body.get("reasoning")
    values = body.get("chat_template_kwargs")
    switches = [body, values if isinstance(values, Mapping) else {}]
    efforts = [body.get("reasoning_effort"), reasoning.get("effort") if isinstance(reasoning, Mapping) else None]
    kind = thinking.get("type") if isinstance(thinking, Mapping) else None
    if "none" in efforts or kind == "disabled" or any(each.get("enable_thinking") is False for each in switches):
        return {"think_budget": 0}
    budget = thinking.get("budget_tokens") if isinstance(thinking, Mapping) else None
    return {} if budget is None else {"think_budget": budget}


def _usage(end: AnswerEnd) -> dict[str, Any]:
    stats, n_out = end.completion.stats, len(end.completion.tokens)
    return {
        "prompt_tokens": stats.n_prompt,
        "completion_tokens": n_out,
        "total_tokens": stats.n_prompt + n_out,
        "prompt_tokens_details": {"cached_tokens": stats.n_reused},
        "completion_tokens_details": {"reasoning_tokens": end.n_thinking},
    }


def _own(answering: Answering, form: _Form, end: AnswerEnd) -> dict[str, Any]:
    return own_fields(answering, form.told, end)


def _logprobs(server: Server, answering: Answering, drawn: Drawn) -> dict[str, Any]:
    if answering.asked.chat.logprobs is None:
        return {"logprobs": None}
    return {"logprobs": response_logprobs(drawn.logprobs, server.model.tokenizer)}


def _body(server: Server, answering: Answering, form: _Form, found: WholeAnswer) -> dict[str, Any]:
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
        "index": 0, "message": message, **_logprobs(server, answering, Drawn(found.ids, found.logprobs)),
        "finish_reason": end.reason,
    }  # fmt: skip
    head = completion_head(server, answering, "chatcmpl", "chat.completion")
    if form.has_ids:
        choice["token_ids"], head["prompt_token_ids"] = found.ids, list(answering.prompt)
    return {**head, "choices": [choice], "usage": _usage(end), **_own(answering, form, end)}


def _thoughts(text: str) -> dict[str, str]:
    """Under both names that clients look for."""
    return {"reasoning_content": text, "reasoning": text}


async def _chunks(
    server: Server, answering: Answering, form: _Form, events: AsyncIterator[AnswerEvent], request_id: str
) -> AsyncIterator[bytes]:
    head = completion_head(server, answering, "chatcmpl", "chat.completion.chunk")
    if form.has_usage:
        head["usage"] = None

    def chunk(delta: dict[str, Any], drawn: Drawn | None = None, reason: str | None = None) -> dict[str, Any]:
        drawn = drawn or Drawn([], [])
        choice = {"index": 0, "delta": delta, **_logprobs(server, answering, drawn), "finish_reason": reason}
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
                    else:
                        yield PING
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
                    last = chunk({}, event.drawn, event.reason) | _own(answering, form, event)
                    yield sse(last)
                    if form.has_usage:
                        yield sse({**head, "choices": [], "usage": _usage(event)})
    except Exception as error:
        yield sse(error_body("openai", error, request_id))
    yield sse("[DONE]")
