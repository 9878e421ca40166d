"""The command line: the list of commands and the entry point. Touches no array and no byte layout.

Everything heavy is imported inside the commands, so that `m2lite --help` answers at once and imports no Numba.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from m2lite import __version__
from m2lite.commands import batch, chat, files, generate, measures
from m2lite.signals import exit_on_terminate, leave_now

app = typer.Typer(
    help="MiniMax-M2 on a CPU, from an int4 GGUF file that stays on disk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# As --help lists them.
COMMANDS = (
    chat.chat, generate.generate, files.convert, files.quantize, files.imatrix, files.verify, files.inspect_,
    measures.plan, measures.bench, measures.perplexity, measures.doctor,
)  # fmt: skip
for _run in COMMANDS:
    app.command(_run.__name__.rstrip("_"))(_run)
app.add_typer(batch.app, name="batch")


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


if __name__ == "__main__":
    main()
