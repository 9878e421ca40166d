"""The searched encoders in plain NumPy: the definition, which those of quant/encoders/ match bit for bit. Slow.

Arrays are float32 [positions, blocks]; a sum runs over positions in their order. encoders/affine.py and
encoders/signed.py say what is searched and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from m2lite.formats.iquants import IQ4_VALUES
from m2lite.quant.encode import scaled_importance

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.uint8]
F = np.float32
SINGULAR = F(1e-4)
N_REFITS = 2


def encode_reference(name: str, rows: F32, importance: F32 | None = None) -> Bytes:
    """uint8[n, row bytes] of float32[n, width]."""
    encode, n_weights = _TABLE[name]
    n_rows, width = rows.shape
    x = np.ascontiguousarray(rows, np.float32).reshape(-1, n_weights).T
    weights = None
    if importance is not None:
        weights = np.broadcast_to(scaled_importance(importance), rows.shape).reshape(-1, n_weights).T
    sigma = np.repeat(_row_squares(rows), width // n_weights)
    with np.errstate(all="ignore"):
        return encode(x, weights, sigma).reshape(n_rows, -1)


# --- arithmetic -----------------------------------------------------------------------------------------------------


def _sum(terms: F32) -> F32:
    total: F32 = np.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def _row_squares(rows: F32) -> F32:
    """Mean of x**2 of each row: 16 virtual lanes, then a tree."""
    with np.errstate(all="ignore"):
        squares = (rows * rows).reshape(len(rows), -1, 16)
        lanes = _sum(squares.transpose(1, 0, 2))
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        return np.asarray(lanes[:, 0] / F(rows.shape[1]), np.float32)


def _nearest(x: F32) -> F32:
    return (x + F(12582912.0)) - F(12582912.0)


def _clip(x: F32, low: float, high: float) -> F32:
    """NaN becomes `low`."""
    x = np.where(x > F(low), x, F(low))
    return np.where(x < F(high), x, F(high))


def _at_most(x: F32, high: float) -> F32:
    return np.where(x < F(high), x, F(high))


def _half(x: npt.NDArray[np.floating]) -> F32:
    return x.astype(np.float16).astype(np.float32)


def _reciprocal(x: F32) -> F32:
    return np.where(x > 0, F(1) / x, F(0))


def _inverse(x: F32) -> F32:
    return np.where(x == 0, F(0), F(1) / x)


def _largest(x: F32) -> F32:
    """The first of the largest magnitude along the first axis."""
    top: F32 = np.take_along_axis(x, np.abs(x).argmax(axis=0, keepdims=True), axis=0)[0]
    return top


def _weigh(x: F32, importance: F32, sigma: F32) -> F32:
    return importance * np.sqrt(sigma + x * x)


# --- scale and offset -----------------------------------------------------------------------------------------------


@dataclass
class _Affine:
    """The search of one sub-block [32, blocks]: the best scale and minimum so far."""

    x: F32
    w: F32
    n_max: int

    def search(self) -> tuple[F32, F32]:
        x, w, n_max = self.x, self.w, self.n_max
        self.low = _at_most(x.min(axis=0), 0.0)
        width = x.max(axis=0) - self.low
        width = np.where(width > 0, width, F(0))  # so that 0 never is -0
        self.y = x - self.low
        t = w * self.y
        self.sw, self.sy, self.syy, self.sxx = _sum(w), _sum(t), _sum(t * self.y), _sum((w * x) * x)
        self.error, self.scale, self.minimum = np.full_like(width, np.inf), width * F(1.0 / n_max), self.low
        per_width = _reciprocal(width)
        for i in range(21):
            steps = per_width * (F(n_max) + (F(-1.5) + F(0.15) * F(i)))
            self._fit(_at_most(_nearest(self.y * steps), n_max))
        for _ in range(N_REFITS):
            shift = self.minimum - self.low
            self._fit(_clip(_nearest((self.y - shift) * _reciprocal(self.scale)), 0, n_max))
        return self.scale, F(0) - self.minimum

    def _fit(self, q: F32) -> None:
        """Least squares of one rounding, taken where it beats what was."""
        t = self.w * q
        sl, sll, sly = _sum(t), _sum(t * q), _sum(t * self.y)
        both = self.sw * sll
        determinant = both - sl * sl
        inverse = F(1) / determinant
        s = (self.sw * sly - self.sy * sl) * inverse
        offset = (sll * self.sy - sl * sly) * inverse
        e = (self.syy - s * sly) - offset * self.sy
        m = offset + self.low
        slx = sly + self.low * sl
        alone = slx / sll
        clamped = m > 0
        s = np.where(clamped, alone, s)
        e = np.where(clamped, self.sxx - alone * slx, e)
        m = np.where(clamped, F(0), m)
        better = (determinant > SINGULAR * both) & (s > 0) & (e < self.error)
        self.error = np.where(better, e, self.error)
        self.scale = np.where(better, s, self.scale)
        self.minimum = np.where(better, m, self.minimum)


def _affine_code(x: F32, offset: F32, inverse: F32, n_max: int) -> F32:
    return _clip(_nearest((x + offset) * inverse), 0, n_max)


def _choose_pairs(x: F32, w: F32, n_max: int, d: F32, d_min: F32, s: F32, m: F32) -> tuple[F32, F32, F32]:
    """Error, scales and offsets in 6 bits of 8 sub-blocks, [8, 32, blocks]."""
    errors, s_codes, m_codes = [], [], []
    for xi, wi, si, mi in zip(x, w, s, m, strict=True):
        s_near, m_near = _nearest(si * _reciprocal(d)), _nearest(mi * _reciprocal(d_min))
        error, s_best, m_best = np.full_like(d, np.inf), _at_most(s_near, 63), _at_most(m_near, 63)
        for s_step in (0, -1, 1):
            for m_step in (0, -1, 1):
                s_code, m_code = _clip(s_near + F(s_step), 0, 63), _clip(m_near + F(m_step), 0, 63)
                scale, offset = d * s_code, d_min * m_code
                off = (scale * _affine_code(xi, offset, _reciprocal(scale), n_max) - offset) - xi
                e = _sum((wi * off) * off)
                better = e < error
                error, s_best = np.where(better, e, error), np.where(better, s_code, s_best)
                m_best = np.where(better, m_code, m_best)
        errors.append(error)
        s_codes.append(s_best)
        m_codes.append(m_best)
    return _sum(np.stack(errors)), np.stack(s_codes), np.stack(m_codes)


def _refit_affine(x: F32, w: F32, n_max: int, d: F32, d_min: F32, s: F32, m: F32) -> tuple[F32, F32]:
    terms = []
    for xi, wi, a, b in zip(x, w, s, m, strict=True):
        q = _affine_code(xi, d_min * b, _reciprocal(d * a), n_max)
        t = wi * q
        sq, sqq, sqx = _sum(t), _sum(t * q), _sum(t * xi)
        terms.append(((a * a) * sqq, (a * b) * sq, (b * b) * _sum(wi), a * sqx, b * _sum(wi * xi)))
    saa, sab, sbb, sax, sbx = (_sum(np.stack(column)) for column in zip(*terms, strict=True))
    both = saa * sbb
    determinant = both - sab * sab
    inverse = F(1) / determinant
    d_new = (sax * sbb - sab * sbx) * inverse
    min_new = (sab * sax - sbx * saa) * inverse
    good = (determinant > SINGULAR * both) & (d_new > 0) & (min_new >= 0)
    alone = (sax + d_min * sab) / saa
    d_new = np.where(good, d_new, np.where((saa > 0) & (alone > 0), alone, d))
    return _half(d_new), _half(np.where(good, min_new, d_min))


def _affine_super(x: F32, importance: F32 | None, n_max: int) -> tuple[F32, F32, F32, F32, Codes]:
    """d, d_min, 8 scales, 8 offsets and 256 codes of each super-block [256, blocks]."""
    subs = x.reshape(8, 32, -1)
    if importance is None:
        w = np.stack([np.sqrt(_sum(s * s) * F(1 / 32)) + np.abs(s) for s in subs])
    else:
        w = _weigh(x, importance, _sum(x * x) * F(2 / 256)).reshape(subs.shape)
    fits = [_Affine(s, v, n_max).search() for s, v in zip(subs, w, strict=True)]
    s, m = np.stack([f[0] for f in fits]), np.stack([f[1] for f in fits])
    zero = np.zeros_like(s[0])
    top, m_top = zero, zero
    for si, mi in zip(s, m, strict=True):
        top, m_top = np.where(si > top, si, top), np.where(mi > m_top, mi, m_top)
    d, d_min = _half(top * F(1 / 63)), _half(m_top * F(1 / 63))
    error, s_code, m_code = _choose_pairs(subs, w, n_max, d, d_min, s, m)
    d_new, min_new = _refit_affine(subs, w, n_max, d, d_min, s_code, m_code)
    error_new, s_new, m_new = _choose_pairs(subs, w, n_max, d_new, min_new, s, m)
    better = error_new < error
    d, d_min = np.where(better, d_new, d), np.where(better, min_new, d_min)
    s_code, m_code = np.where(better, s_new, s_code), np.where(better, m_new, m_code)
    q = [_affine_code(xi, d_min * b, _reciprocal(d * a), n_max) for xi, a, b in zip(subs, s_code, m_code, strict=True)]
    return d, d_min, s_code, m_code, _whole(np.concatenate(q))


def _affine_block(x: F32, importance: F32, sigma: F32, n_max: int) -> tuple[F32, F32, Codes]:
    s, m = _Affine(x, _weigh(x, importance, sigma), n_max).search()
    d, low = _half(s), _half(m)
    return d, F(0) - low, _whole(_affine_code(x, low, _reciprocal(d), n_max))


# --- a scale alone --------------------------------------------------------------------------------------------------

_VALUES = np.array(IQ4_VALUES, np.float32)
_MIDDLES = (_VALUES[1:] + _VALUES[:-1]) / F(2)


def _whole(x: F32) -> Codes:
    return x.astype(np.int32).astype(np.uint8)


@dataclass(frozen=True)
class _Grid:
    """What a scale is multiplied with: codes of numbers, and the values of codes."""

    code: Callable[[F32], Codes]
    value: Callable[[Codes], F32]
    nominal: float
    tops: Sequence[float]

    def rounded(self, x: F32) -> F32:
        return self.value(self.code(x))


def _whole_grid(n: int, tops: Sequence[float]) -> _Grid:
    return _Grid(
        lambda x: _whole(_clip(_nearest(x), -n, n - 1) + F(n)), lambda q: q.astype(np.float32) - F(n), -n, tops
    )


def _ends(low: float, high: float, first: float, last: float, step: float) -> list[float]:
    return [top + shift for top in (low, high) for shift in np.arange(first, last, step)]


_IQ4 = _Grid(
    lambda x: np.where(np.isnan(x), 0, np.searchsorted(_MIDDLES, x, side="right")).astype(np.uint8),
    lambda q: _VALUES[q],
    -127,
    _ends(-127, 113, -7, 9, 2),
)
_Q4 = _whole_grid(8, _ends(-8, 8, -1.5, 1.5, 0.25))
_Q5 = _whole_grid(16, _ends(-16, 16, -1.5, 1.5, 0.25))
_Q6 = _whole_grid(32, [-32 + shift for shift in np.arange(-1.5, 1.6, 0.25)])


def _search_scale(x: F32, w: F32, grid: _Grid) -> F32:
    top = _largest(x)
    per_top = _inverse(top)
    gain, scale = np.zeros_like(top), top * F(1.0 / grid.nominal)
    for target in (*grid.tops, *[None] * N_REFITS):
        q = grid.rounded(x * (_inverse(scale) if target is None else per_top * F(target)))
        t = w * q
        slx, sll = _sum(t * x), _sum(t * q)
        s = slx / sll
        g = s * slx
        better = (sll > 0) & (g > gain)
        gain, scale = np.where(better, g, gain), np.where(better, s, scale)
    return scale


def _choose_scales(
    x: F32, w: F32, grid: _Grid, d: F32, scales: F32, least: int, most: int, steps: Sequence[int]
) -> tuple[F32, F32]:
    errors, codes = [], []
    for xi, wi, s in zip(x, w, scales, strict=True):
        near = _nearest(s * _inverse(d))
        error, best = np.full_like(d, np.inf), _clip(near, least, most)
        for step in steps:
            code = _clip(near + F(step), least, most)
            scale = d * code
            off = scale * grid.rounded(xi * _inverse(scale)) - xi
            e = _sum((wi * off) * off)
            better = e < error
            error, best = np.where(better, e, error), np.where(better, code, best)
        errors.append(error)
        codes.append(best)
    return _sum(np.stack(errors)), np.stack(codes)


def _signed_super(
    x: F32, w: F32, grid: _Grid, n: int, least: int, most: int, steps: Sequence[int]
) -> tuple[F32, F32, Codes]:
    """d, the codes of the scales and 256 codes of each super-block."""
    subs, w = x.reshape(256 // n, n, -1), w.reshape(256 // n, n, -1)
    scales = np.stack([_search_scale(xi, wi, grid) for xi, wi in zip(subs, w, strict=True)])
    d = _half(_largest(scales) * F(1.0 / least))
    error, codes = _choose_scales(subs, w, grid, d, scales, least, most, steps)
    slx, sll = np.zeros_like(d), np.zeros_like(d)
    for xi, wi, a in zip(subs, w, codes, strict=True):
        q = grid.rounded(xi * _inverse(d * a))
        t = wi * q
        slx, sll = slx + a * _sum(t * xi), sll + (a * a) * _sum(t * q)
    d_new = _half(np.where(sll > 0, slx / sll, d))
    error_new, codes_new = _choose_scales(subs, w, grid, d_new, scales, least, most, steps)
    better = error_new < error
    d, codes = np.where(better, d_new, d), np.where(better, codes_new, codes)
    final = [grid.code(xi * _inverse(d * a)) for xi, a in zip(subs, codes, strict=True)]
    return d, codes, np.concatenate(final)


def _signed_block(x: F32, w: F32, grid: _Grid) -> tuple[F32, Codes]:
    d = _half(_search_scale(x, w, grid))
    return d, grid.code(x * _inverse(d))


def _weigh_iq4(x: F32, importance: F32 | None) -> F32:
    if importance is not None:
        return _weigh(x, importance, _sum(x * x) * F(2.0 / len(x)))
    subs = x.reshape(-1, 32, x.shape[1])
    return np.concatenate([s * s + _sum(s * s) * F(1 / 32) for s in subs])


# --- bytes ----------------------------------------------------------------------------------------------------------


def _joined(*parts: npt.NDArray[np.generic]) -> Bytes:
    """Parts [..., blocks] -> uint8[blocks, bytes]."""
    return np.concatenate([np.ascontiguousarray(np.atleast_2d(p).T).view(np.uint8) for p in parts], axis=1)


def _f16(x: F32) -> npt.NDArray[np.float16]:
    return x.astype("<f2")


def _nibbles(q: Codes, half: int) -> Codes:
    """In each 2 * half codes: the low nibbles of the first half, and above them of the second."""
    pairs = (q & np.uint8(15)).reshape(-1, 2, half, q.shape[-1])
    joined: Codes = pairs[:, 0] | (pairs[:, 1] << np.uint8(4))
    return joined.reshape(-1, q.shape[-1])


def _fifth_bits(q: Codes) -> Codes:
    return np.packbits(q >> 4, axis=0, bitorder="little")


def _affine_head(d: F32, d_min: F32, s: F32, m: F32) -> tuple[npt.NDArray[np.generic], ...]:
    a, b = _whole(s), _whole(m)
    low = [(v[:4] | ((v[4:] >> 4) << 6)).astype(np.uint8) for v in (a, b)]
    return _f16(d), _f16(d_min), *low, (a[4:] & 15) | ((b[4:] & 15) << 4)


def _q4_k(x: F32, importance: F32 | None, sigma: F32) -> Bytes:
    *head, q = _affine_super(x, importance, 15)
    return _joined(*_affine_head(*head), _nibbles(q, 32))


def _q5_k(x: F32, importance: F32 | None, sigma: F32) -> Bytes:
    *head, q = _affine_super(x, importance, 31)
    high = np.packbits((q >> 4).reshape(8, 32, -1), axis=0, bitorder="little")[0]
    return _joined(*_affine_head(*head), high, _nibbles(q, 32))


def _q6_k(x: F32, importance: F32 | None, sigma: F32) -> Bytes:
    w = x * x if importance is None else importance
    d, codes, q = _signed_super(x, w, _Q6, 16, -128, 127, (0, -1, 1, -2, 2))
    quarters = (q >> 4).reshape(2, 4, 32, -1)
    high = quarters[:, 0] | (quarters[:, 1] << 2) | (quarters[:, 2] << 4) | (quarters[:, 3] << 6)
    return _joined(_nibbles(q, 64), high.reshape(64, -1), codes.astype(np.int8), _f16(d))


def _iq4_xs(x: F32, importance: F32 | None, sigma: F32) -> Bytes:
    d, codes, q = _signed_super(x, _weigh_iq4(x, importance), _IQ4, 32, -32, 31, (0, -1, 1))
    s = (codes + F(32)).astype(np.uint16)
    high = sum((s[i] >> 4) << (2 * i) for i in range(8)).astype("<u2")
    return _joined(_f16(d), high, ((s[::2] & 15) | ((s[1::2] & 15) << 4)).astype(np.uint8), _nibbles(q, 16))


def _iq4_nl(x: F32, importance: F32 | None, sigma: F32) -> Bytes:
    d, q = _signed_block(x, _weigh_iq4(x, importance), _IQ4)
    return _joined(_f16(d), _nibbles(q, 16))


def _q4_0(x: F32, importance: F32 | None, sigma: F32) -> Bytes:
    assert importance is not None
    d, q = _signed_block(x, _weigh(x, importance, sigma), _Q4)
    return _joined(_f16(d), _nibbles(q, 16))


def _q5_0(x: F32, importance: F32 | None, sigma: F32) -> Bytes:
    assert importance is not None
    d, q = _signed_block(x, _weigh(x, importance, sigma), _Q5)
    return _joined(_f16(d), _fifth_bits(q), _nibbles(q, 16))


def _q4_1(x: F32, importance: F32 | None, sigma: F32) -> Bytes:
    assert importance is not None
    d, low, q = _affine_block(x, importance, sigma, 15)
    return _joined(_f16(d), _f16(low), _nibbles(q, 16))


def _q5_1(x: F32, importance: F32 | None, sigma: F32) -> Bytes:
    assert importance is not None
    d, low, q = _affine_block(x, importance, sigma, 31)
    return _joined(_f16(d), _f16(low), _fifth_bits(q), _nibbles(q, 16))


_Encode = Callable[[F32, F32 | None, F32], Bytes]
_TABLE: Mapping[str, tuple[_Encode, int]] = {
    "Q4_0": (_q4_0, 32),
    "Q4_1": (_q4_1, 32),
    "Q5_0": (_q5_0, 32),
    "Q5_1": (_q5_1, 32),
    "Q4_K": (_q4_k, 256),
    "Q5_K": (_q5_k, 256),
    "Q6_K": (_q6_k, 256),
    "IQ4_NL": (_iq4_nl, 32),
    "IQ4_XS": (_iq4_xs, 256),
}
