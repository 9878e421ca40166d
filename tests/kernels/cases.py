"""Inputs for every kernel, run on the compiled form and on its NumPy twin. Used in-process and in child processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from m2lite.formats.table import FORMATS
from m2lite.kernels import dot, fast, reference

F = np.float32
SERIAL, PARALLEL = 1, 2  # n_parts

# The formats of the fast ring: those with a tile, those of one weight, and of the others one of each kind.
FEW = ("Q4_0", "Q8_0", "F16", "BF16", "F32", "Q5_1", "Q4_K", "IQ2_XS", "IQ4_XS")
ALL = tuple(FORMATS)


KV_TYPES = ("f16", "q8_0")


class Arena:
    """Named arrays; two copies of the same inputs, one for each side."""

    def __init__(self, **arrays: Any) -> None:
        self.arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}

    def copy(self) -> Arena:
        return Arena(**{k: v.copy() for k, v in self.arrays.items()})

    def __getitem__(self, name: str) -> int:
        return int(self.arrays[name].ctypes.data)


# Where the float16 scales of a block lie, where it does not begin with its only one; MXFP4 and NVFP4 have none.
HALVES = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "TQ1_0": (52,), "TQ2_0": (64,), "IQ1_M": (), "MXFP4": (), "NVFP4": (),
}  # fmt: skip


def weights_of(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], worst: bool = False
) -> np.ndarray[Any, Any]:
    """Random block bytes of a format, [*rows, row bytes]; `worst` has extreme integers and a zero block."""
    fmt = FORMATS[name]
    n_blocks = shape[-1] // fmt.n_weights
    if name in ("F32", "F16", "BF16"):
        assert fmt.pack is not None
        return fmt.pack(rng.standard_normal((*shape[:-1], n_blocks, fmt.n_weights)).astype(F)).reshape(*shape[:-1], -1)
    raw = rng.integers(0, 256, (*shape[:-1], n_blocks, fmt.n_bytes), dtype=np.uint8)
    if worst:
        raw[...] = rng.choice(np.array([0x00, 0xFF, 0x80, 0x7F], np.uint8), raw.shape)
    for at in HALVES.get(name, (0,)):
        scales = (rng.standard_normal((*shape[:-1], n_blocks)) * 0.02).astype(np.float16)
        if worst:
            scales[..., 0] = [6.1e-5, 5.96e-8, -65504.0, 0.0][n_blocks % 4]
        raw[..., at : at + 2] = scales[..., None].view(np.uint8)
    if name == "MXFP4":
        raw[..., 0] = rng.integers(110, 130, raw.shape[:-1], np.uint8)
    if name == "IQ1_M":  # the float16 lies in the top nibbles of four words: below 2, so no infinity
        raw[..., 55] &= 0xBF
    return raw.reshape(*shape[:-1], -1)


def both(name: str, arena: Arena, outputs: tuple[str, ...], *args: Any) -> Iterator[tuple[Any, Any, str]]:
    """Run kernel `name` on two copies of the arena and yield the outputs of both sides."""
    sides = []
    for module in (fast, reference):
        copy = arena.copy()
        plain = [copy[a[1:]] if isinstance(a, str) and a.startswith("@") else a for a in args]
        plain = [module.tile_address(*a) if isinstance(a, tuple) and len(a) == 2 else a for a in plain]
        plain = [module.unpack_address(a[0]) if isinstance(a, tuple) else a for a in plain]
        plain = [module.attend_address(a) if a in KV_TYPES else a for a in plain]
        result = getattr(module, name)(*plain)
        sides.append((copy, result))
    if sides[1][1] is not None:
        yield sides[0][1], sides[1][1], f"{name} returns"
    for output in outputs:
        yield sides[0][0].arrays[output], sides[1][0].arrays[output], f"{name}: {output}"


def shapes_of(name: str) -> Iterator[tuple[int, int, bool]]:
    """(rows, width, worst): few rows and many, even and odd numbers of blocks."""
    unit = dot.step_of(name)
    if unit == 32:
        yield from ((64, 96, False), (16, 32, True), (1, 64, False), (5, 64, True), (37, 160, False))
    else:
        yield from ((37, 2 * unit, False), (16, unit, True), (3, 3 * unit, True))


def matmul_cases(n_parts: int, formats: tuple[str, ...]) -> Iterator[tuple[Any, Any, str]]:
    rng = np.random.default_rng(1)
    for name in formats:
        for kind in sorted({"float32", dot.activation_kind(name)}):
            for n_out, k, worst in shapes_of(name):
                w = weights_of(rng, name, (n_out, k), worst)
                for n_x in (1, 2, 3, 4, 5, 8, 65, 150) if dot.step_of(name) == 32 else (1, 2, 3, 4, 20, 65):
                    x = rng.standard_normal((n_x, k)).astype(F)
                    if worst:
                        x = np.sign(x) * F(3.0)
                        x[0] = 0
                    panel = np.zeros(dot.panel_bytes(kind, n_x, k), np.uint8)
                    arena = Arena(w=w, x=x, panel=panel, out=np.zeros((n_x, n_out), F))
                    is_int8 = int(kind == "int8")
                    yield from both("pack", arena, ("panel",), n_parts, "@panel", "@x", 4 * k, n_x, k // 32, is_int8)
                    reference.pack(0, arena["panel"], arena["x"], 4 * k, n_x, k // 32, is_int8)
                    args = (
                        "@out",
                        4 * n_out,
                        (name, kind),
                        "@w",
                        w.shape[-1],
                        n_out,
                        k // 32,
                        "@panel",
                        dot.panel_bytes(kind, 1, k),
                        n_x,
                    )
                    for mine, theirs, what in both("matmul", arena, ("out",), n_parts, *args):
                        yield mine, theirs, f"{name} {what}"


def three_cases(n_parts: int) -> Iterator[tuple[Any, Any, str]]:
    """Three matrices at once, in formats of all kinds, one of them with fewer rows than a tile."""
    rng = np.random.default_rng(6)
    k = 512
    for names, shapes in ((("Q4_K", "Q8_0", "Q5_1"), (144, 37, 16)), (("F32", "Q4_0", "IQ2_XS"), (16, 5, 80))):
        kinds = [dot.activation_kind(name) for name in names]
        for n_x in (1, 3, 150):
            arrays: dict[str, Any] = {"x": rng.standard_normal((n_x, k)).astype(F)}
            arrays |= {kind: np.zeros(dot.panel_bytes(kind, n_x, k), np.uint8) for kind in ("int8", "float32")}
            arrays |= {f"w{i}": weights_of(rng, names[i], (shapes[i], k)) for i in range(3)}
            arrays |= {f"out{i}": np.zeros((n_x, shapes[i]), F) for i in range(3)}
            arena = Arena(**arrays)
            args: list[Any] = []
            for i, kind in enumerate(kinds):
                reference.pack(0, arena[kind], arena["x"], 4 * k, n_x, k // 32, int(kind == "int8"))
                row_bytes = arrays[f"w{i}"].shape[-1]
                args += [f"@out{i}", (names[i], kind), f"@w{i}", row_bytes, shapes[i]]
                args += [f"@{kind}", dot.panel_bytes(kind, 1, k)]
            yield from both("matmul_three", arena, ("out0", "out1", "out2"), n_parts, k // 32, n_x, *args)


def expert_cases(n_parts: int, formats: tuple[str, ...]) -> Iterator[tuple[Any, Any, str]]:
    rng = np.random.default_rng(2)
    mixed = [("Q4_0", "Q4_0", "Q4_0"), ("Q8_0", "Q4_0", "Q8_0"), ("F32", "F16", "BF16"), ("Q4_K", "Q4_0", "IQ4_XS")]
    for gate, up, down in mixed + [(name, name, name) for name in formats if name not in FEW]:
        n, n_ff = (64, 96) if {dot.step_of(name) for name in (gate, up, down)} == {32} else (256, 512)
        sizes = ((1, 16, 4), (3, 12, 2), (21, 32, 8), (2, 45, 1))
        for n_rows, n_experts, n_used in sizes if (gate, up, down) in mixed else sizes[1:2]:
            n_padded = (n_experts + 15) // 16 * 16
            scores, bias = rng.standard_normal((n_rows, n_padded)).astype(F), rng.standard_normal(n_padded).astype(F)
            pairs = n_rows * n_used
            arena = Arena(
                scores=scores, bias=bias, ids=np.zeros((n_rows, n_used), np.int32),
                weights=np.zeros((n_rows, n_used), F),
                counts=np.zeros(n_experts, np.int32), active=np.zeros(n_experts, np.int32),
                starts=np.zeros(n_experts + 1, np.int32), rows=np.zeros(pairs, np.int32),
                slots=np.zeros(pairs, np.int32),
                x=rng.standard_normal((n_rows, n)).astype(F), h=np.zeros((pairs, n_ff), F), y=np.zeros((pairs, n), F),
                gate=weights_of(rng, gate, (n_experts, n_ff, n)), up=weights_of(rng, up, (n_experts, n_ff, n)),
                down=weights_of(rng, down, (n_experts, n, n_ff)), panel=np.zeros(pairs * n_ff * 4, np.uint8),
                panel2=np.zeros(pairs * n_ff * 4, np.uint8), scratch=np.zeros(4 * 2 * n_rows * 16, F),
            )  # fmt: skip
            route = ("@scores", "@bias", n_rows, n_experts, n_padded, n_used, "@ids", "@weights")
            yield from both("route", arena, ("scores", "ids", "weights"), *route)
            reference.route(*(arena[a[1:]] if isinstance(a, str) else a for a in route))
            group = ("@ids", n_rows, n_experts, n_used, "@counts", "@active", "@starts", "@rows", "@slots")
            yield from both("group_pairs", arena, ("active", "starts", "rows", "slots"), *group)
            n_active = reference.group_pairs(*(arena[a[1:]] if isinstance(a, str) else a for a in group))
            kinds = [dot.activation_kind(name) for name in (gate, up, down)]
            for kind, panel in zip(kinds, ("panel", "panel2"), strict=False):
                pack = (n_parts, f"@{panel}", "@x", 4 * n, "@rows", "@starts", n_active, n // 32, int(kind == "int8"))
                yield from both("pack_groups", arena, (panel,), *pack)
                reference.pack_groups(*(arena[a[1:]] if isinstance(a, str) else a for a in pack))
            slices = {k: arena.arrays[k].nbytes // n_experts for k in ("gate", "up", "down")}
            steps = [dot.STEP_BYTES[k] for k in kinds]
            args = ("@h", (gate, kinds[0]), "@gate", slices["gate"], (up, kinds[1]), "@up", slices["up"], n_ff, n // 32,
                    "@panel", steps[0] * n // 32, "@panel2", steps[1] * n // 32, "@active", "@starts", n_active,
                    "@scratch", 2 * n_rows * 64)  # fmt: skip
            yield from both("experts_up", arena, ("h",), n_parts, *args)
            arena.arrays["h"] = rng.standard_normal((pairs, n_ff)).astype(F)
            arena.arrays["rows"] = np.arange(pairs, dtype=np.int32)
            pack = (0, "@panel", "@h", 4 * n_ff, "@rows", "@starts", n_active, n_ff // 32, int(kinds[2] == "int8"))
            reference.pack_groups(*(arena[a[1:]] if isinstance(a, str) else a for a in pack))
            args = ("@y", (down, kinds[2]), "@down", slices["down"], n, n_ff // 32, "@panel", steps[2] * n_ff // 32,
                    "@active", "@starts", n_active)  # fmt: skip
            yield from both("experts_down", arena, ("y",), n_parts, *args)
            arena.arrays["y"] = rng.standard_normal((pairs, n)).astype(F)
            arena.arrays["total"] = rng.standard_normal((n_rows, n)).astype(F)
            for first, last in {(0, pairs), (0, pairs // 3), (pairs // 3, 2 * pairs // 3), (pairs // 2, pairs)}:
                args = ("@x", "@total", "@y", "@slots", "@weights", n_rows, n_used, n, first, last)
                yield from both("combine", arena, ("x", "total"), n_parts, *args)


def row_cases(n_parts: int, formats: tuple[str, ...]) -> Iterator[tuple[Any, Any, str]]:
    rng = np.random.default_rng(3)
    for n_rows, n_heads, head_dim, rotary in ((1, 4, 32, 16), (3, 6, 64, 32), (5, 4, 128, 64), (2, 2, 16, 8)):
        n = n_heads * head_dim
        arena = Arena(
            x=(rng.standard_normal((n_rows, n)) * 3).astype(F), y=rng.standard_normal((n_rows, n)).astype(F),
            out=np.zeros((n_rows, n), F), weight=rng.standard_normal(n).astype(F),
            angles=rng.uniform(-1, 1, (200, rotary)).astype(F), positions=rng.integers(0, 200, n_rows).astype(np.int32),
            tokens=rng.integers(0, 50, n_rows).astype(np.int32),
        )  # fmt: skip
        for name in formats:
            width = max(1, n // dot.step_of(name)) * dot.step_of(name)
            arena.arrays["w"] = weights_of(rng, name, (50, width))
            arena.arrays["rows"] = np.zeros((n_rows, width), F)
            embed = ((name,), "@w", arena.arrays["w"].shape[-1], width // 32, "@tokens", n_rows, "@rows", 4 * width)
            yield from both("embed_rows", arena, ("rows",), *embed)
        yield from both("add_rows", arena, ("x",), "@x", "@y", n_rows, n)
        yield from both("rms_norm", arena, ("out",), "@out", "@x", "@weight", n_rows, n, F(1e-6))
        rope = ("@x", "@weight", "@angles", "@positions", n_rows, n_heads, head_dim, rotary, F(1e-6))
        yield from both("norm_rope", arena, ("x",), *rope)


# (query heads, kv heads, head_dim): groups of 6, 7, 5, 1, 3 and 13; q8_0 takes those of whole blocks of 32.
ATTENTION = ((6, 1, 32), (12, 2, 128), (7, 1, 48), (10, 2, 16), (2, 2, 64), (6, 2, 96), (26, 2, 32))
# Positions of rows: first and last of a page, around the 1,024 of a block, and a row of three blocks.
PLACES = (
    (0,),
    (1022,),
    (1023,),
    (1024,),
    (2100,),
    (5, 6, 62, 63, 64, 65),
    (1020, 1024, 3, 2047, 2048),
    tuple(range(20)),
)


def pages_of(rng: np.random.Generator, n_pages: int, n_kv: int, head_dim: int, is_q8: int) -> Any:
    """Pages with something in every byte: int64 addresses in the order of a table, and the memory to keep."""
    page = reference.page_dtype(head_dim, is_q8)
    store = np.zeros((n_pages, n_kv), page)
    for name in page.names or ():
        shape = store[name].shape
        numbers = rng.standard_normal(shape) * (0.02 if name.endswith("scales") else 1)
        store[name] = rng.integers(-127, 128, shape) if store[name].dtype == np.int8 else numbers
    return store.ctypes.data + rng.permutation(n_pages).astype(np.int64) * store[0].nbytes, store


def append_cases(rng: np.random.Generator, n_kv: int, head_dim: int, is_q8: int) -> Iterator[tuple[Any, Any, str]]:
    """Each side writes to its own pages, since addresses lie inside the data."""
    n_rows = 9
    kv = rng.standard_normal((2, n_rows, n_kv * head_dim)).astype(F)
    kv[:, 0, :4] = [1e-7, 6e-8, 7e4, -3e-5]
    kv[:, 1] = 0
    kv[:, 2, :16] = 1e-31
    kv[:, 3, :2] = [1e30, 127.5 * 65504]
    kv[:, 4, :3] = np.arange(3) + 0.5  # ties
    kv[:, 4, 3] = 127
    sides = []
    for module in (fast, reference):
        target = np.zeros((n_rows, n_kv), reference.page_dtype(head_dim, is_q8))
        pages = target.ctypes.data + np.arange(n_rows, dtype=np.int64) * target[0].nbytes
        slots = np.arange(n_rows, dtype=np.int32) * 8 % 64
        slots[-1] = 63
        with np.errstate(over="ignore"):
            module.append_kv(
                kv[0].ctypes.data,
                kv[1].ctypes.data,
                pages.ctypes.data,
                0,
                slots.ctypes.data,
                n_rows,
                n_kv,
                head_dim,
                is_q8,
            )
        sides.append(target)
    yield *sides, f"append_kv {(n_kv, head_dim, is_q8)}"


def attention_cases(n_parts: int) -> Iterator[tuple[Any, Any, str]]:
    rng = np.random.default_rng(4)
    for (n_heads, n_kv, head_dim), is_q8 in product(ATTENTION, (0, 1)):
        if is_q8 and head_dim % 32:
            continue
        yield from append_cases(rng, n_kv, head_dim, is_q8)
        table, _store = pages_of(rng, 34, n_kv, head_dim, is_q8)
        other, _other_store = pages_of(rng, 34, n_kv, head_dim, is_q8)
        scratch_bytes = fast.attend_scratch_bytes(n_heads, n_kv, head_dim, 34 * 64)
        kv, page = KV_TYPES[is_q8], reference.kv_head_bytes(head_dim, is_q8)
        for positions in PLACES:
            n_rows = len(positions)
            tables = np.full(n_rows, table.ctypes.data, np.int64)
            tables[1::4] = other.ctypes.data
            arena = Arena(
                out=np.zeros((n_rows, n_heads * head_dim), F), tables=tables, positions=np.array(positions, np.int32),
                q=(rng.standard_normal((n_rows, n_heads * head_dim)) * 2).astype(F),
                scratch=rng.integers(0, 256, (2, scratch_bytes), np.uint8),
            )  # fmt: skip
            attend = ("@out", "@q", "@tables", "@positions", n_rows, n_heads, n_kv, head_dim, 0, F(head_dim**-0.5))
            for mine, theirs, what in both(
                "attend", arena, ("out",), n_parts, *attend, kv, page, "@scratch", scratch_bytes
            ):
                yield mine, theirs, f"{what} {(n_heads, n_kv, head_dim, is_q8, positions[:3])}"


def all_cases(n_parts: int, formats: tuple[str, ...]) -> Iterator[tuple[Any, Any, str]]:
    yield from matmul_cases(n_parts, formats)
    yield from three_cases(n_parts)
    yield from expert_cases(n_parts, formats)
    yield from row_cases(n_parts, formats)
    yield from attention_cases(n_parts)


def differences(formats: tuple[str, ...] = FEW) -> list[str]:
    """What differs between the compiled kernels and their twins, serial and parallel; empty when all bits agree."""
    from m2lite.simd import jit

    jit.start(2)
    out = []
    for n_parts in (SERIAL, PARALLEL):
        for mine, theirs, what in all_cases(n_parts, formats):
            a, b = np.atleast_1d(mine), np.atleast_1d(theirs)
            if a.tobytes() != b.tobytes():
                out.append(f"{what} ({n_parts} parts): {np.sum(a != b)} of {a.size} differ")
    return out


if __name__ == "__main__":
    from m2lite.simd import emit

    found = differences(ALL if "all" in sys.argv else FEW)
    print(f"{emit.FORM}: {len(found)} differences")
    print("\n".join(found[:20]))
    raise SystemExit(bool(found))
