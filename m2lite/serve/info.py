"""What clients ask about the server: its model, its health, its tokenizer and template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from m2lite import __version__
from m2lite.dialogue.chat_request import ChatRequest, parse_messages
from m2lite.errors import UsageError
from m2lite.sampling.draw import Sampling
from m2lite.serve.bodies import read_flag, read_object
from m2lite.serve.normal import merge_system, usable_tools
from m2lite.serve.replies import expert_shape
from m2lite.serve.server import Server
from m2lite.text.messages import check_tools


def routes(server: Server) -> list[Route]:
    async def models(_: Request) -> Response:
        # `models` is for Codex. An entry there has the instructions that it gives the model in place of its own.
        return JSONResponse({"object": "list", "data": [_model(server)], "models": []})

    async def model(request: Request) -> Response:
        server.check_model(request.path_params["name"], is_strict=True)
        return JSONResponse(_model(server))

    async def health(_: Request) -> Response:
        status = "draining" if server.is_draining else "loading" if server.n_warming else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def props(_: Request) -> Response:
        return JSONResponse(_props(server))

    async def tokenize(request: Request) -> Response:
        data = await request.body()
        return JSONResponse(await server.off_loop(lambda: _tokenize(server, read_object(data))))

    async def detokenize(request: Request) -> Response:
        data = await request.body()
        return JSONResponse(await server.off_loop(lambda: _detokenize(server, read_object(data))))

    async def tokenizer_info(_: Request) -> Response:
        return JSONResponse(_tokenizer_info(server))

    async def apply_template(request: Request) -> Response:
        data = await request.body()
        return JSONResponse(await server.off_loop(lambda: _apply_template(server, read_object(data))))

    return [
        *(Route(path, models, methods=["GET"]) for path in ("/v1/models", "/models")),
        Route("/v1/models/{name:path}", model, methods=["GET"]),
        *(Route(path, health, methods=["GET"]) for path in ("/health", "/v1/health")),
        Route("/props", props, methods=["GET"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info, methods=["GET"]),
        Route("/apply-template", apply_template, methods=["POST"]),
    ]


def _model(server: Server) -> dict[str, Any]:
    model = server.model
    meta = {"n_vocab": model.tokenizer.n_vocab, "n_ctx": model.ctx, "n_ctx_train": model.config.n_ctx_train}
    return {
        "id": server.name,
        "object": "model",
        "created": server.created,
        "owned_by": "m2lite",
        "max_model_len": model.ctx,
        "context_length": model.ctx,
        "meta": meta | {"size": model.gguf.size_bytes},
    }


def _props(server: Server) -> dict[str, Any]:
    """As llama-server has them, where clients look for the context and for tools."""
    model, sampling = server.model, server.options.sampling
    params = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "n_predict": -1 if server.options.max_tokens is None else server.options.max_tokens,
    }
    caps = ("supports_tools", "supports_tool_calls", "supports_parallel_tool_calls", "supports_system_role")
    return {
        "default_generation_settings": {"n_ctx": model.ctx, "params": params},
        "total_slots": server.options.parallel,
        "model_alias": server.name,
        "model_path": model.path.name,
        "modalities": {"vision": False, "audio": False},
        "chat_template": model.template.source,
        "chat_template_caps": dict.fromkeys(caps, True),
        "build_info": f"m2lite {__version__}",
        **expert_shape(server),
    }


def _tokenize(server: Server, body: Mapping[str, Any]) -> dict[str, Any]:
    """Of `content`, as llama-server is asked; of `prompt` or `messages`, as vLLM is."""
    tokenizer = server.model.tokenizer
    if "messages" in body:
        ids = server.encode(_chat(body))
    else:
        is_content = "content" in body
        text = body.get("content" if is_content else "prompt")
        if not isinstance(text, str):
            raise UsageError("There is no text.", "Give content, prompt or messages.")
        ids = tokenizer.encode(text, control=read_flag(body, "parse_special"))
        name = "add_special" if is_content else "add_special_tokens"
        if read_flag(body, name, default=not is_content) and tokenizer.add_bos and tokenizer.bos_id is not None:
            ids = [tokenizer.bos_id, *ids]
    found: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": server.model.ctx}
    texts = [tokenizer.token_bytes(i).decode(errors="replace") or tokenizer.token_text(i) for i in ids]
    if read_flag(body, "with_pieces"):
        found["tokens"] = [{"id": i, "piece": text} for i, text in zip(ids, texts, strict=True)]
    if read_flag(body, "return_token_strs"):
        found["token_strs"] = texts
    return found


def _detokenize(server: Server, body: Mapping[str, Any]) -> dict[str, Any]:
    ids = body.get("tokens")
    if not isinstance(ids, Sequence) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UsageError("tokens is no list of token ids.", 'Give {"tokens": [1, 2]}.')
    text = server.model.tokenizer.decode(ids)
    return {"content": text, "prompt": text}


def _tokenizer_info(server: Server) -> dict[str, Any]:
    tokenizer, template = server.model.tokenizer, server.model.template
    return {
        "tokenizer_class": "m2lite",
        "bos_token": tokenizer.token_text(tokenizer.bos_id),
        "eos_token": tokenizer.token_text(tokenizer.eos_id),
        "pad_token": tokenizer.token_text(tokenizer.eos_id),
        "add_bos_token": tokenizer.add_bos,
        "chat_template": template.source,
        "model_max_length": server.model.ctx,
        "vocab_size": tokenizer.n_vocab,
    }


def _apply_template(server: Server, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": server.model.tokenizer.decode(server.encode(_chat(body)))}


def _chat(body: Mapping[str, Any]) -> ChatRequest:
    messages = parse_messages("messages", merge_system(body.get("messages")))
    return ChatRequest(messages, Sampling(seed=0), check_tools(usable_tools(body.get("tools"))[0]))
