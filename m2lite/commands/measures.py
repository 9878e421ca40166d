"""`bench`, `tune`, `perplexity` and `doctor`: what it costs, what costs less, how good it is, what is here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from m2lite.commands.frame import MODEL, ProgressBar, command, open_model
from m2lite.errors import UsageError
from m2lite.settings import Settings, parse_count
from m2lite.shown import shown
from m2lite.signals import stop_on_signals
from m2lite.system.byte_units import parse_speed
from m2lite.system.streams import note, say, say_json


@command(*MODEL)
def bench(
    settings: Settings,
    *,
    prompts: Annotated[str, typer.Option("-p", metavar="N,...", help="Prompt tokens; 0 for no prefill")] = "512",
    decodes: Annotated[str, typer.Option("-n", metavar="N,...", help="Decoded tokens; 0 for no decode")] = "128",
    depths: Annotated[
        str, typer.Option("-d", metavar="N,...", help="Positions that are in the KV cache before each test")
    ] = "0",
    repeats: Annotated[int, typer.Option("-r", metavar="N", min=1, help="Repetitions")] = 5,
    cold: Annotated[bool, typer.Option("--cold", help="Drop the file from memory before every run")] = False,
    rotating: Annotated[bool, typer.Option("--rotating", help="Other tokens, so other experts, in every run")] = False,
    draft: Annotated[bool, typer.Option("--draft", help="Compare drafts on five workloads instead")] = False,
    mtp: Annotated[str | None, typer.Option("--mtp", metavar="FILE", help="Prediction modules, for --draft")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Measure prefill and decode on this machine, next to its read bandwidth; or which drafts pay."""
    from m2lite.bench import format_result, plan_tests, run_bench
    from m2lite.bench_drafts import bench_drafts, format_drafts

    measure: Callable[..., dict[str, Any]]
    if draft:
        settings, format_found = settings.opened(draft="auto", mtp=mtp), format_drafts
        measure = partial(bench_drafts, max_tokens=max(_counts("-n", decodes)))
    else:
        settings, format_found = settings.opened(draft="off", mtp=None), format_result
        tests = plan_tests(_counts("-p", prompts), _counts("-n", decodes), _counts("-d", depths))
        if not tests:
            raise UsageError("There is nothing to measure.", "Give -p or -n more than 0 tokens.")
        measure = partial(run_bench, tests=tests, cold=cold, rotating=rotating)
    with open_model(settings) as model, stop_on_signals() as stop:
        found = measure(model, repeats=repeats, note=note, stop=stop)
        if stop():
            raise typer.Exit(stop.exit_code)
        _print(found, format_found, as_json)


def _print(found: dict[str, Any], format_found: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    if as_json:
        say_json(found)
    else:
        say(*format_found(found).split("\n"))


@command(*MODEL)
def tune(
    settings: Settings,
    *,
    minutes: Annotated[float, typer.Option("--minutes", metavar="N", min=0.1, help="Stop after so long")] = 10.0,
) -> None:
    """Try what differs between processors, and keep what makes this one faster: no token changes.

    Without a MODEL, one of MiniMax-M2's widths whose weights are zeros. Ctrl-C keeps what was found.
    """
    from tempfile import TemporaryDirectory

    from m2lite.engine.tuned import Tuning, load_tuning, make_place, save_tuning, this_machine, tuning_path
    from m2lite.storage.line_log import LineLog
    from m2lite.tune import format_tuning, run_tune
    from m2lite.zeros import write_zeros

    known = load_tuning() if settings.opening["tuning"] else Tuning()
    here = this_machine()
    path = tuning_path(here)
    make_place(path)
    with ExitStack() as stack:
        log = stack.enter_context(closing(LineLog(path.with_suffix(".log"), keeps_lines=False)))

        def write(line: str) -> None:
            note(line)
            log.append([line])

        if settings.model is None:
            folder = stack.enter_context(TemporaryDirectory(prefix="m2lite-"))
            settings = replace(settings, model=str(Path(folder) / "zeros.gguf"))
            write_zeros(Path(str(settings.model)))
        model = stack.enter_context(open_model(settings.opened(draft="off", mtp=None, heat=False)))
        stop = stack.enter_context(stop_on_signals())
        about = ", ".join(f"{name} {value}" for name, value in here.items() if value != "")
        write(f"{datetime.now(UTC):%Y-%m-%d %H:%M} {shown(model.path.name)}, {model.n_threads} threads; {about}")
        found = run_tune(
            model, known, minutes=minutes, has_threads=settings.opening["threads"] is not None, note=write, stop=stop,
            keep=lambda found: save_tuning(path, found),
        )  # fmt: skip
        lines = format_tuning(found)
        log.append(lines)
    kept = f"kept in {path}" if path.exists() else "nothing is kept"
    say(*lines, f"{kept}; what was tried stands in {log.path}")
    if stop():
        raise typer.Exit(stop.exit_code)


@command(*MODEL)
def plan(
    settings: Settings,
    *,
    disk: Annotated[
        str | None,
        typer.Option(
            "--disk", metavar="SPEED", help="Assume this speed, e.g. 3.5g (GB/s, of 10**9), and do not measure"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """What a model will cost here: memory, tokens a second by hit rate, and what binds them."""
    from m2lite.plan import format_plan, make_plan

    try:
        speed = None if disk is None else parse_speed(disk)
    except ValueError as error:
        raise UsageError(f"--disk {disk!r}: {error}.", "Correct it.") from None
    with open_model(settings.opened(draft="off", mtp=None)) as model:
        _print(make_plan(model, speed), format_plan, as_json)


def _counts(flag: str, text: str) -> list[int]:
    """0,4k -> [0, 4096], each once."""
    try:
        return list(dict.fromkeys(parse_count(part) for part in text.split(",")))
    except ValueError as error:
        raise UsageError(f"{flag} {text!r}: {error}.", "Separate numbers by commas, such as 0,4096.") from None


@command("threads", "kv")
def perplexity(
    settings: Settings,
    *,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="GGUF file")],
    text: Annotated[Path, typer.Argument(metavar="FILE", help="UTF-8 text")],
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="OTHER", help="Also KL divergence from this model (KV f16), taken as the truth"
        ),
    ] = None,
    n_ctx: Annotated[int, typer.Option("--chunk", "-c", metavar="N", min=8, help="Tokens per chunk")] = 512,
    n_chunks: Annotated[int | None, typer.Option("--chunks", metavar="N", min=1, help="Read only the first N")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """How well a model foresees a text, and how far it is from another. Scored as llama-perplexity does it."""
    from m2lite.measure.chunks import read_tokens
    from m2lite.measure.quality import format_perplexity
    from m2lite.measure.quality import perplexity as run_perplexity

    with ExitStack() as stack:
        settings = settings.opened(ctx=n_ctx, draft="off", mtp=None)
        opened = stack.enter_context(open_model(replace(settings, model=model)))
        truth = replace(settings, model=against).opened(kv="f16")
        other = stack.enter_context(open_model(truth)) if against else None
        stop = stack.enter_context(stop_on_signals())
        with ProgressBar("chunks") as progress:
            found = run_perplexity(
                opened, read_tokens(opened, text), n_ctx, against=other, n_chunks=n_chunks, stop=stop,
                progress=lambda done, total, ppl: progress(f"perplexity {ppl:.4f}", done, total),
            )  # fmt: skip
        if found is not None and as_json:
            say_json(asdict(found))
        elif found is not None:
            say(*format_perplexity(found).split("\n"))
    if stop():
        raise typer.Exit(stop.exit_code)


@command(*MODEL)
def doctor(settings: Settings) -> None:
    """Processor features, threading layer, caches, memory, and where each setting comes from."""
    from m2lite.doctor import report

    for name, value in report(settings):
        say(f"{name:<18}{value}")
