"""Every damage is found and named; a file is compared with what its source gives."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2lite.errors import BadModelError
from m2lite.quant.convert import Conversion, convert
from m2lite.quant.quantize import quantize
from m2lite.quant.verify import check, verify
from m2lite.storage.gguf_reader import open_gguf
from tests.golden.models import hf_weights
from tests.quant import checkpoints
from tests.quant.checkpoints import SMALL, new_config
from tinymodel import write_model


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_a_whole_file_is_ok(converted: dict[str, Conversion]) -> None:
    seen = []
    done = converted["q4_0"]
    report = verify(done.path, progress=lambda *step, phase="": seen.append((*step, phase)))
    assert report.ok and report.n_hashed == report.n_tensors == done.n_tensors
    assert report.paths == (done.path,) and report.size_bytes == done.size_bytes
    assert not report.notes and not report.samples
    assert seen[-1][0] == "output.weight" and seen[-1][1] == seen[-1][2] and {step[-1] for step in seen} == {"verify"}
    check(report)


def test_one_flipped_byte_names_its_tensor(converted: dict[str, Conversion], tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    shutil.copy(converted["q4_0"].path, path)
    with open_gguf(path) as model:
        infos = list(model.tensors.values())
    for info in infos[::5]:
        for place in (info.offset, info.offset + info.n_bytes - 1):
            flip(path, place, 3)
            report = verify(path)
            assert [f"tensor '{info.name}'" in problem for problem in report.problems] == [True]
            with pytest.raises(BadModelError, match="is not what was written"):
                check(report)
            flip(path, place, 3)
    assert verify(path).ok


@pytest.mark.parametrize("step", [211, pytest.param(3, marks=pytest.mark.slow)])
def test_every_flip_of_the_header_is_found(converted: dict[str, Conversion], tmp_path: Path, step: int) -> None:
    path = tmp_path / "x.gguf"
    mtp_path = converted["q8_0"].mtp_path
    assert mtp_path is not None
    whole = mtp_path.read_bytes()  # no vocabulary: a short header
    with open_gguf(mtp_path) as model:
        end = min(info.offset for info in model.tensors.values())
    for place in range(0, end, step):
        path.write_bytes(whole)
        flip(path, place, place % 8)
        try:
            report = verify(path)
        except BadModelError:
            continue
        assert report.problems, place


def test_padding_and_what_is_behind_the_end_count_too(converted: dict[str, Conversion], tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    whole = converted["q4_0"].path.read_bytes()
    with open_gguf(converted["q4_0"].path) as model:
        info = model.tensors["blk.0.exp_probs_b.bias"]
    path.write_bytes(whole)
    flip(path, info.offset + info.n_bytes)
    assert "behind tensor 'blk.0.exp_probs_b.bias' are not its zero padding" in verify(path).problems[0]
    path.write_bytes(whole + b"more")
    assert "are not its zero padding" in verify(path).problems[0]


def test_a_file_of_another_tool_is_checked_in_structure_only(tmp_path: Path) -> None:
    report = verify(write_model(tmp_path / "x.gguf", None))
    assert report.ok and report.n_hashed == 0 and "another tool" in report.notes[0]


def test_against_its_checkpoint(source: Path, converted: dict[str, Conversion], tmp_path: Path) -> None:
    done = converted["q4_0"]
    assert done.mtp_path is not None
    for path in (done.path, done.mtp_path):
        report = verify(path, source, n_samples=5)
        assert report.ok and len({sample.tensor for sample in report.samples}) == 5
        assert all(sample.is_equal and sample.n_bytes for sample in report.samples)
    weights = hf_weights(SMALL)
    weights["model.layers.1.self_attn.v_proj.weight"][3, 5] += 1
    other = checkpoints.write(tmp_path / "hf", checkpoints.as_f32(weights))
    report = verify(done.path, other, n_samples=99)
    assert len(report.problems) == 1 and "'blk.1.attn_v.weight'" in report.problems[0]
    assert "from what its source gives" in report.problems[0]
    assert {sample.tensor for sample in report.samples if not sample.is_equal} == {"blk.1.attn_v.weight"}


def test_against_the_gguf_it_was_made_of(converted: dict[str, Conversion], tmp_path: Path) -> None:
    assert verify(converted["q8_0"].path, converted["f32"].path, n_samples=99).ok
    assert not verify(converted["q8_0"].path, converted["q4_0"].path, n_samples=99).ok
    sidecar = converted["f32"].mtp_path
    assert sidecar is not None
    report = verify(converted["q8_0"].path, sidecar)
    assert "is not of this source: it is not there" in report.problems[0]


def test_another_arithmetic_is_found(source: Path, converted: dict[str, Conversion], tmp_path: Path) -> None:
    """The same weights under another config.json are another model."""
    weights, config = checkpoints.small(), new_config(SMALL)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}}, "rope.dimension_count' is 16 in the file"),
        ({"rope_parameters": {**config["rope_parameters"], "rope_theta": 1e4}}, "rope.freq_base' is 5000000.0"),
        ({"rms_norm_eps": 1e-5}, "layer_norm_rms_epsilon' is 9.99"),
        ({"num_experts_per_tok": 1}, "expert_used_count' is 2 in the file, where config.json"),
    ]
    for number, (change, words) in enumerate(changes):
        other = checkpoints.write(tmp_path / str(number), weights, {**config, **change})
        for path in (converted["q8_0"].path, converted["q8_0"].mtp_path):
            assert path is not None
            (problem,) = verify(path, other).problems
            assert words in problem
    made = convert(tmp_path / "0", tmp_path / "x.gguf", "q8_0")
    assert "rope.dimension_count' is 16 in the file" in verify(converted["q8_0"].path, made.path).problems[0]


def test_another_end_of_a_reply_is_told(source: Path, converted: dict[str, Conversion], tmp_path: Path) -> None:
    other = shutil.copytree(source, tmp_path / "hf")
    (other / "generation_config.json").write_text('{"eos_token_id": [284, 40]}')
    report = verify(converted["q8_0"].path, other)
    assert report.ok and len(report.notes) == 2
    assert "eos_token_id' is 289 in the file, 284 in the source" in report.notes[0]
    assert "eot_token_id' is None in the file, 40 in the source" in report.notes[1]


def test_every_part_of_a_split_is_checked(source: Path, tmp_path: Path) -> None:
    done = convert(source, tmp_path / "x.gguf", "f32", mtp=False, split_max_bytes=150_000)
    assert verify(done.path, source, 99).ok and len(done.paths) > 3
    flip(done.paths[2], done.paths[2].stat().st_size - 40)
    report = verify(done.path)
    assert len(report.problems) == 1 and report.problems[0].startswith(done.paths[2].name)
    assert np.array_equal(report.paths, done.paths)


def test_types_that_cannot_be_made_again_are_said(converted: dict[str, Conversion], tmp_path: Path) -> None:
    wide = quantize(converted["q8_0"].path, tmp_path / "x.gguf", "f32", allow_requantize=True, mtp=False)
    assert verify(wide.path, converted["q8_0"].path, 99).ok
