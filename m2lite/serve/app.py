"""The application: routes of all dialects behind the gate, and errors in the form of the dialect that was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from m2lite.serve import chat_completions, completions, info, messages, metrics, responses, web_page
from m2lite.serve.errors import Refused, dialect_of, error_response
from m2lite.serve.gate import Gate
from m2lite.serve.server import Server
from m2lite.serve.warm import warm

# A dialect is a module with `routes(server)`.
_DIALECTS = (chat_completions, completions, messages, responses, info, metrics, web_page)


def create_app(server: Server, bodies: Sequence[dict[str, Any]] = ()) -> Starlette:
    """The application that answers for `server`, whose start and stop are its own; `bodies` are computed first."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await server.start()
        warming = asyncio.create_task(warm(server, bodies))
        try:
            yield
        finally:
            warming.cancel()
            with suppress(asyncio.CancelledError):
                await warming
            await server.stop()

    routes: list[Route] = [route for dialect in _DIALECTS for route in dialect.routes(server)]
    gate = Middleware(Gate, options=server.options)
    return Starlette(routes=routes, middleware=[gate], exception_handlers={HTTPException: _on_http}, lifespan=lifespan)


async def _on_http(request: Request, error: Exception) -> Response:
    """What the router says: there is no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    if error.status_code == 405:
        refused = Refused(405, "method_not_allowed", f"{path} does not answer {method}.", headers=error.headers)
    elif error.status_code == 404:
        refused = Refused(404, "not_found", f"There is no {path} here.", "GET /v1/models says what is served.")
    else:
        refused = Refused(error.status_code, "refused", f"{error.detail}.")
    return error_response(dialect_of(path), refused, request.state.request_id)
