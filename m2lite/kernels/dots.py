"""Exact integer dots of 16 weight rows with rows of activations, in every vector form, as LLVM IR. Sees no format.

A tile holds 32 weights of 16 rows: lane i of vector d has weights 4d..4d+3 of row i, a byte each. An activation row is
at an address: 32 int8, then what panels keep about them (SCALE_AT ...). The sums are exact in int32: all forms agree.
"""

from __future__ import annotations

from llvmlite import ir

from m2lite.formats.kernels.tile import Integers
from m2lite.simd.emit import (
    FORM,
    I8,
    I16,
    I32,
    LANES,
    Vectors,
    call_llvm,
    const,
    halves,
    joined,
    load,
    merged,
    pinned,
    splat,
    split,
)

GROUP = 64  # rows of a panel that share one pass over a tile


# A block of 32 activations in a panel: byte offsets of what follows its 32 int8, and its size.
SCALE_AT = 32  # float32: activation = scale x int8
SUM_AT = 36  # two int16: -8 x (sum of those of the 32 whose place modulo 4 is below 2), -8 x (sum of the others)
SCALED_SUM_AT = 40  # float32: -(scale x sum), for formats whose blocks have a minimum
HALF_SUM_AT = 44  # as SUM_AT, of the first 16, for formats with a scale per 16
PANEL_BYTES = 48


# These multiply unsigned by signed bytes: signed weights get +128. maddubs could not (255 x 127 x 2 saturates): it
# takes the weight's magnitude and an activation with the weight's sign. sdot takes signed weights as they are.
_WANTS_UNSIGNED = FORM in ("avx512vnni", "avxvnni", "portable")


def prepare(builder: ir.IRBuilder, kind: Integers, tile: Vectors) -> Vectors:
    """The tile's bytes as this form's `integer_dots` takes them; done once per tile."""
    if kind.is_signed and _WANTS_UNSIGNED:
        return [builder.xor(v, const(0x80808080 - (1 << 32))) for v in tile]
    return tile


def signed(builder: ir.IRBuilder, kind: Integers, tile: Vectors) -> Vectors:
    """The tile's bytes less their offset."""
    if kind.offset == 0:
        return tile
    bytes_ = ir.VectorType(I8, 4 * LANES)
    less = const(-kind.offset, 4 * LANES, I8)
    return [builder.bitcast(builder.add(builder.bitcast(v, bytes_), less), v.type) for v in tile]


def integer_dots(builder: ir.IRBuilder, kind: Integers, tile: Vectors, rows: Vectors) -> list[Vectors]:
    """Per row (an address) and group of weights: 16 lanes of int32, the dots of the 16 weight rows with that group."""
    if FORM != "avx2":
        return _dots_dot4(builder, kind, tile, rows)
    groups = [group_dots(builder, kind, tile, rows, g) for g in range(kind.n_groups)]
    return [list(row) for row in zip(*groups, strict=True)]


def group_dots(builder: ir.IRBuilder, kind: Integers, tile: Vectors, rows: Vectors, g: int) -> Vectors:
    """AVX2's `integer_dots` for one group: the sums of two at once do not fit into its registers."""
    return _dots_signed(builder, tile, rows) if kind.is_signed else _dots_unsigned(builder, kind, tile, rows, g)


def starts_of(builder: ir.IRBuilder, kind: Integers, row: ir.Value, n_lanes: int = LANES) -> list[ir.Value | None]:
    """What each group's sum of an activation row begins with: - offset x (sum of its activations); None for nothing."""
    offset = 128 if kind.is_signed and _WANTS_UNSIGNED else kind.offset
    if offset == 0:
        return [None] * kind.n_groups
    sums = []
    for place in [SUM_AT] if kind.n_groups == 1 else [HALF_SUM_AT, SUM_AT]:
        both = load(builder, row, I32, place)
        low = builder.sext(builder.trunc(both, I16), I32)
        sums.append(splat(builder, builder.add(low, builder.ashr(both, I32(16))), n_lanes))
    if kind.n_groups == 2:
        sums[1] = builder.sub(sums[1], sums[0])
    shift = _eighths(offset)
    return [builder.shl(v, const(shift, n_lanes)) if shift else v for v in sums]


def _eighths(offset: int) -> int:
    """log2 of offset / 8: panels keep sums times 8."""
    assert offset in (8, 16, 32, 64, 128)
    return (offset // 8).bit_length() - 1


# --- forms with an instruction for four products in 32 bits ----------------------------------------------------------


def _dots_dot4(builder: ir.IRBuilder, kind: Integers, tile: Vectors, rows: Vectors) -> list[Vectors]:
    """Two chains per row, since one would wait for its own last sum."""
    out = []
    for row in rows:
        chains = [const(0) if s is None else s for s in (*starts_of(builder, kind, row), None)[:2]]
        for i in range(4):
            for chain, d in ((0, i), (1, i + 4)):
                chains[chain] = dot4(builder, chains[chain], tile[d], load(builder, row, I32, 4 * d))
        out.append(chains if kind.n_groups == 2 else [builder.add(*chains)])
    return out


_DOT4 = {  # per form: the instruction, and the lanes of 32 bits that it works on
    "avx512vnni": ("llvm.x86.avx512.vpdpbusd.512", 16),
    "avxvnni": ("llvm.x86.avx512.vpdpbusd.256", 8),
    "neondot": ("llvm.aarch64.neon.sdot.v4i32.v16i8", 4),
}


def dot4(builder: ir.IRBuilder, acc: ir.Value, w: ir.Value, s: ir.Value) -> ir.Value:
    """acc[i] + sum of 4 (byte of w[i]) x (signed byte of s); bytes of w are unsigned, in the sdot form signed."""
    if FORM not in _DOT4:
        for byte in range(4):
            weight = builder.and_(builder.lshr(w, const(8 * byte)), const(0xFF))
            signed = builder.ashr(builder.shl(s, I32(24 - 8 * byte)), I32(24))
            acc = builder.add(acc, builder.mul(weight, splat(builder, signed)))
        return acc
    name, n = _DOT4[FORM]
    lanes, v = ir.VectorType(I32, n), ir.VectorType(I8, 4 * n)
    signed = builder.bitcast(splat(builder, s, n), v)
    parts = zip(split(builder, acc, LANES // n), split(builder, w, LANES // n), strict=True)
    return merged(builder, [call_llvm(builder, name, lanes, [a, builder.bitcast(u, v), signed]) for a, u in parts])


# --- AVX2: pairs of products in 16 bits -------------------------------------------------------------------------------

_BYTES, _WORDS, _HALF = ir.VectorType(I8, 32), ir.VectorType(I16, 16), ir.VectorType(I32, 8)


def sums_that_fit(bits: int) -> int:
    """How many results of maddubs (two products each) can be added in int16, whatever the bytes."""
    return 1 if bits == 8 else 32767 // (2 * ((1 << bits) - 1) * 127)


def _dots_unsigned(builder: ir.IRBuilder, kind: Integers, tile: Vectors, rows: Vectors, g: int) -> Vectors:
    """Pairs of products are added in int16 and widened once per group: about 2 operations per 32 products.

    Sums may pass int16 on the way: they wrap, and end inside. For that they begin with - center x (the activations that
    the lane sums), which makes them those of weights within +-center.
    """
    n = 8 // kind.n_groups
    center = kind.offset or (0 if sums_that_fit(kind.bits) >= n else 1 << (kind.bits - 1))
    assert n * 2 * center * 127 <= 32767
    starts = [_pair_sums(builder, kind, row, g) if center else None for row in rows]
    sums = [[_shifted(builder, start, center)] * 2 if start is not None else [None] * 2 for start in starts]
    for d in range(g * n, (g + 1) * n):
        weights = [builder.bitcast(h, _BYTES) for h in halves(builder, tile[d])]
        for r, row in enumerate(rows):
            x = builder.bitcast(splat(builder, load(builder, row, I32, 4 * d), 8), _BYTES)
            for h in (0, 1):
                pairs = _pairs(builder, weights[h], x)
                if sums[r][h] is not None:  # LLVM would make trees of the chains, for which it lacks registers
                    pairs = pinned(builder, builder.add(sums[r][h], pairs))
                sums[r][h] = pairs
    out = []
    for r, start in enumerate(starts):
        wide = [quads_of(builder, v) for v in sums[r]]
        if start is not None and center != kind.offset:
            lost = quads_of(builder, start, -(center // 8))
            wide = [builder.add(v, lost) for v in wide]
        out.append(joined(builder, *wide))
    return out


def _pair_sums(builder: ir.IRBuilder, kind: Integers, row: ir.Value, group: int) -> ir.Value:
    """16 int16: what panels keep of the activations that each lane of a group's sums meets."""

    def sums(place: int) -> ir.Value:
        return builder.bitcast(splat(builder, load(builder, row, I32, place), 8), _WORDS)

    if kind.n_groups == 1:
        return sums(SUM_AT)
    return builder.sub(sums(SUM_AT), sums(HALF_SUM_AT)) if group else sums(HALF_SUM_AT)


def _shifted(builder: ir.IRBuilder, pair_sums: ir.Value, center: int) -> ir.Value:
    shift = _eighths(center)
    return builder.shl(pair_sums, const(shift, 16, I16)) if shift else pair_sums


def _dots_signed(builder: ir.IRBuilder, tile: Vectors, rows: Vectors) -> Vectors:
    """Two products fill an int16, so each pair is widened at once: about 4 operations per 32 products."""
    sums: list[Vectors] = [[const(0, 8)] * 2 for _ in rows]
    for d in range(8):
        weights = [builder.bitcast(h, _BYTES) for h in halves(builder, tile[d])]
        sizes = [_magnitude(builder, w) for w in weights]
        for r, row in enumerate(rows):
            x = builder.bitcast(splat(builder, load(builder, row, I32, 4 * d), 8), _BYTES)
            for h in (0, 1):
                pairs = _pairs(builder, sizes[h], _with_sign(builder, x, weights[h]))
                sums[r][h] = pinned(builder, builder.add(sums[r][h], quads_of(builder, pairs)))
    return [joined(builder, *row) for row in sums]


def pairs_of(builder: ir.IRBuilder, kind: Integers, w: ir.Value, x: ir.Value) -> ir.Value:
    """16 int16: the sums of two products each of 32 weights with 32 int8 (of which none is -128)."""
    if kind.can_change_sign:  # activations serve many weights, so their magnitudes cost nothing
        return _pairs(builder, _magnitude(builder, x), _with_sign(builder, w, x))
    if kind.is_signed:
        return _pairs(builder, _magnitude(builder, w), _with_sign(builder, x, w))
    return _pairs(builder, w, x)


def quads_of(builder: ir.IRBuilder, pairs: ir.Value, factor: int = 1) -> ir.Value:
    """8 int32 from 16 int16: the sums of neighbours, times a factor."""
    return call_llvm(builder, "llvm.x86.avx2.pmadd.wd", _HALF, [pairs, const(factor, 16, I16)])


def _pairs(builder: ir.IRBuilder, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    return call_llvm(builder, "llvm.x86.avx2.pmadd.ub.sw", _WORDS, [unsigned, signed])


def _magnitude(builder: ir.IRBuilder, w: ir.Value) -> ir.Value:
    return call_llvm(builder, "llvm.abs.v32i8", _BYTES, [w, ir.IntType(1)(0)])


def _with_sign(builder: ir.IRBuilder, x: ir.Value, w: ir.Value) -> ir.Value:
    return call_llvm(builder, "llvm.x86.avx2.psign.b", _BYTES, [x, w])
