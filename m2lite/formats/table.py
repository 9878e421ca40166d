"""The block formats of weights, a row each: what its blocks are, and what unpacks, multiplies and writes them.

A new format is one row and its pieces. They are in the file of its family: the definition, in NumPy, in formats/, what
the engine compiles in formats/kernels/, and what writes it in quant/encoders/.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np

from m2lite.formats import floats, fp4, iquants, kquants, plain, ternary
from m2lite.formats.fields import Bytes, Floats, Parts, unpack_of_gguf, weights_of


@dataclass(frozen=True)
class BlockFormat:
    """How `n_weights` consecutive weights of a row lie in `n_bytes` bytes, and who knows how to work with them.

    `unpack` is the definition, for any bytes. `pack` exists for floats, `parts` where weights are integers times
    scales: what kernels that multiply integers have to agree with. A piece that brings Numba in is "module:name", so
    that it is imported when it is first used.
    """

    name: str
    ggml_type: int
    n_weights: int
    n_bytes: int
    unpack: Callable[[Bytes], Floats]  # [..., n_bytes] -> [..., n_weights]
    unpacker: str  # the same for kernels: a formats.kernels.block.Unpacker; of floats 16 in registers, as LLVM IR
    pack: Callable[[Floats], Bytes] | None = None  # [..., n_weights] -> [..., n_bytes]
    parts: Callable[[Bytes], Parts] | None = None
    tile: str = ""  # a formats.kernels.tile.TileForm, where there are parts: then kernels multiply integers
    encoder: str = ""  # as quant/encoders/block.py says, the bytes of the gguf package; of floats it stores 16
    search: str = ""  # the same with an importance, and also without one where there is no encoder
    largest: float = math.inf  # the largest weight that there may be: above, a scale could be infinite

    @property
    def is_float(self) -> bool:
        return self.n_weights == 1

    @property
    def is_writable(self) -> bool:
        return bool(self.encoder or self.search)

    def row_bytes(self, n_weights: int) -> int:
        """Bytes of a row of `n_weights` weights, which must be whole blocks."""
        if n_weights % self.n_weights:
            raise ValueError(f"{n_weights} weights are not whole {self.name} blocks of {self.n_weights}")
        return n_weights // self.n_weights * self.n_bytes


def piece(place: str) -> Any:
    """The piece that a row names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def unpack_rows(fmt: BlockFormat, data: Bytes, shape: Sequence[int]) -> Floats:
    """float32[shape] = the weights in `data`, whose last axis is `shape[-1]` weights wide."""
    fmt.row_bytes(shape[-1])
    blocks = np.ascontiguousarray(data).reshape(-1, fmt.n_bytes)
    if len(blocks) * fmt.n_weights != math.prod(shape):
        raise ValueError(f"{data.size} bytes of {fmt.name} do not hold {tuple(shape)} weights")
    return fmt.unpack(blocks).reshape(shape)


def _row(
    family: ModuleType, name: str, ggml_type: int, n_weights: int, n_bytes: int, writers: str = "",
    largest: float = math.inf,
) -> BlockFormat:  # fmt: skip
    """A format whose pieces are called after it, unpack_q4_k and the like, in the files of its family."""
    low, home = name.lower(), family.__name__.rpartition(".")[2]
    pack, parts, unpack = (getattr(family, f"{what}_{low}", None) for what in ("pack", "parts", "unpack"))
    places = {"unpacker": f"m2lite.formats.kernels.{home}:unpack_{low}"}
    if parts:
        places["tile"] = f"m2lite.formats.kernels.{home}:tile_{low}"
    if "encode" in writers:
        places["encoder"] = f"m2lite.quant.encoders.{home}:encode_{low}"
    if "search" in writers:
        places["search"] = f"m2lite.quant.encoders.{home}:search_{low}"
    unpack = unpack or (weights_of(parts) if parts else unpack_of_gguf(ggml_type))
    return BlockFormat(
        name, ggml_type, n_weights, n_bytes, unpack=unpack, pack=pack, parts=parts, largest=largest, **places
    )


_F16 = 65504.0  # the largest one: most scales are f16


_TABLE = (
    _row(floats, "F32", 0, 1, 4, "encode"),
    _row(floats, "F16", 1, 1, 2, "encode", _F16),
    _row(floats, "BF16", 30, 1, 2, "encode"),
    _row(plain, "Q4_0", 2, 32, 18, "encode search", 8 * _F16),
    _row(plain, "Q4_1", 3, 32, 20, "encode search", _F16),
    _row(plain, "Q5_0", 6, 32, 22, "encode search", 16 * _F16),
    _row(plain, "Q5_1", 7, 32, 24, "encode search", _F16),
    _row(plain, "Q8_0", 8, 32, 34, "encode", 127 * _F16),
    # 16 x (low nibble scale, high nibble min), 64 x four 2-bit numbers, d, dmin: w = (d s) q - (dmin m)
    _row(kquants, "Q2_K", 10, 256, 84),
    # 32 of high bits, 64 x four 2-bit numbers, 12 of scales, d: w = d (s - 32) (q + 4 h - 4)
    _row(kquants, "Q3_K", 11, 256, 110),
    # Searched formats could hold up to twice of what is said, but the best scale may exceed the plain one.
    _row(kquants, "Q4_K", 12, 256, 144, "search", 32 * _F16),
    _row(kquants, "Q5_K", 13, 256, 176, "search", 32 * _F16),
    _row(kquants, "Q6_K", 14, 256, 210, "search", 2048 * _F16),
    # d, 8 x (4 codes of 8 bits, 4 sign codes of 7 bits, scale of 4 bits): w = d (1/2 + s) / 4 value sign
    _row(iquants, "IQ2_XXS", 16, 256, 66),
    # d, 32 x (code of 9 bits, sign code of 7 bits), 16 scales of 4 bits: w as in IQ2_XXS
    _row(iquants, "IQ2_XS", 17, 256, 74),
    # d, 32 low bytes of codes, 32 of signs, 8 x four high pairs, 16 scales of 4 bits: w as in IQ2_XXS
    _row(iquants, "IQ2_S", 22, 256, 82),
    # d, 64 codes, 8 x (4 sign codes of 7 bits, scale of 4 bits): w = d (1/2 + s) / 2 value sign
    _row(iquants, "IQ3_XXS", 18, 256, 98),
    # d, 64 low bytes of codes, 64 high bits, 32 bytes of signs, 8 scales: w = d (1 + 2 s) value sign
    _row(iquants, "IQ3_S", 21, 256, 110),
    # d, 32 low bytes of codes, 8 x (four high triples, scale of 3 bits, sign of delta): w = d (2 s + 1) (value + delta)
    _row(iquants, "IQ1_S", 19, 256, 50),
    # 32 low bytes of codes, 32 x (high triple, sign of delta), 4 x (four 3-bit scales, a nibble of d): w as in IQ1_S
    _row(iquants, "IQ1_M", 29, 256, 56),
    _row(iquants, "IQ4_NL", 20, 32, 18, "search", 64 * _F16),
    _row(iquants, "IQ4_XS", 23, 256, 136, "search", 2048 * _F16),
    _row(ternary, "TQ1_0", 34, 256, 54),
    _row(ternary, "TQ2_0", 35, 256, 66),
    _row(fp4, "MXFP4", 39, 32, 17, "encode"),
    _row(fp4, "NVFP4", 40, 64, 36),
)
_by_name: dict[str, BlockFormat] = {}
_by_type: dict[int, BlockFormat] = {}
FORMATS: Mapping[str, BlockFormat] = MappingProxyType(_by_name)
BY_TYPE: Mapping[int, BlockFormat] = MappingProxyType(_by_type)


def add_format(fmt: BlockFormat) -> None:
    """From now on files may have tensors of it."""
    assert fmt.name not in FORMATS and fmt.ggml_type not in BY_TYPE, fmt.name
    _by_name[fmt.name] = _by_type[fmt.ggml_type] = fmt


for _fmt in _TABLE:
    add_format(_fmt)

# Every type that ggml numbers, so that a refusal can name it. 4, 5, 31-33 and 36-38 were taken out of the format.
_NAMES = """
    F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL
    IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 IQ4_NL_4_8
    IQ4_NL_8_8 MXFP4 NVFP4 Q1_0 Q2_0
"""
TYPE_NAMES: Mapping[int, str] = MappingProxyType(dict(enumerate(_NAMES.split())))

# The types that only ik_llama.cpp has (its ggml.h), by number; _R4 and the like hold rows interleaved.
_IK_NAMES = """
    133 Q6_0 134 IQ1_BN 135 IQ2_BN 136 Q8_K64 137 IQ2_K 138 IQ3_K 139 IQ4_K 140 IQ5_K
    141 IQ6_K 142 IQ2_TN 143 IQ1_TN 144 IQ4_KS 145 IQ2_KS 146 IQ4_KSS 147 Q8_K16 148 Q8_K32 149 Q8_KR8 150 Q8_K128
    151 Q8_KV 152 IQ5_KS 153 IQ2_KT 154 IQ3_KT 155 IQ4_KT 156 IQ3_KS 157 IQ2_KL 158 IQ1_KT 202 Q4_0_R8 206 Q5_0_R4
    208 Q8_0_R8 210 Q2_K_R4 211 Q3_K_R4 212 Q4_K_R4 213 Q5_K_R4 214 Q6_K_R4 216 IQ2_XXS_R4 217 IQ2_XS_R4 218 IQ3_XXS_R4
    219 IQ1_S_R4 220 IQ4_NL_R4 221 IQ3_S_R4 222 IQ2_S_R4 223 IQ4_XS_R8 229 IQ1_M_R4 230 BF16_R16 233 Q6_0_R4
    335 IQ2_BN_R4 337 IQ2_K_R4 338 IQ3_K_R4 339 IQ4_K_R4 340 IQ5_K_R4 344 IQ4_KS_R4 352 IQ5_KS_R4 397 Q8_K_R16
    398 Q8_KV_R8 399 Q8_K_R8
"""
IK_TYPE_NAMES: Mapping[int, str] = MappingProxyType(
    dict(zip(map(int, _IK_NAMES.split()[::2]), _IK_NAMES.split()[1::2], strict=True))
)
