"""What a request must be before anybody reads it: key, host, origin, type and size. Pure ASGI; knows no model."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from m2lite.errors import M2liteError
from m2lite.serve.errors import ClientGone, Refused, dialect_of, error_response
from m2lite.serve.server import ServeOptions
from m2lite.system.streams import note

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_BODY_S = 30.0  # for which a client may send nothing of its body
_OPEN = ("/", "/health", "/v1/health")  # for which no key is asked


class Gate:
    """Lets only such requests through to `app`, with an id and with their whole body."""

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self._app, self._options = app, options
        self._hosts = {*_LOOPBACK, *map(str.lower, options.allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id

        is_begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_begun
            if message["type"] == "http.response.start":
                is_begun = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
            body = await self._body(headers, receive) if scope["method"] == "POST" else b""
        except Refused as error:
            await error_response(dialect_of(scope["path"]), error, request_id)(scope, receive, send_with_id)
            return
        is_read = scope["method"] != "POST"

        async def receive_whole() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            await self._app(scope, receive_whole, send_with_id)
        except ClientGone:
            return
        except Exception as error:
            if not isinstance(error, M2liteError):
                note(f"m2lite: internal error in {request_id}, {type(error).__name__}: {error}. Please report it.")
            if is_begun:
                raise
            await error_response(dialect_of(scope["path"]), error, request_id)(scope, receive, send_with_id)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if not self._hosts & {host, name}:
            raise Refused(403, "host_not_allowed", f"Host {host!r} is not allowed.", "Start with --allowed-host.")
        origin = headers.get("origin")
        if origin is not None and origin not in self._options.allowed_origins:
            raise Refused(403, "origin_not_allowed", f"Origin {origin!r} is not allowed.", "Use --allowed-origin.")
        if self._options.api_keys and scope["path"] not in _OPEN:
            self._check_key(headers)
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Refused(
                    415,
                    "unsupported_media_type",
                    f"The content type is {kind or 'missing'!r}.",
                    "Send application/json.",
                )

    def _check_key(self, headers: Headers) -> None:
        kind, _, shown = headers.get("authorization", "").partition(" ")
        keys = [headers.get("x-api-key", ""), shown.strip() if kind.lower() == "bearer" else ""]
        known = [hmac.compare_digest(key.encode(), good.encode()) for key in keys for good in self._options.api_keys]
        if not any(known):
            raise Refused(401, "invalid_api_key", "The API key is missing or wrong.", "Send it as a bearer token.")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        most, chunks, n_bytes = self._options.most_body_bytes, list[bytes](), 0
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise _too_large(most)
        while True:
            try:
                message = await asyncio.wait_for(receive(), _BODY_S)
            except TimeoutError:
                raise Refused(
                    408, "request_timeout", f"Nothing of the body came for {_BODY_S:g} s.", "Send it again."
                ) from None
            if message["type"] == "http.disconnect":
                raise Refused(400, "incomplete_body", "The body ended early.", "Send it again.")
            chunks.append(message.get("body", b""))
            n_bytes += len(chunks[-1])
            if n_bytes > most:
                raise _too_large(most)
            if not message.get("more_body", False):
                return b"".join(chunks)


def _too_large(most: int) -> Refused:
    return Refused(413, "request_too_large", f"The body has more than {most:,} bytes.", "Send less.")
