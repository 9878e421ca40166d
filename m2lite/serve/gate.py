"""What a request must be before anybody reads it: key, host, origin, type and size. Pure ASGI; knows no model."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import AsyncIterator

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from m2lite.errors import M2liteError
from m2lite.serve import log
from m2lite.serve.errors import ClientGone, Refused, code_of, dialect_of, error_response
from m2lite.serve.server import ServeOptions
from m2lite.serve.web_page import PAGE_PATHS
from m2lite.system.streams import note

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_SILENT_S = 30.0  # for which a client may send nothing of its body
_BODY_S = 300.0  # for all of it
_TIMES_READ = 8  # the limit, of a body that is too large
_CLOSE = {"connection": "close"}
_MOST_HELD = 256 << 20  # bytes of all bodies that are coming in
_OPEN = ("/health", "/v1/health", *PAGE_PATHS)  # for which no key is asked


class Gate:
    """Lets only such requests through to `app`, with an id and with their whole body."""

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self._app, self._options = app, options
        self._n_held = 0
        self._hosts = {*_LOOPBACK, *map(str.lower, options.allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        entry = log.RequestLog(f"req_{secrets.token_hex(12)}", scope["method"], scope["path"])
        scope.setdefault("state", {})["request_id"] = entry.id
        log.current.set(entry)
        origin = Headers(scope=scope).get("origin", "")

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
                sent = MutableHeaders(scope=message)
                sent["x-request-id"] = entry.id
                if entry.prefix:  # for whoever stands in front of several servers: docs/several-machines.md
                    sent["x-m2lite-prefix"] = entry.prefix
                if origin in self._options.allowed_origins:
                    sent.update(_allow(origin))
            await send(message)

        try:
            await self._answer(scope, receive, send_with_id)
        except ClientGone:
            entry.notes.append("the client went away")
        except Exception as error:
            if not isinstance(error, M2liteError):
                note(f"m2lite: internal error in {entry.id}, {type(error).__name__}: {error}. Please report it.")
            if entry.status:
                raise
            entry.notes.append(code_of(error))
            await error_response(dialect_of(scope["path"]), error, entry.id)(scope, receive, send_with_id)
        finally:
            entry.write()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self._check(scope, headers)
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await Response(status_code=204)(scope, receive, send)  # a browser asks whether it may ask
            return
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body: bytes | None = await self._body(headers, receive)
        if self._options.logs_prompts:
            note(f"{scope['path']} {(body or b'').decode(errors='replace')}")

        async def receive_whole() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            whole, body = body, None
            return {"type": "http.request", "body": whole, "more_body": False}

        await self._app(scope, receive_whole, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if not self._hosts & {host, name}:
            raise Refused(403, "host_not_allowed", f"Host {host!r} is not allowed.", "Start with --allowed-host.")
        origin = headers.get("origin")
        own = (f"http://{host}", f"https://{host}")  # a page of this server's
        if origin is not None and origin not in (*own, *self._options.allowed_origins):
            raise Refused(403, "origin_not_allowed", f"Origin {origin!r} is not allowed.", "Use --allowed-origin.")
        if self._options.api_keys and scope["path"] not in _OPEN and scope["method"] != "OPTIONS":
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
        chunks = list[bytes]()
        try:
            async with asyncio.timeout(_BODY_S):
                async for chunk in self._chunks(receive):
                    chunks.append(chunk)
                    self._n_held += len(chunk)
                    if self._n_held > _MOST_HELD:
                        raise Refused(503, "busy", "Too many bodies come in at once.", "Ask again soon.")
        except TimeoutError:
            raise Refused(
                408, "request_timeout", "The body comes too slowly.", "Send it again.", headers=_CLOSE
            ) from None
        finally:
            self._n_held -= sum(map(len, chunks))
        return b"".join(chunks)

    async def _chunks(self, receive: Receive) -> AsyncIterator[bytes]:
        """Those of a body that is too large are read, too, but not kept: who still sends reads no answer."""
        n_bytes, is_more, most = 0, True, self._options.most_body_bytes
        while is_more and n_bytes <= _TIMES_READ * most:
            message = await asyncio.wait_for(receive(), _SILENT_S)
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk: bytes = message.get("body", b"")
            n_bytes += len(chunk)
            is_more = message.get("more_body", False)
            if n_bytes <= most:
                yield chunk
        if n_bytes > most:
            raise Refused(
                413, "request_too_large", f"The body has more than {most:,} bytes.", "Send less.", headers=_CLOSE
            )


def _allow(origin: str) -> dict[str, str]:
    """What lets a page of this origin ask."""
    return {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": "authorization, content-type, x-api-key, anthropic-version, anthropic-beta, "
        "x-session-id, x-m2lite-prefix",
        "access-control-expose-headers": "x-request-id, x-m2lite-prefix, retry-after",
        "access-control-max-age": "600",
        "vary": "origin",
    }
