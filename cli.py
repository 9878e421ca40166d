"""The command line: the list of commands and the entry point. Touches no array and no byte layout.

Everything heavy is imported inside the commands, so that `m2lite --help` answers at once and imports no Numba.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from m2lite import __version__
from m2lite.commands import batch, chat, files, generate, measures, serve
from m2lite.commands.frame import PlainCommand, PlainGroup, guard
from m2lite.shown import shown
from m2lite.signals import exit_on_terminate, leave_now
from m2lite.system import streams

app = typer.Typer(
    cls=PlainGroup,
    help="MiniMax-M2 on a CPU, from an int4 GGUF file that stays on disk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# As --help lists them.
COMMANDS = (
    chat.chat, generate.generate, serve.serve, files.convert, files.quantize, files.imatrix, files.verify,
    files.inspect_, measures.plan, measures.bench, measures.perplexity, measures.doctor,
)  # fmt: skip
for _run in COMMANDS:
    app.command(_run.__name__.rstrip("_"), cls=PlainCommand)(_run)
app.add_typer(batch.app, name="batch")


# Of what typer brings along, which is click under changing names: an error in the arguments.
_ArgumentError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main() -> None:
    gc.disable()  # what is imported stays: looking for garbage in it takes 0.05 s
    streams.claim()
    exit_on_terminate()
    code = run(sys.argv[1:])
    lost = streams.finish()
    if lost is not None and code == 0:
        streams.note(f"m2lite: {lost}")
        code = 1
    compute = sys.modules.get("m2lite.engine.thread")
    if compute is not None and compute.is_busy():
        leave_now(code)
    gc.freeze()  # nor is it taken apart at the end, which takes 0.1 s
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    code: Any = 0
    try:
        with guard():
            try:
                code = app(list(arguments), prog_name="m2lite", standalone_mode=False)
            except _ArgumentError as error:
                from typer import rich_utils

                text = shown(error.format_message())  # it quotes the arguments
                error.format_message = lambda: text
                rich_utils.rich_format_error(error)
                code = error.exit_code
            except typer.Abort:
                code = 1
    except typer.Exit as left:
        code = left.exit_code
    except SystemExit as left:
        code = left.code
    return code if isinstance(code, int) else int(code is not None)


def _show_version(wanted: bool) -> None:
    if wanted:
        streams.say(f"m2lite {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
