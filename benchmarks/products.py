"""Products of one matrix with rows of activations, with and without the processor's matrix instructions, in turns.

python benchmarks/products.py [--formats Q4_0,Q4_K,Q6_K,Q8_0] [--rows 8,16,64] [--pairs 31] [--shape 1536x3072]

One thread, weights random bytes in memory, unpacking included, packing of the activations not. Prints billions of
multiply-adds a second without and with them, medians, and the median ratio of the pairs; the results are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from m2lite.formats.table import FORMATS
from m2lite.kernels import amx, dot, fast
from m2lite.simd import jit

MOST_MACS = 200e6  # of a run: some milliseconds, so that what disturbs one side disturbs the other


def random_weights(name: str, n_out: int, n: int) -> npt.NDArray[np.uint8]:
    """Bytes that are numbers between 2**-14 and 2 wherever a format has a float16: denormal ones take longer."""
    fmt = FORMATS[name]
    raw = np.random.default_rng(0).integers(0, 256, (n_out, n // fmt.n_weights, fmt.n_bytes), np.uint8) & 0x3F | 0x04
    if name == "MXFP4":
        raw[..., 0] = 120  # its scale is a power of two
    return raw.reshape(n_out, -1)


def timed(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def compare(name: str, n_out: int, n: int, n_rows: int, n_pairs: int) -> str:
    w = random_weights(name, n_out, n)
    x = np.random.default_rng(1).standard_normal((n_rows, n)).astype(np.float32)
    panel, out = np.zeros(dot.panel_bytes("int8", n_rows, n), np.uint8), np.zeros((2, n_rows, n_out), np.float32)
    fast.pack(1, panel.ctypes.data, x.ctypes.data, 4 * n, n_rows, n // 32, 1)
    n_done = max(16, min(n_out, int(MOST_MACS / n / n_rows) // 16 * 16))
    runs: list[Callable[[], None]] = []
    for side, is_allowed in enumerate((False, True)):
        amx.allow(is_allowed)
        weights = fast.tile_address(name, "int8"), w.ctypes.data, w.shape[-1], n_done, n // 32
        rows = panel.ctypes.data, dot.panel_bytes("int8", 1, n), n_rows
        runs.append(partial(fast.matmul, 1, out[side].ctypes.data, 4 * n_out, *weights, *rows))
    times = [[timed(run) for run in runs] for _ in range(n_pairs + 1)][1:]
    assert out[0].tobytes() == out[1].tobytes(), "the results differ"
    without, with_them = (n_rows * n_done * n / statistics.median(side) / 1e9 for side in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    return f"| {name} | {n_rows} | {without:.0f} | {with_them:.0f} | {ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="Q4_0,Q4_K,Q6_K,Q8_0")
    parser.add_argument("--rows", default="8,16,64")
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--shape", default="1536x3072", help="rows of weights x weights in each")
    options = parser.parse_args()
    if reason := amx.why_not():
        raise SystemExit(f"There is nothing to compare: {reason}.")
    jit.start(1)
    n_out, n = map(int, options.shape.split("x"))
    print("| format | rows | without, GMAC/s | with | ratio |\n|---|---|---|---|---|")
    for name in options.formats.split(","):
        for n_rows in map(int, options.rows.split(",")):
            print(compare(name, n_out, n, n_rows, options.pairs), flush=True)


if __name__ == "__main__":
    main()
