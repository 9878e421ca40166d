"""Commands that make and check model files: `convert`, `quantize`, `imatrix`, `verify`, `inspect`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2lite.commands.frame import ProgressBar, announce_compiling, command, open_model
from m2lite.commands.places import PNG, places_beside
from m2lite.errors import UsageError
from m2lite.settings import Settings
from m2lite.shown import shown
from m2lite.system.byte_units import format_bytes, parse_positive_bytes
from m2lite.system.streams import note, say, say_json

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from m2lite.quant.options import Asked, Conversion, JobPlan
    from m2lite.quant.verify import Report

_Imatrix = Annotated[
    Path | None, typer.Option("--imatrix", metavar="FILE", help="Importance matrix in GGUF, as `m2lite imatrix` makes")
]
_Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an existing file; of a link the name, what it points to stays as it is"),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object")]


@dataclass(frozen=True)
class _JobOptions:
    """Options of convert and quantize."""

    out: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.gguf", help="File to write")]
    type_name: Annotated[
        str, typer.Option("--type", metavar="TYPE", help="m2-int4, q4_0, q4_k_m, iq4_xs, q8_0, bf16, f32, ...")
    ] = "m2-int4"
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and stop")] = False
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type", metavar="REGEX=TYPE", help="Another type for the tensors that match; may be repeated"
        ),
    ] = None
    target_size: Annotated[
        str | None, typer.Option("--target-size", metavar="SIZE", help="The best mix in this size, e.g. 120g (GiB)")
    ] = None
    imatrix: _Imatrix = None
    allow_partial_imatrix: Annotated[
        bool, typer.Option("--allow-partial-imatrix", help="Use one that lacks some tensors: those do without")
    ] = False
    split_max_size: Annotated[
        str | None,
        typer.Option("--split-max-size", metavar="SIZE", help="Write parts of at most this, e.g. 48g (GiB)"),
    ] = None
    alignment: Annotated[
        str | None,
        typer.Option("--alignment", metavar="BYTES", help="Of tensors in the file: 4096 (pages) or 32 [default: 4096]"),
    ] = None
    name: Annotated[str | None, typer.Option("--name", metavar="TEXT", help="The model's name within the file")] = None
    mtp: Annotated[bool, typer.Option("--mtp/--no-mtp", help="Prediction modules go to mtp-OUT.gguf")] = True
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read back what was written before it gets its name")
    ] = True
    overwrite: _Overwrite = False
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an interrupted run left, and begin anew")
    ] = False
    as_json: _Json = False

    def asked(self) -> Asked:
        """What decides the bytes of the output, parsed: a mistake is told before anything is opened."""
        from m2lite.quant.recipes import parse_overrides

        if self.alignment not in (None, "32", "4096"):
            raise UsageError(f"--alignment is {self.alignment!r}.", "Take 4096 or 32.")
        return {
            "mtp": self.mtp,
            "overrides": parse_overrides(self.tensor_type or []),
            "target_bytes": _size("--target-size", self.target_size),
            "imatrix": self.imatrix,
            "allow_partial_imatrix": self.allow_partial_imatrix,
            "split_max_bytes": _size("--split-max-size", self.split_max_size),
            "alignment": int(self.alignment) if self.alignment else None,
            "name": self.name,
        }

    def carry_out(self, opened: AbstractContextManager[JobPlan], threads: int | None) -> None:
        """Do the job and say what was made, or with `dry_run` only print its plan."""
        from m2lite.quant.options import carry_out, check_taken

        if self.dry_run:
            _show_plan(opened, self.as_json)
            return
        if not self.overwrite:
            check_taken(self.out)
        with ProgressBar() as progress:
            made = carry_out(
                opened, overwrite=self.overwrite, restart=self.restart, verify=self.verify, threads=threads,
                progress=progress, warn=_warn,
            )  # fmt: skip
        _show_made(made, self.as_json)


@command("threads")
def convert(
    settings: Settings,
    *,
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Directory with config.json and safetensors")],
    job: _JobOptions,
    init_mtp: Annotated[
        int, typer.Option("--init-mtp", metavar="N", min=0, max=16, help="Make N modules of the last layer, to train")
    ] = 0,
) -> None:
    """Hugging Face safetensors to GGUF in one pass. Interrupted, it goes on when it is run again."""
    from m2lite.quant.convert import plan_convert

    announce_compiling()
    asked = job.asked()
    asked["init_mtp"] = init_mtp
    job.carry_out(plan_convert(hf_dir, job.out, job.type_name, **asked), settings.opening["threads"])


@command("threads")
def quantize(
    settings: Settings,
    *,
    source: Annotated[str, typer.Argument(metavar="IN.gguf", help="GGUF file, best F32, F16 or BF16")],
    job: _JobOptions,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Quantize what is quantized already: loses quality twice")
    ] = False,
) -> None:
    """GGUF to GGUF of another type. Interrupted, it goes on when it is run again."""
    from m2lite.engine.locate import locate_model
    from m2lite.quant.quantize import plan_quantize

    announce_compiling()
    found = locate_model(source)
    plan = plan_quantize(found, job.out, job.type_name, allow_requantize=allow_requantize, **job.asked())
    job.carry_out(plan, settings.opening["threads"])


def _size(flag: str, text: str | None) -> int | None:
    try:
        return None if text is None else parse_positive_bytes(text)
    except ValueError as error:
        raise UsageError(f"{flag} is {text!r}: {error}.", "Give bytes, or a number with k, m, g or t.") from None


def _warn(text: str) -> None:
    note(f"warning: {text}")


def _show_plan(opened: AbstractContextManager[JobPlan], as_json: bool) -> None:
    from m2lite.quant.plan import as_dict, format_plan, plan_job

    with opened as planned:
        plan = plan_job(planned)
    for warning in plan.warnings:
        _warn(warning)
    if as_json:
        say_json(as_dict(plan))
    else:
        say(*format_plan(plan).split("\n"))


def _show_made(made: Conversion, as_json: bool) -> None:
    if as_json:
        say_json(_plain(asdict(made)))
        return
    if made.resumed_bytes:
        note(f"went on from {format_bytes(made.resumed_bytes)} that an earlier run had done")
    n_parts = len(made.paths) - (made.mtp_path is not None)
    split = f" in {n_parts} parts" if n_parts > 1 else ""
    say(f"{made.path}: {format_bytes(made.size_bytes)}, {made.n_tensors} tensors{split}")
    if made.mtp_path is not None:
        say(f"{made.mtp_path}: {format_bytes(made.mtp_size_bytes)}, {made.n_mtp_modules} prediction modules")


def _plain(value: Any) -> Any:
    """As JSON has it: paths are text, tuples (named ones too) lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@command("threads")
def imatrix(
    settings: Settings,
    *,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="GGUF file: the less quantized, the better")],
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="UTF-8 text like that which the model will see")],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write, .gguf")],
    n_ctx: Annotated[int, typer.Option("--chunk", "-c", metavar="N", min=8, help="Tokens per chunk")] = 512,
    n_chunks: Annotated[int | None, typer.Option("--chunks", metavar="N", min=1, help="Read only the first N")] = None,
    overwrite: _Overwrite = False,
) -> None:
    """Which inputs of each matrix matter on a text: makes 4-bit files better. Names experts that it never reached."""
    from m2lite.measure.chunks import read_tokens
    from m2lite.measure.importance import collect_importance, format_importance
    from m2lite.quant.imatrix import Importance, write_imatrix
    from m2lite.signals import stop_on_signals

    places_beside(text, models=[model]).approve("--output", out, kind="replaced")
    if out.exists() and not overwrite:
        raise UsageError(f"{out}: exists already.", "Choose another name, or give --overwrite.")
    with (
        open_model(replace(settings, model=model).opened(ctx=n_ctx, kv="f16", draft="off", mtp=None)) as opened,
        stop_on_signals() as stop,
    ):
        with ProgressBar("chunks") as progress:
            tokens = read_tokens(opened, text)
            found = collect_importance(
                opened, tokens, n_ctx, n_chunks=n_chunks, stop=stop,
                progress=lambda done, total: progress(text.name, done, total),
            )  # fmt: skip
        if found.n_chunks:
            made = Importance(found.sums, (text.name,), found.n_chunks, n_ctx)
            write_imatrix(out, made, overwrite=overwrite)
            say(*f"{shown(str(out))}: {format_importance(found)}".split("\n"))
    if stop():
        raise typer.Exit(stop.exit_code)


@command("threads")
def verify(
    settings: Settings,
    *,
    file: Annotated[str, typer.Argument(metavar="FILE", help="GGUF file, or the first part of a split")],
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="DIR_OR_FILE", help="What it was made of: samples are made again"),
    ] = None,
    n_samples: Annotated[int, typer.Option("--samples", metavar="N", min=1, help="Tensors to make again")] = 8,
    imatrix: _Imatrix = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="Load the file and answer one prompt")] = True,
    as_json: _Json = False,
) -> None:
    """Is a file what was written? Hashes of header and tensors, samples made again, one prompt."""
    from m2lite.engine.locate import locate_model
    from m2lite.quant.verify import verify as run_verify

    path = locate_model(file)
    with ProgressBar() as progress:
        report = run_verify(
            path, against, n_samples, imatrix=imatrix, threads=settings.opening["threads"], progress=progress
        )
    answer = _answer_once(settings, path) if run and report.ok and not path.name.startswith("mtp-") else None
    if as_json:
        say_json(_plain(asdict(report)) | {"ok": report.ok, "answer": answer})
    else:
        _show_report(report)
        if answer is not None:
            say(f"one prompt: {answer['n_tokens']} tokens, {answer['text']!r}")
    if not report.ok:
        raise typer.Exit(4)


def _show_report(report: Report) -> None:
    say(f"{report.paths[0]}: {format_bytes(report.size_bytes)}, {report.n_tensors} tensors, {report.n_hashed} hashed")
    equal = sum(sample.is_equal for sample in report.samples)
    if report.samples:
        n_bytes = sum(sample.n_bytes for sample in report.samples)
        say(f"made again from the source: {equal} of {len(report.samples)} samples equal, {format_bytes(n_bytes)}")
    for line in report.notes:
        say(f"note: {line}")
    for line in report.problems:
        say(f"WRONG: {line}")
    if report.ok and report.n_hashed == report.n_tensors:
        say("every byte is what was written")


def _answer_once(settings: Settings, path: Path) -> dict[str, Any]:
    """A few greedy tokens: the model loads, and its numbers are finite."""
    from m2lite.sampling.draw import Sampling

    with open_model(replace(settings, model=str(path)).opened(ctx=256, kv="f16", draft="off", mtp=None)) as model:
        tokens = list(model.session().generate("Once upon a time", max_tokens=8, sampling=Sampling(temperature=0.0)))
        return {"n_tokens": len(tokens), "text": model.tokenizer.decode(tokens)}


@command()
def inspect_(
    settings: Settings,
    *,
    file: Annotated[str, typer.Argument(metavar="FILE", help="GGUF file")],
    heat: Annotated[bool, typer.Option("--heat", help="Draw which experts were used while it was streamed")] = False,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="With --heat: as a picture")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Header, types, tokenizer and template of a file. Touches no weights."""
    from m2lite.describe import describe_file
    from m2lite.engine.locate import locate_model

    if png is not None:
        places_beside(models=[file]).approve("--png", png, kind="replaced", begins=PNG)
    if heat or png is not None:
        _draw_heat(str(locate_model(file)), png)
        return
    found = describe_file(str(locate_model(file)))
    if as_json:
        say_json(found)
        return
    parts = f" in {len(found['parts'])} parts" if len(found["parts"]) > 1 else ""
    say(f"{found['path']}: {format_bytes(found['size_bytes'])}, {found['n_tensors']} tensors{parts}")
    say("bytes: " + ", ".join(f"{name} {size:,}" for name, size in found["sizes"].items()))
    for kind in found["types"]:
        say(f"  {kind['type']:<8}{kind['n_tensors']:>6} tensors {format_bytes(kind['n_bytes']):>9}  {kind['runs']}")
    for title in ("config", "tokenizer", "template"):
        say(f"{title}: " + ", ".join(f"{k} {v}" for k, v in found[title].items() if v is not None))
    for check in found["tokenizer_checks"]:
        say(f"  {'ok' if check['ok'] else 'NO':<4}{check['check']}")
    for key, value in found["metadata"].items():
        say(f"  {key} = {_one_line(value)}")
    for tensor in found["tensors"]:
        say(f"  {tensor['name']}  {tensor['type']}  {'x'.join(map(str, tensor['shape']))}")


def _draw_heat(path: str, png: Path | None) -> None:
    import shutil

    from m2lite.model.config import parse_config
    from m2lite.storage.durable import atomic_write
    from m2lite.storage.gguf_reader import open_gguf
    from m2lite.storage.heat import draw_png, draw_text, heat_path, load_heat
    from m2lite.storage.identity import trunk_identity

    with open_gguf(path) as gguf:
        config, kept = parse_config(gguf.metadata), heat_path(trunk_identity(gguf))
    heat = load_heat(kept, config.n_layers, config.n_experts)
    if heat is None:
        what = f"No use of {path} is on record: it is kept while a model larger than its memory is streamed."
        raise UsageError(what, "Run it first, for one with --ram or --load direct.")
    if png is not None:
        atomic_write(png, draw_png(heat), mode=0o644)
        note(f"{png}: a row for each of {config.n_layers} layers, a column for each of {config.n_experts} experts")
        return
    width = shutil.get_terminal_size().columns - 5
    for i, line in enumerate(draw_text(heat, width)):
        say(f"{i:>3}  {line}")


def _one_line(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"
