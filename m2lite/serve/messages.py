"""Anthropic's messages: POST /v1/messages and /v1/messages/count_tokens.

A body is brought to the form of a chat completion's, which is then read as one: what stands here is what differs.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from m2lite.dialogue.chat_request import ChatRequest
from m2lite.errors import UsageError
from m2lite.serve.answering import Answering
from m2lite.serve.bodies import read_flag, read_object
from m2lite.serve.chat_completions import parse_chat
from m2lite.serve.errors import error_body
from m2lite.serve.events import AnswerEnd, AnswerEvent, Beat, Reading, WholeAnswer
from m2lite.serve.normal import shortened
from m2lite.serve.parts import AnswerPart, PartBegin, PartEnd, PartEvent, PartMore, Parts
from m2lite.serve.replies import Form, own_fields, progress_of, read_form, respond, sse
from m2lite.serve.server import Server
from m2lite.text.messages import part_kind
from m2lite.text.reply import opens_thinking
from m2lite.text.values import closed

# Claude Code puts a line before its system prompt that differs in each request.
_BILLING = "x-anthropic-billing-header"
# Fields that are brought to others here.
_OWN = ("messages", "system", "tools", "tool_choice", "stop_sequences", "thinking", "output_config", "output_format")
# Fields that cannot change the answer: nobody is told that they are ignored.
_SILENT = frozenset(
    {
        "stream", "context_management", "container", "betas", "anthropic_beta", "anthropic_version", "inference_geo",
        "speed", "diagnostics", "user_profile_id", "fallback_credit_token",
    }
)  # fmt: skip
_THINKING = ("enabled", "disabled", "adaptive")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_SIGNATURE = "m2lite"  # of thoughts; nobody checks it, but without one some clients send them back as a user's text
_UNSEEN = "[{}, which this model cannot read]"  # in place of a part of a tool's result

Told = list[str]  # what is ignored, a sentence each


def routes(server: Server) -> list[Route]:
    async def answer(request: Request) -> Response:
        return await respond(server, request, read_message, _chunks, _body)

    async def count(request: Request) -> Response:
        data = await request.body()
        n = await server.off_loop(lambda: len(server.encode(read_message(data, server.defaults())[0])))
        return JSONResponse({"input_tokens": n})

    return [
        Route("/v1/messages", answer, methods=["POST"]),
        Route("/v1/messages/count_tokens", count, methods=["POST"]),
    ]


def read_message(data: bytes, defaults: ChatRequest) -> tuple[ChatRequest, Form]:
    body = read_object(data)
    asked, told = chat_body(body)
    chat, more = parse_chat(asked, defaults)
    return chat, Form(told=(*told, *more), **read_form(body))


# What is asked


def chat_body(body: Mapping[str, Any]) -> tuple[dict[str, Any], Told]:
    """The same as a body of chat completions, and what of it is ignored."""
    told = Told()
    asked = {name: value for name, value in body.items() if name not in _OWN and name not in _SILENT}
    asked["messages"] = _messages(body, told)
    tools = body.get("tools")
    if isinstance(tools, Sequence) and not isinstance(tools, str):
        tools = [_tool(tool) for tool in tools]
    asked["tools"] = tools
    asked["stop"] = body.get("stop_sequences")
    asked |= _tool_choice(body.get("tool_choice")) | _thinking(body.get("thinking"))
    config = _object("output_config", body.get("output_config"))
    schema = _object("output_format", config.get("format") or body.get("output_format"))
    if schema:
        asked["response_format"] = {"type": schema.get("type"), "json_schema": {"schema": schema.get("schema")}}
    return asked, shortened(told)


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping | None):
        raise UsageError(f"{name} is a {type(value).__name__}, expected an object.")
    return value or {}


def _tool(tool: Any) -> Any:
    """A function; what Anthropic's servers would carry out themselves stays as it is."""
    if not isinstance(tool, Mapping) or tool.get("type") not in (None, "custom"):
        return tool
    names = {"name": "name", "description": "description", "input_schema": "parameters", "strict": "strict"}
    function = {ours: tool[theirs] for theirs, ours in names.items() if tool.get(theirs) not in (None, False)}
    return {"type": "function", "function": function}


def _tool_choice(value: Any) -> dict[str, Any]:
    choice = _object("tool_choice", value)
    if not choice:
        return {}
    kind = choice.get("type")
    found: dict[str, Any] = {}
    if kind == "tool":
        found["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    elif isinstance(kind, str) and kind in _CHOICES:
        found["tool_choice"] = _CHOICES[kind]
    else:
        raise UsageError(f"tool_choice is of type {kind!r}.", f"Use tool, {', '.join(_CHOICES)}.")
    if read_flag(choice, "disable_parallel_tool_use"):
        found["parallel_tool_calls"] = False
    return found


def _thinking(value: Any) -> dict[str, Any]:
    thinking = _object("thinking", value)
    if thinking and thinking.get("type") not in _THINKING:
        raise UsageError(f"thinking is of type {thinking.get('type')!r}.", f"Use {', '.join(_THINKING)}.")
    return {"thinking": thinking} if thinking else {}


def _messages(body: Mapping[str, Any], told: Told) -> Any:
    """OpenAI's messages. Those that are none stay as they are: who checks them says what is wrong."""
    messages = body.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return messages
    system = _system(body.get("system"), "system")
    found: list[Any] = [{"role": "system", "content": system}] if system else []
    for number, message in enumerate(messages):
        where = f"Message {number}"
        role = message.get("role") if isinstance(message, Mapping) else None
        if role == "user":
            found += _user(message, where, told)
        elif role == "assistant":
            found.append(_assistant(message, where, told))
        elif role == "system":
            system = _system(message.get("content"), where)
            found += [{"role": "system", "content": system}] if system else []
        else:
            found.append(message)
    return found


def _system(content: Any, where: str) -> str:
    """The system text without the line of the bill."""
    texts = [_text(block, where) for block in _blocks(content, where)]
    texts = [text.partition("\n")[2] if text.startswith(_BILLING) else text for text in texts]
    return "\n\n".join(filter(None, texts))


def _blocks(content: Any, where: str) -> Sequence[Any]:
    """The blocks of a content, of which a string is one."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if not isinstance(content, Sequence):
        raise UsageError(f"{where}: content is a {type(content).__name__}, expected a string or a list of blocks.")
    return content


def _string(block: Mapping[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise UsageError(f"{where}: {name} is a {type(value).__name__}, expected a string.")
    return value


def _text(block: Any, where: str) -> str:
    """The text of a block that is to be read."""
    kind = part_kind(block)
    if kind == "text":
        return _string(block, "text", where)
    source = block.get("source") if kind == "document" else None
    if isinstance(source, Mapping) and source.get("type") == "text":
        return _string(source, "data", where)
    raise UsageError(f"{where} has a block of type {kind!r}; the model reads text only.", "Leave it out.")


def _user(message: Mapping[str, Any], where: str, told: Told) -> list[dict[str, Any]]:
    """The results of tools in front, right behind the calls; then what the user says."""
    results, texts = list[dict[str, Any]](), list[str]()
    for block in _blocks(message.get("content"), where):
        if part_kind(block) == "tool_result":
            text = _result(block, where, told)
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        else:
            texts.append(_text(block, where))
    if texts or not results:
        results.append({"role": "user", "content": "\n".join(texts)})
    return results


def _result(block: Mapping[str, Any], where: str, told: Told) -> str:
    """What a tool said. A picture there is told, not refused: it would end the conversation of an agent."""
    texts = list[str]()
    for each in _blocks(block.get("content"), where):
        try:
            texts.append(_text(each, where))
        except UsageError:
            texts.append(_UNSEEN.format(part_kind(each)))
            told.append(f"{where}: a tool's result holds a block of type {part_kind(each)!r}, which was left out.")
    text = "\n".join(texts)
    is_said = "error" in text[:100].lower()
    return f"Error: {text}" if read_flag(block, "is_error") and not is_said else text


def _assistant(message: Mapping[str, Any], where: str, told: Told) -> dict[str, Any]:
    thinking, text, calls = "", "", list[dict[str, Any]]()
    for block in _blocks(message.get("content"), where):
        match part_kind(block):
            case "thinking":
                thinking += _string(block, "thinking", where)
            case "tool_use":
                function = {"name": block.get("name"), "arguments": block.get("input")}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case "text":
                text += _string(block, "text", where)
            case kind:
                told.append(f"{where}: the block of type {kind!r} was left out.")
    found: dict[str, Any] = {"role": "assistant", "content": text}
    return found | ({"reasoning_content": thinking} if thinking else {}) | ({"tool_calls": calls} if calls else {})


# What is answered


def _body(server: Server, answering: Answering, form: Form, found: WholeAnswer) -> dict[str, Any]:
    assert found.end is not None
    message = _message(server, answering) | _ending(found.end) | {"usage": _usage(answering, found.end)}
    message["content"] = [_block(part) for part in Parts().tell_all(found.events)]
    return message | own_fields(answering, form, found.end)


def _message(server: Server, answering: Answering) -> dict[str, Any]:
    """Before anything is said."""
    return {
        "id": f"msg_{answering.id}", "type": "message", "role": "assistant", "model": server.name, "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": _usage(answering, None),
    }  # fmt: skip


def _usage(answering: Answering, end: AnswerEnd | None) -> dict[str, int]:
    """Tokens of the prompt that were computed, those that were not, and those of the answer."""
    stats = answering.handle.completion.stats
    return {
        "input_tokens": len(answering.prompt) - stats.n_reused,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": stats.n_reused,
        "output_tokens": 0 if end is None else len(end.completion.tokens),
    }


def _ending(end: AnswerEnd) -> dict[str, Any]:
    reasons = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}
    reason = reasons[end.reason] if end.stop_text is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": end.stop_text}


def _block(part: AnswerPart) -> dict[str, Any]:
    """A part that is whole."""
    if part.kind == "call":
        return {"type": "tool_use", "id": part.id, "name": part.name, "input": json.loads(closed(part.text))}
    if part.kind == "thinking":
        return {"type": "thinking", "thinking": part.text, "signature": _SIGNATURE}
    return {"type": "text", "text": part.text}


_EMPTY: dict[str, dict[str, Any]] = {
    "call": {"type": "tool_use", "input": {}},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
    "content": {"type": "text", "text": ""},
}
_DELTAS = {
    "call": ("input_json_delta", "partial_json"), "thinking": ("thinking_delta", "thinking"),
    "content": ("text_delta", "text"),
}  # fmt: skip


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, kind)


def _part_events(event: PartEvent) -> list[bytes]:
    part, index = event.part, event.part.number
    match event:
        case PartBegin():
            named = {"id": part.id, "name": part.name} if part.kind == "call" else {}
            return [_event("content_block_start", index=index, content_block=_EMPTY[part.kind] | named)]
        case PartMore():
            kind, field = _DELTAS[part.kind]
            return [_event("content_block_delta", index=index, delta={"type": kind, field: event.text})]
        case PartEnd():
            signed = {"type": "signature_delta", "signature": _SIGNATURE}
            delta = [_event("content_block_delta", index=index, delta=signed)] if part.kind == "thinking" else []
            return [*delta, _event("content_block_stop", index=index)]


async def _chunks(
    server: Server, answering: Answering, form: Form, events: AsyncIterator[AnswerEvent], request_id: str
) -> AsyncIterator[bytes]:
    parts, is_begun = Parts(), False
    thinks = answering.asked.chat.think_tokens != 0 and opens_thinking(answering.tokenizer, answering.prompt)
    try:
        async for event in events:
            # Claude Code gives up after five minutes in which nothing came but pings, so some more nothing comes, too.
            waits = is_begun and isinstance(event, Reading | Beat)
            if not is_begun:  # only now: by the first event it is known what was cached
                yield _event("message_start", message=_message(server, answering))
                is_begun = True
            if isinstance(event, Reading | Beat):
                yield _event("ping", **progress_of(answering, form, event))
            for each in parts.wait("thinking" if thinks else "content") if waits else parts.tell(event):
                for chunk in _part_events(each):
                    yield chunk
            if isinstance(event, AnswerEnd):
                own = own_fields(answering, form, event)
                yield _event("message_delta", delta=_ending(event), usage=_usage(answering, event), **own)
                yield _event("message_stop")
    except Exception as error:
        yield sse(error_body("anthropic", error, request_id), "error")
