"""What clients ask about the server: its model, its health."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from m2lite.serve.server import Server


def routes(server: Server) -> list[Route]:
    async def index(_: Request) -> Response:
        return PlainTextResponse("m2lite: POST /v1/chat/completions\n")

    async def models(_: Request) -> Response:
        return JSONResponse(_models(server))

    async def health(_: Request) -> Response:
        status = "draining" if server.is_draining else "ok"
        return JSONResponse({"status": status}, 503 if server.is_draining else 200)

    return [
        Route("/", index, methods=["GET"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/models", models, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
    ]


def _models(server: Server) -> dict[str, Any]:
    model = server.model
    meta = {"n_vocab": model.tokenizer.n_vocab, "n_ctx": model.ctx, "n_ctx_train": model.config.n_ctx_train}
    found = {"id": server.name, "object": "model", "created": server.created, "owned_by": "m2lite", "meta": meta}
    return {"object": "list", "data": [found], "models": [{"slug": server.name, "name": server.name}]}
