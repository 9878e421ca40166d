"""OpenAI's responses: POST /v1/responses. Nothing is stored: each request brings its whole conversation.

A body is brought to the form of a chat completion's (`responses_body`), which is then read as one; here are the events.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from m2lite.dialogue.chat_request import ChatRequest, response_logprobs
from m2lite.errors import ContextError
from m2lite.sampling.rules import Logprob
from m2lite.serve.answering import Answering, AnswerRequest
from m2lite.serve.bodies import read_object
from m2lite.serve.chat_completions import parse_chat
from m2lite.serve.errors import code_of, error_body
from m2lite.serve.events import AnswerEnd, AnswerEvent, Beat, Reading
from m2lite.serve.parts import AnswerPart, PartBegin, PartEnd, PartEvent, PartMore, Parts
from m2lite.serve.replies import EventStream, Form, own_fields, progress_of, read_form, sse, whole_answer
from m2lite.serve.responses_body import Names, chat_body
from m2lite.serve.server import Server

_PREFIXES = {"thinking": "rs", "content": "msg", "call": "fc"}


@dataclass(frozen=True, kw_only=True)
class _ResponseForm(Form):
    names: Names
    echo: dict[str, Any] = field(default_factory=dict)  # fields of the request that are given back


def routes(server: Server) -> list[Route]:
    async def answer(request: Request) -> Response:
        return await _answer(server, request)

    return [Route(path, answer, methods=["POST"]) for path in ("/v1/responses", "/responses")]


async def _answer(server: Server, request: Request) -> Response:
    data, request_id = await request.body(), request.state.request_id
    chat, form = await server.off_loop(lambda: read_response(data, server.defaults()))
    try:
        answering = await server.begin(AnswerRequest(chat=chat))
    except ContextError as error:
        if not form.is_stream:
            raise
        # Codex makes its conversation shorter where it reads this in an event, and gives up where it is a status.
        body = {"id": f"resp_{request_id}", "created_at": server.created} | _head(server, chat, form)
        failed = _Stream(body, form, answer_id=request_id).failed(error)
        return Response(b"".join(failed), media_type=EventStream.media_type)
    body = {"id": f"resp_{answering.id}", "created_at": answering.created} | _head(server, chat, form)
    stream = _Stream(body, form, answering)
    if form.is_stream:
        return EventStream(answering, lambda events: _chunks(stream, events))
    found = await whole_answer(request, answering)
    assert found.end is not None
    stream.parts.tell_all(found.events)
    return JSONResponse(stream.ended(found.end))


def read_response(data: bytes, defaults: ChatRequest) -> tuple[ChatRequest, _ResponseForm]:
    body = read_object(data)
    asked, told, names = chat_body(body)
    chat, more = parse_chat(asked, defaults)
    echo = {
        name: body[name]
        for name in ("tool_choice", "parallel_tool_calls", "metadata", "user")
        if body.get(name) is not None
    }
    return chat, _ResponseForm(told=(*told, *more), names=names, echo=echo, **read_form(body))


def _head(server: Server, chat: ChatRequest, form: _ResponseForm) -> dict[str, Any]:
    """A response before anything is said, but for its id and time."""
    return {
        "object": "response", "status": "in_progress", "background": False, "error": None, "incomplete_details": None,
        "instructions": None, "max_output_tokens": chat.max_tokens, "metadata": {}, "model": server.name, "output": [],
        "parallel_tool_calls": True, "previous_response_id": None, "reasoning": {"effort": None, "summary": None},
        "store": False, "temperature": chat.sampling.temperature, "text": {"format": {"type": "text"}},
        "tool_choice": "auto", "tools": [], "top_p": chat.sampling.top_p, "truncation": "disabled", "usage": None,
        **form.echo,
    }  # fmt: skip


def _usage(end: AnswerEnd) -> dict[str, Any]:
    stats, n_out = end.completion.stats, len(end.completion.tokens)
    return {
        "input_tokens": stats.n_prompt,
        "input_tokens_details": {"cached_tokens": stats.n_reused, "cache_write_tokens": 0},
        "output_tokens": n_out,
        "output_tokens_details": {"reasoning_tokens": end.n_thinking},
        "total_tokens": stats.n_prompt + n_out,
    }


class _Stream:
    """A response and its events, which are numbered."""

    def __init__(
        self, body: dict[str, Any], form: _ResponseForm, answering: Answering | None = None, answer_id: str = ""
    ) -> None:
        self.body, self.parts = body, Parts()
        self._form, self._answering, self._n = form, answering, 0
        self._id = answering.id if answering is not None else answer_id

    def event(self, kind: str, **fields: Any) -> bytes:
        number, self._n = self._n, self._n + 1
        return sse({"type": kind, "sequence_number": number, **fields}, kind)

    def begin(self) -> list[bytes]:
        return [self.event(f"response.{kind}", response=self.body) for kind in ("created", "in_progress")]

    def beat(self, event: Reading | Beat) -> bytes:
        """It is in progress, again: clients count the seconds between events, and comments are none."""
        assert self._answering is not None
        return self.event("response.in_progress", response=self.body, **progress_of(self._answering, self._form, event))

    def failed(self, error: Exception) -> list[bytes]:
        message = error_body("openai", error, "")["error"]["message"]
        told = {"code": code_of(error), "message": message}
        output = [self._item(part, "incomplete") for part in self.parts.found]
        body = self.body | {"status": "failed", "error": told, "output": output}
        return [*([] if self._n else self.begin()), self.event("response.failed", response=body)]

    def ended(self, end: AnswerEnd) -> dict[str, Any]:
        """The whole response."""
        assert self._answering is not None
        is_cut, found = end.reason == "length", self.parts.found
        output = [self._item(part, "incomplete" if is_cut and part is found[-1] else "completed") for part in found]
        why = {"reason": "max_output_tokens"} if is_cut else None
        told = {"status": "incomplete" if is_cut else "completed", "incomplete_details": why, "output": output}
        return self.body | told | {"usage": _usage(end)} | own_fields(self._answering, self._form, end)

    def end(self, end: AnswerEnd) -> bytes:
        body = self.ended(end)
        return self.event(f"response.{body['status']}", response=body)

    def part(self, event: PartEvent, status: str) -> list[bytes]:
        """Events of a part; `status` is what it has if it ends here."""
        part = event.part
        place = {"item_id": self._item_id(part), "output_index": part.number}
        inner = place | {"content_index": 0}
        match event:
            case PartBegin():
                item = self._item(AnswerPart(part.kind, part.number, id=part.id, name=part.name), "in_progress")
                content = item.pop("content", None)
                item |= {} if content is None else {"content": []}
                added = self.event("response.output_item.added", output_index=part.number, item=item)
                if content is None:
                    return [added]
                return [added, self.event("response.content_part.added", **inner, part=content[0])]
            case PartMore():
                if part.kind == "call":
                    return [self.event("response.function_call_arguments.delta", **place, delta=event.text)]
                if part.kind == "thinking":
                    return [self.event("response.reasoning_text.delta", **inner, delta=event.text)]
                noted = self._logprobs(event.logprobs)
                return [self.event("response.output_text.delta", **inner, delta=event.text, logprobs=noted)]
            case PartEnd():
                item = self._item(part, status)
                said = self._said(part, place, inner, item)
                return [*said, self.event("response.output_item.done", output_index=part.number, item=item)]

    def _said(self, part: AnswerPart, place: Any, inner: Any, item: dict[str, Any]) -> list[bytes]:
        if part.kind == "call":
            fields = {"name": item["name"], "arguments": part.text}
            return [self.event("response.function_call_arguments.done", **place, **fields)]
        kind, noted = "reasoning_text", {}
        if part.kind == "content":
            kind, noted = "output_text", {"logprobs": self._logprobs(part.logprobs)}
        return [
            self.event(f"response.{kind}.done", **inner, text=part.text, **noted),
            self.event("response.content_part.done", **inner, part=item["content"][0]),
        ]

    def _item_id(self, part: AnswerPart) -> str:
        return f"{_PREFIXES[part.kind]}_{self._id}_{part.number}"

    def _item(self, part: AnswerPart, status: str) -> dict[str, Any]:
        """An item of the output."""
        head = {"id": self._item_id(part), "status": status}
        if part.kind == "call":
            called = {"call_id": part.id, "arguments": part.text}
            return {"type": "function_call", **head, **called, **self._form.names.theirs(part.name)}
        if part.kind == "thinking":
            content = [{"type": "reasoning_text", "text": part.text}]
            return {"type": "reasoning", **head, "summary": [], "content": content}
        text = {"type": "output_text", "text": part.text, "annotations": [], "logprobs": self._logprobs(part.logprobs)}
        return {"type": "message", **head, "role": "assistant", "content": [text]}

    def _logprobs(self, noted: Sequence[Logprob | None]) -> list[dict[str, Any]]:
        """Of the text's own tokens: tags are none."""
        assert self._answering is not None
        tokenizer = self._answering.tokenizer
        tags = set(tokenizer.control_strings.values())
        found = response_logprobs([each for each in noted if each and each.token not in tags], tokenizer)
        return [] if found is None else found["content"]


async def _chunks(stream: _Stream, events: AsyncIterator[AnswerEvent]) -> AsyncIterator[bytes]:
    try:
        for chunk in stream.begin():
            yield chunk
        async for event in events:
            if isinstance(event, Reading | Beat):
                yield stream.beat(event)
            is_cut = isinstance(event, AnswerEnd) and event.reason == "length"
            for each in stream.parts.tell(event):
                for chunk in stream.part(each, "incomplete" if is_cut else "completed"):
                    yield chunk
            if isinstance(event, AnswerEnd):
                yield stream.end(event)
    except Exception as error:
        for chunk in stream.failed(error):
            yield chunk
