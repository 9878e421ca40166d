"""Dots of 8 weight rows with one activation row where products are made in pairs (AVX2), as LLVM IR.

A tile brings bytes of different rows together first, so that every lane sums one row: it pays when the tile meets
several activation rows. For a single one it is less work to multiply rows as they lie and to add the lanes of several
rows at the end. The sums are the same integers.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from m2lite.formats.kernels.tile import Integers, Nibbles, TileForm
from m2lite.kernels.dots import pairs_of, quads_of, starts_of, sums_that_fit
from m2lite.simd import emit
from m2lite.simd.emit import I8, I32, RowAddresses, Vectors, load

_SIXTEEN, _BYTES = ir.VectorType(I8, 16), ir.VectorType(I8, 32)
_FOUR, _EIGHT = ir.VectorType(I32, 4), ir.VectorType(I32, 8)


@dataclass
class _Sums:
    """Partial sums of products, and how many pairs an int16 of them holds; 0: they are int32."""

    value: ir.Value
    n_pairs: int = 0


class _Adder:
    """Adds in int16 as long as every sum of a kind of weights must fit, then in int32."""

    def __init__(self, builder: ir.IRBuilder, kind: Integers) -> None:
        self.builder, self.kind = builder, kind

    def widened(self, a: _Sums) -> _Sums:
        return _Sums(quads_of(self.builder, a.value)) if a.n_pairs else a

    def added(self, a: _Sums, b: _Sums) -> _Sums:
        """a + b, lane by lane."""
        a, b = self._with_room(a, b)
        return _Sums(self.builder.add(a.value, b.value), 2 * a.n_pairs)

    def folded(self, a: _Sums, b: _Sums, first: list[int], second: list[int]) -> _Sums:
        """The 32-bit lanes `first` of a and b side by side (b's count from 8) plus the lanes `second`."""
        a, b = self._with_room(a, b)
        parts = [self.shuffled(a, b, places) for places in (first, second)]
        return _Sums(self.builder.add(*parts), 2 * a.n_pairs)

    def shuffled(self, a: _Sums, b: _Sums, places: list[int]) -> ir.Value:
        left, right = (self.builder.bitcast(v.value, _EIGHT) for v in (a, b))
        found = self.builder.shuffle_vector(left, right, ir.Constant(_EIGHT, places))
        return self.builder.bitcast(found, a.value.type)

    def four(self, sums: list[_Sums]) -> _Sums:
        """Each of four vectors folded into one lane of the lower 16 bytes and one of the upper."""
        even, odd = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]
        pairs = [self.folded(sums[i], sums[i + 1], even, odd) for i in (0, 2)]
        return self.folded(pairs[0], pairs[1], even, odd)

    def _with_room(self, a: _Sums, b: _Sums) -> tuple[_Sums, _Sums]:
        fits = 2 * a.n_pairs <= sums_that_fit(self.kind.bits)
        return (a, b) if fits else (self.widened(a), self.widened(b))


def _with_fifth(builder: ir.IRBuilder, low: Vectors, pair: list[ir.Value], offset: int) -> Vectors:
    """Bit i of the four bytes at `offset` of a row above the nibble of its weight i."""
    four = [emit.splat(builder, load(builder, at, I32, offset), 4) for at in pair]
    both = builder.bitcast(emit.joined(builder, *four), _BYTES)
    masks, out = ir.Constant(_BYTES, [1 << (i % 8) for i in range(32)]), []
    for half, v in enumerate(low):
        places = ir.Constant(ir.VectorType(I32, 32), [16 * (i // 16) + 2 * half + i % 16 // 8 for i in range(32)])
        spread = builder.shuffle_vector(both, both, places)
        is_set = builder.icmp_unsigned("==", builder.and_(spread, masks), masks)
        fifth = builder.and_(builder.sext(is_set, _BYTES), emit.const(16, 32, I8))
        out.append(builder.or_(v, builder.bitcast(fifth, _EIGHT)))
    return out


def _halves(builder: ir.IRBuilder, nibbles: Nibbles, pair: list[ir.Value], step: int) -> Vectors:
    """The first 16 weights of a step of both rows' blocks, and the last 16 of both."""

    def load_both(offset: int) -> Vectors:
        return [emit.joined(builder, *(load(builder, at, _FOUR, offset) for at in pair))]

    codes = nibbles(builder, load_both, step)
    return codes if nibbles.fifth is None else _with_fifth(builder, codes, pair, nibbles.fifth)


def row_dots(builder: ir.IRBuilder, form: TileForm, rows: RowAddresses, step: int, x: ir.Value) -> Vectors:
    """Per group of weights: 8 lanes of int32, the dots of one step of 8 rows with the activations at x."""
    kind, weights, at = form.integers, form.weights, [rows.at(builder, row) for row in range(8)]
    adder = _Adder(builder, kind)

    def products(w: ir.Value, signed: ir.Value) -> _Sums:
        return _Sums(pairs_of(builder, kind, builder.bitcast(w, _BYTES), signed), 1)

    if isinstance(weights, Nibbles):
        sixteen = [load(builder, x, _SIXTEEN, offset) for offset in (0, 16)]
        signed = [emit.joined(builder, v, v) for v in sixteen]
        sums = []
        for row in range(4):
            halves = _halves(builder, weights, [at[row], at[row + 4]], step)
            sums.append(adder.added(*map(products, halves, signed)))
        out = [adder.four(sums)]
    else:
        signed = load(builder, x, _BYTES)

        def products_of(row: ir.Value) -> _Sums:
            (whole,) = weights(builder, lambda offset: [load(builder, row, _EIGHT, offset)], step)
            return products(whole, signed)

        fours = [adder.four([products_of(row) for row in at[i : i + 4]]) for i in (0, 4)]
        low, high = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
        if kind.n_groups == 1:
            out = [adder.folded(fours[0], fours[1], low, high)]
        else:
            wide = [adder.widened(v) for v in fours]
            out = [_Sums(adder.shuffled(wide[0], wide[1], places)) for places in (low, high)]
    totals = [adder.widened(v).value for v in out]
    starts = starts_of(builder, kind, x, 8)
    return [v if start is None else builder.add(v, start) for v, start in zip(totals, starts, strict=True)]
