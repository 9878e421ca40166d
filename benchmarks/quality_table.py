"""Size, perplexity and KL divergence of quantized files beside those that llama-quantize makes of the same model.

python benchmarks/quality_table.py F32.gguf TEXT [--types LIST] [--imatrix FILE] [--llama BIN_DIR]

Every file is measured against F32.gguf on TEXT in chunks of 512 tokens by `m2lite perplexity`; with --llama BIN_DIR,
llama-quantize makes the same types, and llama-perplexity reads both files. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OURS_ONLY = ("m2-int4",)  # types that llama-quantize does not know


def run(*command: str | Path) -> str:
    """Standard output and error of a command that must succeed."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def m2lite(*arguments: str | Path) -> str:
    """Standard output of a command of ours."""
    command = [sys.executable, "-m", "m2lite", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def llama_perplexity(binaries: Path, file: Path, text: Path) -> float:
    output = run(binaries / "llama-perplexity", "-m", file, "-f", text, "-c", "512", "-t", "2")
    match = re.search(r"Final estimate: PPL = ([0-9.]+)", output)
    if match is None:
        sys.exit(f"llama-perplexity printed no estimate for {file}")
    return float(match[1])


def bits_per_weight(file: Path) -> float:
    """Over all tensors of the file."""
    tensors = json.loads(m2lite("inspect", file, "--json"))["tensors"]
    return 8 * float(sum(t["n_bytes"] for t in tensors)) / sum(math.prod(t["shape"]) for t in tensors)


def row(label: str, file: Path, found: dict[str, Any], theirs: float | None) -> str:
    against, ppl = found["against"], found["ppl"]
    cells = [
        label,
        f"{file.stat().st_size / 1e6:.1f}",
        f"{bits_per_weight(file):.2f}",
        f"{ppl:.3f} ± {found['ppl_error']:.3f}",
        f"{against['kl']:.5f} ± {against['kl_error']:.5f}",
        f"{against['same_top']:.1%}",
        "" if theirs is None else f"{theirs:.3f} ({theirs / ppl - 1:+.2%})",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--types", default="q4_0,q4_k_m,iq4_xs,m2-int4")
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--llama", type=Path, metavar="BIN_DIR")
    args = parser.parse_args()
    print("| file | MB | bits per weight | perplexity | KL to F32, nats | same top token | llama-perplexity |")
    print("|---|---|---|---|---|---|---|")
    extra = ("--imatrix", args.imatrix) if args.imatrix else ()
    with tempfile.TemporaryDirectory(dir=args.reference.parent) as folder:
        for type_name in args.types.split(","):
            file = Path(folder) / f"{type_name}.gguf"
            m2lite("quantize", args.reference, "-o", file, "--type", type_name, "--no-mtp", *extra)
            made = [(f"{type_name}, m2lite", file)]
            if args.llama and type_name not in OURS_ONLY:
                other = Path(folder) / f"{type_name}-llama.gguf"
                run(args.llama / "llama-quantize", *extra, args.reference, other, type_name, "2")
                made.append((f"{type_name}, llama-quantize", other))
            for label, path in made:
                theirs = llama_perplexity(args.llama, path, args.text) if args.llama else None
                found = json.loads(m2lite("perplexity", path, args.text, "--against", args.reference, "--json"))
                print(row(label, path, found, theirs), flush=True)
                path.unlink()


if __name__ == "__main__":
    main()
