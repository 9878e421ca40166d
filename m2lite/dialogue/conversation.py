"""Messages to tokens and back: render, reuse the common prefix, parse the reply. Knows no terminal and no file."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

from m2lite.dialogue.encode import answer_ids, encode_kept
from m2lite.engine.answer import Completion, Token
from m2lite.engine.handle import Handle
from m2lite.engine.prefix_cache import n_common
from m2lite.engine.request import Request
from m2lite.engine.runner import Stop
from m2lite.engine.sequence import Finished
from m2lite.engine.session import Progress, Session, note_progress
from m2lite.errors import ContextError, UsageError
from m2lite.sampling.draw import Sampling
from m2lite.sampling.json_schema import Schema
from m2lite.sampling.tool_choice import ToolChoice
from m2lite.text.reply import Piece, Said
from m2lite.text.template import encode_chat

Message = dict[str, Any]
Pieces = Generator[Piece, None, None]

SUMMARY_REQUEST = (
    "Summarise our conversation so far, so that it can go on from your summary alone: what was asked and found out, "
    "decisions, names, numbers, code that matters, and what is still open."
)


class AnswerOptions(TypedDict, total=False):
    sampling: Sampling
    max_tokens: int | None  # of the answer, its thinking included
    think_tokens: int | None  # after so many tokens of thinking it is closed; 0: there is none
    stop: Stop | None
    progress: Progress | None
    stop_texts: Sequence[str]  # the content ends before the first of them
    schema: Schema | None  # the content is JSON of it
    tool_choice: ToolChoice
    parallel_tool_calls: bool
    logprobs: int | None  # note each token's, and those of so many of the likeliest


@dataclass
class Turn(Completion):
    attempt: int = 0  # earlier answers to the same question
    n_given: int = 0  # of its ids, those that it already had when it was continued
    is_aside: bool = False  # no part of the messages


_COMPLETE = Turn(finish_reason="stop")


def turn_stream(messages: Sequence[Message], attempt: int = 0) -> int:
    """The rng_stream of the answer to these messages, of which `attempt` earlier ones were thrown away."""
    n_questions = [message["role"] for message in messages].count("user")
    return max(0, n_questions - 1) << 32 | attempt


class Conversation:
    """A list of messages and the session whose tokens follow it.

    Only what changed since the last turn is computed: the rest is in the prefix cache, up to where the last answer
    began if the template drops the thinking of earlier turns.
    """

    def __init__(
        self, session: Session, system: str | None = None, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """`tools`: OpenAI schemas of what the model may call."""
        self.session, self.tools = session, tools
        self.keep_thinking = False  # of earlier turns, whatever the template does: their ids stay as they were
        self.is_kept_on_disk = False  # what was computed, so that it can be read after a restart
        self.messages: list[Message] = []
        self.answer = Turn()  # the last that was asked for
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

    def restore(self, messages: Sequence[Message], said: Turn) -> None:
        self.messages, self.said = list(messages), said

    def keep(self, stop: Stop | None = None) -> None:
        """What was computed goes to the disk, where that is wanted."""
        if self.is_kept_on_disk:
            self.session.model.loop.save(self.session.tokens, stop)

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

    def ask(self, text: str, **options: Unpack[AnswerOptions]) -> Pieces:
        """Append the question and yield the pieces of the answer as they come; `answer` and `messages` then hold it.

        A question that does not fit raises ContextError before anything is computed and is forgotten, and so is one
        that was stopped before its answer began.
        """
        return self._answer([*self.messages, {"role": "user", "content": text}], Turn(), options)

    def regenerate(self, **options: Unpack[AnswerOptions]) -> Pieces:
        """Answer the last question anew, with other random numbers; the former answer stays if nothing comes."""
        messages = self.messages[: self._last_question() + 1]
        is_first = len(messages) == len(self.messages)
        return self._answer(messages, Turn(attempt=0 if is_first else self.said.attempt + 1), options)

    def resume(self, **options: Unpack[AnswerOptions]) -> Pieces:
        """Go on with an answer that was stopped, as if it had not been; answer what has no answer yet.

        UsageError if the answer is complete.
        """
        self._last_question()
        if self.messages[-1]["role"] != "assistant":
            return self._answer(self.messages, Turn(), options)
        if self.said.finish_reason == "stop":
            raise UsageError("The last answer is complete.", "/regen makes another one.")
        model = self.session.model
        tokens = self.said.tokens or answer_ids(model.tokenizer, model.template, self.messages[-1])
        return self._answer(self.messages[:-1], replace(self.said, tokens=list(tokens)), options)

    def tell_results(self, results: Sequence[str], **options: Unpack[AnswerOptions]) -> Pieces:
        """What the calls of the last answer gave back, in their order; the model goes on with it."""
        attempt = self.said.attempt
        self.add_results(results)
        return self._answer(self.messages, Turn(attempt=attempt), options)

    def add_results(self, results: Sequence[str]) -> None:
        """As `tell_results`, but the model does not go on; `resume` lets it."""
        assert len(results) == len(self.messages[-1]["tool_calls"])
        self.messages = [*self.messages, *({"role": "tool", "content": result} for result in results)]
        self.said = _COMPLETE

    def reply_to(
        self, messages: Sequence[Message], rng_stream: int | None = None, **options: Unpack[AnswerOptions]
    ) -> Pieces:
        """Answer these messages, which end with a question or with results, in place of those so far.

        `rng_stream` separates the random numbers of answers that share a seed; by default as in a chat.
        """
        return self._answer(list(messages), Turn(), options, rng_stream)

    def complete(self, text: str, **options: Unpack[AnswerOptions]) -> Pieces:
        """Continue raw text, without a template; `messages` stay as they are."""
        row = self.session.model.encode_prompt(text)
        self.session.check_room(len(row))
        return self._begin(row, Turn(is_aside=True), 0, [], options)

    def summarise(self, n_kept: int = 1, **options: Unpack[AnswerOptions]) -> Pieces:
        """Put a summary, which the model writes, in place of all but the last `n_kept` turns.

        Nothing changes unless it ends well. UsageError if there are no earlier turns.
        """
        starts = self.turns()
        if len(starts) <= n_kept:
            raise UsageError(f"There are {len(starts)} turns, and {n_kept} of them stay.", "Nothing to summarise.")
        cut = starts[-n_kept] if n_kept else len(self.messages)
        question = {"role": "user", "content": SUMMARY_REQUEST}
        older, later = self.messages[:cut], self.messages[cut:]
        pieces = self._answer([*older, question], Turn(is_aside=True), options)

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
        model = self.session.model
        if self.keep_thinking:
            return encode_kept(model.tokenizer, model.template, messages, self.tools, is_to_answer)
        return encode_chat(model.tokenizer, model.template, messages, self.tools, add_generation_prompt=is_to_answer)

    def _last_question(self) -> int:
        starts = self.turns()
        if not starts:
            raise UsageError("Nothing was asked yet.")
        return starts[-1]

    def _answer(
        self, messages: list[Message], turn: Turn, options: AnswerOptions, rng_stream: int | None = None
    ) -> Pieces:
        """The answer to the messages, or the rest of it behind the ids that it has."""
        row = self.encode(messages)
        if rng_stream is None:
            rng_stream = turn_stream(messages, turn.attempt)
        try:
            self.session.check_room(len(row) + len(turn.tokens))
            pieces = self._begin(row, turn, rng_stream, messages, options)
        except ContextError as error:
            raise self._too_long(error, row, messages) from None
        self.asked = messages
        return pieces

    def _begin(
        self, row: Sequence[int], turn: Turn, rng_stream: int, messages: list[Message], options: AnswerOptions
    ) -> Pieces:
        """Ask for the answer; the pieces of it as they come. `answer` is known at once."""
        given, session, most = list(turn.tokens), self.session, options.get("max_tokens")
        request = Request(
            prompt=row, given=given, sampling=options.get("sampling") or Sampling(), rng_stream=rng_stream,
            max_tokens=None if most is None else len(given) + most, think_tokens=options.get("think_tokens"),
            stop_texts=options.get("stop_texts", ()), schema=options.get("schema"), logprobs=options.get("logprobs"),
            tools=self.tools, tool_choice=options.get("tool_choice", "auto"),
            parallel_tool_calls=options.get("parallel_tool_calls", True),
            draft=session.draft, draft_tokens=session.draft_tokens,
        )  # fmt: skip
        handle = session.model.submit(request)
        session.tokens, session.stats = [*row, *given], handle.completion.stats
        session.finish_reason = "interrupted"
        self.answer = replace(
            turn, tokens=given, n_given=len(given), stats=handle.completion.stats, finish_reason="interrupted"
        )
        return self._pieces(self.answer, handle, messages, options)

    def _pieces(self, turn: Turn, handle: Handle, messages: list[Message], options: AnswerOptions) -> Pieces:
        """Pieces of the answer; whatever came, however it ends, goes to `turn` and behind the messages."""
        events = handle.events(options.get("stop"))
        try:
            with closing(events):
                for event in events:
                    note_progress(event, options.get("progress"))
                    if isinstance(event, Token):
                        turn.tokens.append(event.id)
                        self.session.tokens.append(event.id)
                        yield from event.pieces
                    elif isinstance(event, Finished):
                        turn.finish_reason = event.completion.finish_reason
                        yield from event.pieces
        finally:
            self._conclude(turn, handle, messages)

    def _conclude(self, turn: Turn, handle: Handle, messages: list[Message]) -> None:
        """What came of the answer by now is all of it."""
        session, done, is_cut = self.session, handle.completion, False
        n_known = len(turn.logprobs)
        if turn.finish_reason == "interrupted":
            turn.reply = handle.answer.reply_of(turn.tokens)
        else:
            turn.reply, is_cut = done.reply, handle.answer.is_cut
            session.tokens += [] if done.stop_id is None else [done.stop_id]
        session.finish_reason = turn.finish_reason
        turn.logprobs = [*turn.logprobs, *handle.answer.logprobs[n_known : len(turn.tokens)]]
        if not turn.is_aside and (turn.tokens or turn.finish_reason != "interrupted"):
            said = Said.of(turn.reply.message(), None if is_cut else turn.tokens)
            self.messages, self.said = [*messages, said], turn

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
        what = f"This message needs {needed:,} tokens; {free:,} are free of {error.limit:,}."
        return ContextError(what, todo, needed=needed, free=free, limit=error.limit)
