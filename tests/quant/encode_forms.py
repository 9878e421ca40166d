"""Encodes and decodes odd blocks in the vector form of this process and compares with NumPy.

Also on memory between unreadable pages. Run as a child process."""

from __future__ import annotations

import os
import sys

import numpy as np

from m2lite.formats.table import FORMATS
from m2lite.quant import decode
from m2lite.quant.checkpoint import E4M3
from m2lite.quant.decode import decode_rows
from m2lite.quant.encode import encode_rows, run_tiles
from tests.kernels.guards import guarded
from tests.packing import pack_rows
from tests.quant.blocks import importance_of, odd_rows
from tests.quant.search_reference import encode_reference


def run_on_guarded_memory(at_end: bool) -> None:
    """Rows, importance and output begin or end at unreadable pages: a stray access kills this process."""
    rng = np.random.default_rng(9)
    for fmt in (fmt for fmt in FORMATS.values() if not fmt.is_float):
        for importance in [False] * bool(fmt.encoder) + [True] * bool(fmt.search):
            x = guarded(rng.standard_normal((19, 3 * fmt.n_weights)).astype(np.float32), at_end)
            weights = guarded(np.ones(3 * fmt.n_weights, np.float32), at_end) if importance else 0
            sigma, out = (
                guarded(v, at_end) for v in (np.ones(19, np.float32), np.zeros(19 * 3 * fmt.n_bytes, np.uint8))
            )
            run_tiles(fmt, x, weights, sigma, out, 19, 3)
    for width in (1, 15, 40):
        scale, flags = (guarded(np.zeros(1, np.int32), at_end) for _ in range(2))
        out = guarded(np.zeros(5 * width, np.float32), at_end)
        codes = guarded(np.zeros(5 * width, np.uint8), at_end)
        decode._scaled.part(0, 1, codes, scale, 1, 128, 128, 0, 5, width, out, flags)
        for items in (np.uint16, np.float32):
            name = {np.uint16: "BF16", np.float32: "F32"}[items]
            raw = guarded(np.zeros(5 * width, items), at_end)
            decode._decoder(name)[0].part(0, 1, raw, 5 * width // 16, out, flags)


def main() -> int:
    rng = np.random.default_rng(8)
    x = np.clip(odd_rows(rng, 40, 256), -30000, 30000)
    importance = importance_of(rng, 256)
    for name in ("F16", "BF16", "Q4_0", "Q5_0", "Q8_0", "MXFP4"):
        assert np.array_equal(encode_rows(FORMATS[name], x, "t"), pack_rows(FORMATS[name], x)), name
    for name in ("Q5_1", "Q4_K", "Q6_K", "IQ4_XS"):
        expected = encode_reference(name, x, importance)
        assert np.array_equal(encode_rows(FORMATS[name], x, "t", importance), expected), name
    raw = np.arange(256, dtype=np.uint8)
    values, finite = decode_rows(raw, "F8_E4M3", 1, 256)
    assert np.array_equal(values[0], E4M3, equal_nan=True) and not finite
    for at_end in (True, False) if "NUMBA_CPU_NAME" not in os.environ else ():
        run_on_guarded_memory(at_end)
    print("same")
    return 0


if __name__ == "__main__":
    sys.exit(main())
