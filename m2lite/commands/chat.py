"""`chat`: its options, and what is opened for it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Annotated

import typer

from m2lite import machine
from m2lite.commands.frame import DRAFT, MODEL, SAMPLING, THINKING, begin_model, command, how_far, introduce, open_model
from m2lite.commands.options import SchemaOption, StopOption, answer_defaults, say_seed
from m2lite.commands.places import places_beside
from m2lite.errors import UsageError
from m2lite.settings import Settings
from m2lite.system.paths import named_path
from m2lite.system.streams import stdin_is_terminal

if TYPE_CHECKING:
    from m2lite.api import Model
    from m2lite.chat.tools import Limits, Tools
    from m2lite.sampling.json_schema import Schema


@command(*MODEL, "kv_disk", *DRAFT, "template", *THINKING, *SAMPLING)
def chat(
    settings: Settings,
    *,
    system: Annotated[str | None, typer.Option("--system", "-s", metavar="TEXT", help="System message")] = None,
    continue_: Annotated[
        bool, typer.Option("--continue", "-c", help="Go on with the chat that was saved last")
    ] = False,
    session: Annotated[
        str | None, typer.Option("--session", metavar="NAME", help="Go on with this chat, or begin it")
    ] = None,
    no_save: Annotated[bool, typer.Option("--no-save", help="Keep nothing on disk")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Answers as they are, not as Markdown")] = False,
    keep_thinking: Annotated[
        bool, typer.Option("--keep-thinking", help="Earlier turns keep their thinking, and every id that they had")
    ] = False,
    stop_text: StopOption = None,
    json_schema: SchemaOption = None,
    tools: Annotated[
        list[str] | None,
        typer.Option(
            "--tools",
            metavar="FILE|NAMES",
            help="Tools: a file of OpenAI schemas, or shell,python,read_file,write_file",
        ),
    ] = None,
    mcp: Annotated[
        list[str] | None,
        typer.Option("--mcp", metavar="COMMAND", help="A program with tools (an MCP server), and its arguments"),
    ] = None,
    approve: Annotated[
        str,
        typer.Option(
            "--approve",
            metavar="ask|never|all",
            help="Which calls of tools run; ask is never without a terminal",
        ),
    ] = "ask",
    tool_dir: Annotated[str, typer.Option("--tool-dir", metavar="DIR", help="Where tools run")] = ".",
    tool_seconds: Annotated[float, typer.Option("--tool-seconds", metavar="S", help="A tool's time limit")] = 60.0,
    max_rounds: Annotated[
        int, typer.Option("--max-rounds", metavar="N", help="Stop after N same calls with the same result; 0: never")
    ] = 3,
) -> None:
    """Talk with the model. Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands."""
    from m2lite.chat.chat import Chat
    from m2lite.chat.loop import run_chat
    from m2lite.chat.store import SavedChat, latest_session, new_name
    from m2lite.chat.tools import Limits
    from m2lite.dialogue.conversation import Conversation

    if (continue_ and session is not None) or (no_save and (continue_ or session is not None)):
        raise UsageError("--continue, --session and --no-save exclude each other.", "Use one of them.")
    if approve not in ("ask", "never", "all"):
        raise UsageError(f"--approve is {approve!r}.", "Use ask, never or all.")
    if not tool_seconds > 0:
        raise UsageError(f"--tool-seconds is {tool_seconds:g}.", "Use a number above 0.")
    if max_rounds < 0:
        raise UsageError(f"--max-rounds is {max_rounds}.", "Use 0 or more.")
    defaults = answer_defaults(settings, stop_text, json_schema)
    files = [source for source in tools or [] if named_path(source).exists()]  # others are names of tools
    places = places_beside(json_schema, *files, models=[settings.model, settings.opening["mtp"]])
    limits = Limits(named_path(tool_dir), tool_seconds, places=places)
    saved = None
    if continue_ or session is not None or (stdin_is_terminal() and not no_save):  # what is piped is somebody's script
        saved = SavedChat(latest_session() if continue_ else session or new_name())
    say_seed(defaults.sampling, settings)
    with _offered(tools or [], mcp or [], limits, defaults.schema) as box, _opened(settings) as (model, lines):
        conversation = Conversation(model.session(), system, None if box is None else box.schemas)
        conversation.keep_thinking = keep_thinking
        talk = Chat(
            conversation,
            defaults.options(),
            show_thinking=settings.think != "hide",
            is_plain=plain,
            tools=box,
            approve=approve,
            max_rounds=max_rounds,
            places=places,
        )
        if saved is not None:
            saved.model = str(model.path)
            talk.open(saved)
        if settings.kv_disk if saved is None else settings.kv_disk != 0:
            model.use_disk(settings.kv_disk)
            conversation.is_kept_on_disk = True
        model.tune_when_idle()
        code = run_chat(talk, lines)
    raise typer.Exit(code)


@contextmanager
def _opened(settings: Settings) -> Iterator[tuple[Model, Iterator[str] | None]]:
    """The model; and while kernels are compiled for it a person may type: what comes, if a line has come."""
    from m2lite.chat.keys import kept
    from m2lite.chat.lines import typed_lines
    from m2lite.chat.loop import is_interactive
    from m2lite.chat.opening import Opening

    if not is_interactive():
        with open_model(settings) as model:
            yield model, None
        return
    free = machine.free_memory_bytes()
    opening = Opening(partial(begin_model, settings), partial(introduce, settings, free), how_far)
    importlib.import_module("prompt_toolkit")  # meanwhile
    lines = None
    if opening.is_slow():
        typed = typed_lines(opening)
        with kept():
            first = next(typed, "/exit")
        lines = chain([first], typed)
        if first.strip() == "/exit" and not opening.is_done:
            raise typer.Exit(0)
    with opening.result() as model:
        yield model, lines


@contextmanager
def _offered(
    sources: Sequence[str], commands: Sequence[str], limits: Limits, schema: Schema | None
) -> Iterator[Tools | None]:
    """The tools that the model is told of; None where none were asked for. UsageError if `schema` excludes them."""
    from m2lite.chat.mcp_servers import mcp_servers, with_servers
    from m2lite.chat.tools import load_tools
    from m2lite.sampling.tool_choice import CallRules

    if not sources and not commands:
        yield None
        return
    tools = load_tools(sources, limits)
    with mcp_servers(commands, limits) as servers:
        tools = with_servers(tools, servers)
        if (calls := CallRules.of(tools.schemas, "auto", True, schema)) is not None:
            calls.check()
        yield tools
