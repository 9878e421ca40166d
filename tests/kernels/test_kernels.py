"""Compiled kernels against their NumPy twins, bit for bit, in every vector form that this processor can run."""

from __future__ import annotations

import re
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir

from m2lite.formats.kernels.block import Unpacker
from m2lite.formats.table import FORMATS, piece
from m2lite.kernels import dots, fast, matmul, reference, router
from m2lite.kernels.attention import join_parts, part_begin
from m2lite.simd import emit, jit
from m2lite.simd.tuning import VALUES
from tests.forms import FORMS, run_form, run_script
from tests.kernels import cases

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long


def test_every_kernel_has_a_twin() -> None:
    for name in fast.__all__:
        twin = getattr(reference, name)
        assert callable(twin) if name != "steps" else vars(twin).keys() == vars(fast.steps).keys(), name


def test_compiled_kernels_equal_their_twins() -> None:
    assert cases.differences() == []


@pytest.mark.slow
def test_compiled_kernels_equal_their_twins_in_every_format() -> None:
    assert cases.differences(cases.ALL) == []


def test_every_format_runs() -> None:
    for fmt in FORMATS.values():
        unpacker = piece(fmt.unpacker)
        assert callable(unpacker) if fmt.is_float else isinstance(unpacker, Unpacker), fmt.name
        assert bool(fmt.tile) == (fmt.parts is not None), fmt.name
        assert not fmt.tile or piece(fmt.tile).name == fmt.name


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_other_vector_forms_equal_the_twins(form: str) -> None:
    done = run_form(form, "kernels/cases.py", *(["all"] if form == "avx2" else []))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.startswith(f"{form}: 0 differences")


def test_neon_form_compiles_to_sdot(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot run here; that LLVM accepts it and picks the instruction can be seen."""
    monkeypatch.setattr(dots, "FORM", "neondot")
    module = ir.Module()
    vector = emit.V_I32
    function = ir.Function(module, ir.FunctionType(vector, [vector, vector, emit.I32]), "dot")
    builder = ir.IRBuilder(function.append_basic_block())
    acc, u, s = function.args
    builder.ret(dots.dot4(builder, dots.dot4(builder, acc, u, s), u, s))
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple("aarch64-linux-gnu").create_target_machine(features="+dotprod")
    assembly = machine.emit_assembly(llvm.parse_assembly(str(module)))
    assert assembly.count("sdot") == 4 * 2  # four registers each


def test_no_kernel_reads_or_writes_beyond_its_memory() -> None:
    check_guards()


@pytest.mark.slow
def test_no_unpacker_reads_beyond_its_block() -> None:
    check_guards("all")


def check_guards(*arguments: str) -> None:
    done = run_script("kernels/guards.py", *arguments)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.strip() == "no stray access"


@pytest.mark.parametrize(
    ("features", "form"),
    [
        ({"avx512f", "avx512bw", "avx512vnni", "avx512vl", "avx2"}, "avx512vnni"),
        ({"avx512f", "avx512vl", "avx512vnni", "avx2"}, "avxvnni"),
        ({"avx2", "avxvnni"}, "avxvnni"),
        ({"avx2", "fma"}, "avx2"),
        ({"neon", "dotprod"}, "neondot"),
        ({"sse4.2"}, "portable"),
        (set(), "portable"),
    ],
)
def test_form_follows_the_features(features: set[str], form: str) -> None:
    assert emit.choose_form(frozenset(features)) == form


def test_router_survives_nan() -> None:
    """NaN scores are reported, and every id is still in range: nothing may index outside an array."""
    n_rows, n_experts, n_used = 3, 20, 8
    for module in (fast, reference):
        scores = np.zeros((n_rows, 32), np.float32)
        scores[0] = np.nan
        scores[1, ::2] = np.nan
        bias, ids = np.zeros(32, np.float32), np.full((n_rows, n_used), -7, np.int32)
        weights = np.zeros((n_rows, n_used), np.float32)
        arrays = [a.ctypes.data for a in (scores, bias, ids, weights)]
        n_bad = module.route(arrays[0], arrays[1], n_rows, n_experts, 32, n_used, arrays[2], arrays[3])
        assert n_bad == 2
        assert ids.min() >= 0 and ids.max() < n_experts
        assert all(len(set(row)) == n_used for row in ids.tolist())


def test_router_breaks_ties_by_the_lowest_id() -> None:
    scores, bias = np.zeros((1, 16), np.float32), np.zeros(16, np.float32)
    bias[9] = 1
    ids, weights = np.zeros((1, 4), np.int32), np.zeros((1, 4), np.float32)
    fast.route(scores.ctypes.data, bias.ctypes.data, 1, 16, 16, 4, ids.ctypes.data, weights.ctypes.data)
    assert ids.tolist() == [[0, 1, 2, 9]]
    assert weights.tolist() == [[0.25] * 4]


def test_kernel_cache_is_private_and_named_by_its_sources() -> None:
    assert jit.CACHE_DIR.stat().st_mode & 0o077 == 0
    assert len(jit.CACHE_DIR.name) == 16


def test_kernel_cache_knows_every_file_with_kernels() -> None:
    """An edit in a file that no hash covers would leave compiled code behind that is no longer there in the source."""
    package = Path(jit.__file__).parent.parent
    with_kernels = {
        path
        for path in package.glob("**/*.py")
        if re.search(
            r"^from m2lite\.simd\.(jit|vectors) import [^#]*\b(kernel|operation|fma)\b", path.read_text(), re.M
        )
    }
    assert len(with_kernels) > 5
    assert with_kernels <= set(jit.source_files())


def test_code_for_the_first_cache_is_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [("Q4_0", "int8"), ("F16", "float32")]
    plain = [fast.tile_address(*kind) for kind in kinds]
    monkeypatch.setitem(VALUES, "first_cache", 1)
    assert [fast.tile_address(*kind) == at for kind, at in zip(kinds, plain, strict=True)] == [False, True]


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_share_of_experts_asks_for_what_it_reads_next(after: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the share, and behind it for the beginning of the thread's next one, if there is one."""
    monkeypatch.setitem(VALUES, "tiles_ahead", n)
    n_parts, n_tiles, tile_bytes, slice_bytes, ids, counts = 3, 9, 1600, 20_000, [2, 3, 7, 9], [1, 2, 9, 1]
    active, starts = np.array(ids, np.int32), np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    at, begun = active.ctypes.data, starts.ctypes.data

    def walk(share: int, after: int) -> tuple[list[int], list[int]]:
        begin, end = router.share_of(share, n_parts, n_tiles, begun, len(ids))
        read, asked = [], []
        for i in range(len(ids)):
            e, _, _, first_tile, end_tile = router.tiles_of(i, n_tiles, begin, end, at, begun)
            if first_tile < end_tile:
                next_e, next_tile = router.next_of(i, share, n_parts, after, n_tiles, at, begun, len(ids))
                next_w = router.address_in(0, slice_bytes, tile_bytes // 16, next_e, next_tile)
                for tile in range(first_tile, end_tile):
                    read.append(e * slice_bytes + tile * tile_bytes)
                    asked.append(matmul.coming(e * slice_bytes, next_w, tile_bytes, tile, end_tile))
        return read, asked

    read, asked = walk(0, after)
    assert len({r // slice_bytes for r in read}) > 1, "the case has a share of several experts"
    assert asked[: len(read) - n] == read[n:]
    behind = walk(after, n_parts)[0][:n] if after < n_parts else [read[-1]] * n
    assert asked[len(read) - n :] == behind


@pytest.mark.parametrize("is_q8", [0, 1])
def test_attention_may_be_cut_anywhere(is_q8: int) -> None:
    """More parts than this machine has threads: cut between rows and within them, some parts with nothing to do."""
    rng = np.random.default_rng(11)
    n_heads, n_kv, head_dim, n_pages = 6, 2, 32, 70
    table, store = cases.pages_of(rng, n_pages, n_kv, head_dim, is_q8)
    scratch_bytes = fast.attend_scratch_bytes(n_heads, n_kv, head_dim, n_pages * 64)
    scale = np.float32(head_dim**-0.5)
    for where in ([n_pages * 64 - 1], [0], [3000, 3001, 4400], list(range(1000, 1040))):
        n_rows = len(where)
        positions, tables = np.array(where, np.int32), np.full(n_rows, table.ctypes.data, np.int64)
        q = rng.standard_normal((n_rows, n_heads, head_dim)).astype(np.float32)
        results = []
        for n_parts in (1, 2, 3, 5, 16, 33):
            out = np.full_like(q, np.nan)
            scratch = rng.integers(0, 256, (n_parts, scratch_bytes), np.uint8)
            addresses = [a.ctypes.data for a in (out, q, tables, positions)]
            shape, last = (n_rows, n_heads, n_kv, head_dim), (scratch.ctypes.data, scratch_bytes)
            page = (fast.attend_address(cases.KV_TYPES[is_q8]), store[0].nbytes // n_kv)
            for part in range(n_parts):
                fast.attend.part(part, n_parts, *addresses, *shape, 0, scale, *page, *last)
            join_parts(n_parts, *addresses, *shape, 0, scale, *page, *last)
            results.append(out.tobytes())
        assert len(set(results)) == 1, where


def test_attention_shares_the_work_evenly() -> None:
    """Rows far into a context cost more: parts end where the pages are shared evenly, up to one block of 16."""
    positions = np.arange(3000, 9000, 17, dtype=np.int32)
    pages = positions // 64 + 1
    n_kv, n_parts = 8, 7
    ends = [part_begin(i, n_parts, positions.ctypes.data, len(positions), n_kv) for i in range(n_parts + 1)]
    assert ends[0] == (0, 0, 0) and ends[-1] == (n_kv, 0, 0)
    done = [kv_head * pages.sum() + pages[:row].sum() + 16 * block for kv_head, row, block in ends]
    assert np.ptp(np.diff(done)) <= 32


@pytest.mark.parametrize("is_q8", [0, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_attention_hides_no_nan_or_infinity(is_q8: int, bad: float, which: int) -> None:
    """In K or V, whatever its sign and the query's: the rows that see it are not finite, the ones before are."""
    rng = np.random.default_rng(12)
    head_dim, n_rows = 32, 4
    kv = rng.standard_normal((2, n_rows, head_dim)).astype(np.float32)
    kv[which, 2, 5] = bad
    q = rng.standard_normal((n_rows, head_dim)).astype(np.float32)
    q[3] = -q[2]
    positions, slots = (np.arange(n_rows, dtype=np.int32) for _ in range(2))
    scratch = np.zeros(fast.attend_scratch_bytes(1, 1, head_dim, 64), np.uint8)
    for module in (fast, reference):
        page, out = np.zeros(1, reference.page_dtype(head_dim, is_q8)), np.zeros_like(q)
        pages = np.full(n_rows, page.ctypes.data, np.int64)
        tables = np.full(n_rows, pages.ctypes.data, np.int64)
        shape, last = (n_rows, 1, 1, head_dim), (scratch.ctypes.data, scratch.nbytes)
        with np.errstate(invalid="ignore", over="ignore"):
            module.append_kv(*(a.ctypes.data for a in (*kv, pages)), 0, slots.ctypes.data, n_rows, 1, head_dim, is_q8)
            addresses = [a.ctypes.data for a in (out, q, tables, positions)]
            function = module.attend_address(cases.KV_TYPES[is_q8])
            module.attend(1, *addresses, *shape, 0, np.float32(0.2), function, page.nbytes, *last)
        assert np.isfinite(out[:2]).all()
        assert not np.isfinite(out[2:]).all(axis=1).any()


def test_exp_is_accurate() -> None:
    x = np.linspace(-87, 88, 200_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(reference.exp32(x) / exact - 1)) < 4e-7
    assert reference.exp32(np.array([-np.inf, -1000, -87.5], np.float32)).tolist() == [0, 0, 0]
