"""`batch`, and below it `batch status` and `batch merge`."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2lite.commands.frame import DRAFT, MODEL, SAMPLING, PlainCommand, PlainGroup, command, open_model
from m2lite.commands.options import SchemaOption, StopOption, answer_defaults
from m2lite.commands.places import PNG, places_beside
from m2lite.errors import M2liteError, UsageError
from m2lite.settings import Settings
from m2lite.system.streams import STDERR, STDOUT, Out, note, others_to_stderr, require_stdout, say, say_json

if TYPE_CHECKING:
    from m2lite.api import Model
    from m2lite.batch.cluster import Cluster
    from m2lite.batch.lines import Checked, Input, Line
    from m2lite.batch.results import Manifest
    from m2lite.batch.runner import Runner, Shard, Tally, Write
    from m2lite.dialogue.chat_request import ChatRequest

EXIT_SOME_FAILED = 3
DEFAULT_INFLIGHT = 32


class _Group(PlainGroup):
    """`batch IN -o OUT` is `batch run IN -o OUT`: what is no command's name is an argument."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    help="Answer a file of requests, or see and join what came of them: IN -o OUT is short for run IN -o OUT.",
    no_args_is_help=True,
)


@command(
    *(name for name in MODEL if name != "model"),
    "kv_disk",
    "template",
    "think_budget",
    *DRAFT,
    *SAMPLING,
    has_result=False,
)
def run(
    settings: Settings,
    *,
    source: Annotated[str, typer.Argument(metavar="IN", help="Lines of requests, or a .txt of questions; - is stdin")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="OUT", help="Results, a line each; - is stdout")],
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="As MODEL of chat and generate")] = None,
    inflight: Annotated[int, typer.Option("--inflight", metavar="N", min=1, help="Answers at once")] = DEFAULT_INFLIGHT,
    on_bad_line: Annotated[
        str, typer.Option("--on-bad-line", metavar="fail|record", help="Refuse a bad input, or record its errors")
    ] = "fail",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Lines that failed are done again")] = False,
    force: Annotated[bool, typer.Option("--force", help="Go on with other settings than the output has")] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="At most N lines of those left")
    ] = None,
    shard: Annotated[str, typer.Option("--shard", metavar="I/N", help="Part I of N, by the names of lines")] = "1/1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, count tokens, estimate; answer nothing")] = False,
    order: Annotated[
        str,
        typer.Option("--order", metavar="done|input", help="Results as they are done, or as IN has them"),
    ] = "done",
    stop_text: StopOption = None,
    json_schema: SchemaOption = None,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="A Ray cluster: an engine on each node; or local")
    ] = None,
    ray_actors: Annotated[int | None, typer.Option("--ray-actors", metavar="N", min=1, help="Engines in all")] = None,
    plot: Annotated[
        str | None, typer.Option("--plot", metavar="PNG", help="Draw the speed over time at the end")
    ] = None,
) -> None:
    """Answer every line of IN. Ends where it was stopped before: run the same command again."""
    from m2lite.batch.lines import Input
    from m2lite.batch.progress import check_plot
    from m2lite.batch.results import approve_output

    if on_bad_line not in ("fail", "record"):
        raise UsageError(f"--on-bad-line is {on_bad_line!r}.", "Use fail or record.")
    if order not in ("done", "input"):
        raise UsageError(f"--order is {order!r}.", "Use done or input.")
    if ray_actors is not None and ray is None:
        raise UsageError("--ray-actors was given without --ray.", "Add it.")
    settings = replace(settings, model=settings.model if model is None else model, think="show")  # no option here
    places = places_beside(source, json_schema, models=[settings.model, settings.opening["mtp"]])
    approve_output(places, output)
    if output == "-":
        require_stdout()
    if plot is not None:
        places.approve("--plot", plot, kind="replaced", begins=PNG)
        check_plot(Path(plot))
    defaults = answer_defaults(settings, stop_text, json_schema, default_seed=0)
    job = _Job(settings, inflight, defaults, parse_shard(shard), limit, order == "input", ray, ray_actors)
    lines = Input(source, defaults)
    checked = _check(lines, on_bad_line)
    if dry_run:
        job.estimate(lines, None if output == "-" else Path(output))
        return
    raise typer.Exit(job.run(lines, checked, output, force=force, retry_failed=retry_failed, plot=plot))


def _check(lines: Input, on_bad_line: str) -> Checked:
    """Reads all of the input; what is wrong with it is told, and refused unless it is to be recorded."""
    checked = lines.check()
    if not checked.n_lines:
        raise UsageError(f"{lines.name} holds no line.", "Give one request a line.")
    for error in checked.errors:
        note(f"{lines.name}: {error}")
    if checked.n_errors > len(checked.errors):
        note(f"and {checked.n_errors - len(checked.errors):,} more")
    if checked.n_errors and on_bad_line == "fail":
        raise UsageError(
            f"{checked.n_errors:,} of {checked.n_lines:,} lines cannot be answered.",
            "Correct them, or record their errors and answer the others with --on-bad-line record.",
        )
    return checked


def parse_shard(text: str) -> Shard:
    from m2lite.batch.runner import Shard

    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    index, n = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= index <= n:
        raise UsageError(f"--shard is {text!r}.", "Use I/N with I from 1 to N, such as 1/4.")
    return Shard(index, n)


@dataclass(frozen=True)
class _Job:
    """One run of a batch."""

    settings: Settings
    n_inflight: int
    defaults: ChatRequest
    shard: Shard
    limit: int | None
    is_in_order: bool  # results as the input has their lines
    ray: str | None
    n_actors: int | None

    def _worker(self) -> Runner | Cluster:
        if self.ray is None:
            from m2lite.batch.runner import Runner

            return Runner(self._open(), self.n_inflight, self.settings.kv_disk)
        from m2lite.batch.cluster import Cluster

        options: dict[str, Any] = {"path": self.settings.model, **self.settings.opening, "sequences": self.n_inflight}
        cluster = Cluster(self.ray, options, self.n_inflight, self.n_actors, _tell)
        note(f"{cluster.n_engines} engines on Ray's nodes · {cluster.facts['model']}")
        return cluster

    def _open(self) -> Model:
        return open_model(self.settings, sequences=self.n_inflight)

    def run(
        self, lines: Input, checked: Checked, output: str, *, force: bool, retry_failed: bool, plot: str | None
    ) -> int:
        """The exit code."""
        from m2lite.batch.progress import Show, summary
        from m2lite.batch.progress import plot as draw_plot
        from m2lite.batch.results import Results
        from m2lite.batch.runner import Tally, count_ended, lines_left
        from m2lite.engine.thread import Stopped
        from m2lite.signals import stop_on_signals

        path = None if output == "-" else Path(output)
        n_total = checked.n_lines if self.shard.n == 1 else sum(line in self.shard for line in lines)
        with ExitStack() as stack:
            # Ray prints what befalls its nodes, among the results
            out = STDOUT if self.ray is None else stack.enter_context(others_to_stderr())
            worker = self._worker()
            stack.callback(worker.close)
            results, tally, show = None, Tally(n_total, worker.n_layers), Show()
            if path is not None:
                results = Results(path, self._manifest(worker.facts, checked, n_total), force, retry_failed)
                stack.callback(results.close)
                tally.n_done, tally.n_failed = count_ended(lines, results, self.shard)
                tally.n_before = tally.n_done + tally.n_failed
                if tally.n_before:
                    note(f"{tally.n_before:,} of {n_total:,} lines have a result already")
                if n_others := len(results.ended) - tally.n_before:
                    note(f"{n_others:,} results in {output} are of lines that {lines.name} does not have")
            left = lines_left(lines, {} if results is None else results.ended, self.shard, self.limit)
            left, write = self._in_turn(stack, left, out) if results is None else (left, results.add)
            stop = stack.enter_context(stop_on_signals())
            try:
                worker.run(left, write, tally, show, stop)
                self._check_whole(tally, lines)
                if results is not None and self.is_in_order:
                    results.sort(line.custom_id for line in lines)
            except Stopped:
                pass
            finally:
                show.end(tally)
        note(*summary(tally).split("\n"))
        if lines.n_grown:
            note(f"warning: {lines.name} has grown by {lines.n_grown:,} bytes since it was checked; they were not read")
        if plot is not None and len(show.points) > 1:
            draw_plot(show.points, Path(plot))
        if stop():
            if path is not None:
                again = shlex.join(["m2lite", *sys.argv[1:]])
                note(f"stopped; {tally.n_done + tally.n_failed:,} results are safe in {output}. To go on: {again}")
            return stop.exit_code
        return EXIT_SOME_FAILED if tally.n_failed else 0

    def _check_whole(self, tally: Tally, lines: Input) -> None:
        """What was counted before has come to its end, every line of it."""
        n_ended = tally.n_done + tally.n_failed
        if self.limit is None and n_ended != tally.n_total:
            what = f"{lines.name} had {tally.n_total:,} lines when it was checked, and {n_ended:,} have a result."
            raise M2liteError(what, "Run it again with the file as it is now.")

    def _in_turn(self, stack: ExitStack, lines: Iterator[Line], out: Out) -> tuple[Iterator[Line], Write]:
        """The lines, and what prints their results there, as they are done or as the lines come."""
        from m2lite.batch.results import InTurn

        def write(line: Mapping[str, Any], key: int) -> None:
            out.json(line)

        if not self.is_in_order:
            return lines, write
        turn = InTurn(write)
        stack.callback(turn.close)
        return turn.take(lines), turn.add

    def _manifest(self, facts: dict[str, Any], checked: Checked, n_lines: int) -> Manifest:
        from m2lite.batch.results import VERSION

        defaults = self.defaults
        return {
            "m2lite_batch": VERSION,
            "input_sha256": checked.sha256,
            "lines": n_lines,
            "shard": f"{self.shard.index}/{self.shard.n}",
            **facts,
            **asdict(defaults.sampling),
            "max_tokens": defaults.max_tokens,
            "think_budget": defaults.think_tokens,
            "stop": list(defaults.stop_texts),
            "json_schema": defaults.schema,
        }

    def estimate(self, lines: Input, output: Path | None) -> None:
        """How much there is to do, and how long that may take."""
        from m2lite.batch.results import read_manifest, read_results
        from m2lite.batch.runner import lines_left
        from m2lite.text.template import encode_chat

        done = set[int]()
        if output is not None and read_manifest(output) is not None:
            done = {found.key for found in read_results(output)}
        n = n_prompt = n_most = n_long = 0
        with self._open() as model:
            for line in lines_left(lines, done, self.shard, self.limit):
                if line.request is None:
                    continue
                row = encode_chat(model.tokenizer, model.template, line.request.messages, line.request.tools)
                n, n_prompt, n_most = n + 1, n_prompt + len(row), max(n_most, len(row))
                n_long += len(row) > model.ctx
            note(f"{n:,} lines to answer, {n_prompt:,} tokens of prompts, the longest {n_most:,}")
            if n_long:
                note(f"{n_long:,} of them do not fit into the context of {model.ctx:,}: they will fail")
            if n:
                self._time(model, n, n_prompt)

    def _time(self, model: Model, n_lines: int, n_prompt: int) -> None:
        """By measuring a few steps with as many answers at once as there will be."""
        from m2lite.batch.measure import measure_speeds

        at_once = min(self.n_inflight, n_lines)
        speeds = measure_speeds(model, at_once)
        reading, drawing = speeds.reading, speeds.drawing
        n_answer = self.defaults.max_tokens or 512
        seconds = n_prompt / reading + n_lines * n_answer / drawing
        note(
            f"measured: prompts {reading:,.0f} tok/s, answers {drawing:,.1f} tok/s with {at_once} at once; for answers "
            f"of {n_answer:,} tokens and nothing shared, about {seconds / 3600:,.1f} hours"
        )


def _tell(text: str) -> None:
    """A line while progress is shown."""
    STDERR.rewrite()
    note(text)


@command()
def status(
    settings: Settings,
    *,
    output: Annotated[str, typer.Argument(metavar="OUT", help="The output of a batch")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """How far a batch is, from its output alone."""
    from m2lite.batch.results import status as read_status

    found = read_status(Path(output))
    if as_json:
        say_json(found)
        return
    say(f"{found['done']:,} done, {found['failed']:,} failed, {found['left']:,} left of {found['total']:,} lines")
    if found["surplus"]:
        say(f"{found['surplus']:,} results more than lines: some are of lines that the input does not have any more")
    manifest = found["manifest"]
    say(f"model {manifest['model']}, shard {manifest['shard']}, last result {found['last_written'] or 'none'}")


@command(has_result=False)
def merge(
    settings: Settings,
    *,
    outputs: Annotated[list[str], typer.Argument(metavar="OUT...", help="Outputs of shards, or of parts")],
    target: Annotated[str, typer.Option("--output", "-o", metavar="ALL", help="The file of all results")],
    source: Annotated[
        str | None, typer.Option("--input", metavar="IN", help="Bring them into the order of this input")
    ] = None,
) -> None:
    """Join outputs into one file. A line that failed in one and not in another counts as done."""
    from m2lite.batch.lines import Input
    from m2lite.batch.results import merge as merge_outputs
    from m2lite.dialogue.chat_request import ChatRequest
    from m2lite.sampling.draw import Sampling

    places_beside(source, *outputs).approve("--output", target)
    lines = None if source is None else Input(source, ChatRequest([], Sampling(seed=0)))
    order = None if lines is None else (line.custom_id for line in lines)
    n, n_failed = merge_outputs([Path(name) for name in outputs], Path(target), order)
    note(f"{n:,} results in {target}, {n_failed:,} of them failed")
    raise typer.Exit(EXIT_SOME_FAILED if n_failed else 0)


for _function in (run, status, merge):
    app.command(_function.__name__, cls=PlainCommand)(_function)
