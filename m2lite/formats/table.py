"""The block formats of weights, as one table; NumPy is their definition. Knows bytes and numbers, not tensors.

A new format is one row in `_TABLE` with its functions. `unpack` reads any bytes. `pack` exists for numbers on their
own; blocks of several are packed by quant/encode.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from m2lite.formats import floats, fp4, iquants, kquants, plain
from m2lite.formats.fields import Bytes, Floats, Parts, unpack_of_gguf, weights_of


@dataclass(frozen=True)
class BlockFormat:
    """How `n_weights` consecutive weights of a row lie in `n_bytes` bytes.

    `parts` exists where weights are integers times scales: what kernels that multiply integers have to agree with.
    """

    name: str
    ggml_type: int
    n_weights: int
    n_bytes: int
    unpack: Callable[[Bytes], Floats]  # [..., n_bytes] -> [..., n_weights]
    pack: Callable[[Floats], Bytes] | None = None  # [..., n_weights] -> [..., n_bytes]
    parts: Callable[[Bytes], Parts] | None = None

    def row_bytes(self, n_weights: int) -> int:
        """Bytes of a row of `n_weights` weights, which must be whole blocks."""
        if n_weights % self.n_weights:
            raise ValueError(f"{n_weights} weights are not whole {self.name} blocks of {self.n_weights}")
        return n_weights // self.n_weights * self.n_bytes


def unpack_rows(fmt: BlockFormat, data: Bytes, shape: Sequence[int]) -> Floats:
    """float32[shape] = the weights in `data`, whose last axis is `shape[-1]` weights wide."""
    fmt.row_bytes(shape[-1])
    blocks = np.ascontiguousarray(data).reshape(-1, fmt.n_bytes)
    if len(blocks) * fmt.n_weights != math.prod(shape):
        raise ValueError(f"{data.size} bytes of {fmt.name} do not hold {tuple(shape)} weights")
    return fmt.unpack(blocks).reshape(shape)


def _integers(name: str, ggml_type: int, n_weights: int, n_bytes: int, parts: Callable[[Bytes], Parts]) -> BlockFormat:
    return BlockFormat(name, ggml_type, n_weights, n_bytes, weights_of(parts), parts=parts)


def _from_gguf(name: str, ggml_type: int, n_bytes: int) -> BlockFormat:
    return BlockFormat(name, ggml_type, 256, n_bytes, unpack_of_gguf(ggml_type))


_TABLE = (
    BlockFormat("F32", 0, 1, 4, floats.unpack_f32, floats.pack_f32),
    BlockFormat("F16", 1, 1, 2, floats.unpack_f16, floats.pack_f16),
    BlockFormat("BF16", 30, 1, 2, floats.unpack_bf16, floats.pack_bf16),
    _integers("Q4_0", 2, 32, 18, plain.parts_q4_0),
    BlockFormat("Q4_1", 3, 32, 20, plain.unpack_q4_1, parts=plain.parts_q4_1),
    _integers("Q5_0", 6, 32, 22, plain.parts_q5_0),
    BlockFormat("Q5_1", 7, 32, 24, plain.unpack_q5_1, parts=plain.parts_q5_1),
    _integers("Q8_0", 8, 32, 34, plain.parts_q8_0),
    # 16 x (low nibble scale, high nibble min), 64 x four 2-bit numbers, d, dmin: w = (d s) q - (dmin m)
    _from_gguf("Q2_K", 10, 84),
    # 32 of high bits, 64 x four 2-bit numbers, 12 of scales, d: w = d (s - 32) (q + 4 h - 4)
    _from_gguf("Q3_K", 11, 110),
    _integers("Q4_K", 12, 256, 144, kquants.parts_q4_k),
    _integers("Q5_K", 13, 256, 176, kquants.parts_q5_k),
    _integers("Q6_K", 14, 256, 210, kquants.parts_q6_k),
    # d, 8 x (4 codes of 8 bits, 4 sign codes of 7 bits, scale of 4 bits): w = d (1/2 + s) / 4 value sign
    _from_gguf("IQ2_XXS", 16, 66),
    # d, 32 x (code of 9 bits, sign code of 7 bits), 16 scales of 4 bits: w as in IQ2_XXS
    _from_gguf("IQ2_XS", 17, 74),
    # d, 32 low bytes of codes, 32 of signs, 8 x four high pairs, 16 scales of 4 bits: w as in IQ2_XXS
    _from_gguf("IQ2_S", 22, 82),
    # d, 64 codes, 8 x (4 sign codes of 7 bits, scale of 4 bits): w = d (1/2 + s) / 2 value sign
    _from_gguf("IQ3_XXS", 18, 98),
    # d, 64 low bytes of codes, 64 high bits, 32 bytes of signs, 8 scales: w = d (1 + 2 s) value sign
    _from_gguf("IQ3_S", 21, 110),
    # d, 32 low bytes of codes, 8 x (four high triples, scale of 3 bits, sign of delta): w = d (2 s + 1) (value + delta)
    _from_gguf("IQ1_S", 19, 50),
    # 32 low bytes of codes, 32 x (high triple, sign of delta), 4 x (four 3-bit scales, a nibble of d): w as in IQ1_S
    _from_gguf("IQ1_M", 29, 56),
    _integers("IQ4_NL", 20, 32, 18, iquants.parts_iq4_nl),
    _integers("IQ4_XS", 23, 256, 136, iquants.parts_iq4_xs),
    # 32 and 16 x five, 4 x four digits of base 3, d: digit k is the top of 3 (byte 3**k mod 256) / 256; w = d (q - 1)
    _from_gguf("TQ1_0", 34, 54),
    # 64 x four 2-bit numbers, d: w = d (q - 1)
    _from_gguf("TQ2_0", 35, 66),
    _integers("MXFP4", 39, 32, 17, fp4.parts_mxfp4),
    BlockFormat("NVFP4", 40, 64, 36, fp4.unpack_nvfp4),
)
FORMATS: Mapping[str, BlockFormat] = MappingProxyType({fmt.name: fmt for fmt in _TABLE})
BY_TYPE: Mapping[int, BlockFormat] = MappingProxyType({fmt.ggml_type: fmt for fmt in _TABLE})

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
