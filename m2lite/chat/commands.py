"""The commands of the chat as one table. Knows the conversation, not the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Unpack

from m2lite.chat.chat import Begin, Chat, export_markdown, read_text
from m2lite.chat.editor import edit
from m2lite.chat.status import describe
from m2lite.chat.store import (
    SavedChat,
    delete_session,
    list_sessions,
    new_name,
    one_line,
    read_session,
    session_path,
)
from m2lite.dialogue.conversation import AnswerOptions, Conversation, Pieces
from m2lite.errors import UsageError
from m2lite.settings import OPTIONS, parse_count
from m2lite.shown import shown
from m2lite.storage.durable import atomic_write
from m2lite.system.paths import named_path

_SHOWN_SESSIONS = 20
_SET = (
    "temp",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
)  # rows of the settings table
_SAMPLING = {"temp": "temperature"}  # the fields of Sampling that are named otherwise


class ChatEnds(Exception):
    """The user wants to go."""


@dataclass(frozen=True)
class Command:
    """`run` takes the chat and the rest of the line, and returns what to tell the user, or what begins an answer."""

    run: Callable[[Chat, str], str | Begin]
    arguments: str
    help: str
    completes: str = ""  # what Tab offers behind it: "path" or "chat"


def run_command(chat: Chat, line: str) -> str | Begin:
    """Run a line that begins with a slash; an unknown command is an error and never reaches the model."""
    name, _, rest = line[1:].partition(" ")
    if name not in COMMANDS:
        raise UsageError(f"There is no command /{name}.", "/help lists them; a message that begins with / needs //.")
    command = COMMANDS[name]
    if rest.strip() and not command.arguments:
        raise UsageError(f"/{name} takes nothing behind it.", "A message that begins with / needs //.")
    return command.run(chat, rest.strip())


def _help(chat: Chat, rest: str) -> str:
    if rest:
        name = rest.removeprefix("/")
        if name not in COMMANDS:
            raise UsageError(f"There is no command /{name}.", "/help lists them.")
        return _line_of(name)
    lines = [_line_of(name) for name in COMMANDS]
    lines.append("  //...                  a message that begins with /")
    lines.append('  """...                 a message of several lines, up to the next """')
    lines.append("  Alt-Enter or Ctrl-J begins a new line, Ctrl-C stops an answer, Ctrl-D leaves")
    return "\n".join(lines)


def _line_of(name: str) -> str:
    command = COMMANDS[name]
    return f"  /{name + ' ' + command.arguments:<22}{command.help}"


def _clear(chat: Chat, rest: str) -> str:
    n_turns, saved = chat.conversation.n_turns, chat.saved
    chat.conversation.clear()
    if saved is None or not saved.saved.messages:
        return f"forgot {n_turns} turns"
    saved.close()
    chat.saved = SavedChat(new_name(), str(chat.conversation.session.model.path))
    return f"forgot {n_turns} turns; /load {saved.name} brings them back"


def _exit(chat: Chat, rest: str) -> str:
    raise ChatEnds


def _system(chat: Chat, rest: str) -> str:
    if rest:
        chat.conversation.set_system(rest)
        return "system message set"
    current = chat.conversation.system
    return "the template's own system message is used" if current is None else current


def _undo(chat: Chat, rest: str) -> str:
    return f"forgot: {one_line(chat.conversation.undo(), 60)}"


def _edit(chat: Chat, rest: str) -> Begin:
    """The last question, or a new one, in the user's editor."""
    conversation = chat.conversation
    is_again = bool(conversation.turns())
    text = str(conversation.messages[conversation.turns()[-1]]["content"]) if is_again else ""
    edited = edit(text)
    if edited is None or not edited.strip():
        raise UsageError("Nothing was saved in the editor: the chat is as it was.")
    return partial(_ask_instead if is_again else Conversation.ask, conversation, edited.rstrip("\n"))


def _ask_instead(conversation: Conversation, text: str, **options: Unpack[AnswerOptions]) -> Pieces:
    """Another question in place of the last; if it cannot be asked, nothing changes."""
    before = conversation.messages, conversation.said
    conversation.undo()
    try:
        return conversation.ask(text, **options)
    except BaseException:
        conversation.restore(*before)
        raise


def _number(line: str, text: str, expected: str) -> int:
    try:
        return parse_count(text)
    except ValueError:
        raise UsageError(f"{line}: expected {expected}.") from None


def _forget(chat: Chat, rest: str) -> str:
    n = chat.conversation.forget(_number(f"/forget {rest}", rest or "1", "a number of turns"))
    return f"forgot the oldest {n} turns; {chat.conversation.n_turns} are left"


def _compact(chat: Chat, rest: str) -> Begin:
    n_kept = _number(f"/compact {rest}", rest or "1", "the number of turns that stay as they are")
    return partial(chat.conversation.summarise, n_kept)


def _set(chat: Chat, rest: str) -> str:
    name, _, text = rest.replace("=", " ", 1).partition(" ")
    name, text = name.strip().lstrip("-").replace("-", "_"), text.strip()
    if name and name not in _SET:
        raise UsageError(f"{name!r} cannot be set.", f"Use one of {', '.join(_SET)}.")
    if name and text:
        try:
            value = OPTIONS[name].parse(text)
        except ValueError as error:
            raise UsageError(f"/set {name} {text}: {error}.") from None
        if name == "max_tokens":
            chat.options["max_tokens"] = value
        else:
            chat.options["sampling"] = replace(chat.options["sampling"], **{_SAMPLING.get(name, name): value})
    return "  ".join(f"{each} {_value(chat, each)}" for each in ([name] if name else _SET))


def _value(chat: Chat, name: str) -> object:
    if name != "max_tokens":
        return getattr(chat.options["sampling"], _SAMPLING.get(name, name))
    return chat.options["max_tokens"] or "no limit"


def _think(chat: Chat, rest: str) -> str:
    most = chat.options["think_tokens"]
    if rest in ("show", "hide"):
        chat.show_thinking, most = rest == "show", most or None
    elif rest in ("on", "off"):
        most = 0 if rest == "off" else None
    elif rest:
        most = _number(f"/think {rest}", rest, "show, hide, on, off, or a number of tokens")
    chat.options["think_tokens"] = most
    if most == 0:
        return "thinking is off"
    shown = "shown" if chat.show_thinking else "folded"
    return f"thinking is {shown}" + ("" if most is None else f", at most {most:,} tokens")


def _context(chat: Chat, rest: str) -> str:
    """What each turn takes of the context."""
    conversation, limit = chat.conversation, chat.conversation.session.model.ctx
    starts, messages = conversation.turns(), conversation.messages
    before, lines = 0, list[str]()
    for n, end in enumerate([*starts, len(messages)]):
        if end:
            length = len(conversation.encode(messages[:end], is_to_answer=False))
            what = "system message" if n == 0 else f"turn {n}: {one_line(str(messages[starts[n - 1]]['content']), 50)}"
            lines.append(f"  {length - before:>9,}  {what}")
            before = length
    return "\n".join([*lines, f"  {max(0, limit - before):>9,}  free of {limit:,}"])


def _read(chat: Chat, rest: str) -> str:
    if not rest:
        raise UsageError("/read needs a file.")
    path = named_path(rest)
    text = read_text(path)
    session = chat.conversation.session
    n_tokens = len(session.model.tokenizer.encode(text))
    if n_tokens > session.n_free:
        raise UsageError(f"{path} has {n_tokens:,} tokens; {session.n_free:,} are free of {session.model.ctx:,}.")
    chat.attached.append((str(path), text))
    return f"{path}: {n_tokens:,} tokens, which go with your next message"


def _export(chat: Chat, rest: str) -> str:
    kind, _, name = rest.partition(" ")
    if kind not in ("md", "json"):
        raise UsageError(f"/export {rest}: expected md or json, and a file if you like.")
    stem = "chat" if chat.saved is None else chat.saved.name
    path = named_path(name.strip() or f"{stem}.{kind}")
    chat.places.approve("/export", path, is_kept=False)
    messages = chat.conversation.messages
    text = export_markdown(messages) if kind == "md" else json.dumps(messages, ensure_ascii=False, indent=2) + "\n"
    atomic_write(path, text.encode())
    return f"{path}: {len(messages)} messages"


def _sessions(chat: Chat, rest: str) -> str:
    found, lines = list_sessions(), list[str]()
    for path in found[:_SHOWN_SESSIONS]:
        try:
            saved = read_session(path)
        except UsageError as error:
            lines.append(f"  {path.stem:<24} {error.what}")
            continue
        here = "*" if chat.saved is not None and chat.saved.name == path.stem else " "
        lines.append(f"{here} {shown(path.stem):<24} {saved.n_turns:>4} turns  {saved.title}")
    if len(found) > _SHOWN_SESSIONS:
        lines.append(f"  and {len(found) - _SHOWN_SESSIONS} more in {found[0].parent}")
    return "\n".join(lines) or "no chat is saved yet"


def _load(chat: Chat, rest: str) -> str:
    if not session_path(rest).exists():
        raise UsageError(f"There is no saved chat {rest!r}.", "/sessions lists them.")
    if chat.saved is not None and chat.saved.name == rest:
        raise UsageError(f"This is {rest!r}.")
    saved = SavedChat(rest, str(chat.conversation.session.model.path))
    chat.conversation.set_system(None)
    chat.open(saved)
    return last_exchange(chat)


def last_exchange(chat: Chat) -> str:
    """What a chat that is opened again shows: where it stands."""
    assert chat.saved is not None
    saved, lines = chat.saved.saved, list[str]()
    if saved.bad_line is not None:
        lines.append(
            f"warning: line {saved.bad_line} of {chat.saved.path} cannot be read; the chat ends before it. Who goes on "
            f"finds all of the file in {chat.saved.path.name}.damaged."
        )
    turns = chat.conversation.turns()
    lines.append(f"— {chat.saved.name}: {len(turns)} turns")
    if turns:
        for message in saved.messages[turns[-1] :]:
            mark = "> " if message["role"] == "user" else ""
            lines.append(mark + one_line(str(message["content"]), 300))
        if saved.messages[-1]["role"] != "assistant":
            lines.append("— this question has no answer yet. /continue answers it, /undo drops it.")
        elif chat.conversation.said.finish_reason != "stop":
            lines.append("— this answer was not finished. /continue to go on, /undo to drop it.")
    return "\n".join(lines)


def _save(chat: Chat, rest: str) -> str:
    if chat.saved is None:
        if rest:
            chat.places.check_other("/save", session_path(rest))
        chat.saved = SavedChat(rest or new_name(), str(chat.conversation.session.model.path))
        if chat.saved.saved.messages:
            chat.saved.close()
            chat.saved = None
            raise UsageError(f"{rest!r} exists already.", "Choose another name.")
    elif rest:
        chat.saved.rename(rest)
    chat.save()
    return f"saved as {chat.saved.name}: {chat.saved.path}"


def _rename(chat: Chat, rest: str) -> str:
    if chat.saved is None:
        raise UsageError("This chat is not saved.", "/save NAME does.")
    chat.saved.rename(rest)
    return f"this chat is now {rest}"


def _delete(chat: Chat, rest: str) -> str:
    if chat.saved is not None and chat.saved.name == rest:
        raise UsageError(f"{rest!r} is this chat.", "/load another one first.")
    delete_session(rest)
    return f"{rest} is gone"


COMMANDS: dict[str, Command] = {
    "help": Command(_help, "[COMMAND]", "this list"),
    "continue": Command(lambda chat, _: chat.conversation.resume, "", "go on with an answer that was stopped"),
    "regen": Command(lambda chat, _: chat.conversation.regenerate, "", "answer the last question anew"),
    "edit": Command(_edit, "", "the last question in $EDITOR; it is asked instead"),
    "undo": Command(_undo, "", "forget the last question and its answer"),
    "forget": Command(_forget, "[N]", "forget the oldest N turns"),
    "compact": Command(_compact, "[N]", "put the model's summary in place of all but the last N turns (1)"),
    "clear": Command(_clear, "", "begin a new chat; the system message stays"),
    "read": Command(_read, "FILE", "a text file goes with your next message", "path"),
    "system": Command(_system, "[TEXT]", "show or replace the system message"),
    "think": Command(_think, "[show|hide|on|off|N]", "the model's thinking: shown, folded, none, or at most N tokens"),
    "set": Command(_set, "[NAME VALUE]", f"show or set {', '.join(_SET)}"),
    "context": Command(_context, "", "what each turn takes of the context"),
    "stats": Command(lambda chat, _: describe(chat.conversation), "", "model, context use, speed of the last answer"),
    "sessions": Command(_sessions, "", "saved chats, the latest first"),
    "load": Command(_load, "NAME", "go on with a saved chat", "chat"),
    "save": Command(_save, "[NAME]", "save this chat, which is else done by itself, under a name"),
    "rename": Command(_rename, "NAME", "another name for this chat"),
    "delete": Command(_delete, "NAME", "delete a saved chat", "chat"),
    "export": Command(_export, "md|json [FILE]", "this chat as a file", "path"),
    "exit": Command(_exit, "", "leave, as Ctrl-D does"),
}
