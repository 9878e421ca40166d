"""OpenAI's older completions: POST /v1/completions. Raw text or token ids go on, tags as they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from m2lite.dialogue.chat_request import FIELDS, MOST_LOGPROBS, ChatRequest, parse_request
from m2lite.errors import UsageError
from m2lite.sampling.rules import Logprob
from m2lite.serve.answering import Answering, AnswerRequest
from m2lite.serve.bodies import read_flag, read_object, wants_usage
from m2lite.serve.errors import error_body
from m2lite.serve.events import AnswerEnd, AnswerEvent, Beat, Reading
from m2lite.serve.normal import shortened
from m2lite.serve.replies import (
    PING,
    EventStream,
    Form,
    completion_head,
    first_of,
    own_fields,
    progress_of,
    read_form,
    sse,
)
from m2lite.serve.server import Server
from m2lite.text.stop_text import StopTexts
from m2lite.text.tokenizer import Tokenizer

MOST_PROMPTS = 1_000
_USUAL_TOKENS = 16  # of an answer, where nothing is said: OpenAI's
_OWN = (
    "prompt", "echo", "logprobs", "max_tokens", "stream", "stream_options", "return_token_ids", "return_progress",
    "parse_special",
)  # fmt: skip
_SILENT = ("user", "metadata", "store", "service_tier", "cache_prompt", "add_special_tokens", "skip_special_tokens")
_ONLY = {"best_of": 1, "suffix": "", "use_beam_search": False}  # fields of which one value can be done
_NOT_HERE = ("messages", "tools", "tool_choice", "parallel_tool_calls", "max_completion_tokens", "top_logprobs")


Prompt = str | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class _TextForm(Form):
    has_usage: bool
    has_ids: bool
    is_echo: bool
    n_logprobs: int | None
    max_tokens: int
    is_special: bool  # texts of control tokens in a prompt are these tokens


def routes(server: Server) -> list[Route]:
    async def answer(request: Request) -> Response:
        return await _answer(server, request)

    return [Route(path, answer, methods=["POST"]) for path in ("/v1/completions", "/completions")]


async def _answer(server: Server, request: Request) -> Response:
    data = await request.body()
    chat, form, prompts = await server.off_loop(lambda: _parse(server, data))
    asked = [_request(chat, form, ids) for ids in prompts]
    if not form.is_stream:
        work = asyncio.ensure_future(_all(server, form, asked))
        await first_of(work, request.receive)
        return JSONResponse(work.result())
    if len(asked) > 1:
        raise UsageError(f"{len(asked)} prompts cannot be streamed at once.", "Send each in a request of its own.")
    answering = await server.begin(asked[0])
    return EventStream(answering, lambda events: _chunks(server, answering, form, events, request.state.request_id))


def _request(chat: ChatRequest, form: _TextForm, ids: list[int]) -> AnswerRequest:
    n_logprobs = form.n_logprobs if form.is_echo else None
    return AnswerRequest(chat=chat, prompt=ids, prompt_logprobs=n_logprobs)


# What is asked


def _parse(server: Server, data: bytes) -> tuple[ChatRequest, _TextForm, list[list[int]]]:
    chat, form, prompts = read_completion(data, server.defaults())
    return chat, form, [_ids(server, prompt, form) for prompt in prompts]


def read_completion(data: bytes, defaults: ChatRequest) -> tuple[ChatRequest, _TextForm, list[Prompt]]:
    """What a body asks for, how the answer is given, and what is to go on."""
    body = read_object(data)
    has_usage, told = wants_usage(body), _check_fields(body)
    form = _TextForm(
        **read_form(body),
        has_usage=has_usage,
        has_ids=read_flag(body, "return_token_ids"),
        is_echo=read_flag(body, "echo"),
        n_logprobs=_whole(body, "logprobs", None, MOST_LOGPROBS),
        max_tokens=_whole(body, "max_tokens", defaults.max_tokens or _USUAL_TOKENS, 2**31) or 0,
        is_special=read_flag(body, "parse_special"),
        told=tuple(told),
    )
    known = {name: body[name] for name in body if name in FIELDS and name not in _OWN}
    nothing = {"messages": [{"role": "user", "content": ""}]}
    chat = replace(parse_request(nothing | known, defaults), messages=[], logprobs=form.n_logprobs)
    chat = replace(chat, max_tokens=max(1, form.max_tokens))  # of which none is told, if none was asked for
    return chat, form, _prompts(body.get("prompt"))


def _check_fields(body: Mapping[str, Any]) -> list[str]:
    told = list[str]()
    for name, value in body.items():
        if value is None or value in ({}, [], "") or name in _OWN or name in _SILENT:
            continue
        if name in _NOT_HERE or value != _ONLY.get(name, value):
            raise UsageError(f"The field {name!r} is not supported here.", "Leave it out.")
        if name not in FIELDS and name not in _ONLY:
            told.append(f"The field {name!r} is not known and was ignored.")
    return shortened(told)


def _whole(body: Mapping[str, Any], name: str, default: int | None, most: int) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise UsageError(f"{name} is {value!r}.", f"Use a whole number from 0 to {most:,}.")
    return value


def _prompts(prompt: Any) -> list[Prompt]:
    """One prompt or several, each a text or a list of ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, Sequence) or not prompt:
        raise UsageError("There is no prompt.", "Give a text, token ids, or a list of either.")
    if _are_ids(prompt):
        return [prompt]
    if len(prompt) > MOST_PROMPTS:
        raise UsageError(f"There are {len(prompt):,} prompts, limit {MOST_PROMPTS:,}.", "Send fewer.")
    wrong = next((each for each in prompt if not isinstance(each, str) and not _are_ids(each)), "")
    if wrong != "":
        raise UsageError(f"A prompt is a {type(wrong).__name__}.", "Give a text, or a list of token ids.")
    return list(prompt)


def _are_ids(prompt: Any) -> bool:
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    return is_list and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)


def _ids(server: Server, prompt: Prompt, form: _TextForm) -> list[int]:
    if not isinstance(prompt, str):
        ids = list(prompt)
    elif form.is_special:
        ids = server.model.tokenizer.encode(prompt, control=True)
    else:
        ids = server.model.encode_prompt(prompt)
    if not ids:
        raise UsageError("The prompt is empty.", "Give at least one token.")
    return ids


# What is answered


class _RawText:
    """The text of an answer's ids, tags included, up to a stop text; and where in it each token begins."""

    def __init__(self, tokenizer: Tokenizer, answering: Answering, form: _TextForm) -> None:
        self._tokenizer, self._form, self._answering = tokenizer, form, answering
        self._stops = StopTexts(answering.asked.chat.stop_texts)
        self._decoder = tokenizer.stream(start=form.is_echo)
        self._at = 0  # in the text
        self.logprobs: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        self.ids, self._n_told = list[int](), 0

    @property
    def is_stopped(self) -> bool:
        return self._stops.is_found

    def prompt(self) -> str:
        """The prompt's own text, which no stop text ends."""
        ids = self._answering.prompt
        noted = [None, *self._answering.handle.completion.prompt_logprobs]
        noted += [None] * (len(ids) - len(noted))
        return "".join(self._decode(i, each) for i, each in zip(ids, noted, strict=True))

    def push(self, ids: Iterable[int], noted: Sequence[Logprob | None]) -> str:
        """The text that these ids complete."""
        if not self._form.max_tokens:
            return ""
        text = ""
        for n, index in enumerate(ids):
            if self.is_stopped:
                break
            self.ids.append(index)
            text += self._stops.push(self._decode(index, noted[n] if n < len(noted) else None))
        return text

    def finish(self) -> str:
        """What is left when nothing follows. The token that ended it has a logprob, and no text."""
        done = self._answering.handle.completion
        if self.is_stopped or not self._form.max_tokens:
            return ""
        text = self._stops.push(self._decoder.flush()) + self._stops.flush()
        if done.stop_id is not None:
            self._note(done.stop_id, done.stop_logprob)
        return text

    def _decode(self, index: int, noted: Logprob | None) -> str:
        text = self._decoder.push(index)
        self._note(index, noted)
        self._at += len(text)
        return text

    def _note(self, index: int, noted: Logprob | None) -> None:
        if self._form.n_logprobs is None:
            return
        found, likeliest = self.logprobs, None
        if noted is not None:
            likeliest = dict(noted.likeliest) | {noted.token: noted.logprob}
        found["tokens"].append(self._name(index))
        found["token_logprobs"].append(None if noted is None else noted.logprob)
        found["top_logprobs"].append(likeliest and {self._name(i): logprob for i, logprob in likeliest.items()})
        found["text_offset"].append(self._at)

    def _name(self, index: int) -> str:
        """The token's text; its bytes where these are no text alone, so that no two tokens have one name."""
        data = self._tokenizer.token_bytes(index)
        try:
            return data.decode() or self._tokenizer.token_text(index)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def take_ids(self) -> list[int]:
        """Those since they were taken last."""
        start, self._n_told = self._n_told, len(self.ids)
        return self.ids[start:]

    def take_logprobs(self) -> dict[str, list[Any]] | None:
        """Likewise; None where none were asked for."""
        if self._form.n_logprobs is None:
            return None
        found, self.logprobs = self.logprobs, {name: [] for name in self.logprobs}
        return found


def _drawn(event: AnswerEvent) -> tuple[Iterable[int], Sequence[Logprob | None]]:
    return ((), ()) if isinstance(event, Reading | Beat) else event.drawn[:2]


def _usage(form: _TextForm, ends: Sequence[AnswerEnd]) -> dict[str, Any]:
    stats = [end.completion.stats for end in ends]
    n_prompt, n_out = sum(each.n_prompt for each in stats), sum(len(end.completion.tokens) for end in ends)
    n_out = n_out if form.max_tokens else 0
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_out,
        "total_tokens": n_prompt + n_out,
        "prompt_tokens_details": {"cached_tokens": sum(each.n_reused for each in stats)},
    }


def _reason(writer: _RawText, end: AnswerEnd) -> str:
    return "length" if end.reason == "length" and not writer.is_stopped else "stop"


async def _all(server: Server, form: _TextForm, asked: Sequence[AnswerRequest]) -> dict[str, Any]:
    """The answers to all prompts, of which no more are under way than are answered at once."""
    room = asyncio.Semaphore(server.options.parallel)

    async def one(number: int) -> tuple[dict[str, Any], Answering, AnswerEnd]:
        async with room:
            answering = await server.begin(asked[number])
            try:
                choice, end = await _choice(server, answering, form)
            finally:
                answering.cancel()
        return {"index": number, **choice}, answering, end

    tasks = [asyncio.ensure_future(one(number)) for number in range(len(asked))]
    try:
        found = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
    _, first, end = found[0]
    body = {"choices": [choice for choice, _, _ in found], "usage": _usage(form, [end for _, _, end in found])}
    return completion_head(server, first, "cmpl", "text_completion") | body | own_fields(first, form, end)


async def _choice(server: Server, answering: Answering, form: _TextForm) -> tuple[dict[str, Any], AnswerEnd]:
    writer = _RawText(server.model.tokenizer, answering, form)
    found = await answering.whole()
    assert found.end is not None
    text = (writer.prompt() if form.is_echo else "") + writer.push(found.ids, found.logprobs) + writer.finish()
    choice: dict[str, Any] = {
        "text": text,
        "logprobs": writer.take_logprobs(),
        "finish_reason": _reason(writer, found.end),
    }
    if form.has_ids:
        choice |= {"token_ids": writer.take_ids(), "prompt_token_ids": list(answering.prompt)}
    return choice, found.end


async def _chunks(
    server: Server, answering: Answering, form: _TextForm, events: AsyncIterator[AnswerEvent], request_id: str
) -> AsyncIterator[bytes]:
    head = completion_head(server, answering, "cmpl", "text_completion")
    writer = _RawText(server.model.tokenizer, answering, form)
    is_begun = not form.is_echo

    def chunk(text: str, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": writer.take_logprobs(), "finish_reason": reason}
        return {**head, "choices": [choice | ({"token_ids": writer.take_ids()} if form.has_ids else {})]}

    try:
        async for event in events:
            if isinstance(event, Reading | Beat):
                progress = progress_of(answering, form, event)
                yield sse({**head, "choices": [], **progress}) if progress else PING
                continue
            if not is_begun:  # only now are the logprobs of the prompt there
                yield sse(chunk(writer.prompt()))
                is_begun = True
            text = writer.push(*_drawn(event))
            if isinstance(event, AnswerEnd):
                last = chunk(text + writer.finish(), _reason(writer, event))
                yield sse(last | own_fields(answering, form, event))
                if form.has_usage:
                    yield sse({**head, "choices": [], "usage": _usage(form, [event])})
            elif text:
                yield sse(chunk(text))
    except Exception as error:
        yield sse(error_body("openai", error, request_id))
    yield sse("[DONE]")
