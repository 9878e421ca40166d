"""Every way in which a conversion can go wrong: the words, and what is left on disk."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from m2lite.errors import BadModelError, M2liteError, ResourceError, UsageError
from m2lite.quant import job as job_module
from m2lite.quant import options as options_module
from m2lite.quant.convert import Conversion, convert
from m2lite.storage.gguf_reader import open_gguf
from tests.faults.disk import Dead, faults
from tests.golden.models import hf_config, hf_weights
from tests.quant import checkpoints
from tests.quant.checkpoints import SMALL, digest, digests

ROOT = Path(__file__).parents[2]


def refusal(source: Path, folder: Path, kind: type[M2liteError] = BadModelError, type_name: str = "q4_0") -> str:
    with pytest.raises(kind) as caught:
        convert(source, folder / "refused.gguf", type_name, restart=True)
    assert not list(folder.glob("*refused.gguf")), "something was left"
    # Only what a next run can go on from is kept, and that is said.
    assert bool(list(folder.glob("*refused.gguf*"))) == ("What is done is kept" in str(caught.value))
    return str(caught.value)


def test_a_module_with_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    weights = checkpoints.rename_mtp(hf_weights(SMALL), SMALL, "a")
    weights["model.layers.3.shared_head.head.weight"] = weights["lm_head.weight"] + 1
    source = checkpoints.write(tmp_path / "hf", checkpoints.as_f32(weights))
    assert "shared_head.head.weight' differs from 'lm_head.weight'" in refusal(source, tmp_path)


def test_a_model_without_routing_bias_gets_zeros_only_when_it_says_so(tmp_path: Path) -> None:
    weights = {name: value for name, value in hf_weights(SMALL).items() if "correction_bias" not in name}
    stored = checkpoints.as_f32(weights)
    source = checkpoints.write(tmp_path / "said", stored, {**hf_config(SMALL), "use_routing_bias": False})
    done = convert(source, tmp_path / "x.gguf", "f32")
    with open_gguf(done.path) as model:
        assert not model.view("blk.1.exp_probs_b.bias").any()
    silent = checkpoints.write(tmp_path / "silent", stored)
    assert "e_score_correction_bias' is missing (blk.0.exp_probs_b.bias)" in refusal(silent, tmp_path)


def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    def write(number: int, change: Any) -> Path:
        weights = hf_weights(SMALL)
        change(weights)
        return checkpoints.write(tmp_path / str(number), checkpoints.as_f32(weights))

    up = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    cases = (
        (lambda w: w.pop(up), f"Tensor '{up}' is missing"),
        (lambda w: w.update({up: w[up].T.copy()}), "has shape [64, 32] where config.json gives [32, 64]"),
        (lambda w: w.update({"model.layers.0.mlp.shared.weight": w[up]}), "1 tensors of the checkpoint have no place"),
        (lambda w: w.update({"model.layers.2.input_layernorm.weight": w["model.norm.weight"]}), "have no place"),
        (lambda w: w.update({up + "_scale_inv": w[up]}), "have no place"),
        (lambda w: w.pop("lm_head.weight"), "Tensor 'lm_head.weight' is missing"),
        (lambda w: w.pop("model.mtp.layers.1.hnorm.weight"), "hnorm.weight' is missing"),
    )
    for number, (change, words) in enumerate(cases):
        assert words in refusal(write(number, change), tmp_path)


def test_widths_that_are_not_whole_blocks_take_what_fits(tmp_path: Path) -> None:
    case = dataclasses.replace(SMALL, n_ff=24, n_mtp=0)
    source = checkpoints.write(tmp_path / "hf", checkpoints.as_f32(hf_weights(case)), hf_config(case))
    with open_gguf(convert(source, tmp_path / "x.gguf", "q4_0").path) as model:
        assert model.tensors["blk.0.ffn_down_exps.weight"].format.name == "F16"
        assert model.tensors["blk.0.ffn_up_exps.weight"].format.name == "Q4_0"


def test_weights_too_large_for_a_format_are_refused_by_name(tmp_path: Path) -> None:
    weights = hf_weights(SMALL)
    weights["model.layers.1.self_attn.v_proj.weight"][3, 5] = 1e8
    source = checkpoints.write(tmp_path / "hf", checkpoints.as_f32(weights))
    for kind in ("f16", "q8_0", "q4_0"):
        assert "'blk.1.attn_v.weight' holds 1e+08, more than" in refusal(source, tmp_path, type_name=kind)
    assert convert(source, tmp_path / "x.gguf", "bf16").path.exists()


def test_an_unknown_type_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    assert "'q3_x' is not an output type. Take one of f32, f16" in refusal(
        tmp_path / "none", tmp_path, UsageError, "q3_x"
    )


def test_outputs_that_cannot_be_meant_are_refused(source: Path, tmp_path: Path) -> None:
    def words(out: Path) -> str:
        with pytest.raises(UsageError) as caught:
            convert(source, out, "q4_0")
        return str(caught.value)

    assert "does not end in .gguf" in words(tmp_path / "x.bin")
    assert "no directory" in words(tmp_path / "none" / "x.gguf")
    (tmp_path / "d.gguf").mkdir()
    assert "is a directory" in words(tmp_path / "d.gguf")
    (tmp_path / "old.gguf").write_text("precious")
    assert "exists already" in words(tmp_path / "old.gguf")
    (tmp_path / "mtp-new.gguf").write_text("precious")
    assert "mtp-new.gguf exists already" in words(tmp_path / "new.gguf")
    assert (tmp_path / "old.gguf").read_text() == (tmp_path / "mtp-new.gguf").read_text() == "precious"
    assert not (tmp_path / "new.gguf").exists()


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_the_input_is_never_the_output(tmp_path: Path, link: Any) -> None:
    source = checkpoints.write(tmp_path / "hf", checkpoints.small())
    before = digest(source / "model.safetensors")
    link(source / "model.safetensors", tmp_path / "x.gguf")
    with pytest.raises(UsageError, match="is a file that this command reads"):
        convert(source, tmp_path / "x.gguf", "q4_0", overwrite=True)
    assert digest(source / "model.safetensors") == before


def test_overwriting_replaces_both_files_in_one_step_each(
    source: Path, converted: dict[str, Conversion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.gguf"
    convert(source, out, "f16")
    old = digest(out)
    with pytest.raises(OSError, match="stop"), monkeypatch.context() as patch:
        patch.setattr(options_module, "encode_rows", _raise)
        convert(source, out, "q4_0", overwrite=True)
    assert digest(out) == old
    assert digests(convert(source, out, "q4_0", overwrite=True)) == digests(converted["q4_0"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mtp-x.gguf", "x.gguf"]


def _raise(*_: object) -> None:
    raise OSError("stop")


def test_a_full_disk_is_said_before_work_begins(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "free_bytes", lambda _: 1000)
    words = refusal(source, tmp_path, ResourceError)
    assert "1,000 B free" in words


@pytest.mark.parametrize("step", [pytest.param(11, marks=pytest.mark.slow), 59])
@pytest.mark.parametrize("code", [None, errno.ENOSPC])
def test_a_conversion_that_is_killed_or_fails_at_any_call_resumes_to_the_same_bytes(
    source: Path,
    converted: dict[str, Conversion],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    code: int | None,
) -> None:
    with faults(monkeypatch) as counter:
        convert(source, tmp_path / "count.gguf", "f16")
    expected = digests(converted["f16"])
    for number in range(7, counter.n_calls, step):
        folder = tmp_path / str(number)
        folder.mkdir()
        with faults(monkeypatch, number, code), pytest.raises(Dead if code is None else ResourceError):
            convert(source, folder / "x.gguf", "f16")
        for name, wanted in zip(("x.gguf", "mtp-x.gguf"), expected, strict=True):
            assert not (folder / name).exists() or digest(folder / name) == wanted, f"call {number}"
        if not (folder / "x.gguf").exists() or len(list(folder.iterdir())) > 2:
            with faults(monkeypatch):
                assert digests(convert(source, folder / "x.gguf", "f16")) == expected
        assert sorted(path.name for path in folder.iterdir()) == ["mtp-x.gguf", "x.gguf"]


def test_a_killed_conversion_leaves_no_model_and_the_next_one_is_whole(
    source: Path, converted: dict[str, Conversion], tmp_path: Path
) -> None:
    script = (
        "import os, signal, sys\n"
        "from m2lite.quant.convert import convert\n"
        "def progress(tensor, done, total, /, phase=''):\n"
        "    if done > total / 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert(sys.argv[1], sys.argv[2], 'f16', progress=progress)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, source, tmp_path / "x.gguf"], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("*.gguf"))
    for part in tmp_path.glob("*.part"):
        assert part.read_bytes()[:4] != b"GGUF"
    again = convert(source, tmp_path / "x.gguf", "f16")
    assert again.resumed_bytes > 0 and digests(again) == digests(converted["f16"])
    assert len(list(tmp_path.iterdir())) == 2


def test_a_source_that_changes_on_the_way_is_no_model(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "hf", checkpoints.small())

    def touch(tensor: str, done: int, total: int, /, phase: str = "") -> None:
        os.utime(source / "model.safetensors", (1, 1))

    with pytest.raises(BadModelError, match="changed while it was read"):
        convert(source, tmp_path / "x.gguf", "f16", progress=touch)
    assert not list(tmp_path.glob("*.gguf*"))
