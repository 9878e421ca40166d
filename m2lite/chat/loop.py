"""The conversation loop: read a line, run a command or stream an answer. Owns the terminal while it runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from m2lite.chat.commands import Leave, run_command, status_line
from m2lite.chat.render import Renderer, styled
from m2lite.decode.conversation import Conversation
from m2lite.decode.sampling import Sampling
from m2lite.decode.session import Model
from m2lite.errors import M2liteError
from m2lite.signals import SecondInterrupt, StopFlag, stop_on_signals

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

PROMPT = "> "
_SLOW_PROMPT_S = 0.5  # from here on, reading the prompt is worth a line of progress


def run_chat(model: Model, sampling: Sampling, system: str | None, max_tokens: int | None, show_thinking: bool) -> int:
    """Talk until the user leaves; returns the exit code."""
    conversation = Conversation(model.session(), system)
    chat = _Chat(conversation, sampling, max_tokens, show_thinking)
    lines = _typed_lines() if sys.stdin.isatty() and sys.stdout.isatty() else _piped_lines()
    try:
        for line in lines:
            try:
                code = chat.handle(line)
            except SecondInterrupt:
                raise
            except KeyboardInterrupt:  # in the moments in which no answer is there to stop
                _tell("— stopped before the answer began; the question is dropped")
                continue
            if code:
                return code
    except Leave:
        pass
    return 0


class _Chat:
    """What one line does."""

    def __init__(
        self, conversation: Conversation, sampling: Sampling, max_tokens: int | None, show_thinking: bool
    ) -> None:
        self._conversation = conversation
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._show_thinking = show_thinking

    def handle(self, line: str) -> int:
        """A command, a message or nothing; returns an exit code if the chat is over."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                _tell(run_command(self._conversation, line.strip()))
            elif line.strip():
                return self._answer(line[1:] if line.startswith("//") else line)
        except M2liteError as error:
            _tell(f"error: {error}")
        return 0

    def _answer(self, text: str) -> int:
        conversation = self._conversation
        renderer = Renderer(sys.stdout, sys.stderr, styled(sys.stderr), self._show_thinking)
        with stop_on_signals() as stop:
            progress = _PromptProgress()
            pieces = conversation.ask(
                text, sampling=self._sampling, max_tokens=self._max_tokens, stop=stop, progress=progress
            )
            with closing(pieces):
                for piece in pieces:
                    progress.end()
                    renderer.show(piece)
            progress.end()
            renderer.end()
            self._conclude(stop)
        return stop.exit_code if stop.terminated else 0

    def _conclude(self, stop: StopFlag) -> None:
        answer = self._conversation.answer
        for error in answer.reply.errors:
            _tell(f"warning: {error}")
        if answer.finish_reason == "interrupted":
            n = len(answer.tokens)
            _tell(f"— stopped (kept {n} tokens)" if n else "— stopped before the answer began; the question is dropped")
        elif answer.finish_reason == "length":
            _tell("— cut off: the answer reached the limit of tokens")
        _tell(status_line(self._conversation), dim=True)


class _PromptProgress:
    """`reading 512 of 4,000 tokens`, rewritten in place, only on a terminal and only when it takes a while."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        if done < total and sys.stderr.isatty() and time.monotonic() - self._started > _SLOW_PROMPT_S:
            print(f"\r\033[Kreading {done:,} of {total:,} tokens", end="", file=sys.stderr, flush=True)
            self._shown = True

    def end(self) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            self._shown = False


def _tell(text: str, dim: bool = False) -> None:
    """A line that is no part of the answer."""
    if dim and styled(sys.stderr):
        text = f"\033[2m{text}\033[0m"
    print(text, file=sys.stderr, flush=True)


def _piped_lines() -> Iterator[str]:
    """One message a line, until the end of input."""
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def _typed_lines() -> Iterator[str]:
    """What the user types: Enter sends, Alt-Enter and Ctrl-J begin a new line, pasted text is taken as it is."""
    session = _prompt_session()
    while True:
        try:
            yield session.prompt(PROMPT)
        except KeyboardInterrupt:
            _tell("Ctrl-D or /exit leaves.")
        except EOFError:
            return


def _prompt_session() -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    path = _history_path()
    history = InMemoryHistory() if path is None else FileHistory(str(path))
    return PromptSession(history=history, key_bindings=keys, prompt_continuation="  ")


def _history_path() -> Path | None:
    """A file that only the user can read; None where it cannot be written."""
    import platformdirs

    path = Path(platformdirs.user_state_dir("m2lite", appauthor=False)) / "history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return None
    return path
