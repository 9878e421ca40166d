"""Files and configurations that are not a MiniMax-M2, or lie about it: refused by name, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import tinymodel
from m2lite.errors import BadModelError, M2liteError
from m2lite.model.config import parse_config
from m2lite.storage.gguf_reader import open_gguf
from m2lite.storage.identity import trunk_sizes
from tests.model.engine import Engine


@pytest.fixture(scope="module")
def metadata(model_files: dict[str, Path]) -> dict[str, Any]:
    return dict(open_gguf(model_files["random"]).metadata)


REFUSED = {
    "attention.sliding_window": 4096,
    "expert_gating_func": 1,
    "expert_shared_count": 1,
    "expert_group_count": 8,
    "leading_dense_block_count": 1,
    "rope.scaling.type": "yarn",
    "nextn_predict_layers": 1,
    "attention.kv_lora_rank": 512,
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_m2_does_not_have_is_refused_by_key(metadata: dict[str, Any], key: str) -> None:
    full = f"minimax-m2.{key}"
    with pytest.raises(BadModelError, match=full):
        parse_config(metadata | {full: REFUSED[key]})


def test_sigmoid_is_the_default(metadata: dict[str, Any]) -> None:
    left = {k: v for k, v in metadata.items() if not k.endswith("expert_gating_func")}
    assert parse_config(left) == parse_config(metadata)


LIES: dict[str, Any] = {
    "block_count": 0,
    "embedding_length": 50,
    "attention.head_count": 3,
    "attention.head_count_kv": 0,
    "attention.key_length": 24,
    "attention.value_length": 64,
    "rope.dimension_count": 34,
    "expert_count": 1 << 20,
    "expert_used_count": 9,
    "context_length": 1 << 31,
    "rope.freq_base": float("nan"),
    "attention.layer_norm_rms_epsilon": -1.0,
    "feed_forward_length": True,
    "expert_feed_forward_length": "many",
}


@pytest.mark.parametrize("key", LIES)
def test_values_out_of_range_are_refused(metadata: dict[str, Any], key: str) -> None:
    with pytest.raises(BadModelError):
        parse_config(metadata | {f"minimax-m2.{key}": LIES[key]})


def test_a_missing_key_is_named(metadata: dict[str, Any]) -> None:
    left = {key: value for key, value in metadata.items() if key != "minimax-m2.attention.head_count"}
    with pytest.raises(BadModelError, match=r"minimax-m2\.attention\.head_count is missing"):
        parse_config(left)


def test_other_architectures_are_refused(metadata: dict[str, Any]) -> None:
    with pytest.raises(BadModelError, match="'llama', expected 'minimax-m2'"):
        parse_config(metadata | {"general.architecture": "llama"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("expert_count", 7, r"ffn_gate_inp.weight has shape \[8, 64\], the metadata asks for \[7, 64\]"),
        ("block_count", 3, r"blk\.2\.[a-z_.]+ is missing"),
        ("block_count", 1, r"blk\.1\.[a-z_.]+ does not belong to a MiniMax-M2"),
        ("attention.head_count", 8, r"attn_q(_norm)?.weight has shape"),
    ],
)
def test_sizes_and_tensors_must_agree(
    model_files: dict[str, Path], tmp_path: Path, key: str, value: int, message: str
) -> None:
    path = rewrite(model_files["random"], tmp_path / "lie.gguf", {f"minimax-m2.{key}": value})
    with pytest.raises(BadModelError, match=message):
        Engine(path)


def test_per_head_norms_are_refused(model_files: dict[str, Path], tmp_path: Path) -> None:
    def shrink(name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return values[:32] if name.endswith("attn_q_norm.weight") else values

    path = rewrite(model_files["random"], tmp_path / "per-head.gguf", {}, shrink)
    with pytest.raises(BadModelError, match=r"attn_q_norm.weight has shape \[32\], the metadata asks for \[128\]"):
        Engine(path)


@pytest.mark.parametrize(
    "tensor", ["ffn_gate_inp.weight", "attn_k.weight", "ffn_down_exps.weight", "output_norm.weight"]
)
def test_nan_in_the_weights_stops_with_a_message(model_files: dict[str, Path], tmp_path: Path, tensor: str) -> None:
    def spoil(name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if name.endswith(tensor):
            values = values.copy()
            if values.dtype == np.uint8:  # block scales: the first two bytes of every block
                n = 34 if values.shape[-1] % 34 == 0 else 18
                values.reshape(-1, n)[:, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
            else:
                values[...] = np.nan
        return values

    engine = Engine(rewrite(model_files["random"], tmp_path / "nan.gguf", {}, spoil))
    timeline = engine.pool.timeline()
    with pytest.raises(M2liteError, match="NaN or infinity in"):
        engine.run(timeline, [1, 2, 3])
    assert timeline.length == 0


def test_a_fused_qkv_gives_the_same_bits(model_files: dict[str, Path], tmp_path: Path) -> None:
    source = gguf.GGUFReader(model_files["random"])
    parts = {t.name: np.array(t.data) for t in source.tensors}

    def fuse(name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        if name.endswith(("attn_k.weight", "attn_v.weight")):
            return None
        if name.endswith("attn_q.weight"):
            return np.concatenate([parts[name.replace("attn_q", which)] for which in ("attn_q", "attn_k", "attn_v")])
        return values

    path = rewrite(model_files["random"], tmp_path / "fused.gguf", {}, fuse, {"attn_q.weight": "attn_qkv.weight"})
    ids = [5, 6, 7, 8]
    assert Engine(path).logits(ids).tobytes() == Engine(model_files["random"]).logits(ids).tobytes()


def rewrite(
    source: Path,
    target: Path,
    changes: dict[str, Any],
    edit: Any = None,
    renames: dict[str, str] | None = None,
    types: Any = None,
) -> Path:
    """Copy a GGUF with other metadata values, tensors or tensor names."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "minimax-m2")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.alignment"):
            continue
        value = changes.get(field.name, field.contents())
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type)
    for tensor in reader.tensors:
        name, values = tensor.name, np.array(tensor.data)
        if edit is not None:
            values = edit(name, values)
        if values is None:
            continue
        for old, new in (renames or {}).items():
            name = name.replace(old, new) if name.endswith(old) else name
        writer.add_tensor(name, values, raw_dtype=types(tensor.tensor_type) if types else tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_the_rewriter_keeps_a_model_as_it_is(model_files: dict[str, Path], tmp_path: Path) -> None:
    same = rewrite(model_files["random"], tmp_path / "same.gguf", {})
    assert Engine(same).logits([1, 2]).tobytes() == Engine(model_files["random"]).logits([1, 2]).tobytes()
    assert Engine(same).config.n_vocab == tinymodel.N_VOCAB


def change(metadata: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Keys below the architecture, `__` for a dot."""
    return metadata | {f"minimax-m2.{name.replace('__', '.')}": value for name, value in values.items()}


@pytest.mark.parametrize(
    "values",
    [
        {"rope__scaling__factor": 40.0},
        {"rope__scaling__factor": 2.0, "rope__scaling__type": "linear"},
        {"rope__scale_linear": 8.0},
        {"rope__scaling__type": "longrope"},
        {"rope__scaling__attn_factor": 1.2},
        {"rope__scaling__yarn_ext_factor": 1.0},
        {"rope__scaling__of_tomorrow": 0.5},
        {"rope__dimension_sections": 3},
        {"attention__scale": 0.25},
        {"attention__causal": False},
        {"attention__mode_of_tomorrow": "windowed"},
        {"expert_weights_norm": False},
        {"expert_weights_scale": 2.5},
        {"logit_scale": 0.0625},
        {"final_logit_softcapping": 30.0},
        {"use_parallel_residual": True},
        {"key_of_tomorrow": 7},
    ],
)
def test_every_key_that_decides_the_arithmetic_is_refused_by_name(
    metadata: dict[str, Any], values: dict[str, Any]
) -> None:
    with pytest.raises(BadModelError, match=f"minimax-m2.{next(iter(values)).replace('__', '.')} is"):
        parse_config(change(metadata, **values))


@pytest.mark.parametrize(
    "values",
    [
        {"rope__scaling__factor": 1.0},
        {"rope__scaling__factor": 0.0, "rope__scaling__type": "linear"},
        {"rope__scaling__factor": 4.0, "rope__scaling__type": "none"},  # llama.cpp ignores it then
        {"rope__scaling__original_context_length": 4096, "rope__scaling__finetuned": False},
        {"rope__scaling__attn_factor": 1.0, "rope__scaling__yarn_beta_fast": 32.0},
        {"attention__scale": 32**-0.5, "attention__causal": True},
        {"expert_weights_norm": True, "expert_weights_scale": 1.0, "expert_group_count": 1},
        {"key_of_tomorrow": 0, "switch_of_tomorrow": False, "remark": "none that counts"},
    ],
)
def test_keys_that_are_off_change_nothing(metadata: dict[str, Any], values: dict[str, Any]) -> None:
    assert parse_config(change(metadata, **values)) == parse_config(metadata)


def with_arrays(path: Path, **arrays: list[int] | list[float] | list[str]) -> Path:
    """A header with these arrays in place of scalars."""
    writer = gguf.GGUFWriter(path, "minimax-m2")
    for name, items in arrays.items():
        writer.add_array(f"minimax-m2.{name.replace('__', '.')}", items)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_one_number_for_each_layer_is_one_number(metadata: dict[str, Any], tmp_path: Path) -> None:
    """llama.cpp writes it so for some models, and reads it for all."""
    same = {"attention__head_count": [4, 4], "attention__head_count_kv": [2, 2], "feed_forward_length": [32, 32]}
    with open_gguf(with_arrays(tmp_path / "a.gguf", **same, attention__sliding_window=[0, 0])) as file:
        assert parse_config(metadata | dict(file.metadata)) == parse_config(metadata)
        assert trunk_sizes("minimax-m2", metadata | dict(file.metadata)) == trunk_sizes("minimax-m2", metadata)
    for items, words in (
        ([2, 1], r"head_count_kv is 2 in layer 0 and 1 in layer 1 \(another than layer 0's in 1 of 2\)"),
        ([2, 2, 2], "head_count_kv has 3 values, one for each of 2 layers is expected"),
        ([], "head_count_kv is an array of 0 "),
        (["2", "2"], "head_count_kv is an array of 2 strings, expected one value"),
    ):
        if items:
            path = with_arrays(tmp_path / "b.gguf", attention__head_count_kv=items)
            with open_gguf(path) as file, pytest.raises(BadModelError, match=words):
                parse_config(metadata | dict(file.metadata))
    with open_gguf(with_arrays(tmp_path / "c.gguf", rope__dimension_sections=[16, 24, 24, 0])) as file:
        assert repr(file.metadata["minimax-m2.rope.dimension_sections"]) == "an array of 4 INT32 (16, 24, 24, 0)"
        with pytest.raises(BadModelError, match=r"rope\.dimension_sections is 16 in layer 0"):
            parse_config(metadata | dict(file.metadata))
