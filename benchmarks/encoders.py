"""Error and speed of every encoder, beside llama.cpp's where its library is at hand.

python benchmarks/encoders.py [F32_OR_BF16.gguf] [--tensors REGEX] [--types Q4_K,...] [--threads N] [--ggml LIBRARY]

LIBRARY is the libggml-base.so of a llama.cpp build.

Without a file: 2 M weights each from a normal, a Laplace and a Student t (3) distribution. RMSE is relative to the
weights' own; with importance both errors are weighted by it. MW/s is millions of weights per second; llama.cpp's
function runs on one thread. Prints Markdown.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from m2lite.formats.table import FORMATS, unpack_rows
from m2lite.quant.encode import encode_rows
from m2lite.simd import jit
from m2lite.storage.gguf_reader import open_gguf

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Encode = Callable[[str, F32, F32 | None], Bytes]
MOST_WEIGHTS = 1 << 22


def random_tensors(seed: int = 0) -> Iterator[tuple[str, F32]]:
    rng = np.random.default_rng(seed)
    shape = (512, 4096)
    yield "normal", rng.standard_normal(shape, np.float32) * np.float32(0.02)
    yield "laplace", (rng.laplace(size=shape) * 0.02).astype(np.float32)
    yield "t3", (rng.standard_t(3, shape) * 0.02).astype(np.float32)


def file_tensors(path: Path, pattern: str) -> Iterator[tuple[str, F32]]:
    """Matrices of a GGUF whose names match, cut to MOST_WEIGHTS."""
    with open_gguf(path) as file:
        for name, tensor in file.tensors.items():
            if len(tensor.shape) < 2 or not re.search(pattern, name):
                continue
            rows = unpack_rows(tensor.format, file.view(name), tensor.shape).reshape(-1, tensor.shape[-1])
            yield name, np.array(rows[: max(1, MOST_WEIGHTS // rows.shape[1])])


def llama_encoder(library: Path) -> Encode:
    lib = ctypes.CDLL(str(library))

    def encode(name: str, rows: F32, importance: F32 | None) -> Bytes:
        function = getattr(lib, "quantize_" + name.lower().replace("_k", "_K"))
        function.restype = ctypes.c_size_t
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
        out = np.empty((len(rows), FORMATS[name].row_bytes(rows.shape[1])), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        function(rows.ctypes.data, out.ctypes.data, *rows.shape, weights)
        return out

    return encode


def our_encoder(name: str, rows: F32, importance: F32 | None) -> Bytes:
    return encode_rows(FORMATS[name], rows, "benchmark", importance)


def timed(encode: Encode, name: str, rows: F32, importance: F32 | None, repeats: int) -> tuple[Bytes, float]:
    """The bytes, and MW/s of the best of `repeats`."""
    best, out = float("inf"), np.empty(0, np.uint8)
    for _ in range(repeats):
        start = time.perf_counter()
        out = encode(name, rows, importance)
        best = min(best, time.perf_counter() - start)
    return out, rows.size / best / 1e6


def relative_error(name: str, encoded: Bytes, rows: F32, importance: F32 | None) -> float:
    off = unpack_rows(FORMATS[name], encoded, rows.shape).astype(np.float64) - rows
    weights = 1.0 if importance is None else importance.astype(np.float64)
    return float(np.sqrt((weights * off * off).sum() / (weights * rows.astype(np.float64) ** 2).sum()))


def report(label: str, rows: F32, types: list[str], threads: int, llama: Encode | None) -> None:
    rng = np.random.default_rng(1)
    importance = np.exp(rng.standard_normal(rows.shape[1]) * 1.2).astype(np.float32)
    for name in types:
        if rows.shape[1] % FORMATS[name].n_weights:
            continue
        for weights in (None, importance) if FORMATS[name].search else (None,):
            jit.start(1)
            our_encoder(name, rows[:64], weights)
            ours, speed = timed(our_encoder, name, rows, weights, 3)
            jit.start(threads)
            our_encoder(name, rows, weights)
            _, fast = timed(our_encoder, name, rows, weights, 3)
            error = relative_error(name, ours, rows, weights)
            cells = [f"{error:.5f}", f"{speed:.0f}", f"{fast:.0f}"]
            if llama is not None and name not in ("F32", "F16", "BF16"):
                theirs, their_speed = timed(llama, name, rows, weights, 1)
                their_error = relative_error(name, theirs, rows, weights)
                same = "same bytes" if np.array_equal(ours, theirs) else f"{error / their_error - 1:+.2%}"
                cells += [f"{their_error:.5f}", f"{their_speed:.1f}", same]
            bits = 8 * FORMATS[name].n_bytes / FORMATS[name].n_weights
            kind = name + ("" if weights is None else " + importance")
            print(f"| {label} | {kind} | {bits:g} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--tensors", default=r"\.weight$", help="regular expression over GGUF names")
    parser.add_argument("--types", default=",".join(name for name, fmt in FORMATS.items() if fmt.is_writable))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ggml", type=Path, help="libggml-base.so of a llama.cpp build")
    options = parser.parse_args()
    llama = llama_encoder(options.ggml) if options.ggml else None
    heads = ["weights", "type", "bits", "error", "MW/s", f"MW/s, {options.threads} threads"]
    heads += ["llama.cpp error", "MW/s", "difference"] if llama else []
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    tensors = file_tensors(options.file, options.tensors) if options.file else random_tensors()
    for label, rows in tensors:
        report(label, np.ascontiguousarray(rows, np.float32), options.types.split(","), options.threads, llama)


if __name__ == "__main__":
    main()
