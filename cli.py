"""The command line: arguments, terminal, exit codes. Touches no array and no byte layout.

Everything heavy is imported inside the commands, so that `m2lite --help` answers at once and imports no Numba.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from m2lite import __version__
from m2lite.errors import M2liteError, UsageError
from m2lite.settings import OPTIONS, Settings, resolve_settings
from m2lite.signals import EXIT_INTERRUPTED, exit_on_terminate, leave_now

if TYPE_CHECKING:
    from m2lite.decode.conversation import Answer
    from m2lite.decode.sampling import Sampling
    from m2lite.decode.session import Model

app = typer.Typer(
    help="MiniMax-M2 on a CPU, from an int4 GGUF file that stays on disk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MODEL = ("model", "threads", "ctx")
_SAMPLING = ("temp", "top_k", "top_p", "min_p", "seed", "max_tokens")
_PANELS = {"model": None, **dict.fromkeys(_MODEL[1:], "Engine"), **dict.fromkeys(_SAMPLING, "Sampling")}


def command(*options: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the command of its name, with `options` from the settings table and `--debug`.

    The function gets the resolved settings first; errors become one line on stderr and an exit code.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            debug = arguments.pop("debug")
            flags = {name: arguments.pop(name) for name in options}
            guard(lambda: function(resolve_settings(flags), **arguments), debug)

        hints = get_type_hints(function, include_extras=True)
        own = list(inspect.signature(function).parameters.values())[1:]
        parameters = [p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY) for p in own]
        parameters += [_parameter(name) for name in options]
        debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")]
        parameters.append(inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=debug))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__
        app.command(function.__name__.rstrip("_"))(run)
        return function

    return register


def _parameter(name: str) -> inspect.Parameter:
    """A row of the settings table as typer wants it; the text is parsed by the table, not by typer."""
    option = OPTIONS[name]
    shown = option.help + ("" if option.default is None else f" [default: {option.default}]")
    shown = shown.replace("[", "\\[")
    if option.flags:
        info = typer.Option(*option.flags, metavar=option.metavar, help=shown, rich_help_panel=_PANELS.get(name))
    else:
        info = typer.Argument(metavar=option.metavar, help=shown, show_default=False)
    annotation = Annotated[str | None, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def guard(run: Callable[[], None], debug: bool = False) -> None:
    """Run a command; what goes wrong becomes one line on stderr and the exit code of its kind."""
    try:
        run()
        sys.stdout.flush()
    except M2liteError as error:
        _fail(f"m2lite: {error}", error.exit_code, debug)
    except KeyboardInterrupt:
        _fail("m2lite: interrupted.", EXIT_INTERRUPTED, debug)
    except BrokenPipeError:  # the reader has gone, `| head` for one: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except MemoryError:
        _fail("m2lite: the memory does not suffice. Use a smaller --ctx.", 5, debug)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"m2lite: {error.strerror or error}{where}.", 1, debug)
    except typer.Exit:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        _fail(f"m2lite: internal error, {what}. Please report it with what --debug shows.", 1, debug)


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    note(message)
    raise typer.Exit(code)


def note(text: str) -> None:
    """A line for the person, on stderr; losing it is no reason to stop."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    exit_on_terminate()
    code: Any = 0
    try:
        app(prog_name="m2lite")
    except SystemExit as error:
        code = error.code
    compute = sys.modules.get("m2lite.decode.compute")
    if compute is not None and compute.is_busy():
        leave_now(code if isinstance(code, int) else 1)
    sys.exit(code)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"m2lite {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit")
    ] = False,
) -> None:
    pass


def open_model(settings: Settings) -> Model:
    """The model that the settings name, with its start line on stderr."""
    from m2lite.decode.session import Model
    from m2lite.describe import format_bytes, format_mix, type_mix

    def on_compile() -> None:
        note("compiling kernels for this processor, once (up to a minute)...")

    model = Model.open(
        settings.model,
        threads=settings.threads,
        ctx=settings.ctx,
        template=settings.template,
        on_compile=on_compile,
    )
    parts = [
        model.path.name,
        format_mix(type_mix(model.gguf)),
        format_bytes(model.gguf.size_bytes),
        f"{model.n_threads} threads ({model.engine.layer})",
        f"ctx {model.ctx:,}",
        f"KV {format_bytes(model.kv_bytes)}",
        f"loaded in {model.load_s:.1f} s",
    ]
    note(" · ".join(parts))
    if model.engine.layer_advice:
        note(f"warning: {model.engine.layer_advice}")
    if model.template.warning:
        note(f"warning: {model.template.warning}")
    return model


def make_sampling(settings: Settings) -> Sampling:
    """The sampling options; a seed that was drawn is printed."""
    from m2lite.decode.sampling import Sampling, new_seed

    seed = settings.seed
    if seed is None:
        seed = new_seed()
        if settings.temp > 0:
            note(f"seed {seed}")
    return Sampling(settings.temp, settings.top_k, settings.top_p, settings.min_p, seed)


@command(*_MODEL, "template", "think", *_SAMPLING)
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


@command(*_MODEL, "template", *_SAMPLING)
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
            _print_json(_as_object(model, answer, sampling.seed))
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
        },
    }


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, ensure_ascii=False), flush=True)


@command(*_MODEL)
def bench(
    settings: Settings,
    *,
    n_prompt: Annotated[int, typer.Option("-p", metavar="N", min=1, help="Prompt tokens")] = 512,
    n_decode: Annotated[int, typer.Option("-n", metavar="N", min=1, help="Decoded tokens")] = 128,
    repeats: Annotated[int, typer.Option("-r", metavar="N", min=1, help="Repetitions")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Measure prefill and decode on this machine, next to its read bandwidth."""
    from m2lite.bench import format_result, run_bench
    from m2lite.signals import stop_on_signals

    with open_model(settings) as model, stop_on_signals() as stop:
        result = run_bench(model, n_prompt, n_decode, repeats, note=note, stop=stop)
        if stop():
            raise typer.Exit(stop.exit_code)
        if as_json:
            _print_json(result)
        else:
            print(format_result(result))


@command()
def convert(
    settings: Settings,
    *,
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Directory with config.json and safetensors")],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.gguf", help="File to write")],
    type_name: Annotated[str, typer.Option("--type", metavar="TYPE", help="q4_0, q8_0, f16, bf16 or f32")] = "q4_0",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file")] = False,
) -> None:
    """Hugging Face safetensors to GGUF; prediction modules go to mtp-OUT.gguf beside it."""
    from m2lite.describe import format_bytes
    from m2lite.quant.convert import convert as run_convert

    progress = _ProgressLine()
    result = run_convert(hf_dir, out, type_name, overwrite=overwrite, progress=progress)
    progress.end()
    print(f"{result.path}: {format_bytes(result.size_bytes)}, {result.n_tensors} tensors")
    if result.mtp_path is not None:
        print(f"{result.mtp_path}: {format_bytes(result.mtp_size_bytes)}, {result.n_mtp_modules} prediction modules")


class _ProgressLine:
    """Tensor, bytes done and in all: rewritten in place on a terminal, absent elsewhere."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()
        self._percent = -1

    def __call__(self, tensor: str, done_bytes: int, total_bytes: int, /) -> None:
        percent = 100 * done_bytes // max(1, total_bytes)
        if self._on and percent != self._percent:
            self._percent = percent
            print(f"\r\033[K{percent:3d} %  {tensor}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._on:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


@command()
def inspect_(
    settings: Settings,
    *,
    file: Annotated[str, typer.Argument(metavar="FILE", help="GGUF file")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Header, types, tokenizer and template of a file. Touches no weights."""
    from m2lite.decode.locate import locate_model
    from m2lite.describe import describe_file, format_bytes, format_mix

    found = describe_file(str(locate_model(file)))
    if as_json:
        _print_json(found)
        return
    print(f"{found['path']}: {format_bytes(found['size_bytes'])}, {found['n_tensors']} tensors")
    print(f"types: {format_mix(found['type_mix'])}")
    for title in ("config", "tokenizer", "template"):
        print(f"{title}: " + ", ".join(f"{k} {v}" for k, v in found[title].items() if v is not None))
    for key, value in found["metadata"].items():
        print(f"  {key} = {_one_line(value)}")
    for tensor in found["tensors"]:
        print(f"  {tensor['name']}  {tensor['type']}  {'x'.join(map(str, tensor['shape']))}")


def _one_line(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"


@command("model", "threads", "ctx")
def doctor(settings: Settings) -> None:
    """Processor features, threading layer, caches, memory, and where each setting comes from."""
    from m2lite.doctor import report

    for name, value in report(settings):
        print(f"{name:<18}{value}")


if __name__ == "__main__":
    main()
