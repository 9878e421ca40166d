"""float32 rows -> bytes of a block format, checked and on all threads. What the bytes mean is in formats/.

Without importance the formats that the gguf package can write get exactly its bytes; the others, and all that take an
importance, are searched (search.py). The same input gives the same bytes for any number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from m2lite.errors import BadModelError
from m2lite.formats.table import BlockFormat
from m2lite.kernels.jit import n_parts
from m2lite.quant import search
from m2lite.quant.search_reference import scaled_importance

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# A block's scale is an f16: the largest weight that each format can hold. Above, the scale would be infinite.
F16_MAX = 65504.0
LIMITS = {
    "F16": F16_MAX,
    "Q4_0": F16_MAX * 8,
    "Q4_1": F16_MAX,
    "Q5_0": F16_MAX * 16,
    "Q5_1": F16_MAX,
    "Q8_0": F16_MAX * 127,
    # The searched formats could hold up to twice of that, but the best scale may exceed the plain one.
    "Q4_K": F16_MAX * 32,
    "Q5_K": F16_MAX * 32,
    "Q6_K": F16_MAX * 2048,
    "IQ4_NL": F16_MAX * 64,
    "IQ4_XS": F16_MAX * 2048,
}
# Every format that can be written -> whether an importance changes its bytes.
ENCODERS: Mapping[str, bool] = MappingProxyType(
    {name: name in search.WEIGHTED for name in ("F32", *search.ELEMENTS, *search.PLAIN, *search.WEIGHTED)}
)


def can_encode(name: str) -> bool:
    """Whether `encode_rows` writes this format."""
    return name in ENCODERS


def uses_importance(name: str) -> bool:
    """Whether an importance changes the bytes of this format."""
    return ENCODERS[name]


def encode_rows(
    block_format: BlockFormat, rows: F32, name: str, importance: F32 | None = None, out: Bytes | None = None
) -> Bytes:
    """uint8[n, row bytes] of float32[n, width]; `name` is for the message when a weight is too large for the format.

    importance: float32[width], the mean square of what each column is multiplied with, for formats that use one.
    """
    n_rows, width = rows.shape
    rows = np.ascontiguousarray(rows, np.float32)
    searched = importance is not None and uses_importance(block_format.name)
    _check_limit(block_format, rows, name, searched)
    row_bytes = block_format.row_bytes(width)
    if out is None:
        out = np.empty((n_rows, row_bytes), np.uint8)
    assert out.shape == (n_rows, row_bytes) and out.dtype == np.uint8 and out.flags.c_contiguous
    assert importance is None or (
        importance.shape == (width,) and bool((importance >= 0).all() and np.isfinite(importance).all())
    )
    if not rows.size:
        return out
    if block_format.name == "F32":
        out.reshape(-1).view("<f4")[:] = rows.reshape(-1)
    elif block_format.name in search.ELEMENTS:
        _encode_elements(block_format, rows.reshape(-1), out.reshape(-1))
    elif searched:
        _encode_blocks(search.WEIGHTED[block_format.name], block_format, rows, importance, out)
    else:
        encoder = (search.WEIGHTED | search.PLAIN)[block_format.name]
        blocks = rows.reshape(-1, block_format.n_weights)
        _encode_blocks(encoder, block_format, blocks, None, out.reshape(len(blocks), -1))
    return out


def _check_limit(block_format: BlockFormat, rows: F32, name: str, searched: bool) -> None:
    limit = LIMITS.get(block_format.name)
    if limit is not None and searched and block_format.name in search.PLAIN:
        limit /= 2  # the best scale may exceed the plain one
    if limit is not None and rows.size and (largest := max(float(rows.max()), -float(rows.min()))) > limit:
        raise BadModelError(
            f"Tensor {name!r} holds {largest:g}, more than the {limit:g} that {block_format.name} can hold.",
            "Convert with --type bf16 or f32.",
        )


def _encode_elements(block_format: BlockFormat, weights: F32, out: Bytes) -> None:
    n = weights.size
    search.ELEMENTS[block_format.name](n_parts(n), weights.ctypes.data, out.ctypes.data, n)
    tail = n // search.LANES * search.LANES
    if tail < n:
        assert block_format.pack is not None
        out[2 * tail :] = block_format.pack(weights[tail:])


def _encode_blocks(
    encoder: search.Encoder, block_format: BlockFormat, rows: F32, importance: F32 | None, out: Bytes
) -> None:
    """Encode rows of whole blocks; fewer than a tile's 16 rows are filled up with zeros first."""
    n_rows, width = rows.shape
    if n_rows < search.LANES:
        full = np.zeros((search.LANES, width), np.float32)
        full[:n_rows] = rows
        packed = np.empty((search.LANES, out.shape[1]), np.uint8)
        _encode_blocks(encoder, block_format, full, importance, packed)
        out[:] = packed[:n_rows]
        return
    weights = None if importance is None else scaled_importance(importance)
    sigma = np.empty(n_rows, np.float32)
    if weights is not None:
        search.row_squares(n_parts(rows.size), rows.ctypes.data, sigma.ctypes.data, n_rows, width)
    encoder.run(
        rows.ctypes.data,
        0 if weights is None else weights.ctypes.data,
        sigma.ctypes.data,
        out.ctypes.data,
        n_rows,
        width // block_format.n_weights,
    )
