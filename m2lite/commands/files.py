"""Commands that make and check model files: `convert`, `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from m2lite.commands.frame import ProgressLine, command, print_json
from m2lite.settings import Settings


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

    progress = ProgressLine()
    result = run_convert(hf_dir, out, type_name, overwrite=overwrite, progress=progress)
    progress.end()
    print(f"{result.path}: {format_bytes(result.size_bytes)}, {result.n_tensors} tensors")
    if result.mtp_path is not None:
        print(f"{result.mtp_path}: {format_bytes(result.mtp_size_bytes)}, {result.n_mtp_modules} prediction modules")


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
        print_json(found)
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
