"""Messages to tokens and back: render, reuse the common prefix, parse the reply. Knows no terminal and no file."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, Unpack

from m2lite.decode.constrain import Schema
from m2lite.decode.drafts import n_common
from m2lite.decode.engine import Stop
from m2lite.decode.rows import answer_ids, close_thinking, encode_kept
from m2lite.decode.rules import Logprob, Logprobs, Rule
from m2lite.decode.sampling import Sampling
from m2lite.decode.session import Progress, Session
from m2lite.decode.snapshots import Snapshots
from m2lite.decode.stats import Stats
from m2lite.errors import ContextError, UsageError
from m2lite.text.reply import Piece, Reply, ReplyStream, Said, opens_thinking
from m2lite.text.template import encode_chat

Message = dict[str, Any]
Pieces = Generator[Piece, None, None]

SUMMARY_REQUEST = (
    "Summarise our conversation so far, so that it can go on from your summary alone: what was asked and found out, "
    "decisions, names, numbers, code that matters, and what is still open."
)


class Options(TypedDict, total=False):
    """How to answer."""

    sampling: Sampling
    max_tokens: int | None  # of the answer, its thinking included
    think_tokens: int | None  # after so many tokens of thinking it is closed; 0: there is none
    stop: Stop | None
    progress: Progress | None
    stop_texts: Sequence[str]  # the content ends before the first of them
    schema: Schema | None  # the content is JSON of it
    logprobs: int | None  # note each token's, and those of so many of the likeliest


@dataclass
class Answer:
    """One answer: its parts, and its ids without the one that ended it."""

    tokens: list[int] = field(default_factory=list)
    reply: Reply = field(default_factory=lambda: Reply("", ""))
    finish_reason: str = "interrupted"
    stats: Stats = field(default_factory=Stats)
    attempt: int = 0  # earlier answers to the same question
    n_given: int = 0  # of its ids, those that it already had when it was continued
    is_aside: bool = False  # no part of the messages
    logprobs: list[Logprob | None] = field(default_factory=list)  # by token, where they were asked for


_COMPLETE = Answer(finish_reason="stop")


@dataclass(frozen=True)
class _Run:
    """An answer under way."""

    answer: Answer
    reply: ReplyStream
    in_thinking: bool  # where the answer begins
    stream: int
    messages: list[Message]  # what it answers
    options: Options


class Conversation:
    """A list of messages and the session whose row follows it.

    Only what changed since the last turn is evaluated: the row is rewound to the longest common prefix, which ends
    where the last answer began if the template drops the thinking of earlier turns.
    """

    def __init__(
        self, session: Session, system: str | None = None, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """`tools`: OpenAI schemas of what the model may call."""
        self.session, self.tools = session, tools
        self.keep_thinking = False  # of earlier turns, whatever the template does: their ids stay as they were
        self.snapshots: Snapshots | None = None  # where rows are kept that were computed once
        self.messages: list[Message] = []
        self.answer = Answer()  # the last that was asked for
        self.asked: list[Message] = []  # what that answers
        self.said = _COMPLETE  # the one at the end of `messages`, which is another if nothing came
        self.set_system(system)

    @property
    def n_turns(self) -> int:
        return len(self.turns())

    @property
    def system(self) -> str | None:
        """The system message; None: the template's own."""
        return next((str(m["content"]) for m in self.messages if m["role"] == "system"), None)

    def set_system(self, text: str | None) -> None:
        """Replace the system message; None leaves it to the template."""
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = ([] if text is None else [{"role": "system", "content": text}]) + rest

    def clear(self) -> None:
        """Forget every turn; the system message stays."""
        self.messages, self.said = [message for message in self.messages if message["role"] == "system"], _COMPLETE

    def restore(self, messages: Sequence[Message], said: Answer) -> None:
        """Go on from there."""
        self.messages, self.said = list(messages), said

    def keep(self, stop: Stop | None = None) -> None:
        """What was computed goes to the snapshots."""
        if self.snapshots is not None:
            self.snapshots.save(self.session, stop)

    def turns(self) -> list[int]:
        """Where in `messages` each turn begins."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]

    def undo(self) -> str:
        """Forget the last turn; returns its question."""
        at = self._last_question()
        question = str(self.messages[at]["content"])
        self.messages, self.said = self.messages[:at], _COMPLETE
        return question

    def forget(self, n_turns: int) -> int:
        """Forget the oldest turns; returns how many those were."""
        starts = self.turns()
        n = min(n_turns, len(starts))
        if n:
            self.messages = self.messages[: starts[0]] + (self.messages[starts[n] :] if n < len(starts) else [])
        return n

    def ask(self, text: str, **options: Unpack[Options]) -> Pieces:
        """Append the question and yield the pieces of the answer as they come; `answer` and `messages` then hold it.

        A question that does not fit raises ContextError before anything is computed and is forgotten, and so is one
        that was stopped before its answer began.
        """
        return self._answer([*self.messages, {"role": "user", "content": text}], Answer(), options)

    def regenerate(self, **options: Unpack[Options]) -> Pieces:
        """Answer the last question anew, with other random numbers; the former answer stays if nothing comes."""
        messages = self.messages[: self._last_question() + 1]
        is_first = len(messages) == len(self.messages)
        return self._answer(messages, Answer(attempt=0 if is_first else self.said.attempt + 1), options)

    def resume(self, **options: Unpack[Options]) -> Pieces:
        """Go on with an answer that was stopped, as if it had not been; answer what has no answer yet.

        UsageError if the answer is complete.
        """
        self._last_question()
        if self.messages[-1]["role"] != "assistant":
            return self._answer(self.messages, Answer(), options)
        if self.said.finish_reason == "stop":
            raise UsageError("The last answer is complete.", "/regen makes another one.")
        model = self.session.model
        tokens = self.said.tokens or answer_ids(model.tokenizer, model.template, self.messages[-1])
        return self._answer(self.messages[:-1], replace(self.said, tokens=tokens), options)

    def tell_results(self, results: Sequence[str], **options: Unpack[Options]) -> Pieces:
        """What the calls of the last answer gave back, in their order; the model goes on with it."""
        attempt = self.said.attempt
        self.add_results(results)
        return self._answer(self.messages, Answer(attempt=attempt), options)

    def add_results(self, results: Sequence[str]) -> None:
        """As `tell_results`, but the model does not go on; `resume` lets it."""
        assert len(results) == len(self.messages[-1]["tool_calls"])
        self.messages = [*self.messages, *({"role": "tool", "content": result} for result in results)]
        self.said = _COMPLETE

    def reply_to(self, messages: Sequence[Message], stream: int | None = None, **options: Unpack[Options]) -> Pieces:
        """Answer these messages, which end with a question or with results, in place of those so far.

        `stream` separates the random numbers of answers that share a seed; by default as in a chat.
        """
        return self._answer(list(messages), Answer(), options, stream)

    def complete(self, text: str, **options: Unpack[Options]) -> Pieces:
        """Continue raw text, without a template; `messages` stay as they are."""
        session = self.session
        row = session.model.encode_prompt(text)
        session.set_tokens(row)
        return self._collect(row, Answer(is_aside=True), 0, [], options)

    def summarise(self, n_kept: int = 1, **options: Unpack[Options]) -> Pieces:
        """Put a summary, which the model writes, in place of all but the last `n_kept` turns.

        Nothing changes unless it ends well. UsageError if there are no earlier turns.
        """
        starts = self.turns()
        if len(starts) <= n_kept:
            raise UsageError(f"There are {len(starts)} turns, and {n_kept} of them stay.", "Nothing to summarise.")
        cut = starts[-n_kept] if n_kept else len(self.messages)
        question = {"role": "user", "content": SUMMARY_REQUEST}
        older, later = self.messages[:cut], self.messages[cut:]
        pieces = self._answer([*older, question], Answer(is_aside=True), options)

        def follow() -> Pieces:
            yield from pieces
            answer = self.answer
            if answer.finish_reason == "stop" and answer.reply.content.strip():
                system = [message for message in older if message["role"] == "system"]
                said = Said.of({"role": "assistant", "content": answer.reply.content}, None)
                self.messages = [*system, question, said, *later]
                answer.is_aside = False
                self.said = self.said if later else answer

        return follow()

    def encode(self, messages: Sequence[Message], is_to_answer: bool = True) -> list[int]:
        """The row that the messages are."""
        model = self.session.model
        if self.keep_thinking:
            return encode_kept(model.tokenizer, model.template, messages, self.tools, is_to_answer)
        return encode_chat(model.tokenizer, model.template, messages, self.tools, add_generation_prompt=is_to_answer)

    def _last_question(self) -> int:
        starts = self.turns()
        if not starts:
            raise UsageError("Nothing was asked yet.")
        return starts[-1]

    def _answer(self, messages: list[Message], answer: Answer, options: Options, stream: int | None = None) -> Pieces:
        """The answer to the messages, or the rest of it behind the ids that it has."""
        session = self.session
        row = self.encode(messages)
        try:
            session.set_tokens([*row, *answer.tokens])
        except ContextError as error:
            raise self._too_long(error, row, messages) from None
        if self.snapshots is not None:
            self.snapshots.restore(session, options.get("stop"))
        self.asked = messages
        if stream is None:
            turn = sum(message["role"] == "user" for message in messages) - 1
            stream = max(0, turn) << 32 | answer.attempt
        return self._collect(row, answer, stream, messages, options)

    def _collect(
        self, row: Sequence[int], answer: Answer, stream: int, messages: list[Message], options: Options
    ) -> Pieces:
        """What `_pieces` yields, with `answer` made known at once."""
        self.answer = replace(answer, tokens=list(answer.tokens), n_given=len(answer.tokens), stats=Stats())
        self.answer.finish_reason, self.session.finish_reason = "interrupted", None
        tokenizer = self.session.model.tokenizer
        in_thinking = opens_thinking(tokenizer, row)
        reply = ReplyStream(tokenizer, in_thinking, options.get("stop_texts", ()), self.tools)
        return self._pieces(_Run(self.answer, reply, in_thinking, stream, messages, options))

    def _pieces(self, run: _Run) -> Pieces:
        """Pieces of the answer; whatever came, however it ends, goes to `answer` and behind the messages."""
        answer, reply = run.answer, run.reply
        for token in answer.tokens:
            reply.push(token)
        ids = self._ids(run)
        try:
            with closing(ids):
                for token in ids:
                    answer.tokens.append(token)
                    yield from reply.push(token)
                    if reply.is_stopped:
                        break
            yield from reply.finish()
        finally:
            answer.finish_reason = "stop" if reply.is_stopped else self.session.finish_reason or "interrupted"
            reply.finish()
            answer.reply = reply.reply()
            if not answer.is_aside and (answer.tokens or answer.finish_reason != "interrupted"):
                said = Said.of(answer.reply.message(), None if reply.is_stopped else answer.tokens)
                self.messages, self.said = [*run.messages, said], answer

    def _ids(self, run: _Run) -> Generator[int, None, None]:
        """The ids that follow the row; where the thinking is as long as it may be, those that close it.

        The reply has got each id when the next is asked for.
        """
        reply, forced = run.reply, list[int]()
        n_left, n_think = run.options.get("max_tokens"), run.options.get("think_tokens")
        while True:
            if n_think is not None and n_think <= 0 and reply.kind == "thinking":
                forced, n_think = close_thinking(self.session.model.tokenizer), None
                yield from forced
            ids = self._draw(forced, n_left, run)
            with closing(ids):
                for token in ids:
                    yield token
                    n_left = None if n_left is None else n_left - 1
                    if n_think is not None and reply.kind == "thinking":
                        n_think -= 1
                        if n_think <= 0 and n_left != 0:
                            break
                else:
                    return

    def _draw(self, new: Sequence[int], max_tokens: int | None, run: _Run) -> Generator[int, None, None]:
        """Ids behind the row and `new`; `answer.stats` then includes them, and `answer.logprobs` theirs."""
        answer, options, before = run.answer, run.options, run.answer.stats
        rules, noted = self._rules(run)
        n_settled = len(answer.tokens)
        known = [*answer.logprobs, *[None] * (n_settled - len(answer.logprobs))]
        ids: Iterator[int] = self.session.generate(
            new, max_tokens=max_tokens, sampling=options.get("sampling"), stream=run.stream, stop=options.get("stop"),
            progress=options.get("progress"), rules=rules, settled=answer.tokens,
        )  # fmt: skip
        try:
            for n, token in enumerate(ids, n_settled):
                if noted is not None:
                    answer.logprobs = [*known, *noted.found[n_settled : n + 1]]
                yield token
        finally:
            answer.stats = before.followed_by(self.session.stats) if before.n_generated else self.session.stats

    def _rules(self, run: _Run) -> tuple[list[Rule], Logprobs | None]:
        """What the draws keep to, for ids that begin where the answer does."""
        n_likeliest, schema = run.options.get("logprobs"), run.options.get("schema")
        noted = None if n_likeliest is None else Logprobs(n_likeliest)
        rules: list[Rule] = [] if noted is None else [noted]
        if schema is not None:
            most = run.options.get("max_tokens")
            rules.append(self.session.model.masks.constraint(schema, run.in_thinking, most))
        return rules, noted

    def _too_long(self, error: ContextError, row: Sequence[int], messages: Sequence[Message]) -> ContextError:
        """Counted behind the turns that are kept, which is what the user can act on."""
        starts = self.turns()
        if not starts:
            return error
        n_kept = n_common(self.session.tokens, row)
        needed, free = len(row) - n_kept, max(0, error.limit - n_kept)
        todo = "Shorten it, /clear the turns so far, or start again with a larger --ctx."
        for n, start in enumerate(starts[1:], 1):
            shorter = [*messages[: starts[0]], *messages[start:]]
            n_freed = len(row) - len(self.encode(shorter))
            if len(row) - n_freed < error.limit:
                turns = "the oldest turn" if n == 1 else f"the oldest {n} turns"
                todo = (
                    f"/forget {n} drops {turns} (frees {n_freed:,}), /compact sums up; or shorten it, or start with a "
                    "larger --ctx."
                )
                break
        return ContextError(
            f"This message needs {needed:,} tokens; {free:,} are free of {error.limit:,}.",
            todo,
            needed=needed,
            free=free,
            limit=error.limit,
        )
