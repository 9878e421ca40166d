"""`chat` and `generate`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2lite.commands.frame import DRAFT, MODEL, SAMPLING, command, note, open_model, print_json
from m2lite.errors import UsageError
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


@command(*MODEL, *DRAFT, "template", "think", *SAMPLING)
def chat(
    settings: Settings,
    *,
    system: Annotated[str | None, typer.Option("--system", "-s", metavar="TEXT", help="System message")] = None,
) -> None:
    """Talk with the model. Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands."""
    from m2lite.chat.loop import run_chat

    model = open_model(settings)
    with model:
        code = run_chat(model, make_sampling(settings), system, settings.max_tokens, settings.think == "show")
    raise typer.Exit(code)


@command(*MODEL, *DRAFT, "template", *SAMPLING)
def generate(
    settings: Settings,
    *,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT|-", help="The question; - reads stdin")],
    system: Annotated[str | None, typer.Option("--system", "-s", metavar="TEXT", help="System message")] = None,
    no_template: Annotated[bool, typer.Option("--no-template", help="Feed the text as it is")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Only the answer: no thinking, no colour")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end")] = False,
) -> None:
    """Answer one question: the answer on stdout, everything else on stderr."""
    from m2lite.chat.render import Renderer, styled
    from m2lite.decode.conversation import Conversation
    from m2lite.signals import stop_on_signals

    if no_template and system is not None:
        raise UsageError("--system was given with --no-template.", "The text is fed as it is: leave one of them out.")
    text = _read_prompt(prompt)
    sampling = make_sampling(settings)
    with open_model(settings) as model, stop_on_signals() as stop:
        conversation = Conversation(model.session(), system)
        ask = conversation.complete if no_template else conversation.ask
        pieces = ask(text, sampling=sampling, max_tokens=settings.max_tokens, stop=stop)
        renderer = Renderer(sys.stdout, sys.stderr, styled(sys.stderr) and not plain, not plain)
        for piece in pieces:
            if not as_json:
                renderer.show(piece)
        renderer.end()
        answer = conversation.answer
        for error in answer.reply.errors:
            note(f"warning: {error}")
        if as_json:
            print_json(_as_object(model, answer, sampling.seed))
        elif answer.finish_reason == "length":
            note(f"stopped after {len(answer.tokens):,} tokens, before the answer had ended")
    if stop():
        raise typer.Exit(stop.exit_code)


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
