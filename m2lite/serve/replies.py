"""Answers on the wire: a stream of server-sent events, or one JSON. A client that goes away cancels its answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from m2lite import __version__
from m2lite.engine.answer import Completion
from m2lite.model.numerics import NUMERICS_VERSION
from m2lite.serve.answering import Answering
from m2lite.serve.errors import ClientGone
from m2lite.serve.events import AnswerEnd, AnswerEvent, WholeAnswer
from m2lite.serve.server import Server

BEAT_S = 10.0  # without anything to send, after which something is sent


def sse(data: Any, event: str | None = None) -> bytes:
    """One server-sent event; `data` is JSON, or a text as it is."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {text}\n\n".encode()


PING = b": ping\n\n"  # a comment, which clients skip


def own_fields(answering: Answering, told: Sequence[str], end: AnswerEnd) -> dict[str, Any]:
    """What only m2lite tells: what the same answer can be had again with, and what was odd or left out (`told`)."""
    warnings = [*told, *end.completion.reply.errors, *answering.cut_short(end)]
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
