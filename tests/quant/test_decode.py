"""Checkpoint bytes to float32: bit for bit what NumPy makes of them, scales and ragged edges included."""

from __future__ import annotations

import numpy as np
import pytest

from m2lite.formats.table import FORMATS, unpack_rows
from m2lite.quant.checkpoint import E4M3
from m2lite.quant.decode import decode_rows
from m2lite.simd import jit
from m2lite.simd.tuning import VALUES
from tests.kernels.cases import weights_of

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}

# rows, width, block, first row
CASES = [
    (5, 300, (128, 128), 100),
    (200, 512, (128, 128), 0),
    (7, 33, (4, 10), 3),
    (1, 1, (128, 128), 0),
    (130, 256, (128, 128), 255),
]


def plain(raw: np.ndarray, dtype: str) -> np.ndarray:
    """The definition: NumPy's own types, and a table for E4M3."""
    if dtype == "F8_E4M3":
        return E4M3[raw]
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view({"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


def finite_bytes(raw: np.ndarray, dtype: str) -> np.ndarray:
    """The same with the exponent's lowest bits cleared, so that no NaN and no infinity is left."""
    if dtype == "F8_E4M3":
        return np.where(raw & 0x7F == 0x7F, 0, raw).astype(np.uint8)
    step, mask = ITEM_BYTES[dtype], {"BF16": 0xBE, "F16": 0xBB, "F32": 0xBE}[dtype]
    out = raw.copy()
    out[step - 1 :: step] &= np.uint8(mask)
    return out


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_numpy(
    case: tuple[int, int, tuple[int, int], int], dtype: str, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VALUES, "alone_macs", 0)
    before = jit.n_threads()
    jit.start(n_threads)
    n, width, block, first = case
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, n * width * ITEM_BYTES[dtype], dtype=np.uint8)
    for data in (raw, finite_bytes(raw, dtype)):
        with np.errstate(all="ignore"):
            expected = plain(data, dtype).reshape(n, width)
            scale = None
            if dtype == "F8_E4M3":
                height = -(-(first + n + 3) // block[0])
                scale = rng.standard_normal((height, -(-width // block[1]))).astype(np.float32)
                rows, columns = (first + np.arange(n)) // block[0], np.arange(width) // block[1]
                expected = expected * scale[rows[:, None], columns]
        values, finite = decode_rows(data, dtype, n, width, scale, block, first)
        numbers = ~np.isnan(expected)
        assert np.array_equal(np.isnan(values), ~numbers)
        assert np.array_equal(values.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])
        assert finite == bool(np.isfinite(expected).all())
    jit.start(before)


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("at", [0, 15, 16, 32, 36])
def test_one_number_that_is_none(dtype: str, at: int) -> None:
    """Wherever it stands, in a full vector or in the rest behind."""
    values = np.zeros((1, 37), np.float32)
    for bad in (np.inf, -np.inf, np.nan) if dtype != "F8_E4M3" else (np.nan,):
        values[0, at] = bad
        bits = values.view(np.uint32)
        raw = {
            "F32": values,
            "F16": values.astype(np.float16),
            "BF16": (bits >> 16).astype(np.uint16),
            "F8_E4M3": np.where(np.isnan(values), 0x7F, 0).astype(np.uint8),
        }[dtype]
        assert not decode_rows(raw.reshape(-1).view(np.uint8), dtype, 1, 37)[1]
    assert decode_rows(np.zeros(37 * ITEM_BYTES[dtype], np.uint8), dtype, 1, 37)[1]


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "IQ2_XS", "TQ1_0", "NVFP4"])
def test_blocks_are_as_their_definition_has_them(name: str) -> None:
    rng, fmt = np.random.default_rng(3), FORMATS[name]
    raw = weights_of(rng, name, (7, 3 * fmt.n_weights))
    values, finite = decode_rows(raw.reshape(-1), name, 7, 3 * fmt.n_weights)
    expected = unpack_rows(fmt, raw, values.shape)
    assert finite and np.array_equal(values.view(np.uint32), expected.view(np.uint32))
    raw.reshape(7, 3, -1)[5, 1] = 0xFF  # NaN, wherever an f16 is
    assert decode_rows(raw.reshape(-1), name, 7, 3 * fmt.n_weights)[1] == (name == "NVFP4")


def test_overflow_of_the_product_is_noticed() -> None:
    raw = np.full(16, 0x7E, np.uint8)  # 448
    values, finite = decode_rows(raw, "F8_E4M3", 1, 16, np.full((1, 1), 1e37, np.float32))
    assert not finite and np.isinf(values).all()


def test_out_is_used() -> None:
    out = np.empty((2, 40), np.float32)
    values, _ = decode_rows(np.zeros(160, np.uint8), "BF16", 2, 40, out=out)
    assert values is out and not out.any()
