"""Where the user's lines come from: the keyboard, with history and completion, or a pipe. Knows no model."""

from __future__ import annotations

import os
import select
import signal
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2lite.chat import keys
from m2lite.chat.commands import COMMANDS
from m2lite.chat.opening import Opening
from m2lite.chat.store import list_sessions
from m2lite.engine.runner import Stop
from m2lite.shown import shown
from m2lite.signals import is_heeded, leave_afterwards
from m2lite.system.paths import user_dir
from m2lite.system.streams import STDERR, note, stdin_descriptor, stdin_is_terminal, stdin_lines, tell

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

PROMPT = "> "
_POLL_S = 0.1
_REFRESH_S = 0.5  # of what stands below the prompt
_BLOCK = '"""'  # begins and ends a message of several lines


def piped_lines() -> Iterator[str]:
    """One message a line, or a block of lines, until the end of input."""
    text = ""  # of a block that has begun
    for number, data in enumerate(stdin_lines(), 1):
        try:
            line = data.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            tell(f"error: line {number} is left out, it is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}.")
            continue
        text = f"{text}\n{line}" if text else line
        if not is_open(text):
            yield without_marks(text)
            text = ""
    if text:
        yield without_marks(text)


def is_open(text: str) -> bool:
    """Whether a block of lines has begun and not ended."""
    return text.lstrip().startswith(_BLOCK) and text.count(_BLOCK) == 1


def without_marks(text: str) -> str:
    """The lines of a block, which are no command; other text as it is."""
    stripped = text.strip()
    if not stripped.startswith(_BLOCK) or (stripped.count(_BLOCK) > 1 and not stripped.endswith(_BLOCK)):
        return text
    lines = stripped.removeprefix(_BLOCK).removesuffix(_BLOCK).strip("\n")
    return "/" + lines if lines.startswith("/") else lines


def typed_lines(opening: Opening[Any] | None = None) -> Iterator[str]:
    """What the user types: Enter sends, Alt-Enter and Ctrl-J begin a new line, pasted text is taken as it is.

    The first line may be typed while something is opened; where that fails, there is none.
    """
    session = _prompt_session()
    while opening is None or not opening.has_failed:
        try:
            yield without_marks(_prompt(session, opening))
            session.bottom_toolbar = opening = None
        except KeyboardInterrupt:
            tell("Ctrl-D or /exit leaves.")
        except EOFError:
            return


def _prompt(session: PromptSession[str], opening: Opening[Any] | None = None) -> str:
    """A line; a signal that ends the process ends the prompt first, and raises nothing within the event loop."""
    app = session.app

    def end() -> None:
        if app.is_running and not app.is_done:
            app.exit(exception=EOFError)

    def ask(what: Callable[[], None] = end) -> None:
        loop = app.loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(what)

    def begin() -> None:
        if is_asked():
            end()
        elif opening is not None:
            opening.when_done(partial(ask, partial(_show_opened, session, opening, end)))

    with leave_afterwards(ask) as is_asked:
        return session.prompt(
            PROMPT,
            pre_run=begin,
            handle_sigint=is_heeded(signal.SIGINT),
            bottom_toolbar=None if opening is None or opening.is_done else lambda: opening.text,
            refresh_interval=0.0 if opening is None else _REFRESH_S,
        )


def _show_opened(session: PromptSession[str], opening: Opening[Any], end: Callable[[], None]) -> None:
    """What was opened is introduced above the prompt; where that went wrong, there is nothing to ask for."""
    from prompt_toolkit.application import run_in_terminal

    session.bottom_toolbar = None
    if opening.has_failed:
        end()
    elif session.app.is_running and not session.app.is_done:
        run_in_terminal(opening.introduce)


def ask_line(question: str, stop: Stop) -> str:
    """What the user types behind the question; "" where nobody can be asked, or if `stop` says so first.

    What was typed before the question was there is no answer to it.
    """
    if not stdin_is_terminal():
        return ""
    stdin = stdin_descriptor()
    with keys.cooked():
        keys.forget()
        STDERR.write(shown(question))
        STDERR.flush()
        while not stop():
            if select.select([stdin], [], [], _POLL_S)[0]:
                return os.read(stdin, 1 << 16).decode(errors="replace").rstrip("\n")
    note("")
    return ""


def _prompt_session() -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @Condition
    def in_block() -> bool:
        return is_open(session.default_buffer.text)

    @bindings.add("escape", "enter")
    @bindings.add("c-j")
    @bindings.add("enter", filter=in_block)
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    path = _history_path()
    history = InMemoryHistory() if path is None else FileHistory(str(path))
    session: PromptSession[str] = PromptSession(
        history=history,
        key_bindings=bindings,
        prompt_continuation="  ",
        completer=_completer(),
        complete_while_typing=False,
        enable_history_search=True,
    )
    return session


def _completer() -> Any:
    """Commands behind a slash at the beginning, and what follows them: files, or saved chats."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class Commands(Completer):
        def get_completions(self, document: Any, complete_event: Any) -> Iterable[Any]:
            text = document.text_before_cursor
            if not text.startswith("/") or "\n" in text:
                return
            name, blank, rest = text[1:].partition(" ")
            if not blank:
                for each, command in COMMANDS.items():
                    if each.startswith(name):
                        yield Completion(each, -len(name), display_meta=command.help)
            elif name in COMMANDS and COMMANDS[name].completes == "path":
                rest = rest.rpartition(" ")[2] if name == "export" else rest
                yield from paths.get_completions(Document(rest), complete_event)
            elif name in COMMANDS and COMMANDS[name].completes == "chat":
                for path in list_sessions():
                    if path.stem.startswith(rest):
                        yield Completion(path.stem, -len(rest))

    return Commands()


def _history_path() -> Path | None:
    """A file that only the user can read; None where it cannot be written, or is none."""
    path = user_dir("state") / "history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o600)
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        os.close(descriptor)
    except OSError:
        return None
    return path if is_file else None
