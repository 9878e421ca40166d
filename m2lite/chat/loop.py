"""The conversation loop: read a line, run a command or stream an answer. Owns the terminal while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from typing import Any

from m2lite.chat.chat import Begin, Chat, with_files
from m2lite.chat.commands import ChatEnds, last_exchange, run_command
from m2lite.chat.keys import kept, without_echo
from m2lite.chat.lines import ask_line, piped_lines, typed_lines
from m2lite.chat.markdown import Markdown
from m2lite.chat.progress import PromptProgress
from m2lite.chat.render import Renderer
from m2lite.chat.status import status_line
from m2lite.chat.tools import Tools, describe_call
from m2lite.errors import M2liteError
from m2lite.shown import shown
from m2lite.signals import SecondInterrupt, StopFlag, stop_on_signals
from m2lite.system.streams import STDERR, STDOUT, OutputError, ReaderGone, stdin_is_terminal, tell

_SHOWN_RESULT = 2000  # characters of a tool's result that are shown; the model gets all of it


def is_interactive() -> bool:
    """Whether a person sits there."""
    return stdin_is_terminal() and STDOUT.is_terminal


def run_chat(chat: Chat, lines: Iterator[str] | None = None) -> int:
    """Talk until the user leaves; returns the exit code. `lines` are what the user types, where that has begun."""
    talk = _Talk(chat)
    is_terminal = is_interactive()
    if chat.saved is not None and chat.saved.saved.messages:
        tell(last_exchange(chat), dim=True)
    try:
        with kept() if is_terminal else nullcontext():
            for line in lines or (typed_lines() if is_terminal else piped_lines()):
                try:
                    code = talk.handle(line)
                except SecondInterrupt:
                    raise
                except KeyboardInterrupt:  # in the moments in which no answer is there to stop
                    tell("— stopped before the answer began; the question is dropped")
                    continue
                if code:
                    return code
    except ChatEnds:
        pass
    finally:
        chat.close()
    return 0


class _Talk:
    """What one line does."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._is_unsaved = False

    def handle(self, line: str) -> int:
        """A command, a message or nothing; returns an exit code if the chat is over."""
        chat = self._chat
        try:
            if line.startswith("/") and not line.startswith("//"):
                found = run_command(chat, line.strip())
                if not isinstance(found, str):
                    return self._answer(found)
                tell(found)
                self._save()
            elif line.strip():
                text = with_files(line[1:] if line.startswith("//") else line, chat.attached)
                return self._answer(partial(chat.conversation.ask, text), is_question=True)
        except (ChatEnds, OutputError, ReaderGone):
            raise
        except M2liteError as error:
            tell(f"error: {error}")
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            tell(f"error: {shown(f'{error.strerror or error}{where}')}.")
        except MemoryError:
            tell("error: the memory does not suffice.")
        except Exception as error:  # a bug, and no reason to lose the chat
            what = shown(f"{type(error).__name__}: {error}")
            tell(f"internal error, {what}. Please report it. The chat goes on.")
        return 0

    def _answer(self, begin: Begin, is_question: bool = False) -> int:
        """An answer, and as long as it calls tools, what it makes of their results.

        One that calls the same again and again, learns nothing new and says nothing is stopped.
        """
        code = self._show(begin, is_question)
        conversation, tools, most = self._chat.conversation, self._chat.tools, self._chat.max_rounds
        before, n_same = None, 0
        while (
            tools is not None
            and not code
            and conversation.answer.finish_reason == "stop"
            and conversation.answer.reply.tool_calls
        ):
            reply = conversation.answer.reply
            results = self._call_tools(tools, reply.tool_calls)
            if results is None:
                tell("— the calls were left open. /regen answers anew, /undo drops the turn.")
                break
            n_same = n_same + 1 if not reply.content.strip() and before == (reply.tool_calls, results) else 1
            before = reply.tool_calls, results
            if n_same == most and not reply.content.strip():
                conversation.add_results(results)
                self._save()
                why = f"— stopped: the same call gave the same result in {n_same} rounds."
                tell(f"{why} /continue goes on, /undo drops the turn.")
                break
            code = self._show(partial(conversation.tell_results, results))
        return code

    def _call_tools(self, tools: Tools, calls: Sequence[Mapping[str, Any]]) -> list[str] | None:
        """The result of each, in order; None if the user stopped."""
        results = list[str]()
        for call in calls:
            tell(f"call: {describe_call(call)}")
            with stop_on_signals() as stop:
                result = self._call(tools, call, stop)
            if stop():
                return None
            results.append(result)
        return results

    def _call(self, tools: Tools, call: Mapping[str, Any], stop: StopFlag) -> str:
        name = call["function"]["name"]
        if name not in {tool["function"]["name"] for tool in tools.schemas}:
            result = f"error: there is no tool {name}"
        elif name not in tools.here:
            result = ask_line(f"what does {name} return? ", stop) or "error: nobody could run it"
        elif not self._is_approved(name, stop):
            result = "error: the user did not want this to run"
        else:
            result = tools.here[name](call, stop)
        tell(result if len(result) <= _SHOWN_RESULT else f"{result[:_SHOWN_RESULT]} [...]", dim=True)
        return result

    def _is_approved(self, name: str, stop: StopFlag) -> bool:
        chat = self._chat
        if chat.approve != "ask" or name in chat.approved:
            return chat.approve != "never"
        if not stdin_is_terminal():
            tell("— refused, since nobody can be asked here. With --approve all every call runs.")
        said = ask_line(f"run it? y: yes, a: yes, and {name} from now on, n: no ", stop).strip().lower()
        if said in ("a", "always"):
            chat.approved.add(name)
        return said in ("y", "yes", "a", "always")

    def _show(self, begin: Begin, is_question: bool = False) -> int:
        """Stream one answer, save it, and say what it cost."""
        chat = self._chat
        markdown = Markdown() if STDOUT.is_styled and not chat.is_plain else None
        renderer = Renderer(STDERR.is_styled, chat.show_thinking, markdown)
        with stop_on_signals() as stop, without_echo():
            progress = PromptProgress()
            pieces = begin(**chat.options, stop=stop, progress=progress)
            keeper = chat.keeper()
            if is_question:
                self._on_disk(keeper.begin)
            try:
                with closing(pieces):
                    for piece in pieces:
                        progress.end()
                        if piece.kind != "tool_call" or chat.tools is None:  # calls are shown when they are whole
                            renderer.show(piece)
                        self._on_disk(partial(keeper.add, piece))
            finally:
                progress.end()
                renderer.end()
                self._save()
            if is_question:
                chat.attached = []
            self._conclude(stop)
            if not stop.terminated:
                chat.conversation.keep(stop)
        return stop.exit_code if stop.terminated else 0

    def _save(self) -> None:
        """All that was said is on disk."""
        if self._on_disk(self._chat.save):
            self._is_unsaved = False

    def _on_disk(self, save: Callable[[], None]) -> bool:
        """A full disk is told, once until all is saved again, and ends no answer."""
        try:
            save()
        except M2liteError as error:
            if not self._is_unsaved:
                tell(f"error: the chat is not saved: {error}")
            self._is_unsaved = True
            return False
        return True

    def _conclude(self, stop: StopFlag) -> None:
        conversation = self._chat.conversation
        answer, session = conversation.answer, conversation.session
        for error in answer.reply.errors:
            tell(f"warning: {error}")
        n = len(answer.tokens)
        if answer.is_aside:
            tell("— no summary came of it: the chat is as it was")
        elif answer.finish_reason == "interrupted" and n:
            tell(f"— stopped (kept {n} tokens). /continue to go on, /undo to drop it.")
        elif answer.finish_reason == "interrupted":
            tell("— stopped before the answer began; the question is dropped")
        elif answer.finish_reason == "length" and not session.n_free:
            tell(f"— cut off: the context of {session.model.ctx:,} tokens is full. /forget drops the oldest turns.")
        elif answer.finish_reason == "length":
            tell("— cut off: the answer reached the limit of tokens. /continue goes on.")
        tell(status_line(conversation), dim=True)
