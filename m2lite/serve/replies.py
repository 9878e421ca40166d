"""Answers on the wire: a stream of server-sent events, or one JSON. A client that goes away cancels its answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from m2lite import __version__
from m2lite.dialogue.chat_request import ChatRequest
from m2lite.engine.answer import Completion
from m2lite.model.numerics import NUMERICS_VERSION
from m2lite.serve.answering import Answering, AnswerRequest
from m2lite.serve.bodies import read_flag
from m2lite.serve.errors import ClientGone
from m2lite.serve.events import AnswerEnd, AnswerEvent, Beat, Reading, WholeAnswer
from m2lite.serve.server import Server

F = TypeVar("F", bound="Form")

BEAT_S = 10.0  # without anything to send, after which something is sent


def sse(data: Any, event: str | None = None) -> bytes:
    """One server-sent event; `data` is JSON, or a text as it is."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {text}\n\n".encode()


PING = b": ping\n\n"  # a comment, which clients skip


@dataclass(frozen=True, kw_only=True)
class Form:
    """How an answer is given."""

    is_stream: bool = False
    has_progress: bool = False  # of the prompt while it is read
    has_experts: bool = False  # that each token was drawn with
    told: tuple[str, ...] = ()  # what was ignored


def read_form(body: Mapping[str, Any]) -> dict[str, bool]:
    """What every dialect's body may say of it."""
    return {"is_stream": read_flag(body, "stream"), "has_progress": read_flag(body, "return_progress")}


def progress_of(answering: Answering, form: Form, event: Reading | Beat) -> dict[str, Any]:
    """How far the prompt is read, for a client that asks; nothing for others, and once it is read."""
    if not form.has_progress or (isinstance(event, Beat) and answering.progress.is_over):
        return {}
    return {"prompt_progress": answering.progress.told()}


def own_fields(answering: Answering, form: Form, end: AnswerEnd) -> dict[str, Any]:
    """What only m2lite tells: what the same answer can be had again with, and what was odd or left out."""
    warnings = [*form.told, *end.completion.reply.errors, *answering.cut_short(end)]
    return {"m2lite": {"seed": answering.seed}} | ({"m2lite_warnings": warnings} if warnings else {})


def expert_shape(server: Server) -> dict[str, Any]:
    """What is to be known of the experts that were chosen: each token has [n_layers, n_used] ids of this type."""
    c = server.model.config
    sizes = {"n_layers": c.n_layers, "n_experts": c.n_experts, "n_used": c.n_experts_used}
    return {"m2lite_experts": sizes | {"dtype": c.expert_dtype.name}}


def timings(completion: Completion) -> dict[str, Any]:
    """What an answer took so far, under llama-server's names; for a streamed model also what was read."""
    stats, drafted = completion.stats, completion.stats.drafted
    found: dict[str, Any] = {
        "cache_n": stats.n_reused, "prompt_n": stats.n_prompt - stats.n_reused,
        "prompt_ms": 1e3 * stats.prompt_s, "prompt_per_second": stats.prompt_tokens_per_s,
        "predicted_n": stats.n_generated,
        "predicted_ms": 1e3 * stats.decode_s, "predicted_per_second": stats.tokens_per_s,
    }  # fmt: skip
    if drafted is not None:
        found |= {"draft_n": drafted.n_proposed, "draft_n_accepted": drafted.n_accepted}
    return found | (stats.traffic.as_dict() if stats.traffic else {})


def completion_head(server: Server, answering: Answering, prefix: str, kind: str) -> dict[str, Any]:
    """What OpenAI's completions begin with, chats and older ones, whole and in chunks."""
    return {
        "id": f"{prefix}-{answering.id}",
        "object": kind,
        "created": answering.created,
        "model": server.name,
        "system_fingerprint": f"m2lite-{__version__}-{NUMERICS_VERSION}-{server.model.kv}",
    }


class EventStream(Response):
    """Server-sent events, as `chunks` makes them of an answer's events."""

    media_type = "text/event-stream"

    def __init__(
        self, answering: Answering, chunks: Callable[[AsyncIterator[AnswerEvent]], AsyncIterator[bytes]]
    ) -> None:
        """`chunks` also turns an error into the event that its dialect has for it: the status is sent by then."""
        self.status_code, self.background = 200, None
        self._answering, self._chunks = answering, chunks
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            sending = asyncio.ensure_future(self._send(send))
            await first_of(sending, receive)
        finally:
            self._answering.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._answering.events(BEAT_S)) as events:  # type: ignore[type-var]
            async for chunk in self._chunks(events):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def first_of(work: asyncio.Future[Any], receive: Receive) -> None:
    """Wait for `work`; it is cancelled and ClientGone raised where the client goes away before."""
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        work.result()
    finally:
        for each in (work, gone):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole_answer(request: Request, answering: Answering) -> WholeAnswer:
    """All of it. ClientGone, and nothing more is computed, where its client does not wait for it."""
    work = asyncio.ensure_future(answering.whole())
    try:
        await first_of(work, request.receive)
    finally:
        answering.cancel()
    return work.result()


async def respond(
    server: Server, request: Request,
    read: Callable[[bytes, ChatRequest], tuple[ChatRequest, F]],
    chunks: Callable[[Server, Answering, F, AsyncIterator[AnswerEvent], str], AsyncIterator[bytes]],
    body: Callable[[Server, Answering, F, WholeAnswer], dict[str, Any]],
) -> Response:  # fmt: skip
    """Read a request and answer it, as a stream of `chunks` or as one `body`."""
    data = await request.body()
    chat, form = await server.off_loop(lambda: read(data, server.defaults()))
    answering = await server.begin(AnswerRequest(chat=chat, has_experts=form.has_experts))
    if form.is_stream:
        return EventStream(answering, lambda events: chunks(server, answering, form, events, request.state.request_id))
    return JSONResponse(body(server, answering, form, await whole_answer(request, answering)))
