"""What a directory holds that is complete and still no checkpoint to convert: named, with what to do. Reads headers.

"Download it again" costs 230 GB and helps nobody whose files are whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m2lite.errors import BadModelError

CONVERTIBLE = "Convert the original checkpoint instead: safetensors in FP8 (blocks), BF16, F16 or F32."
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class ForeignKind(NamedTuple):
    """A kind of checkpoint: what it is, how its tensors' names end, and what to do with it."""

    what: str
    endings: tuple[str, ...]
    todo: str


MLX = ForeignKind(
    "an MLX checkpoint, quantized for Apple's framework",
    (".scales", ".biases"),
    "Convert the original checkpoint instead, or undo it with `mlx_lm.convert --hf-path DIR --dequantize`.",
)
LORA = ForeignKind(
    "a LoRA adapter, or a model with one that is not merged",
    ("lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_B.default.weight", ".base_layer.weight"),
    "Merge it into its base model first (PEFT: merge_and_unload, save_pretrained), then convert that.",
)
# The most telling first: names of a later kind may be among those of an earlier one.
KINDS = (
    LORA,
    ForeignKind("quantized with NVFP4", (".weight_scale_2", ".weight_global_scale"), CONVERTIBLE),
    ForeignKind("quantized with MXFP4", ("_proj_blocks", "_proj_scales"), CONVERTIBLE),
    ForeignKind("quantized with bitsandbytes", (".absmax", ".quant_map", ".SCB", "__nf4", "__fp4"), CONVERTIBLE),
    ForeignKind("quantized with EXL3", (".trellis", ".suh", ".svh"), CONVERTIBLE),
    ForeignKind("quantized with EXL2", (".q_weight", ".q_scale"), CONVERTIBLE),
    ForeignKind("quantized with GPTQ", (".qweight", ".g_idx"), CONVERTIBLE),
    ForeignKind("quantized with AWQ (or GPTQ)", (".qweight", ".qzeros"), CONVERTIBLE),
    ForeignKind("packed by compressed-tensors", (".weight_packed", ".weight_shape", ".weight_zero_point"), CONVERTIBLE),
    MLX,
    ForeignKind(
        "quantized with one scale for each tensor or row (compressed-tensors, ModelOpt, Quark)",
        (".weight_scale", ".input_scale"),
        CONVERTIBLE,
    ),
    ForeignKind(
        "an MLX checkpoint",
        (".switch_mlp.gate_proj.weight", ".switch_mlp.up_proj.weight", ".switch_mlp.down_proj.weight"),
        "Convert the original checkpoint instead.",
    ),
    ForeignKind(
        "a checkpoint in Mistral's own layout",
        (".attention.wq.weight", ".feed_forward.w1.weight"),
        "Convert the same model as Hugging Face has it.",
    ),
    ForeignKind(
        "another architecture",
        (".mlp.gate_proj.weight", ".mlp.shared_expert.gate_proj.weight", ".attn.c_attn.weight",
         ".linear_attn.in_proj_qkvz.weight", ".mixer.in_proj.weight"),
        "m2lite converts MiniMax-M2 only.",
    ),
)  # fmt: skip
# quantization_config.quant_method, in words.
METHODS = {
    "gptq": "GPTQ", "awq": "AWQ", "compressed-tensors": "compressed-tensors", "modelopt": "ModelOpt (FP8 or NVFP4)",
    "mxfp4": "MXFP4", "bitsandbytes": "bitsandbytes", "exl2": "EXL2", "exl3": "EXL3", "hqq": "HQQ",
    "torchao": "torchao", "quark": "Quark", "auto-round": "AutoRound", "autoround": "AutoRound",
    "fbgemm_fp8": "FBGEMM FP8", "aqlm": "AQLM", "vptq": "VPTQ", "eetq": "EETQ", "quanto": "Quanto", "higgs": "HIGGS",
}  # fmt: skip
# Data types that a shard may hold and that are no weights by themselves, in words; the most telling first.
FOREIGN_DTYPES = {
    "F4": "4-bit floats, MXFP4 or NVFP4", "F8_E8M0": "powers of two, the scales of MXFP4 and MXFP8",
    "F8_E5M2": "8-bit floats of another kind", "F8_E4M3FNUZ": "8-bit floats of another kind",
    "U32": "packed integers", "I32": "packed integers", "U8": "packed bytes", "I8": "8-bit integers",
}  # fmt: skip

# What a program was wrapped into when it was saved; no wrapper changes a weight.
_WRAPPED = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AROUND = ("base_model.model.", "module.")
_OF_M2 = ("model.", "lm_head.")


def unwrapped(name: str) -> str:
    """A tensor's name without what torch.compile, FSDP, data parallelism or PEFT put around the model."""
    plain = _WRAPPED.sub("", name)
    while (prefix := next((p for p in _AROUND if plain.startswith(p)), None)) is not None:
        plain = plain.removeprefix(prefix)
    return plain if plain.startswith(_OF_M2) else name


def name_tensors(names: Iterable[str], dtypes: Sequence[str]) -> ForeignKind | None:
    """What these tensors are of, `dtypes` one for each; None for those of no known kind."""
    found = list(names)
    for kind in KINDS:
        seen = [ending for ending in kind.endings if any(name.endswith(ending) for name in found)]
        # Two signs where names are short and common; `.scales` alone may be of several kinds.
        if len(seen) >= (2 if kind is MLX else 1):
            return kind
    dtype = next((d for d in FOREIGN_DTYPES if dtypes.count(d) * 10 > len(dtypes)), None)  # more than a stray buffer
    return None if dtype is None else ForeignKind(f"stored as {dtype} ({FOREIGN_DTYPES[dtype]})", (), CONVERTIBLE)


def check_tensors(names: Iterable[str], dtypes: Sequence[str]) -> None:
    """Raises BadModelError where these tensors are of a known kind that cannot be converted."""
    found = list(names)
    kind = name_tensors(found, dtypes)
    if kind is not None:
        example = next((n for n in found if n.endswith(kind.endings)), None) if kind.endings else None
        shown = f" (it holds {example!r})" if example else ""
        raise BadModelError(f"The checkpoint is {kind.what}{shown}. Its files are complete.", kind.todo)


def check_config(config: Mapping[str, Any]) -> None:
    """Raises BadModelError where config.json says that the weights are quantized in a way that cannot be read."""
    for key in ("quantization", "quantization_config"):  # mlx-lm writes both
        found = config.get(key)
        if isinstance(found, dict) and "quant_method" not in found and {"group_size", "bits"} <= found.keys():
            bits, size = found["bits"], found["group_size"]
            raise BadModelError(
                f"The checkpoint is {MLX.what} (config.json: {key} has {bits} bits in groups of {size}).", MLX.todo
            )
    found = config.get("quantization_config") or config.get("compression_config")
    method = found.get("quant_method") if isinstance(found, dict) else None
    if isinstance(method, str) and method.lower() in METHODS:
        raise BadModelError(
            f"The checkpoint is quantized with {METHODS[method.lower()]} (config.json: quantization_config.quant_method"
            f" is {method!r}).",
            CONVERTIBLE,
        )


def check_directory(directory: Path) -> None:
    """Raises BadModelError where a directory without the files of a checkpoint holds something else that is known."""

    def names(*patterns: str) -> list[str]:
        return sorted(path.name for pattern in patterns for path in directory.glob(pattern))

    def refuse(what: str, todo: str) -> None:
        raise BadModelError(f"{directory} holds {what}.", todo)

    if found := names("adapter_config.json", "adapter_model.*"):
        refuse(f"{LORA.what} ({found[0]})", LORA.todo)
    if found := [n for n in names("*.gguf") if not n.startswith(".")]:
        more = f" and {len(found) - 1} more" if found[1:] else ""
        refuse(
            f"GGUF files ({found[0]}{more}), which are converted already",
            "Run them as they are, or give one to `m2lite quantize`.",
        )
    if found := names("consolidated*", "params.json"):
        refuse(
            f"a checkpoint in Mistral's or Meta's own layout ({found[0]})",
            "Fetch the same model as Hugging Face has it, with config.json and model*.safetensors.",
        )
    if found := names("*.bin.index.json", *PICKLES):
        refuse(
            f"PyTorch pickles ({found[0]}), which can run code and are not read, and no safetensors",
            "Fetch the safetensors, or save them: model.save_pretrained(DIR, safe_serialization=True).",
        )
    if found := names("*.npz", "*.msgpack", "*.h5", "*.onnx", "*.nemo", "*.tflite"):
        refuse(f"{found[0]}, a model of another framework", "Fetch the safetensors that Hugging Face has of it.")
