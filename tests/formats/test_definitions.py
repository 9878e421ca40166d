"""The table of block formats against the gguf package, byte for byte, where it does not take that itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from m2lite.formats.table import BY_TYPE, FORMATS, TYPE_NAMES, BlockFormat, unpack_rows
from tests.packing import PACKERS, pack_rows

ROOT = Path(__file__).resolve().parent.parent.parent
ALL = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
OURS = pytest.mark.parametrize(
    "fmt", [f for f in FORMATS.values() if f.parts or f.pack or f.name == "NVFP4"], ids=lambda f: f.name
)
PACKED = pytest.mark.parametrize("fmt", [FORMATS[name] for name in PACKERS], ids=PACKERS)
# Bytes that hold the largest and the smallest fields, in every place.
EXTREMES = np.array([0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0], np.uint8)
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
    "constant": [0.7] * 64,
    "fifteenths": [0.0, 15.0, 0.5, 1.5, 2.5, 7.49999, 14.5, 13.5] * 8,
    "thirty-firsts": [0.0, 31.0, 0.5, 1.5, 16.5, 15.49999, 30.5, 29.5] * 8,
    "between values of 4-bit floats": [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -5.0] * 8,
    "just below a power of two": [7.9999995, 1.0, -2.0, 0.5] * 16,
    "just below a small power of two": [1.9073485e-06, 1e-6, -1e-7, 0.0] * 16,
    "powers that end": [2.0**-125, -(2.0**-126), 2.0**-127, 2.0**-149] * 16,
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


@PACKED
@pytest.mark.parametrize("scale", [1e-38, 1e-9, 0.02, 1.0, 300.0, 1e12])
def test_random_rows(fmt: BlockFormat, scale: float) -> None:
    rng = np.random.default_rng(int(scale * 1e9) % 2**32)
    check(fmt, (rng.standard_normal((3, 5, 128)) * scale).astype(np.float32))


@PACKED
@pytest.mark.parametrize("edge", EDGES)
def test_edge_blocks(fmt: BlockFormat, edge: str) -> None:
    check(fmt, np.array([EDGES[edge]], np.float32))


@PACKED
@given(nps.arrays(np.float32, (2, 32), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_any_finite_rows(fmt: BlockFormat, rows: np.ndarray) -> None:
    check(fmt, rows)


def check_unpack(fmt: BlockFormat, blocks: np.ndarray) -> None:
    """Equal bits, but for those of a NaN; and no warning."""
    unpacked = unpack_rows(fmt, blocks, (len(blocks), fmt.n_weights))
    expected = oracle_unpack(fmt, blocks.reshape(1, -1)).reshape(unpacked.shape)  # one row: gguf goes by 16
    assert unpacked.dtype == np.float32
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(unpacked), is_nan)
    np.testing.assert_array_equal(unpacked.view(np.uint32)[~is_nan], expected.view(np.uint32)[~is_nan])


@OURS
def test_any_bytes_unpack(fmt: BlockFormat) -> None:
    """Every scale there is, infinities and NaNs too, in every pair of bytes that may hold one."""
    rng = np.random.default_rng(5)
    n_blocks = 65536 if fmt.n_weights <= 32 else 2048  # of large blocks not every scale there is
    blocks = rng.integers(0, 256, (n_blocks, fmt.n_bytes), np.uint8)
    places = {0, 2, fmt.n_bytes - 4, fmt.n_bytes - 2} if fmt.n_weights > 32 else {0, min(2, fmt.n_bytes - 2)}
    scales = rng.permutation(65536)[: len(blocks)].astype("<u2").view(np.uint8).reshape(-1, 2)
    for place in sorted(places):
        with_scales = blocks.copy()
        with_scales[:, place : place + 2] = scales
        check_unpack(fmt, with_scales)


@ALL
def test_extreme_bytes_unpack(fmt: BlockFormat) -> None:
    rng = np.random.default_rng(6)
    check_unpack(fmt, rng.choice(EXTREMES, (500, fmt.n_bytes)))
    check_unpack(fmt, np.repeat(np.arange(256, dtype=np.uint8)[:, None], fmt.n_bytes, axis=1))


@PACKED
def test_numbers_that_are_not_finite_do_not_warn(fmt: BlockFormat) -> None:
    rows = np.array([[np.nan, 1.0] * 16, [np.inf, -1.0] * 16, [-np.inf, 0.0] * 16], np.float32)
    unpacked = unpack_rows(fmt, pack_rows(fmt, rows), rows.shape)
    if fmt.name == "MXFP4":  # its scales are finite, all of them
        assert np.isfinite(unpacked).all()
    else:
        assert not np.isfinite(unpacked).all(axis=1).any()


@PACKED
def test_strided_and_read_only_input(fmt: BlockFormat) -> None:
    wide = np.random.default_rng(3).standard_normal((4, 256)).astype(np.float32)
    rows = wide[::2, :128]
    packed = pack_rows(fmt, rows)
    np.testing.assert_array_equal(packed, oracle_pack(fmt, np.ascontiguousarray(rows)))
    packed.flags.writeable = False
    unpacked = unpack_rows(fmt, packed.reshape(-1), (2, 128))
    np.testing.assert_array_equal(unpacked, oracle_unpack(fmt, packed))


@ALL
def test_leading_axes_strides_and_read_only_blocks(fmt: BlockFormat) -> None:
    """Blocks in any shape, with gaps between them, and from memory that may not be written."""
    raw = np.random.default_rng(4).integers(0, 120, (2, 3, 2 * fmt.n_bytes), np.uint8)
    raw.flags.writeable = False
    blocks = raw[..., : fmt.n_bytes]
    expected = fmt.unpack(np.ascontiguousarray(blocks).reshape(6, -1))
    unpacked = fmt.unpack(blocks)
    assert unpacked.shape == (2, 3, fmt.n_weights)
    np.testing.assert_array_equal(unpacked.reshape(6, -1), expected)


def test_rows_must_be_whole_blocks() -> None:
    fmt = FORMATS["Q4_0"]
    with pytest.raises(ValueError, match="33 weights are not whole Q4_0 blocks of 32"):
        fmt.row_bytes(33)
    with pytest.raises(ValueError, match="do not hold"):
        unpack_rows(fmt, np.zeros(18, np.uint8), (2, 32))


def test_every_type_that_gguf_can_unpack_has_a_row() -> None:
    """A newer gguf package may know more than the table: then this says which."""
    simple = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}
    assert {int(t) for t in simple | set(gguf.quants._type_traits)} == set(BY_TYPE)


def test_pieces_and_tables_are_imported_when_they_are_needed() -> None:
    model = ROOT / "models" / "m2-tiny" / "m2-tiny.gguf"
    code = f"from m2lite.describe import describe_file; describe_file({str(model)!r}); import sys; "
    code += "sys.exit(str({'gguf', 'numba'} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == ""
