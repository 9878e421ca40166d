"""Every row of the table of block formats against the gguf package, byte for byte."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from m2lite.storage.blocks import BY_TYPE, FORMATS, TYPE_NAMES, BlockFormat, pack_rows, unpack_rows

ALL = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
MAX, TINY, SMALLEST = 3.4028235e38, 1.1754944e-38, 1e-45
EDGES = {
    "zero": [0.0] * 64,
    "minus zero": [-0.0] * 64,
    "max": [MAX] * 64,
    "min": [-MAX] * 64,
    "max and min": [MAX, -MAX] * 32,
    "denormal": [1e-40, -1e-40] * 32,
    "smallest": [SMALLEST] + [0.0] * 63,
    "tiny": [TINY, -TINY, 0.0, -0.0] * 16,
    "f16 overflow": [65520.0, -7e4, 1.0, 0.5] * 16,
    "f16 scale overflow": [9e6, -9e6, 1.0, 0.5] * 16,
    "f16 denormal scale": [3e-7, -2e-7, 1e-7, 0.0] * 16,
    "one large": [-1000.0] + [1e-3] * 63,
    "tie in magnitude": [1.0, -1.0] * 32,
    "halves": [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5] * 8,
    "eighths": [-8.0, 7.5, 7.0, 0.5, -0.5, 3.49999, -7.5, 8.0] * 8,
    "bf16 ties": [1.00390625, 1.01171875, -1.00390625, 1.0039063, MAX, 0.1, 0.3, 3.3] * 8,
}


def oracle_pack(fmt: BlockFormat, rows: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        packed = gguf.quants.quantize(rows, gguf.GGMLQuantizationType(fmt.ggml_type))
    return np.ascontiguousarray(packed).view(np.uint8)


def oracle_unpack(fmt: BlockFormat, rows: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        unpacked = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(fmt.ggml_type))
    return np.asarray(unpacked, np.float32)


def check(fmt: BlockFormat, rows: np.ndarray) -> None:
    packed = pack_rows(fmt, rows)
    expected = oracle_pack(fmt, rows)
    assert packed.dtype == np.uint8
    assert packed.shape == expected.shape == (*rows.shape[:-1], fmt.row_bytes(rows.shape[-1]))
    np.testing.assert_array_equal(packed, expected)
    unpacked = unpack_rows(fmt, packed, rows.shape)
    assert unpacked.dtype == np.float32 and unpacked.shape == rows.shape
    np.testing.assert_array_equal(unpacked.view(np.uint32), oracle_unpack(fmt, expected).view(np.uint32))


def test_table_agrees_with_gguf() -> None:
    for fmt in FORMATS.values():
        ggml_type = gguf.GGMLQuantizationType(fmt.ggml_type)
        assert ggml_type.name == fmt.name
        assert gguf.GGML_QUANT_SIZES[ggml_type] == (fmt.n_weights, fmt.n_bytes)
        assert BY_TYPE[fmt.ggml_type] is fmt
    assert len(BY_TYPE) == len(FORMATS)
    for ggml_type in gguf.GGMLQuantizationType:
        assert TYPE_NAMES[ggml_type] == ggml_type.name


@ALL
@pytest.mark.parametrize("scale", [1e-9, 0.02, 1.0, 300.0, 1e12])
def test_random_rows(fmt: BlockFormat, scale: float) -> None:
    rng = np.random.default_rng(int(scale * 1e9) % 2**32)
    check(fmt, (rng.standard_normal((3, 5, 128)) * scale).astype(np.float32))


@ALL
@pytest.mark.parametrize("edge", EDGES)
def test_edge_blocks(fmt: BlockFormat, edge: str) -> None:
    check(fmt, np.array([EDGES[edge]], np.float32))


@ALL
@given(nps.arrays(np.float32, (2, 32), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_any_finite_rows(fmt: BlockFormat, rows: np.ndarray) -> None:
    check(fmt, rows)


@ALL
def test_any_bytes_unpack(fmt: BlockFormat) -> None:
    """Every scale there is, infinities and NaNs too: equal values, and no warning."""
    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 256, (65536, fmt.n_bytes), np.uint8)
    blocks[:, -2 if fmt.n_weights == 1 else 0 :][:, :2] = np.arange(65536, dtype="<u2").view(np.uint8).reshape(-1, 2)
    unpacked = unpack_rows(fmt, blocks, (65536, fmt.n_weights))
    np.testing.assert_array_equal(unpacked, oracle_unpack(fmt, blocks))


@ALL
def test_numbers_that_are_not_finite_do_not_warn(fmt: BlockFormat) -> None:
    rows = np.array([[np.nan, 1.0] * 16, [np.inf, -1.0] * 16, [-np.inf, 0.0] * 16], np.float32)
    unpacked = unpack_rows(fmt, pack_rows(fmt, rows), rows.shape)
    assert not np.isfinite(unpacked).all(axis=1).any()


@ALL
def test_strided_and_read_only_input(fmt: BlockFormat) -> None:
    wide = np.random.default_rng(3).standard_normal((4, 256)).astype(np.float32)
    rows = wide[::2, :128]
    packed = pack_rows(fmt, rows)
    np.testing.assert_array_equal(packed, oracle_pack(fmt, np.ascontiguousarray(rows)))
    packed.flags.writeable = False
    unpacked = unpack_rows(fmt, packed.reshape(-1), (2, 128))
    np.testing.assert_array_equal(unpacked, oracle_unpack(fmt, packed))


@ALL
def test_leading_axes_of_unpack_and_pack(fmt: BlockFormat) -> None:
    weights = np.random.default_rng(4).standard_normal((2, 3, fmt.n_weights)).astype(np.float32)
    blocks = fmt.pack(weights)
    assert blocks.shape == (2, 3, fmt.n_bytes)
    assert fmt.unpack(blocks).shape == (2, 3, fmt.n_weights)


def test_rows_must_be_whole_blocks() -> None:
    fmt = FORMATS["Q4_0"]
    with pytest.raises(ValueError, match="33 weights are not whole Q4_0 blocks of 32"):
        pack_rows(fmt, np.zeros((1, 33), np.float32))
    with pytest.raises(ValueError, match="do not hold"):
        unpack_rows(fmt, np.zeros(18, np.uint8), (2, 32))
