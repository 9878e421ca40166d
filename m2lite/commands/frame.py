"""What all commands share: the registering decorator, errors to exit codes, an open model, progress."""

from __future__ import annotations

import functools
import gc
import inspect
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from m2lite import machine
from m2lite.errors import M2liteError, UsageError
from m2lite.settings import MODEL_OPTIONS, OPTIONS, Settings, panel, resolve_settings
from m2lite.shown import shown
from m2lite.signals import EXIT_INTERRUPTED
from m2lite.system.byte_units import format_bytes, format_speed
from m2lite.system.panics import is_panic
from m2lite.system.streams import STDERR, STDOUT, OutputError, ReaderGone, console, note, require_stdout

if TYPE_CHECKING:
    from m2lite.api import Model

MODEL = ("model", *panel("Engine", MODEL_OPTIONS))
DRAFT = panel("Drafts")
SAMPLING = panel("Sampling")
THINKING = panel("Thinking")


class _Plain:
    """A command or group that takes a text as it is: Typer would import Pydantic, which takes 0.06 s, to look at it."""

    def parse_args(self: Any, ctx: Any, args: list[str]) -> list[str]:
        for parameter in self.get_params(ctx):
            if hasattr(parameter, "get_runtime_param"):  # not in all versions
                parameter.get_runtime_param = functools.partial(_Conversion, parameter.get_runtime_param)
        return super().parse_args(ctx, args)  # type: ignore[misc,no-any-return]


class PlainCommand(_Plain, TyperCommand):
    pass


class PlainGroup(_Plain, TyperGroup):
    pass


class _Conversion:
    """What Typer converts a parameter's value with; `others` makes its own, for a number or a path that was given."""

    def __init__(self, others: Callable[[], Any]) -> None:
        self._others = others

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        kind, is_list = param.type_descriptor.annotation, param.multiple or param.nargs == -1
        if value is None:
            return () if is_list else None
        if kind == list[str] and is_list and not isinstance(value, str):
            return list(value)
        return value if type(value) is kind else self._others().coerce(value, param=param, ctx=ctx)


def command(*options: str, has_result: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command of its name, with `options` from the settings table and `--debug`.

    The function gets the resolved settings first; a parameter that is a dataclass stands for its fields. Errors become
    one line on stderr and an exit code. One that `has_result` for stdout is not begun without one.
    """

    def wrap(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            debug = arguments.pop("debug")
            flags = {name: arguments.pop(name) for name in options}
            with guard(debug):
                if has_result:
                    require_stdout()
                _check_texts(arguments, hints)
                for name, group in groups.items():
                    arguments[name] = group(**{field.name: arguments.pop(field.name) for field in fields(group)})
                if "model" not in options:
                    end_start()
                function(resolve_settings(flags), **arguments)

        hints = get_type_hints(function, include_extras=True)
        own = list[inspect.Parameter]()
        groups = dict[str, Any]()
        for parameter in list(inspect.signature(function).parameters.values())[1:]:
            if is_dataclass(hints[parameter.name]):
                group = groups[parameter.name] = hints[parameter.name]
                hints |= get_type_hints(group, include_extras=True)
                own += inspect.signature(group).parameters.values()
            else:
                own.append(parameter)
        parameters = [p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY) for p in own]
        parameters += [_parameter(name) for name in options]
        debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")]
        parameters.append(inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=debug))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__
        return run

    return wrap


def _check_texts(arguments: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """UsageError for a TEXT that is not UTF-8: names of files may be any bytes, what a model reads may not."""
    for name, value in arguments.items():
        info: Any = getattr(hints[name], "__metadata__", (None,))[0]
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and str(getattr(info, "metavar", "")).startswith("TEXT"):
                data = text.encode("utf-8", "surrogateescape")
                try:
                    data.decode()
                except UnicodeDecodeError as error:
                    flag = info.default  # Typer keeps the first name of an annotated option there
                    what = f"{flag} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}."
                    raise UsageError(what, "Write it in UTF-8, or give it in a file.") from None


def _parameter(name: str) -> inspect.Parameter:
    """A row of the settings table as typer wants it; the text is parsed by the table, not by typer."""
    option = OPTIONS[name]
    text = option.help + ("" if option.default is None else f" [default: {option.text(option.default)}]")
    text = text.replace("[", "\\[")
    if option.flags:
        info = typer.Option(*option.flags, metavar=option.metavar, help=text, rich_help_panel=option.panel)
    else:
        info = typer.Argument(metavar=option.metavar, help=text, show_default=False)
    annotation = Annotated[str | None, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


@contextmanager
def guard(debug: bool = False) -> Iterator[None]:
    """What goes wrong inside becomes one line on stderr and the exit code of its kind."""
    try:
        yield
        STDOUT.flush()
    except (M2liteError, OutputError) as error:
        _fail(f"m2lite: {error}", getattr(error, "exit_code", 1), debug)
    except KeyboardInterrupt as error:
        _fail(" ".join(["m2lite: interrupted.", *_notes(error)]), EXIT_INTERRUPTED, debug)
    except SystemExit as error:  # terminated
        for line in _notes(error):
            note(f"m2lite: {line}")
        raise
    except ReaderGone:
        raise typer.Exit(0) from None
    except MemoryError:
        _fail("m2lite: the memory does not suffice. Use a smaller --ctx.", 5, debug)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"m2lite: {error.strerror or error}{where}.", 1, debug)
    except typer.Exit:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        what = f"{type(error).__name__}: {error}"
        _fail(f"m2lite: internal error, {what}. Please report it with what --debug shows.", 1, debug)


def _notes(error: BaseException) -> list[str]:
    """What the interrupted work has to say, for one where it is kept."""
    return list(getattr(error, "__notes__", ()))


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        note(*traceback.format_exc().splitlines())
    note(*message.split("\n"))
    raise typer.Exit(code)


def end_start() -> None:
    """Garbage is collected from now on, among what is made from now on; cli.main has begun without."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def announce_compiling() -> None:
    """Say so before a kernel is compiled. The caller has imported its job: that may set how threads wait."""
    from m2lite.kernels import jit

    jit.on_compile(say_compiling)


def say_compiling() -> None:
    note("compiling kernels for this processor, once...")


def how_far(n_done: int, n_all: int) -> str:
    """The kernels that are compiled."""
    return f"compiling kernels for this processor, once: {n_done} of {n_all}"


class Compiling:
    """Says so, and how far it is: on a terminal in one line that goes when it is over."""

    def __init__(self) -> None:
        self._is_said = False

    def __call__(self, n_done: int, n_all: int) -> None:
        if not self._is_said and not STDERR.is_terminal:
            say_compiling()
        self._is_said = True
        STDERR.rewrite(how_far(n_done, n_all))

    def __enter__(self) -> Compiling:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_said:
            STDERR.rewrite()


def open_model(settings: Settings, sequences: int = 1) -> Model:
    """The model that the settings name, with its start line on stderr; room for so many sequences at once."""
    free = machine.free_memory_bytes()
    with Compiling() as progress:
        model = begin_model(settings, progress, sequences)
    introduce(settings, free, model)
    return model


def begin_model(settings: Settings, on_compile: Callable[[int, int], None], sequences: int = 1) -> Model:
    """The same, and nothing is said."""
    from m2lite.api import Model

    model = Model.open(settings.model, sequences=sequences, on_compile=on_compile, **settings.opening)
    end_start()
    return model


def introduce(settings: Settings, free: int, model: Model) -> None:
    """Its start line, and what there is to warn of; `free` bytes of memory were there before."""
    from m2lite.describe import format_mix, type_mix

    parts = [
        model.path.name,
        format_mix(type_mix(model.gguf)),
        format_bytes(model.gguf.size_bytes),
        f"{format_bytes(free)} of memory free",
        f"{model.n_threads} threads ({model.runner.layer})",
        f"ctx {model.ctx:,}",
        f"KV {model.kv} {format_bytes(model.kv_bytes)}",
        model.runner.drafting.describe(),
        f"loaded in {model.load_s:.1f} s",
    ]
    note(" · ".join(parts))
    residency = model.runner.residency
    if residency is not None:
        note(f"streamed: {residency.describe()}")
    warnings = [model.runner.drafting.warning, *model.runner.warnings]
    kind = machine.network_file_system(model.path)
    if kind is not None and settings.opening["load"] != "direct":
        warnings.append(
            f"{model.path} lies on {kind}: if that fails, so does m2lite, without a word. Use --load direct."
        )
    for warning in filter(None, [*warnings, *model.tokenizer.warnings, model.template.warning]):
        note(f"warning: {warning}")


class ProgressBar:
    """How far, how fast, how long yet, and what is at hand: a bar on a terminal, elsewhere a line now and then."""

    EVERY_S = 30.0

    def __init__(self, unit: str = "bytes") -> None:
        self._unit = unit
        self._bar: Any = None
        self._task: Any = None
        self._begun = self._noted = time.monotonic()
        self._phase = ""

    def __call__(self, what: str, done: int, total: int, /, phase: str = "") -> None:
        if phase != self._phase:
            self.end()
            self._begun, self._phase = time.monotonic(), phase
        label = f"{phase} {what}".strip()
        if STDERR.is_terminal:
            self._draw(label, done, total)
        elif (now := time.monotonic()) - self._noted >= self.EVERY_S:
            self._noted = now
            speed = done / max(now - self._begun, 1e-9)
            percent, left_s = 100 * done // max(1, total), (total - done) / max(speed, 1e-9)
            rate = format_speed(speed) if self._unit == "bytes" else f"{speed:.2g} {self._unit}/s"
            note(f"{percent} % at {rate}, {left_s:,.0f} s left: {label}")

    def _draw(self, label: str, done: int, total: int) -> None:
        from rich import progress

        if self._bar is None:
            columns = (
                progress.BarColumn(24), progress.DownloadColumn(binary_units=True), progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(), progress.TextColumn("{task.description}", markup=False),
            )  # fmt: skip
            self._bar = progress.Progress(*columns, console=console(), transient=True)
            self._task = self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._task, description=shown(label), completed=done, total=total)

    def end(self) -> None:
        """The terminal is as it was; done again, nothing happens."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
