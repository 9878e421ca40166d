"""OpenAI's chat completions: POST /v1/chat/completions."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from m2lite.dialogue.chat_request import FIELDS, ChatRequest, parse_request, response_logprobs
from m2lite.errors import UsageError
from m2lite.serve.answering import Answering
from m2lite.serve.bodies import read_flag, read_object, wants_usage
from m2lite.serve.errors import error_body
from m2lite.serve.events import (
    AnswerEnd,
    AnswerEvent,
    Beat,
    CallArguments,
    CallBegin,
    CallEnd,
    Drawn,
    Reading,
    Text,
    WholeAnswer,
)
from m2lite.serve.normal import join_answers, merge_system, shortened, usable_tools
from m2lite.serve.replies import (
    PING,
    Form,
    completion_head,
    expert_shape,
    own_fields,
    progress_of,
    read_form,
    respond,
    sse,
    timings,
)
from m2lite.serve.server import Server

# Fields that are read here and not by `parse_request`.
_OWN = frozenset(
    {
        "stream", "stream_options", "return_token_ids", "return_progress", "return_experts", "timings_per_token",
        "reasoning_effort", "reasoning", "thinking", "enable_thinking", "chat_template_kwargs",
    }
)  # fmt: skip
# Fields that cannot change the answer: nobody is told that they are ignored.
_SILENT = frozenset(
    {
        "user", "store", "metadata", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
        "verbosity", "cache_prompt", "include_reasoning", "separate_reasoning", "cache_control", "id_slot",
        "provider",
    }
)  # fmt: skip
# Fields whose value would change the answer.
_REFUSED = (
    "logit_bias", "functions", "function_call", "audio", "grammar", "guided_regex", "guided_grammar", "chat_template",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _ChatForm(Form):
    has_usage: bool = False  # in a last chunk of its own
    has_ids: bool = False
    has_timings: bool = False  # in every chunk, and not in the last one only


def routes(server: Server) -> list[Route]:
    async def answer(request: Request) -> Response:
        return await respond(server, request, read_chat, _chunks, _body)

    paths = ("/v1/chat/completions", "/chat/completions")
    return [Route(path, answer, methods=["POST"]) for path in paths]


def parse_chat(body: Mapping[str, Any], defaults: ChatRequest) -> tuple[ChatRequest, list[str]]:
    """What a body asks for, and what of it is ignored, a sentence each."""
    known = {name: value for name, value in body.items() if name in FIELDS and name not in _OWN}
    known["messages"] = join_answers(merge_system(body.get("messages")))
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


def read_chat(data: bytes, defaults: ChatRequest) -> tuple[ChatRequest, _ChatForm]:
    """What a client asks for, and in what form."""
    body = read_object(data)
    has_usage = wants_usage(body)
    chat, told = parse_chat(body, defaults)
    return chat, _ChatForm(
        has_usage=has_usage,
        has_ids=read_flag(body, "return_token_ids"),
        has_experts=read_flag(body, "return_experts"),
        has_timings=read_flag(body, "timings_per_token"),
        told=tuple(told),
        **read_form(body),
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


def _own(answering: Answering, form: Form, end: AnswerEnd) -> dict[str, Any]:
    return own_fields(answering, form, end) | {"timings": timings(end.completion)}


def _beside(server: Server, answering: Answering, form: _ChatForm, drawn: Drawn) -> dict[str, Any]:
    """What of a choice stands beside its text, token by token."""
    found: dict[str, Any] = {"logprobs": None}
    if answering.asked.chat.logprobs is not None:
        found["logprobs"] = response_logprobs(drawn.logprobs, server.model.tokenizer)
    if form.has_ids:
        found["token_ids"] = drawn.ids
    if form.has_experts:
        found["experts"] = [each and b64encode(each).decode() for each in drawn.experts]
    return found


def _first(server: Server, answering: Answering, form: _ChatForm) -> dict[str, Any]:
    """What is told once: in the body, or in a stream's first chunk."""
    prompt = {"prompt_token_ids": list(answering.prompt)} if form.has_ids else {}
    return prompt | (expert_shape(server) if form.has_experts else {})


def _body(server: Server, answering: Answering, form: _ChatForm, found: WholeAnswer) -> dict[str, Any]:
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
        "index": 0, "message": message, "finish_reason": end.reason,
        **_beside(server, answering, form, Drawn(found.ids, found.logprobs, found.experts)),
    }  # fmt: skip
    head = completion_head(server, answering, "chatcmpl", "chat.completion") | _first(server, answering, form)
    return {**head, "choices": [choice], "usage": _usage(end), **_own(answering, form, end)}


def _thoughts(text: str) -> dict[str, str]:
    """Under both names that clients look for."""
    return {"reasoning_content": text, "reasoning": text}


async def _chunks(
    server: Server, answering: Answering, form: _ChatForm, events: AsyncIterator[AnswerEvent], request_id: str
) -> AsyncIterator[bytes]:
    head = completion_head(server, answering, "chatcmpl", "chat.completion.chunk")
    if form.has_usage:
        head["usage"] = None

    def chunk(delta: dict[str, Any], drawn: Drawn | None = None, reason: str | None = None) -> dict[str, Any]:
        beside = _beside(server, answering, form, drawn or Drawn([], [], []))
        choice = {"index": 0, "delta": delta, **beside, "finish_reason": reason}
        more = {"timings": timings(answering.handle.completion)} if form.has_timings and drawn else {}
        return {**head, "choices": [choice], **more}

    yield sse(chunk({"role": "assistant", "content": ""}) | _first(server, answering, form))
    try:
        async for event in events:
            match event:
                case Reading() | Beat():
                    progress = progress_of(answering, form, event)
                    yield sse({**head, "choices": [], **progress}) if progress else PING
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
                    yield sse(chunk({"tool_calls": [{"index": event.number, "function": function}]}, event.drawn))
                case CallEnd():
                    if event.drawn.ids and (
                        form.has_ids or form.has_experts or answering.asked.chat.logprobs is not None
                    ):
                        yield sse(chunk({}, event.drawn))
                case AnswerEnd():
                    last = chunk({}, event.drawn, event.reason) | _own(answering, form, event)
                    yield sse(last)
                    if form.has_usage:
                        yield sse({**head, "choices": [], "usage": _usage(event)})
    except Exception as error:
        yield sse(error_body("openai", error, request_id))
    yield sse("[DONE]")
