"""`generate`: one answer for a person or a script."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2lite.commands.frame import DRAFT, MODEL, SAMPLING, THINKING, command, open_model
from m2lite.commands.options import MOST_BYTES, SchemaOption, StopOption, answer_defaults, read_given, say_seed
from m2lite.errors import M2liteError, UsageError
from m2lite.settings import Settings
from m2lite.system.inputs import read_input
from m2lite.system.json_text import JsonError, parse_json
from m2lite.system.paths import named_path
from m2lite.system.streams import STDERR, STDOUT, note, say_json, stdin_is_terminal

if TYPE_CHECKING:
    from m2lite.api import Model
    from m2lite.dialogue.chat_request import ChatRequest
    from m2lite.dialogue.conversation import AnswerOptions, Pieces
    from m2lite.engine.answer import Completion
    from m2lite.sampling.rules import Logprob


@command(*MODEL, *DRAFT, "template", *THINKING, *SAMPLING)
def generate(
    settings: Settings,
    *,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT|-", help="The question; -, or none and a pipe: stdin"),
    ] = None,
    file: Annotated[
        list[str] | None, typer.Option("--file", "-f", metavar="FILE", help="A text file that goes before the question")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", metavar="TEXT", help="System message")] = None,
    request: Annotated[
        str | None, typer.Option("--request", metavar="FILE", help="An OpenAI chat completion's body instead")
    ] = None,
    no_template: Annotated[bool, typer.Option("--no-template", help="Feed the text as it is")] = False,
    stop_text: StopOption = None,
    json_schema: SchemaOption = None,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", metavar="N", help="With --json: log probabilities, and the N likeliest")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Only the answer: no thinking, no colour")] = False,
    extract: Annotated[bool, typer.Option("--extract", "-x", help="Print the first block of code only")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end")] = False,
) -> None:
    """Answer one question: the answer on stdout, everything else on stderr."""
    from m2lite.chat.progress import PromptProgress
    from m2lite.dialogue.chat_request import check_whole
    from m2lite.dialogue.conversation import Conversation
    from m2lite.signals import stop_on_signals

    if no_template and system is not None:
        raise UsageError("--system was given with --no-template.", "The text is fed as it is: leave one of them out.")
    if extract and as_json:
        raise UsageError("--extract was given with --json.", "Leave one of them out.")
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs was given without --json.", "Add it.")
    if request is not None and (prompt is not None or file or system is not None or no_template):
        raise UsageError("--request was given with -p, -f, -s or --no-template.", "Put all of it into the request.")
    wanted = replace(answer_defaults(settings, stop_text, json_schema), logprobs=logprobs)
    text = None if request is not None else _question(prompt, file or [])
    if request is not None:
        wanted = _read_request(request, wanted)
    say_seed(wanted.sampling, settings)
    with open_model(settings) as model, stop_on_signals() as stop:
        conversation = Conversation(model.session(), system, wanted.tools)
        progress = PromptProgress()
        options: AnswerOptions = wanted.options() | {"stop": stop, "progress": progress}
        if text is None:
            pieces = conversation.reply_to(wanted.messages, **options)
        else:
            pieces = (conversation.complete if no_template else conversation.ask)(text, **options)
        pieces = progress.until_read(pieces)
        if as_json:
            for _ in pieces:
                pass
        else:
            is_held = extract or (wanted.schema is not None and not STDOUT.is_terminal)
            _show(pieces, is_held, settings.think == "show" and not plain, plain)
        answer = conversation.answer
        for error in answer.reply.errors:
            note(f"warning: {error}")
        if not stop():
            check_whole(wanted.schema, answer)
        _print(model, answer, wanted, request is not None, extract, as_json)
        if answer.finish_reason == "length" and not as_json:
            note(f"stopped after {len(answer.tokens):,} tokens, before the answer had ended")
    if stop():
        raise typer.Exit(stop.exit_code)


def _show(pieces: Pieces, is_held: bool, show_thinking: bool, plain: bool) -> None:
    """As it comes; content that is held back is printed when it is whole."""
    from m2lite.chat.render import Renderer

    renderer = Renderer(STDERR.is_styled and not plain, show_thinking)
    for piece in pieces:
        if not (is_held and piece.kind == "content"):
            renderer.show(piece)
    renderer.end()


def _print(
    model: Model, answer: Completion, wanted: ChatRequest, is_request: bool, extract: bool, as_json: bool
) -> None:
    """What was held back."""
    import time

    from m2lite.chat.markdown import first_code_block
    from m2lite.dialogue.chat_request import response_body

    if extract:
        code = first_code_block(answer.reply.content)
        if code is None:
            raise M2liteError("The answer has no block of code.", "Leave --extract out to see it.")
        STDOUT.write(code)
    elif as_json and is_request:
        name = f"chatcmpl-{wanted.sampling.seed}"
        say_json(response_body(answer, model.tokenizer, name, model.path.name, int(time.time())))
    elif as_json:
        say_json(_as_object(model, answer, wanted.sampling.seed))
    elif wanted.schema is not None and not STDOUT.is_terminal and answer.finish_reason == "stop":
        STDOUT.write(f"{answer.reply.content}\n")


def _read_request(source: str, defaults: ChatRequest) -> ChatRequest:
    """The request in a file; - is stdin."""
    from m2lite.dialogue.chat_request import parse_request

    try:
        body = parse_json(read_given(source))
    except JsonError as error:
        raise UsageError(f"{source}: no JSON ({error}).", 'Give {"messages": [...]}.') from None
    try:
        return parse_request(body, defaults)
    except UsageError as error:
        raise error.located(source) from None


def _question(prompt: str | None, files: list[str]) -> str:
    """What is asked, behind the files that go with it."""
    from m2lite.chat.chat import read_text, with_files

    attached = [(name, read_text(named_path(name))) for name in files]
    if prompt is None and stdin_is_terminal():
        raise UsageError("Nothing was asked.", "Use -p TEXT, or pipe a text in.")
    text = _read_stdin() if prompt is None or prompt == "-" else prompt
    if prompt is None and not text.strip():
        raise UsageError("Nothing was asked: stdin is empty.", "Use -p TEXT, or pipe a text in.")
    return with_files(text, attached)


def _read_stdin() -> str:
    raw = read_input("-", MOST_BYTES)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"stdin is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}.", "Convert it."
        ) from None


def _as_object(model: Model, answer: Completion, seed: int) -> dict[str, Any]:
    reply, stats = answer.reply, answer.stats
    n_out = len(answer.tokens)
    return {
        "text": reply.content,
        "thinking": reply.thinking,
        "tool_calls": reply.tool_calls,
        **({"m2lite_warnings": reply.errors} if reply.errors else {}),
        "tokens": answer.tokens,
        "finish_reason": answer.finish_reason,
        **({"logprobs": [_logprob(each) for each in answer.logprobs]} if answer.logprobs else {}),
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


def _logprob(each: Logprob | None) -> dict[str, Any] | None:
    """By token; null for those that nobody drew, which close the thinking."""
    if each is None:
        return None
    return {"token": each.token, "logprob": each.logprob, "likeliest": [list(pair) for pair in each.likeliest]}
