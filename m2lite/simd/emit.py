"""LLVM IR that kernels are made of, as functions of a builder. Sees 16-lane vectors and bytes, no format.

Vectors always have 16 lanes: LLVM splits them into the registers that the machine has. Only integer dots (dots.py) and
look-ups differ between machines; their form is picked from the features that Numba compiles for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils
from numba.core import config as numba_config

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()
VOID = ir.VoidType()
LANES = 16
V_F32 = ir.VectorType(F32, LANES)
V_I32 = ir.VectorType(I32, LANES)
V_I16 = ir.VectorType(I16, LANES)
Vectors = list[ir.Value]


# --- the form of integer dots -----------------------------------------------------------------------------------


def host_features() -> frozenset[str]:
    """The features that Numba compiles for: an intrinsic outside them would abort the process."""
    text = numba_config.CPU_FEATURES
    if text is None:  # who names a processor, but no features, gets what every one has
        text = llvm.get_host_cpu_features().flatten() if numba_config.CPU_NAME in (None, "host") else ""
    return frozenset(f[1:] for f in text.split(",") if f.startswith("+"))


def choose_form(features: frozenset[str]) -> str:
    """The widest form of integer dots that the target features allow."""
    if {"avx512f", "avx512bw", "avx512vnni"} <= features:
        return "avx512vnni"
    if "avx2" in features and ("avxvnni" in features or {"avx512vnni", "avx512vl"} <= features):
        return "avxvnni"
    if "avx2" in features:
        return "avx2"
    return "neondot" if "dotprod" in features else "portable"


FEATURES = host_features()
FORM = choose_form(FEATURES)
HAS_F16C = "f16c" in FEATURES or "fullfp16" in FEATURES


def const(value: int, n: int = LANES, bits: ir.Type = I32) -> ir.Constant:
    return ir.Constant(ir.VectorType(bits, n), [value] * n)


def splat(builder: ir.IRBuilder, scalar: ir.Value, n: int = LANES) -> ir.Value:
    vector = ir.VectorType(scalar.type, n)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(I32, n), [0] * n))


def wide(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
    """A vector as it is, a scalar in all lanes."""
    return v if isinstance(v.type, ir.VectorType) else splat(builder, v)


def halves(builder: ir.IRBuilder, v: ir.Value) -> list[ir.Value]:
    undefined = ir.Constant(v.type, ir.Undefined)
    n = v.type.count // 2
    index = ir.VectorType(I32, n)
    return [builder.shuffle_vector(v, undefined, ir.Constant(index, list(range(h * n, h * n + n)))) for h in (0, 1)]


def joined(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    n = low.type.count * 2
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, n), list(range(n))))


def split(builder: ir.IRBuilder, v: ir.Value, n: int) -> list[ir.Value]:
    """v in n equal parts; n is a power of two."""
    parts = [v]
    while len(parts) < n:
        parts = [half for part in parts for half in halves(builder, part)]
    return parts


def merged(builder: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    """The parts side by side, as `split` had them."""
    while len(parts) > 1:
        parts = [joined(builder, *parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return parts[0]


LANE_NUMBERS = ir.Constant(V_I32, list(range(LANES)))


def call_llvm(builder: ir.IRBuilder, name: str, result: ir.Type, args: list[ir.Value]) -> ir.Value:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


# --- building blocks for intrinsics -----------------------------------------------------------------------------


def load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, offset: int = 0) -> ir.Value:
    where = builder.add(address, I64(offset)) if offset else address
    return builder.load(builder.inttoptr(where, kind.as_pointer()), align=1)


def prefetch(builder: ir.IRBuilder, address: ir.Value, locality: int = 3, to_write: bool = False) -> None:
    """Ask for the cache line at `address`; never faults. Locality 3 is the first cache, 2 the second."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, I8.as_pointer()), I32(int(to_write)), I32(locality), I32(1)])


def fence(builder: ir.IRBuilder) -> None:
    """Nothing at run time; the compiler moves no load, store or prefetch across it."""
    builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)


def pinned(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
    """v, in a register; the compiler knows nothing of it, so sums are added in the order in which they are written."""
    register = "r" if isinstance(v.type, ir.IntType) else "x"
    return builder.asm(ir.FunctionType(v.type, [v.type]), "", f"={register},0", [v], side_effect=False)


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def call_address(builder: ir.IRBuilder, address: ir.Value, args: list[ir.Value]) -> None:
    """Call a function that returns nothing."""
    kind = ir.FunctionType(VOID, [a.type for a in args])
    builder.call(builder.inttoptr(address, kind.as_pointer()), args)


def packed(builder: ir.IRBuilder, values: Sequence[ir.Value]) -> ir.Value:
    """The address of the values on the stack of the function, eight bytes each."""
    area = cgutils.alloca_once(builder, ir.ArrayType(I64, len(values)))
    address = builder.ptrtoint(area, I64)
    for i, value in enumerate(values):
        store(builder, value, builder.add(address, I64(8 * i)))
    return address


def unpacked(builder: ir.IRBuilder, address: ir.Value, kinds: list[ir.Type]) -> list[ir.Value]:
    """What `packed` has written."""
    return [load(builder, address, kind, 8 * i) for i, kind in enumerate(kinds)]


def own_function(module: ir.Module, name: str, n_args: int) -> tuple[ir.Function, bool]:
    """A function of n int64 that is a part of the module, and whether it has to be written yet."""
    function = cgutils.get_or_insert_function(module, ir.FunctionType(VOID, [I64] * n_args), name)
    function.linkage = "linkonce_odr"  # callers' modules are linked, and each may have one
    return function, not function.blocks


def fma_values(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return call_llvm(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])


def half_to_f32(builder: ir.IRBuilder, half: ir.Value) -> ir.Value:
    """float16 bit patterns -> float32, exact. Without hardware: shift the exponent and multiply by 2**112."""
    n = half.type.count
    floats = ir.VectorType(F32, n)
    if HAS_F16C:
        return builder.fpext(builder.bitcast(half, ir.VectorType(ir.HalfType(), n)), floats)
    wide = builder.zext(half, ir.VectorType(I32, n))
    magnitude = builder.shl(builder.and_(wide, const(0x7FFF, n)), const(13, n))
    scaled = builder.fmul(builder.bitcast(magnitude, floats), ir.Constant(floats, [2.0**112] * n))
    special = builder.icmp_unsigned(">=", magnitude, const(0x7C00 << 13, n))
    bits = builder.select(special, builder.or_(magnitude, const(0x7F800000, n)), builder.bitcast(scaled, wide.type))
    sign = builder.shl(builder.and_(wide, const(0x8000, n)), const(16, n))
    return builder.bitcast(builder.or_(bits, sign), floats)


def tree_of(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
    while v.type.count > 1:
        low, high = halves(builder, v)
        v = builder.fadd(low, high)
    return builder.extract_element(v, I32(0))


def row_at(builder: ir.IRBuilder, address: ir.Value, stride: ir.Value, i: int) -> ir.Value:
    """The address of row i."""
    return builder.add(address, builder.mul(stride, I64(i))) if i else address


@dataclass(frozen=True)
class RowAddresses:
    """Where 16 or 8 rows are: the addresses of every fourth, and the bytes from row to row."""

    fours: list[ir.Value]
    stride: ir.Value

    @property
    def n(self) -> int:
        return 4 * len(self.fours)

    def at(self, builder: ir.IRBuilder, row: int) -> ir.Value:
        return row_at(builder, self.fours[row // 4], self.stride, row % 4)


def rows_of(builder: ir.IRBuilder, address: ir.Value, stride: ir.Value, n: int = LANES) -> RowAddresses:
    """n rows from `address` on.

    Pinned, since LLVM would keep a pointer to each through the loop, for which it lacks registers.
    """
    fours = [pinned(builder, address)]
    while 4 * len(fours) < n:
        fours.append(pinned(builder, builder.add(fours[-1], builder.mul(stride, I64(4)))))
    return RowAddresses(fours, stride)


def gather(builder: ir.IRBuilder, rows: RowAddresses, offset: int, kind: ir.IntType) -> ir.Value:
    """The integer at `offset` in each row."""
    out = ir.Constant(ir.VectorType(kind, rows.n), ir.Undefined)
    for row in range(rows.n):
        out = builder.insert_element(out, load(builder, rows.at(builder, row), kind, offset), I32(row))
    return out


def load_tile(builder: ir.IRBuilder, rows: RowAddresses, offset: int) -> list[ir.Value]:
    """16 bytes at `offset` in each row -> 4 vectors; lane i of vector d: bytes 4d..4d+3 of row i."""
    quad, n_fours = ir.VectorType(I32, 4), len(rows.fours)
    groups = [
        merged(builder, [load(builder, rows.at(builder, g + 4 * four), quad, offset) for four in range(n_fours)])
        for g in range(4)
    ]

    def shuffle(x: ir.Value, y: ir.Value, pattern: tuple[int, int, int, int]) -> ir.Value:
        mask = [4 * four + (p if p < 4 else p - 4 + rows.n) for four in range(n_fours) for p in pattern]
        return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, rows.n), mask))

    low = [shuffle(groups[0], groups[1], (0, 4, 1, 5)), shuffle(groups[0], groups[1], (2, 6, 3, 7))]
    high = [shuffle(groups[2], groups[3], (0, 4, 1, 5)), shuffle(groups[2], groups[3], (2, 6, 3, 7))]
    out = []
    for pair in (0, 1):
        out.append(shuffle(low[pair], high[pair], (0, 1, 4, 5)))
        out.append(shuffle(low[pair], high[pair], (2, 3, 6, 7)))
    return out


def look_up(builder: ir.IRBuilder, codes: ir.Value, values: list[int]) -> ir.Value:
    """values[code] as float32 for codes below 16; one shuffle where the machine has one that takes indices."""
    if FORM == "avx512vnni":
        table = ir.Constant(V_F32, [float(v) for v in values])
        return call_llvm(builder, "llvm.x86.avx512.permvar.sf.512", V_F32, [table, codes])
    shuffle = {"avxvnni": "llvm.x86.ssse3.pshuf.b.128", "avx2": "llvm.x86.ssse3.pshuf.b.128"} | {
        "neondot": "llvm.aarch64.neon.tbl1.v16i8"
    }
    kind = ir.VectorType(I8, LANES)
    bytes_ = ir.Constant(kind, [v & 255 for v in values])
    index = builder.trunc(codes, kind)
    if FORM in shuffle:
        found = call_llvm(builder, shuffle[FORM], kind, [bytes_, index])
    else:
        found = ir.Constant(kind, ir.Undefined)
        for lane in range(LANES):
            value = builder.extract_element(bytes_, builder.extract_element(index, I32(lane)))
            found = builder.insert_element(found, value, I32(lane))
    return builder.sitofp(builder.sext(found, V_I32), V_F32)


def look_up_bytes(builder: ir.IRBuilder, codes: ir.Value, values: list[int]) -> ir.Value:
    """values[code] for each byte of `codes` (four in a lane), all below 16; values are bytes."""
    table = [v & 255 for v in values]
    if FORM in _BYTE_SHUFFLES:
        return _shuffle_bytes(builder, codes, table, *_BYTE_SHUFFLES[FORM])
    n = 4 * codes.type.count
    index = builder.bitcast(codes, ir.VectorType(I8, n))
    level = [const(v, n, I8) for v in table]
    for bit in range(4):  # the codes' bits choose among pairs: 16 values, 8, 4, 2, 1
        mask = const(1 << bit, n, I8)
        is_set = builder.icmp_unsigned("==", builder.and_(index, mask), mask)
        level = [builder.select(is_set, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    return builder.bitcast(level[0], codes.type)


_BYTE_SHUFFLES = {  # per form: the instruction that takes bytes as indices into a register of 16, and its bytes
    "avx512vnni": ("llvm.x86.avx512.pshuf.b.512", 64),
    "avxvnni": ("llvm.x86.avx2.pshuf.b", 32),
    "avx2": ("llvm.x86.avx2.pshuf.b", 32),
    "neondot": ("llvm.aarch64.neon.tbl1.v16i8", 16),
}


def _shuffle_bytes(builder: ir.IRBuilder, codes: ir.Value, table: list[int], name: str, n_bytes: int) -> ir.Value:
    kind = ir.VectorType(I8, n_bytes)
    values = ir.Constant(kind, table * (n_bytes // 16))
    n_parts = 4 * codes.type.count // n_bytes
    parts = [builder.bitcast(part, kind) for part in split(builder, codes, n_parts)]
    found = merged(builder, [call_llvm(builder, name, kind, [values, part]) for part in parts])
    return builder.bitcast(found, codes.type)


def pack_of(builder: ir.IRBuilder, values: list[ir.Value]) -> ir.Value:
    pack = ir.Constant(ir.ArrayType(values[0].type, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        pack = builder.insert_value(pack, value, i)
    return pack


def f32_to_half(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """float32 -> float16 bits, by integer arithmetic where there is no instruction; subnormals included."""
    if HAS_F16C:
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(ir.HalfType(), LANES)), V_I16)
    bits = builder.bitcast(value, V_I32)
    sign = builder.and_(builder.lshr(bits, const(16)), const(0x8000))
    size = builder.and_(bits, const(0x7FFFFFFF))
    # Normal: add half of the last kept bit less one, plus that bit (ties to even), then re-bias the exponent.
    odd = builder.and_(builder.lshr(size, const(13)), const(1))
    rounded = builder.add(builder.add(size, const(0x0FFF)), odd)
    normal = builder.lshr(builder.sub(rounded, const(112 << 23)), const(13))
    # Below 2**-14: adding 0.5 aligns the bits so that the float adder rounds at 2**-24.
    aligned = builder.fadd(builder.bitcast(size, V_F32), ir.Constant(V_F32, [0.5] * LANES))
    small = builder.sub(builder.bitcast(aligned, V_I32), const(0x3F000000))
    half = builder.select(builder.icmp_unsigned("<", size, const(113 << 23)), small, normal)
    half = builder.select(builder.icmp_unsigned(">=", rounded, const(143 << 23)), const(0x7C00), half)
    is_nan = builder.icmp_unsigned(">", size, const(0x7F800000))
    half = builder.select(is_nan, const(0x7E00), half)
    return builder.trunc(builder.or_(half, sign), V_I16)
