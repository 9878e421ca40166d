"""float32 rows -> bytes of a block format, checked. The formats themselves are defined in storage/blocks.py."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from m2lite.errors import BadModelError
from m2lite.storage.blocks import BlockFormat, pack_rows

# A block's scale is an f16: the largest weight that each format can hold. Above, the scale would be infinite.
F16_MAX = 65504.0
LIMITS = {"F16": F16_MAX, "Q4_0": F16_MAX * 8, "Q8_0": F16_MAX * 127}


def encode_rows(block_format: BlockFormat, rows: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.uint8]:
    """uint8[rows, row bytes]; `name` is for the message when a weight is too large for the format."""
    limit = LIMITS.get(block_format.name)
    if limit is not None and rows.size and (largest := float(np.abs(rows).max())) > limit:
        raise BadModelError(
            f"Tensor {name!r} holds {largest:g}, more than the {limit:g} that {block_format.name} can hold.",
            "Convert with --type bf16 or f32.",
        )
    return pack_rows(block_format, rows)
