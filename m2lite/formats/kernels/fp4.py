"""MXFP4 and NVFP4 for kernels: to float32, and as tiles of integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from m2lite.formats.fields import Floats
from m2lite.formats.fp4 import E2M1_DOUBLED, UE4M3, power_of_two
from m2lite.formats.kernels.block import Unpacker, bits_at
from m2lite.formats.kernels.tile import Integers, Nibbles, Step, TileForm, constant, floats, loads_of
from m2lite.simd.emit import I8, I32, RowAddresses, gather
from m2lite.simd.kinds import Address, F32x16, I32x16
from m2lite.simd.memory import load_pair, read_u8, store_f32
from m2lite.simd.vectors import lane_bits, lookup_of

# Unpacker fills them in.
look_up: Callable[[I32x16], F32x16]  # what the codes stand for
powers: Floats  # the scales


def _mxfp4(w: Address, out: Address) -> None:
    for i in range(2):
        store_f32(out + 64 * i, powers[read_u8(w)] * look_up(bits_at(w + 1, 4 * i, 15)))


def _nvfp4(w: Address, out: Address) -> None:
    for g in range(4):  # 16 weights: the low halves of 8 bytes, then their high halves
        both = load_pair(w + 4 + 8 * g, w + 4 + 8 * g)
        codes = (both >> (lane_bits(0xFF00) << 2)) & 15
        store_f32(out + 64 * g, powers[read_u8(w + g)] * look_up(codes))


def _tables(scales: Floats) -> dict[str, Any]:
    return {"look_up": lookup_of(E2M1_DOUBLED.tolist()), "powers": scales}


unpack_mxfp4 = Unpacker(_mxfp4, lambda: _tables(power_of_two(np.arange(256, dtype=np.uint8))))
unpack_nvfp4 = Unpacker(_nvfp4, lambda: _tables(UE4M3))


def _read_mxfp4(builder: ir.IRBuilder, form: TileForm, rows: RowAddresses, step: Step) -> None:
    """The scale is half of 2**(e - 127), since the values are doubled; e below 2 makes it a denormal.

    (e - 1) 2**23 are its bits from e = 2 on, (e + 1) 2**21 below, and the larger number is the right one.
    """
    e = builder.zext(gather(builder, rows, 0, I8), ir.VectorType(I32, rows.n))
    quarter = builder.shl(e, constant(e, 21))
    normal = builder.sub(builder.shl(quarter, constant(e, 2)), constant(e, 1 << 23))
    denormal = builder.add(quarter, constant(e, 1 << 21))
    scale = builder.select(builder.icmp_signed(">", normal, denormal), normal, denormal)
    weights = form.weights(builder, loads_of(builder, form, rows), 0)
    step(weights, [builder.bitcast(scale, floats(scale))])


_VALUES = [v + 16 for v in E2M1_DOUBLED.tolist()]  # as Integers has them
tile_mxfp4 = TileForm("MXFP4", Integers(5, offset=16), _read_mxfp4, Nibbles(1, table=_VALUES))
