"""What all commands share: the app, the registering decorator, errors to exit codes, lines on stderr, an open model."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from m2lite.errors import M2liteError
from m2lite.settings import OPTIONS, Settings, resolve_settings
from m2lite.signals import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from m2lite.decode.session import Model

MODEL = ("model", "threads", "ctx")
SAMPLING = ("temp", "top_k", "top_p", "min_p", "seed", "max_tokens")
_PANELS = {"model": None, **dict.fromkeys(MODEL[1:], "Engine"), **dict.fromkeys(SAMPLING, "Sampling")}


def command(*options: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command of its name, with `options` from the settings table and `--debug`.

    The function gets the resolved settings first; errors become one line on stderr and an exit code.
    """

    def wrap(function: Callable[..., None]) -> Callable[..., None]:
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
        return run

    return wrap


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


def print_json(value: Any) -> None:
    import json

    print(json.dumps(value, ensure_ascii=False), flush=True)


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


class ProgressLine:
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
