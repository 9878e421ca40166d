"""Directories of shards: values, FP8 scales, the index and its traps."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from m2lite.errors import BadModelError, M2liteError, UsageError
from m2lite.quant.checkpoint import E4M3, INDEX_NAME, matrices, open_checkpoint
from tests.golden.models import write_safetensors
from tests.quant import checkpoints


def refusal(directory: Path, kind: type[M2liteError] = BadModelError) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(directory).close()
    return str(caught.value)


def test_the_fp8_table_is_float8_e4m3fn() -> None:
    expected = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert E4M3.tobytes()[:-4] == expected.tobytes()[:-4]  # the last is a NaN, as the 127th: of any sign
    assert np.isnan(E4M3).nonzero()[0].tolist() == [127, 255]


@pytest.mark.parametrize("shape", [(8, 8), (300, 130), (128, 256), (1, 1), (129, 127)])
def test_fp8_blocks_are_multiplied_at_ragged_edges_too(tmp_path: Path, shape: tuple[int, int]) -> None:
    weights = np.random.default_rng(1).standard_normal((3, *shape)).astype(np.float32)
    codes, scale = checkpoints.quantize_fp8(weights, 128)
    stored: checkpoints.Stored = {"w": ("F8_E4M3", codes), "w_scale_inv": ("F32", scale)}
    expected = checkpoints.dequantize_fp8(codes, scale, 128)
    with open_checkpoint(checkpoints.write(tmp_path, stored)) as checkpoint:
        for matrix in range(3):
            assert (checkpoint.read("w", matrix) == expected[matrix]).all()
        first, count = shape[0] // 2, shape[0] - shape[0] // 2
        assert (checkpoint.read("w", 1, first, count) == expected[1, first:]).all()


def test_every_plain_dtype_is_exact(tmp_path: Path) -> None:
    value = np.random.default_rng(2).standard_normal((5, 7)).astype(np.float32)
    half, brain = value.astype(np.float16), value.astype(ml_dtypes.bfloat16)
    stored: checkpoints.Stored = {
        "f32": ("F32", value),
        "f16": ("F16", half),
        "bf16": ("BF16", brain.view(np.uint16)),
        "i32": ("I32", value.view(np.int32)),
    }
    with open_checkpoint(checkpoints.write(tmp_path, stored, n_shards=2)) as checkpoint:
        assert (checkpoint.read("f32") == value).all()
        assert (checkpoint.read("f16", 0, 2, 2) == half[2:4].astype(np.float32)).all()
        assert (checkpoint.read("bf16") == brain.astype(np.float32)).all()
        with pytest.raises(BadModelError, match="'i32' has dtype I32"):
            checkpoint.read("i32")


def test_shapes_are_stacks_of_matrices() -> None:
    assert matrices((4,)) == (1, 1, 4) and matrices((3, 4)) == (1, 3, 4) and matrices((2, 3, 4)) == (2, 3, 4)
    assert matrices(()) == (1, 1, 1)
    with pytest.raises(BadModelError, match="4 dimensions"):
        matrices((1, 2, 3, 4))


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (None, "'w_scale_inv' is missing"),
        (np.full((2, 2), np.nan, np.float32), "'w_scale_inv' holds NaN"),
        (np.full((2, 2), np.inf, np.float32), "'w_scale_inv' holds NaN or infinity"),
        (np.ones((2, 1), np.float32), "has shape [2, 1] where blocks of 128 x 128 need [2, 2]"),
        (np.ones((1, 2, 2), np.float32), None),
    ],
)
def test_fp8_scales_are_checked(tmp_path: Path, scale: np.ndarray | None, words: str | None) -> None:
    stored: checkpoints.Stored = {"w": ("F8_E4M3", np.zeros((200, 200), np.uint8))}
    if scale is not None:
        stored["w_scale_inv"] = ("F32", scale)
    with open_checkpoint(checkpoints.write(tmp_path, stored)) as checkpoint:
        if words is None:
            assert not checkpoint.read("w").any()
        else:
            with pytest.raises(BadModelError) as caught:
                checkpoint.read("w")
            assert words in str(caught.value)


def test_nan_weights_are_refused_by_name(tmp_path: Path) -> None:
    codes = np.zeros((4, 4), np.uint8)
    codes[2, 1] = 0xFF
    plain = np.zeros(4, np.float32)
    plain[0] = np.inf
    stored: checkpoints.Stored = {
        "fp8": ("F8_E4M3", codes), "fp8_scale_inv": ("F32", np.ones((1, 1), np.float32)), "plain": ("F32", plain),
    }  # fmt: skip
    with open_checkpoint(checkpoints.write(tmp_path, stored)) as checkpoint:
        with pytest.raises(BadModelError, match="'fp8' holds NaN or infinity within rows 0 to 3"):
            checkpoint.read("fp8")
        with pytest.raises(BadModelError, match="'plain' holds NaN"):
            checkpoint.read("plain")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    stored: checkpoints.Stored = {name: ("F32", np.zeros(2, np.float32)) for name in "abcd"}
    return checkpoints.write(tmp_path / "hf", stored, n_shards=2)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_shards_are_one_table(sharded: Path) -> None:
    with open_checkpoint(sharded) as checkpoint:
        assert sorted(checkpoint.tensors) == ["a", "b", "c", "d"]
        found = [path.name for path in checkpoint.paths()]
        assert found[:2] == [FIRST, SECOND] and "config.json" in found and INDEX_NAME in found
        assert [file.name for file in checkpoint.identify()] == [FIRST, SECOND]


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", "a\n.safetensors", ""]
)
def test_a_shard_name_is_a_plain_file_name(sharded: Path, name: str) -> None:
    checkpoints.write_index(sharded, {"a": name, "b": SECOND})
    assert "not a plain file name" in refusal(sharded)


def test_an_index_and_shards_that_do_not_agree_are_refused(sharded: Path) -> None:
    right = {"a": FIRST, "c": FIRST, "b": SECOND, "d": SECOND}
    for weight_map, words in (
        ({**right, "e": FIRST}, f"{FIRST} does not hold 'e'"),
        ({**right, "b": FIRST}, f"{FIRST} does not hold 'b'"),
        ({"a": FIRST, "b": SECOND, "d": SECOND}, f"{INDEX_NAME} does not list 'c'"),
        (dict.fromkeys("ac", FIRST), f"holds {SECOND}, but"),
        ({}, "has no weight_map"),
        ({**right, "a": "model-00003-of-00002.safetensors"}, "model-00003-of-00002.safetensors is missing"),
    ):
        checkpoints.write_index(sharded, weight_map)
        assert words in refusal(sharded)
    (sharded / INDEX_NAME).write_text('{"weight_map": [1]}')
    assert "has no weight_map" in refusal(sharded)
    (sharded / INDEX_NAME).write_text("[]")
    assert "not valid JSON: an array where an object is expected" in refusal(sharded)
    (sharded / INDEX_NAME).unlink()
    assert "but there is no model.safetensors.index.json" in refusal(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    write_safetensors(sharded / SECOND, {name: ("F32", np.zeros(2, np.float32)) for name in ("b", "d", "a")})
    assert f"'a' is in two shards, {FIRST} and {SECOND}" in refusal(sharded)


def test_links_out_of_the_directory_are_followed_and_told(sharded: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.safetensors"
    (sharded / SECOND).rename(target)
    (sharded / SECOND).symlink_to(target)
    with open_checkpoint(sharded) as checkpoint:
        assert len(checkpoint.tensors) == 4
        assert checkpoint.notes == [f"{sharded} holds links to files elsewhere, 1 in all: {SECOND} leads to {target}."]
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to("/dev/zero")
    assert "is not a regular file" in refusal(sharded)
    os.mkfifo(tmp_path / "fifo")
    (sharded / "config.json").unlink()
    (sharded / "config.json").symlink_to(tmp_path / "fifo")
    assert "config.json is not a regular file" in refusal(sharded)


def test_the_links_of_a_hugging_face_cache_are_followed(sharded: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    with open_checkpoint(snapshot) as checkpoint:
        assert len(checkpoint.tensors) == 4


@pytest.mark.parametrize("name", ["._model-00001-of-00002.safetensors", "._model.safetensors", ".hidden.safetensors"])
def test_what_macos_leaves_beside_files_is_ignored(sharded: Path, tmp_path: Path, name: str) -> None:
    (sharded / name).write_bytes(b"\0\x05\x16\x07 AppleDouble")
    with open_checkpoint(sharded) as checkpoint:
        assert checkpoint.tensors
    whole = checkpoints.write(tmp_path / "whole", checkpoints.small())
    (whole / name).write_bytes(b"\0\x05\x16\x07 AppleDouble")
    open_checkpoint(whole).close()


def test_files_beside_the_weights_are_no_fifos(sharded: Path) -> None:
    (sharded / "config.json").unlink()
    os.mkfifo(sharded / "config.json")
    assert "is not a regular file" in refusal(sharded)


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    assert "is not a directory" in refusal(tmp_path / "none", UsageError)
    assert "config.json is missing" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{nonsense")
    assert "config.json is not valid JSON" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert "config.json is not valid JSON" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "model.safetensors is missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{"quant_method": "awq"}, *({"quant_method": "fp8", "weight_block_size": size} for size in ([0, 128], 128)), 5],
)
def test_other_quantisations_are_refused(tmp_path: Path, settings: object) -> None:
    checkpoints.write(tmp_path, {"a": ("F32", np.zeros(2, np.float32))})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    assert "quantization_config" in refusal(tmp_path)
