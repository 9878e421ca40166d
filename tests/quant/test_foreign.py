"""Checkpoints that are whole and something else: named, with what to do, and never "Download it again"."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2lite.errors import BadModelError, M2liteError
from m2lite.quant.convert import convert
from tests.golden.models import F32, hf_config, hf_weights, write_safetensors
from tests.quant import checkpoints
from tests.quant.checkpoints import SMALL, Stored

WEIGHTS = hf_weights(SMALL)
PLAIN = checkpoints.as_f32(WEIGHTS)


def refusal(directory: Path) -> str:
    with pytest.raises(M2liteError) as caught:
        convert(directory, directory / "out.gguf", "q8_0")
    assert not (directory / "out.gguf").exists()
    assert "ownload" not in str(caught.value)
    return str(caught.value)


def packed(*endings: str, dtype: str = "U32") -> Stored:
    """Projections and experts as codes, with further tensors whose names end so."""
    stored = {}
    for name, (kind, value) in PLAIN.items():
        if name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")):
            for ending in endings:
                codes = np.zeros((value.shape[0], 1), np.uint32 if dtype == "U32" else np.uint8)
                stored[name.removesuffix(".weight") + ending] = (dtype, codes)
        else:
            stored[name] = (kind, value)
    return stored


KINDS: dict[str, tuple[Stored, dict[str, Any], str]] = {
    "MLX by its config": (
        packed(".weight", ".scales", ".biases"),
        {"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}},
        "MLX checkpoint, quantized for Apple's framework (config.json: quantization has 4 bits in groups of 64)",
    ),
    "MLX by its tensors": (packed(".weight", ".scales", ".biases"), {}, "MLX checkpoint, quantized"),
    "GPTQ": (packed(".qweight", ".qzeros", ".scales", ".g_idx"), {}, "quantized with GPTQ"),
    "AWQ": (packed(".qweight", ".qzeros"), {"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ"),
    "compressed-tensors": (packed(".weight_packed", ".weight_scale", ".weight_shape"), {}, "compressed-tensors"),
    "NVFP4": (packed(".weight", ".weight_scale", ".weight_scale_2", dtype="U8"), {}, "quantized with NVFP4"),
    "MXFP4": (packed(".weight", ".weight_scale", dtype="F8_E8M0"), {}, "one scale for each tensor or row"),
    "E8M0": (packed(".weight", ".scale", dtype="F8_E8M0"), {}, "F8_E8M0 (powers of two, the scales of MXFP4"),
    "bitsandbytes": (packed(".weight", ".weight.absmax", ".weight.quant_map", dtype="U8"), {}, "with bitsandbytes"),
    "EXL3": (packed(".trellis", ".suh", ".svh"), {}, "quantized with EXL3"),
    "LoRA, not merged": (packed(".base_layer.weight", ".lora_A.default.weight"), {}, "LoRA adapter, or a model"),
    "Mistral's names": (packed(".attention.wq.weight"), {}, "in Mistral's own layout"),
}  # fmt: skip


@pytest.mark.parametrize("case", KINDS)
def test_another_kind_of_weights_is_named(tmp_path: Path, case: str) -> None:
    stored, config, words = KINDS[case]
    checkpoints.write(tmp_path, stored, {**hf_config(SMALL), **config}, n_shards=2)
    assert words in refusal(tmp_path)


def test_another_model_is_named_before_its_quantization(tmp_path: Path) -> None:
    """Else its original is fetched next, for nothing."""
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "quantization": {"bits": 4, "group_size": 64},
    }
    checkpoints.write(tmp_path, packed(".weight", ".scales", ".biases"), config)
    assert "model_type is 'mixtral', expected 'minimax_m2'" in refusal(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "model_type is 'mixtral', expected 'minimax_m2'" in refusal(tmp_path)


FILES = {
    "pickles": (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], "holds PyTorch pickles"),
    "one pickle": (["consolidated.pth"], "Mistral's or Meta's own layout"),
    "GGUF": (["m2-Q4_K_M.gguf"], "holds GGUF files (m2-Q4_K_M.gguf), which are converted already"),
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], "holds a LoRA adapter"),
    "Mistral": (["consolidated.safetensors", "params.json"], "Mistral's or Meta's own layout"),
    "old MLX": (["weights.npz"], "a model of another framework"),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("has_config", [True, False])
def test_a_directory_without_a_checkpoint_is_told_what_it_holds(tmp_path: Path, case: str, has_config: bool) -> None:
    names, words = FILES[case]
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    if has_config:
        (tmp_path / "config.json").write_text(json.dumps(hf_config(SMALL)))
    assert words in refusal(tmp_path)


def test_a_part_of_a_model_is_no_broken_download(tmp_path: Path) -> None:
    headless = {name: value for name, value in PLAIN.items() if name != "lm_head.weight"}
    checkpoints.write(tmp_path / "headless", headless, n_shards=2)
    assert "Tensor 'lm_head.weight' is missing (output.weight), and no file is" in refusal(tmp_path / "headless")
    base = {name.removeprefix("model."): value for name, value in headless.items()}
    checkpoints.write(tmp_path / "base", base)
    assert "names are not those of a whole MiniMax-M2" in refusal(tmp_path / "base")
    dense = {f"model.layers.0.mlp.{n}_proj.weight": ("F32", np.zeros((4, 4), np.float32)) for n in ("gate", "up")}
    checkpoints.write(tmp_path / "dense", {**PLAIN, **dense})
    assert "another architecture (it holds 'model.layers.0.mlp.gate_proj.weight')" in refusal(tmp_path / "dense")


def test_other_files_under_the_name_of_a_shard(tmp_path: Path) -> None:
    for start, words in (
        (b"PK\x03\x04", "a zip archive, as PyTorch's pickles are"),
        (b"\x80\x02}q", "a pickle, which can run code"),
        (b"GGUF\3", "a GGUF file"),
    ):
        checkpoints.write(tmp_path, PLAIN)
        (tmp_path / "model.safetensors").write_bytes(start.ljust(600, b"\0"))
        assert words in refusal(tmp_path)


WRAPPERS: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile within": lambda name: name.replace("model.layers.", "model._orig_mod.layers."),
    "PEFT": lambda name: f"base_model.model.{name}",
    "data parallel": lambda name: f"module.{name}",
    "two of them": lambda name: f"module._orig_mod.{name}",
    "FSDP": lambda name: name.replace("self_attn.", "_fsdp_wrapped_module.self_attn."),
    "not all": lambda name: f"_orig_mod.{name}" if "layers.0" in name else name,
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("plain")
    return checkpoints.digests(convert(checkpoints.write(folder, PLAIN), folder / "m.gguf", "q8_0"))


@pytest.mark.parametrize("case", WRAPPERS)
def test_wrapped_names_are_read_by_their_plain_ones(tmp_path: Path, expected: tuple[str, str], case: str) -> None:
    stored = {WRAPPERS[case](name): value for name, value in PLAIN.items()}
    made = convert(checkpoints.write(tmp_path, stored, n_shards=2), tmp_path / "m.gguf", "q8_0")
    assert checkpoints.digests(made) == expected
    assert any("were saved from a wrapped model" in text for text in made.warnings)


def test_a_wrapped_name_beside_its_plain_one_is_refused(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, {**PLAIN, "_orig_mod.lm_head.weight": PLAIN["lm_head.weight"]})
    assert "would both be 'lm_head.weight'" in refusal(tmp_path)


def test_scales_may_be_powers_of_two(tmp_path: Path) -> None:
    """E8M0 in blocks, as some FP8 checkpoints have them: exactly the same numbers as in F32."""

    def rounded(weights: dict[str, F32], as_e8m0: bool) -> Stored:
        stored = checkpoints.as_fp8(weights, 16)
        for name, (_, value) in stored.items():
            if name.endswith("_scale_inv"):
                exponent = np.ceil(np.log2(value))
                scale = ("F8_E8M0", (exponent + 127).astype(np.uint8)) if as_e8m0 else ("F32", np.exp2(exponent))
                stored[name] = scale
        return stored

    fp8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3", "activation_scheme": "dynamic"}
    made = []
    for as_e8m0 in (True, False):
        folder = tmp_path / str(as_e8m0)
        config = {**hf_config(SMALL), "quantization_config": {**fp8, "scale_fmt": "ue8m0" if as_e8m0 else None}}
        checkpoints.write(folder, rounded(WEIGHTS, as_e8m0), config)
        made.append(checkpoints.digests(convert(folder, folder / "m.gguf", "f32")))
    assert made[0] == made[1]
    stored = rounded(WEIGHTS, True)
    name = next(name for name in stored if name.endswith("_scale_inv"))
    stored[name][1][0, 0] = 255  # NaN
    folder = checkpoints.write(tmp_path / "nan", stored, {**hf_config(SMALL), "quantization_config": fp8})
    with pytest.raises(BadModelError, match="holds NaN or infinity"):
        convert(folder, folder / "m.gguf", "f32")


@pytest.mark.parametrize(
    ("key", "value"), [("fmt", "float8_e5m2"), ("bits", 4), ("kv_cache_scheme", {"num_bits": 8}), ("group_size", 32)]
)
def test_every_key_of_the_quantization_is_understood_or_refused(tmp_path: Path, key: str, value: object) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], key: value}
    checkpoints.write(tmp_path, PLAIN, {**hf_config(SMALL), "quantization_config": settings})
    assert f"quantization_config.{key} is {value!r}, which is not supported" in refusal(tmp_path)


def test_a_shard_of_sub_bytes_is_sized(tmp_path: Path) -> None:
    """F4 takes half a byte a weight: the file is whole, and no convertible one."""
    stored = dict(PLAIN)
    checkpoints.write(tmp_path, stored)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"x": ("F4", np.zeros((4, 8), np.uint8))})
    data = path.read_bytes().replace(b"[4, 8]", b"[4,16]")
    path.write_bytes(data)
    assert "stored as F4 (4-bit floats, MXFP4 or NVFP4)" in refusal(tmp_path)
