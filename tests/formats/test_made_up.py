"""A format is one row and the file of its family: one that is made up is read, multiplied, written and verified."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from m2lite.describe import describe_file
from m2lite.errors import BadModelError
from m2lite.formats import table
from m2lite.formats.table import FORMATS, unpack_rows
from m2lite.kernels import fast, reference
from m2lite.quant.decode import decode_rows
from m2lite.quant.encode import encode_rows
from m2lite.quant.quantize import quantize
from m2lite.quant.recipes import parse_overrides
from m2lite.quant.verify import verify
from m2lite.simd import jit
from m2lite.storage.gguf_reader import open_gguf
from tests.formats import made_up
from tests.formats.made_up import NAME
from tests.kernels import cases
from tests.model.engine import Engine
from tests.quant.blocks import odd_rows
from tests.tinymodel import WIDE, write_model

pytestmark = pytest.mark.slow  # it compiles

EXPERTS = r"ffn_(gate|up|down)_exps"


@pytest.fixture(autouse=True)
def row() -> Iterator[None]:
    """The program knows the format for as long as a test runs."""
    before = jit.n_threads()
    jit.start(1)
    table.add_format(made_up.ROW)
    yield
    del table._by_name[NAME], table._by_type[made_up.ROW.ggml_type]
    jit.start(before)


def test_kernels_equal_their_twins() -> None:
    """For 1 to 33 rows of activations, as integers and as floats."""
    for mine, theirs, what in cases.matmul_cases(cases.SERIAL, (NAME,)):
        assert np.array_equal(np.atleast_1d(mine), np.atleast_1d(theirs)), what


def test_rows_are_written_and_read_as_the_definition_has_them() -> None:
    rows = odd_rows(np.random.default_rng(1), 40, 512)
    packed = encode_rows(FORMATS[NAME], rows, "t")
    assert np.array_equal(packed, made_up.pack(rows.reshape(-1, 256)).reshape(40, -1))
    values, finite = decode_rows(packed.reshape(-1), NAME, 40, 512)
    assert finite and np.array_equal(values, unpack_rows(FORMATS[NAME], packed, rows.shape))
    with pytest.raises(BadModelError, match=f"than the 262016 that {NAME} can hold"):
        encode_rows(FORMATS[NAME], rows * np.float32(1e9), "t")


def test_a_file_of_it_is_made_verified_and_run(tmp_path: Path) -> None:
    source = write_model(tmp_path / "f32.gguf", shape=WIDE, formats={"dense": "F32", "experts": "F32"})
    done = quantize(source, tmp_path / "x.gguf", "q8_0", overrides=parse_overrides([f"{EXPERTS}={NAME.lower()}"]))
    assert verify(done.path, against=source, n_samples=99).problems == ()
    found = {row["type"]: row for row in describe_file(str(done.path))["types"]}
    assert found[NAME]["n_tensors"] == 3 * WIDE.n_layers and found[NAME]["runs"] == "fast"
    tokens = list(b"abcdefghijklmnopqrst")  # 20 rows
    compiled, plain = (Engine(done.path, kernels=kernels).logits(tokens) for kernels in (fast, reference))
    assert np.isfinite(compiled).all() and np.array_equal(compiled, plain)
    del table._by_type[made_up.ROW.ggml_type]  # and it was the row that made the difference
    with pytest.raises(BadModelError, match="type 1000"), open_gguf(done.path):
        pass
    table._by_type[made_up.ROW.ggml_type] = made_up.ROW
