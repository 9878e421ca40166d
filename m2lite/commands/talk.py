"""`chat` and `generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2lite.commands.frame import DRAFT, MODEL, SAMPLING, THINKING, command, note, open_model, print_json
from m2lite.errors import M2liteError, UsageError
from m2lite.settings import Settings

if TYPE_CHECKING:
    from m2lite.decode.conversation import Answer
    from m2lite.decode.sampling import Sampling
    from m2lite.decode.session import Model


def make_sampling(settings: Settings) -> Sampling:
    """The sampling options; a seed that was drawn is printed."""
    from m2lite.decode.sampling import Sampling, new_seed

    seed = settings.seed
    if seed is None:
        seed = new_seed()
        if settings.temp > 0:
            note(f"seed {seed}")
    return Sampling(settings.temp, settings.top_k, settings.top_p, settings.min_p, seed)


def think_tokens(settings: Settings) -> int | None:
    """How long the model may think."""
    return 0 if settings.think == "off" else settings.think_budget


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
    tools: Annotated[
        list[str] | None,
        typer.Option(
            "--tools",
            metavar="FILE|NAMES",
            help="Tools: a file of OpenAI schemas, or shell,python,read_file,write_file",
        ),
    ] = None,
    approve: Annotated[
        str, typer.Option("--approve", metavar="ask|never|all", help="Which calls of tools run")
    ] = "ask",
    tool_dir: Annotated[str, typer.Option("--tool-dir", metavar="DIR", help="Where tools run")] = ".",
    tool_seconds: Annotated[float, typer.Option("--tool-seconds", metavar="S", help="A tool's time limit")] = 60.0,
) -> None:
    """Talk with the model. Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands."""
    from m2lite.chat.chat import Chat
    from m2lite.chat.loop import run_chat
    from m2lite.chat.store import SavedChat, latest_session, new_name
    from m2lite.chat.tools import Limits, load_tools
    from m2lite.decode.conversation import Conversation
    from m2lite.decode.snapshots import Snapshots

    if (continue_ and session is not None) or (no_save and (continue_ or session is not None)):
        raise UsageError("--continue, --session and --no-save exclude each other.", "Use one of them.")
    if approve not in ("ask", "never", "all"):
        raise UsageError(f"--approve is {approve!r}.", "Use ask, never or all.")
    if not tool_seconds > 0:
        raise UsageError(f"--tool-seconds is {tool_seconds:g}.", "Use a number above 0.")
    box = load_tools(tools, Limits(Path(tool_dir), tool_seconds)) if tools else None
    saved = None
    if continue_ or session is not None or (sys.stdin.isatty() and not no_save):  # what is piped is somebody's script
        saved = SavedChat(latest_session() if continue_ else session or new_name())
    with open_model(settings) as model:
        talk = Chat(
            Conversation(model.session(), system, None if box is None else box.schemas),
            make_sampling(settings),
            settings.max_tokens,
            show_thinking=settings.think != "hide",
            think_tokens=think_tokens(settings),
            is_plain=plain,
            tools=box,
            approve=approve,
        )
        if saved is not None:
            saved.model = str(model.path)
            talk.open(saved)
            if settings.kv_disk != 0:
                talk.conversation.snapshots = Snapshots(model, settings.kv_disk)
        code = run_chat(talk)
    raise typer.Exit(code)


@command(*MODEL, *DRAFT, "template", *THINKING, *SAMPLING)
def generate(
    settings: Settings,
    *,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT|-", help="The question; - reads stdin")],
    system: Annotated[str | None, typer.Option("--system", "-s", metavar="TEXT", help="System message")] = None,
    no_template: Annotated[bool, typer.Option("--no-template", help="Feed the text as it is")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Only the answer: no thinking, no colour")] = False,
    extract: Annotated[bool, typer.Option("--extract", "-x", help="Print the first block of code only")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end")] = False,
) -> None:
    """Answer one question: the answer on stdout, everything else on stderr."""
    from m2lite.chat.render import Renderer, styled
    from m2lite.decode.conversation import Conversation
    from m2lite.signals import stop_on_signals

    if no_template and system is not None:
        raise UsageError("--system was given with --no-template.", "The text is fed as it is: leave one of them out.")
    if extract and as_json:
        raise UsageError("--extract was given with --json.", "Leave one of them out.")
    text = _read_prompt(prompt)
    sampling = make_sampling(settings)
    with open_model(settings) as model, stop_on_signals() as stop:
        conversation = Conversation(model.session(), system)
        ask = conversation.complete if no_template else conversation.ask
        pieces = ask(
            text, sampling=sampling, max_tokens=settings.max_tokens, think_tokens=think_tokens(settings), stop=stop
        )
        show_thinking = settings.think == "show" and not plain
        renderer = Renderer(sys.stdout, sys.stderr, styled(sys.stderr) and not plain, show_thinking)
        for piece in pieces:
            if not as_json and not (extract and piece.kind == "content"):
                renderer.show(piece)
        renderer.end()
        answer = conversation.answer
        for error in answer.reply.errors:
            note(f"warning: {error}")
        if extract:
            _print_code(answer)
        elif as_json:
            print_json(_as_object(model, answer, sampling.seed))
        elif answer.finish_reason == "length":
            note(f"stopped after {len(answer.tokens):,} tokens, before the answer had ended")
    if stop():
        raise typer.Exit(stop.exit_code)


def _print_code(answer: Answer) -> None:
    from m2lite.chat.markdown import first_code_block

    code = first_code_block(answer.reply.content)
    if code is None:
        raise M2liteError("The answer has no block of code.", "Leave --extract out to see it.")
    sys.stdout.write(code)


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        return prompt
    raw = sys.stdin.buffer.read()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"stdin is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}.", "Convert it."
        ) from None


def _as_object(model: Model, answer: Answer, seed: int) -> dict[str, Any]:
    reply, stats = answer.reply, answer.stats
    n_out = len(answer.tokens)
    return {
        "text": reply.content,
        "thinking": reply.thinking,
        "tool_calls": reply.tool_calls,
        "tokens": answer.tokens,
        "finish_reason": answer.finish_reason,
        "seed": seed,
        "usage": {
            "prompt_tokens": stats.n_prompt,
            "completion_tokens": n_out,
            "total_tokens": stats.n_prompt + n_out,
        },
        "stats": {
            "prompt_tokens_per_s": stats.prompt_tokens_per_s,
            "tokens_per_s": stats.tokens_per_s,
            "time_to_first_token_s": stats.first_token_s,
            "load_s": model.load_s,
            "draft": None if stats.drafted is None else stats.drafted.as_dict() | {"saved_s": stats.saved_s},
            "major_faults": stats.major_faults,
            **(stats.traffic.as_dict() if stats.traffic else {}),
        },
    }
