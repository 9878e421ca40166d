"""`bench`, `perplexity` and `doctor`: what it costs, how good it is, what is here."""

from __future__ import annotations

from typing import Annotated

import typer

from m2lite.commands.frame import MODEL, command, note, open_model, print_json
from m2lite.settings import Settings


@command(*MODEL)
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
            print_json(result)
        else:
            print(format_result(result))


@command("model", "threads", "ctx")
def doctor(settings: Settings) -> None:
    """Processor features, threading layer, caches, memory, and where each setting comes from."""
    from m2lite.doctor import report

    for name, value in report(settings):
        print(f"{name:<18}{value}")
