"""Encoders: bytes of the gguf package and of the NumPy definition, for every thread count, and refusals."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np
import pytest

from forms import FORMS as FORMS_OF_VECTORS
from forms import run_form, run_script
from m2lite.errors import BadModelError
from m2lite.formats.table import FORMATS, unpack_rows
from m2lite.quant.encode import encode_rows
from m2lite.simd import jit
from m2lite.simd.tuning import VALUES
from tests.packing import PACKERS, pack_rows
from tests.quant.blocks import F32, importance_of, odd_rows
from tests.quant.search_reference import encode_reference

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long

ENCODERS = [name for name, fmt in FORMATS.items() if fmt.is_writable]
LIMITS = {name: fmt.largest for name, fmt in FORMATS.items() if np.isfinite(fmt.largest)}
PLAIN = [name for name in ENCODERS if name in PACKERS]
SEARCHED = [name for name in ENCODERS if name not in PACKERS]
WEIGHTED = [name for name in ENCODERS if FORMATS[name].search]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = jit.n_threads()
    jit.start(1)
    yield
    jit.start(before)


def within(name: str, x: F32, share: float = 1.0) -> F32:
    """x cut to what the format can hold."""
    limit = np.float32(LIMITS.get(name, 1e30) * share)
    return np.clip(x, -limit, limit)


def without_zero_signs(name: str, data: np.ndarray) -> np.ndarray:
    """Q4_1 and Q5_1 of blocks of 0 and -0: the sign of NumPy's min and max depends on the processor."""
    if name in ("Q4_1", "Q5_1"):
        halves = data.reshape(-1, FORMATS[name].n_bytes)[:, :4].view("<u2")
        halves[halves == 0x8000] = 0
    return data


def test_the_table() -> None:
    assert set(PLAIN) == {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"}
    assert set(SEARCHED) == {"Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"}
    assert set(WEIGHTED) == set(SEARCHED) | {"Q4_0", "Q4_1", "Q5_0", "Q5_1"}
    assert not FORMATS["IQ2_XXS"].is_writable


@pytest.mark.parametrize("name", PLAIN)
def test_plain_bytes_are_those_of_gguf(name: str) -> None:
    rng = np.random.default_rng(1)
    x = within(name, odd_rows(rng, 500, 96))
    ours = without_zero_signs(name, encode_rows(FORMATS[name], x, "t"))
    assert np.array_equal(ours, without_zero_signs(name, pack_rows(FORMATS[name], x)))
    with np.errstate(all="ignore"):
        theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name]).view(np.uint8)
    assert np.array_equal(ours, without_zero_signs(name, theirs.reshape(ours.shape)))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 31), (7, 16)])
def test_any_width_of_plain_numbers(name: str, shape: tuple[int, int]) -> None:
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    assert np.array_equal(encode_rows(FORMATS[name], x, "t"), pack_rows(FORMATS[name], x))


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("n_rows", [100, 3])
def test_searched_bytes_are_those_of_the_definition(name: str, n_rows: int) -> None:
    rng = np.random.default_rng(3)
    x = within(name, odd_rows(rng, 100, 512), 0.5)[-n_rows:]
    for importance in (None, importance_of(rng, 512)):
        if importance is not None or name in SEARCHED:
            ours = encode_rows(FORMATS[name], x, "t", importance)
            assert np.array_equal(ours, encode_reference(name, x, importance)), importance is not None


@pytest.mark.parametrize("name", ENCODERS)
def test_threads_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VALUES, "alone_macs", 0)
    rng = np.random.default_rng(4)
    x, importance = odd_rows(rng, 50, 512), importance_of(rng, 512)
    x = within(name, x, 0.5)
    one = [encode_rows(FORMATS[name], x, "t", i) for i in (None, importance)]
    jit.start(2)
    out = np.full_like(one[0], 0xAA)
    assert encode_rows(FORMATS[name], x, "t", out=out) is out
    assert np.array_equal(out, one[0])
    assert np.array_equal(encode_rows(FORMATS[name], x, "t", importance), one[1])
    assert bool(FORMATS[name].search) == (not np.array_equal(one[0], one[1]))


@pytest.mark.parametrize("name", ENCODERS)
def test_chunks_change_nothing(name: str) -> None:
    """A tensor is encoded in whatever pieces memory allows."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((40, 256)).astype(np.float32)
    for importance in (None, importance_of(rng, 256)):
        whole = encode_rows(FORMATS[name], x, "t", importance)
        pieces = [encode_rows(FORMATS[name], x[i : i + 17], "t", importance) for i in range(0, 40, 17)]
        assert np.array_equal(whole, np.concatenate(pieces))


@pytest.mark.parametrize("name", WEIGHTED)
def test_importance_lowers_the_weighted_error(name: str) -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((64, 1024)).astype(np.float32)
    importance = np.exp(rng.standard_normal(1024)).astype(np.float32)

    def error(encoded: np.ndarray) -> float:
        off = unpack_rows(FORMATS[name], encoded, x.shape) - x
        return float((importance * off * off).sum())

    plain, weighted = (error(encode_rows(FORMATS[name], x, "t", i)) for i in (None, importance))
    assert weighted < 0.9 * plain


def test_constant_rows_are_kept_where_an_offset_can() -> None:
    """A search must not lose what no search would: one value is exact but for the f16 of its scale."""
    x = np.repeat(np.array([[0.75], [-3.0], [1e-3], [0.0]], np.float32), 256, axis=1)
    for name in ("Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"):
        for importance in (None, importance_of(np.random.default_rng(7), 256)):
            back = unpack_rows(FORMATS[name], encode_rows(FORMATS[name], x, "t", importance), x.shape)
            assert np.abs(back - x).max() < 0.02 * np.abs(x).max(), (name, importance is not None)


@pytest.mark.parametrize("name", LIMITS)
def test_too_large_a_weight_is_named(name: str) -> None:
    x = np.zeros((2, 256), np.float32)
    x[1, 3] = -LIMITS[name]
    assert np.isfinite(unpack_rows(FORMATS[name], encode_rows(FORMATS[name], x, "t"), x.shape)).all()
    x[1, 3] *= np.float32(1.001)
    with pytest.raises(BadModelError, match=rf"'blk\.0\.x' holds .* more than the .* that {name} can hold"):
        encode_rows(FORMATS[name], x, "blk.0.x")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["host", *FORMS_OF_VECTORS])
def test_every_vector_form(form: str) -> None:
    """Another processor compiles to the same bytes, and no load or store leaves its memory."""
    script = "quant/encode_forms.py"
    done = run_script(script) if form == "host" else run_form(form, script)
    assert done.returncode == 0 and done.stdout.split() == ["same"], done.stdout + done.stderr
