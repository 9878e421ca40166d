"""The public Python: an opened model that continues prompts and answers messages. Knows no terminal and no file."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from numbers import Integral
from typing import Any, Literal, TypedDict, Unpack, overload

from m2lite.dialogue.chat_request import MOST_LOGPROBS, ChatRequest, check_whole, parse_messages, parse_tool_choice
from m2lite.dialogue.conversation import turn_stream
from m2lite.engine.answer import Completion, Token
from m2lite.engine.handle import Handle
from m2lite.engine.model import Engine
from m2lite.engine.request import Request
from m2lite.engine.sequence import Finished
from m2lite.errors import UsageError
from m2lite.sampling.draw import Sampling
from m2lite.sampling.json_schema import Schema, check_schema
from m2lite.text.messages import check_tools
from m2lite.text.reply import Piece, Said
from m2lite.text.stop_text import check_stop_texts
from m2lite.text.template import encode_chat

Prompt = str | Sequence[int]  # text, or token ids


class AnswerKeywords(TypedDict, total=False):
    """How `generate` and `chat` answer. The fields of `Sampling` stand first, and go before those of `sampling`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    presence_penalty: float
    frequency_penalty: float

    sampling: Sampling
    max_tokens: int | None  # of the answer, its thinking included
    think_budget: int | None  # after so many tokens of thinking it is closed; 0: there is none
    stop: str | Sequence[str]  # the content ends before the first of these texts
    schema: Schema | None  # the content is JSON of it
    logprobs: int | None  # note each token's, and those of so many of the likeliest (20 at most)
    tool_choice: str | Mapping[str, Any]  # "auto", "none", "required", or one as OpenAI writes it
    parallel_tool_calls: bool  # several calls at once
    draft: str | None  # where drafts come from, and how many at most: as the model was opened
    draft_tokens: int | None


class ChatMessage(Said):
    """An assistant's message: content, and where there are any reasoning_content and tool_calls, whose arguments are
    objects. Append it to the messages to go on."""

    completion: Completion  # with finish_reason, tokens, logprobs, stats, and warnings in reply.errors


class ReplyPieces(Iterator[Piece]):
    """The pieces of an answer as they come. `message` is the whole of it, or what was taken by the time of `close`."""

    def __init__(self, handle: Handle) -> None:
        self._handle, self._tokens, self._is_whole = handle, list[int](), False
        self._pieces = self._run()

    def _run(self) -> Generator[Piece, None, None]:
        with closing(self._handle.events()) as events:
            for event in events:
                if isinstance(event, Token):
                    self._tokens.append(event.id)
                if isinstance(event, Token | Finished):
                    self._is_whole = isinstance(event, Finished)
                    yield from event.pieces
        check_whole(self._handle.request.schema, self._handle.completion)

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Nothing more is computed for it."""
        self._pieces.close()
        self._handle.cancel()

    @property
    def message(self) -> ChatMessage:
        answer, completion, is_cut = self._handle.answer, self._handle.completion, False
        if self._is_whole:
            is_cut = answer.is_cut
        else:
            reply, noted = answer.reply_of(self._tokens), answer.logprobs[: len(self._tokens)]
            completion = Completion(list(self._tokens), reply, stats=completion.stats, logprobs=noted)
        message = ChatMessage(completion.reply.message())
        message.tokens, message.completion = None if is_cut else completion.tokens, completion
        return message


class Model(Engine):
    """A MiniMax-M2 model, opened by `Model.open`. Close it, or use it in a `with` block.

    Any number of threads may use it at once; calls wait until their answer is there (asyncio: `asyncio.to_thread`).
    What is asked at the same time is computed together, and what was computed once is not computed again.
    """

    @overload
    def generate(self, prompt: Prompt, *, rng_stream: int = 0, **options: Unpack[AnswerKeywords]) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]] | list[Prompt],
        *,
        rng_stream: int | Sequence[int] = 0,
        **options: Unpack[AnswerKeywords],
    ) -> list[Completion]: ...
    def generate(
        self,
        prompt: Prompt | list[str] | list[list[int]] | list[Prompt],
        *,
        rng_stream: int | Sequence[int] = 0,
        **options: Unpack[AnswerKeywords],
    ) -> Completion | list[Completion]:
        """What follows `prompt`: raw text, or token ids [T]. A list of prompts is answered together, in its order.

        A completion has `text`, `tokens` [N] without the one that ended it, `finish_reason` ("stop" or "length"),
        `stats` (tokens, and seconds) and, where `logprobs` is given, `logprobs` [N] in nats.
        Without `seed` one is drawn. Answers with the same seed and `rng_stream` are the same in any company, so equal
        prompts of a list have equal answers; `rng_stream=range(n)` makes n prompts differ.

        Raises UsageError for what cannot be meant, ContextError for a prompt that is too long, before anything is
        computed; M2liteError for JSON that is not whole when the answer has to end.
        """
        is_one = isinstance(prompt, str) or len(prompt) == 0 or not hasattr(prompt[0], "__len__")
        prompts: Any = [prompt] if is_one else prompt
        streams = [rng_stream] * len(prompts) if isinstance(rng_stream, int) else list(rng_stream)
        if len(streams) != len(prompts):
            raise UsageError(f"There are {len(streams):,} rng_streams for {len(prompts):,} prompts.", "Give each one.")
        asked, drafts = _asked(options)
        rows = [self._ids(each) for each in prompts]
        found = self._answer_all(
            [asked.to_engine(row, stream, **drafts) for row, stream in zip(rows, streams, strict=True)]
        )
        return found[0] if is_one else found

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[False] = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        rng_stream: int | None = None,
        **options: Unpack[AnswerKeywords],
    ) -> ChatMessage: ...
    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[True],
        tools: Sequence[Mapping[str, Any]] | None = None,
        rng_stream: int | None = None,
        **options: Unpack[AnswerKeywords],
    ) -> ReplyPieces: ...
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        rng_stream: int | None = None,
        **options: Unpack[AnswerKeywords],
    ) -> ChatMessage | ReplyPieces:
        """The answer to OpenAI `messages`, which may call `tools` (OpenAI schemas); with `stream`, as it comes.

        A message is a dict that can be appended to `messages`; its `completion` says how it ended and what it cost.
        By default `rng_stream` follows from the number of questions, as in `m2lite chat`. Only what differs from what
        was computed before is computed.

        Raises as `generate` does; with `stream`, what is found while computing is raised by the iteration.
        """
        asked, drafts = _asked(options, parse_messages("messages", messages), check_tools(tools))
        asked.check_calls()
        row = encode_chat(self.tokenizer, self.template, asked.messages, asked.tools)
        number = turn_stream(asked.messages) if rng_stream is None else rng_stream
        pieces = ReplyPieces(self.submit(asked.to_engine(row, number, **drafts)))
        if stream:
            return pieces
        for _ in pieces:
            pass
        return pieces.message

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.encode_prompt(prompt)
        wrong = next((each for each in prompt if not isinstance(each, Integral)), None)
        if wrong is not None:
            raise UsageError(f"A prompt holds {wrong!r}, which is no token id.", "Give text, or whole numbers.")
        return [int(each) for each in prompt]

    def _answer_all(self, requests: Sequence[Request]) -> list[Completion]:
        handles = list[Handle]()
        try:
            for request in requests:
                handles.append(self.submit(request))
            found = [handle.result() for handle in handles]
        finally:
            for handle in handles:
                handle.cancel()
        for request, completion in zip(requests, found, strict=True):
            check_whole(request.schema, completion)
        return found


def _asked(
    options: AnswerKeywords, messages: Sequence[dict[str, Any]] = (), tools: list[dict[str, Any]] | None = None
) -> tuple[ChatRequest, dict[str, Any]]:
    """The request that keywords are, and those about drafts. TypeError for one that does not exist."""
    given = dict[str, Any](options)
    schema, logprobs = given.pop("schema", None), given.pop("logprobs", None)
    if schema is not None:
        check_schema(schema)
    if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
        raise UsageError(f"logprobs is {logprobs}.", f"Use 0 to {MOST_LOGPROBS}.")
    drafts = dict[str, Any](draft=given.pop("draft", None), draft_tokens=given.pop("draft_tokens", None))
    most, budget = given.pop("max_tokens", None), given.pop("think_budget", None)
    choice, is_parallel = given.pop("tool_choice", "auto"), given.pop("parallel_tool_calls", True)
    choice = parse_tool_choice("tool_choice", choice)
    stop, sampling = check_stop_texts(given.pop("stop", ())), given.pop("sampling", None) or Sampling()
    sampling = replace(sampling, **given)
    asked = ChatRequest(
        list(messages), sampling, tools, most, budget, stop, schema, logprobs, tool_choice=choice,
        parallel_tool_calls=is_parallel,
    )  # fmt: skip
    return asked, drafts
