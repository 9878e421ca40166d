"""quant/plan.py: the table, the totals and the estimate of a job, at M2's own shapes too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2lite.formats.table import FORMATS
from m2lite.quant.convert import convert, plan_convert
from m2lite.quant.encode import encode_rows
from m2lite.quant.plan import (
    Item,
    JobSeconds,
    Target,
    as_dict,
    estimate_time,
    format_plan,
    in_time,
    make_plan,
    plan_job,
)
from m2lite.quant.quantize import plan_quantize
from m2lite.quant.recipes import RECIPES, choose_formats, split_name
from m2lite.quant.stream import Chunk
from m2lite.storage.durable import free_bytes
from m2lite.storage.gguf_reader import open_gguf
from m2lite.storage.part_file import part_path
from tests.quant import checkpoints
from tests.quant.test_recipes import M2, Tensor, module, trunk

GB = 10**9


def items_of(tensors: list[Tensor], recipe: str, source: str = "F8_E4M3") -> list[Item]:
    choices = choose_formats(RECIPES[recipe], tensors)
    items = []
    for t in tensors:
        item = Item(t.name, t.shape, choices[t.name], source, 0, int(t.mtp))
        items.append(item._replace(source_bytes=item.n_weights))
    return items


# bits per weight and size of the tensors of M2's main file; the first three are llama-quantize's figures (4.51, ...).
@pytest.mark.parametrize(
    ("recipe", "bits", "size"),
    [
        ("q4_0", 4.51, 128_966_953_984),
        ("q4_k_m", 4.84, 138_334_096_384),
        ("iq4_xs", 4.31, 123_192_835_072),
        ("m2-int4", 4.65, 132_790_586_368),
    ],
)
def test_m2s_own_shapes(tmp_path: Path, recipe: str, bits: float, size: int) -> None:
    items = items_of(trunk(M2), recipe)
    plan = make_plan(items, [Target(tmp_path / "m2.gguf", size + 20_000_000)], memory_bytes=GB)
    (file,) = plan.files
    assert (file.n_tensors, file.n_weights, file.tensor_bytes) == (809, 228_689_764_864, size)
    assert round(file.bits_per_weight, 2) == bits
    assert sum(row.n_bytes for row in plan.rows) == size and len(plan.rows) == 16
    text = format_plan(plan)
    assert "m2.gguf: 809 tensors, 228,689,764,864 weights" in text and f"{bits:.2f} bits per weight" in text
    assert re.search(r"ffn_gate_exps +x 62 +\[256,1536,3072\] +F8_E4M3 +\S+ +4\.\d\d +\d", text)
    assert plan.fits == (free_bytes(tmp_path) >= size + 20_000_000)
    assert ("TOO LITTLE" in text) != plan.fits
    assert max(map(len, text.splitlines())) < 130


def test_mixed_types_and_fallbacks_are_said(tmp_path: Path) -> None:
    tensors = trunk({**M2, "layers": 8, "ff": 1664})
    text = format_plan(make_plan(items_of(tensors, "q4_k_m"), [Target(tmp_path / "x.gguf", GB)], memory_bytes=GB))
    assert re.search(r"ffn_down_exps +x 8 .* Q5_0 \(4\), Q8_0 \(4\)\*  ", text)
    assert "* ffn_down_exps: Q4_K was meant for 4 of them, but rows of 1664 are not whole blocks of it" in text
    assert "* ffn_down_exps: Q6_K was meant for 4 of them" in text
    assert re.search(r"attn_v +x 8 .* Q4_K \(4\), Q6_K \(4\)  ", text) and text.count("\n  * ") == 2


def test_the_sidecar_is_a_table_of_its_own(tmp_path: Path) -> None:
    items = items_of(trunk(M2) + module(M2, 62), "m2-int4")
    plan = make_plan(
        items, [Target(tmp_path / "m.gguf", 5 * GB), Target(tmp_path / "mtp-m.gguf", 3 * GB)], memory_bytes=GB
    )
    assert [file.name for file in plan.files] == ["m.gguf", "mtp-m.gguf"]
    assert plan.files[1].n_tensors == 17 and plan.size_bytes == plan.disk_needed_bytes == 8 * GB
    main, _, sidecar = format_plan(plan).partition("mtp-m.gguf: ")
    assert "nextn.eh_proj" in sidecar and "nextn" not in main and "output_norm" in main
    left = make_plan(items, [Target(tmp_path / "m.gguf", 5 * GB)], memory_bytes=GB, found_bytes=2 * GB)
    assert left.disk_needed_bytes == 3 * GB


def test_the_plan_is_plain_data(tmp_path: Path) -> None:
    items = items_of(trunk({**M2, "layers": 1}), "q4_0")
    plan = make_plan(items, [Target(tmp_path / "x.gguf", GB)], memory_bytes=GB, estimate=JobSeconds(2.0, 3.0, 1.0))
    found = json.loads(json.dumps(as_dict(plan)))
    assert found["estimate"]["seconds"] == 4.0 and found["files"][0]["bits_per_weight"] == 4.7633
    assert found["rows"][0]["kind"] == "token_embd" and found["rows"][0]["types"] == {"Q4_0": 1}
    assert "time     about 4 s: reads " in format_plan(plan)


def test_time_is_extrapolated_per_pair_of_types() -> None:
    """By a clock of its own: 2 s to read a hundredth of a tensor, 1 s to encode it, 100 s for the first time."""
    items = [item for item in items_of(trunk(M2), "q4_k_m") if "_exps" in item.name]
    now, n_encoded, pairs = 0.0, 0, []

    def sample(item: Item) -> Chunk:
        pairs.append((item.source, item.choice.block_format.name))
        seconds = iter([100.0, 2.0])

        def read() -> str:
            nonlocal now
            now += 2
            return "rows"

        def encode(raw: str) -> Any:
            nonlocal now, n_encoded
            assert raw == "rows"
            now, n_encoded = now + next(seconds, 1.0), n_encoded + 1

        return Chunk(0, item.n_bytes // 100, lambda: None, read, encode)

    estimate = estimate_time(items, sample, 10.0, lambda: now)
    assert pairs == [("F8_E4M3", "Q4_K"), ("F8_E4M3", "Q6_K")] and n_encoded == 2 * (1 + 4)  # 2 + 1 + 1 + 1 s of 5 s
    assert estimate.read_seconds == pytest.approx(200 * 186) and estimate.encode_seconds == pytest.approx(100 * 186)
    assert estimate.check_seconds / estimate.read_seconds == pytest.approx(
        sum(item.n_bytes for item in items) / sum(item.source_bytes for item in items)
    )
    assert estimate.seconds == estimate.read_seconds + estimate.check_seconds


def test_a_real_piece_is_timed() -> None:
    rows = np.random.default_rng(0).standard_normal((64, 512), np.float32)
    item = Item("blk.0.attn_q.weight", (640, 512), choose(("blk.0.attn_q.weight", (640, 512))), "F32", 640 * 2048)

    def encode(raw: Any) -> Any:
        return encode_rows(FORMATS["Q8_0"], raw, "x")

    estimate = estimate_time([item], lambda _: Chunk(0, 64 * 512 // 32 * 34, lambda: None, lambda: rows, encode), 0.05)
    assert 0 <= estimate.read_seconds < 1 and 0 < estimate.encode_seconds < 5


def choose(tensor: tuple[str, tuple[int, ...]]) -> Any:
    return choose_formats(RECIPES["q8_0"], [Tensor(*tensor, "attention")])[tensor[0]]


def test_units() -> None:
    assert [in_time(s) for s in (0.2, 89.4, 91, 3600, 7200)] == ["1 s", "89 s", "2 min", "60 min", "2.0 h"]


def test_the_plan_of_a_conversion_is_what_is_written(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "hf", checkpoints.small(lambda w: checkpoints.as_fp8(w, 128)))
    out = tmp_path / "m.gguf"
    with plan_convert(source, out, "q4_0") as job:
        plan = plan_job(job, 0.05)
    assert [file.name for file in plan.files] == ["m.gguf", "mtp-m.gguf"] and not out.exists()
    rows = {(row.file, row.kind): row for row in plan.rows}
    experts = rows[0, "ffn_down_exps"]  # 2 layers of 4 experts of 64 x 32, and one scale each
    assert experts.sources == {"F8_E4M3": 2} and experts.source_bytes == 8 * (64 * 32 + 4)
    assert rows[0, "token_embd"].sources == {"BF16": 1} and rows[0, "ffn_gate_inp"].sources == {"F32": 2}
    assert plan.estimate is not None and 0 < plan.estimate.seconds < 60
    assert rows[0, "output"].fallbacks == {"Q6_K": 1} and "* output: Q6_K was meant" in format_plan(plan)
    done = convert(source, out, "q4_0")
    assert [file.size_bytes for file in plan.files] == [done.size_bytes, done.mtp_size_bytes]
    with open_gguf(out) as written:
        for row in plan.rows:
            own = [t for t in written.tensors.values() if split_name(t.name)[1] == row.kind]
            if row.file == 0:
                assert (row.n_bytes, row.n_tensors) == (sum(t.n_bytes for t in own), len(own))
    with plan_quantize(out, tmp_path / "again.gguf", "q8_0", allow_requantize=True) as job:
        again = plan_job(job, None)
    assert again.estimate is None and again.source_bytes == sum(f.tensor_bytes for f in plan.files)
    assert {row.kind: row.sources for row in again.rows}["ffn_down_exps"] == {"Q4_0": 2}


def test_what_an_interrupted_run_holds_is_not_needed_again(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "hf", checkpoints.small())
    with plan_convert(source, tmp_path / "m.gguf", "f16") as job:
        before = plan_job(job, None)
        part_path(tmp_path / "m.gguf").write_bytes(bytes(before.files[0].size_bytes))
        assert plan_job(job, None).disk_needed_bytes <= before.disk_needed_bytes - before.files[0].size_bytes


def test_the_parts_of_a_split_are_one_table(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "hf", checkpoints.small())
    with plan_convert(source, tmp_path / "m.gguf", "f16", split_max_bytes=60_000) as job:
        plan = plan_job(job, None)
        assert plan.files[0].n_parts == len(job.job.outputs) - 1 > 1
    assert plan.files[0].n_tensors == 29 and plan.size_bytes == sum(o.header.size_bytes for o in job.job.outputs)
    assert f"m-00001-of-0000{plan.files[0].n_parts}.gguf and {plan.files[0].n_parts - 1} more parts: 29 tensors" in (
        format_plan(plan)
    )
    assert [row.n_tensors for row in plan.rows if row.kind == "ffn_up_exps"] == [2, 2]
