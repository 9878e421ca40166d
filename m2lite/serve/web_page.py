"""The chat in a browser: GET / and the files of page/, as they are installed. Knows no model.

What the page shows comes from strangers, a model among them. So it may load and ask nothing but this server, and run
nothing but its own files: no text becomes a script, whatever it says.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from m2lite.serve.server import Server

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked for each time: a new version is seen
}
_PLAIN = "m2lite: POST /v1/chat/completions, /v1/responses, /v1/completions, /v1/messages\n"


class _PageFile(NamedTuple):
    content: bytes
    headers: dict[str, str]


def _read() -> dict[str, _PageFile]:
    found = dict[str, _PageFile]()
    for each in files("m2lite.serve").joinpath("page").iterdir():
        kind = _TYPES.get(each.name.rpartition(".")[2])
        if kind is not None:
            content = each.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[each.name] = _PageFile(content, {**_HEADERS, "Content-Type": kind, "ETag": tag})
    return found


_FILES = _read()
PAGE_PATHS = ("/", *(f"/page/{name}" for name in _FILES))  # of files that hold no secret


def routes(_: Server) -> list[Route]:
    async def index(request: Request) -> Response:
        """The page for a browser, a line for other programs."""
        if "text/html" in request.headers.get("accept", ""):
            response = _answer(request, "index.html")
        else:
            response = PlainTextResponse(_PLAIN)
        response.headers["Vary"] = "Accept"
        return response

    async def file(request: Request) -> Response:
        return _answer(request, request.url.path.rpartition("/")[2])

    return [Route("/", index, methods=["GET"]), *(Route(path, file, methods=["GET"]) for path in PAGE_PATHS[1:])]


def _answer(request: Request, name: str) -> Response:
    """The file, or that it is what the browser has."""
    content, headers = _FILES[name]
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers={k: v for k, v in headers.items() if k != "Content-Type"})
    return Response(content, headers=headers)
