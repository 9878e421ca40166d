"""From checkpoint to GGUF: bytes against the gguf package, and every way to spell a checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from m2lite.quant import options as options_module
from m2lite.quant.convert import Conversion, convert
from m2lite.storage.gguf_reader import open_gguf
from m2lite.storage.identity import file_identity, trunk_identity
from m2lite.storage.sidecar import sidecar_path
from tests.golden.models import F32, hf_config, hf_weights
from tests.quant import checkpoints
from tests.quant.checkpoints import QUANTIZED, SMALL, digest, digests

ROOT = Path(__file__).parents[2]


def expected_tensors(weights: Mapping[str, F32]) -> tuple[dict[str, F32], dict[str, F32]]:
    """GGUF names and values of trunk and sidecar, by hand."""
    flat = {"embed_tokens": "token_embd", "norm": "output_norm"}
    layer = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "block_sparse_moe.gate": "ffn_gate_inp",
    }  # fmt: skip

    def block(number: int, prefix: str) -> dict[str, F32]:
        out = {f"blk.{number}.{new}.weight": weights[f"{prefix}{old}.weight"] for old, new in layer.items()}
        out[f"blk.{number}.exp_probs_b.bias"] = weights[prefix + "block_sparse_moe.e_score_correction_bias"]
        for old, new in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            experts = [weights[f"{prefix}block_sparse_moe.experts.{e}.{old}.weight"] for e in range(SMALL.n_experts)]
            out[f"blk.{number}.ffn_{new}_exps.weight"] = np.stack(experts)
        return out

    trunk = {f"{new}.weight": weights[f"model.{old}.weight"] for old, new in flat.items()}
    trunk["output.weight"] = weights["lm_head.weight"]
    sidecar: dict[str, F32] = {}
    for i in range(SMALL.n_layers):
        trunk.update(block(i, f"model.layers.{i}."))
    for i in range(SMALL.n_mtp):
        number, prefix = SMALL.n_layers + i, f"model.mtp.layers.{i}."
        sidecar.update(block(number, prefix + "transformer_layer."))
        for old, new in (
            ("enorm", "enorm"),
            ("hnorm", "hnorm"),
            ("eh_proj", "eh_proj"),
            ("final_layernorm", "shared_head_norm"),
        ):
            sidecar[f"blk.{number}.nextn.{new}.weight"] = weights[f"{prefix}{old}.weight"]
    return trunk, sidecar


def expected_format(name: str, value: F32, kind: str, mtp: bool) -> str:
    if value.ndim == 1 or "ffn_gate_inp" in name or kind == "f32":
        return "F32"
    if kind == "q4_0" and (name == "output.weight" or (mtp and "_exps" not in name)):  # Q6_K needs widths of 256
        return "Q8_0"
    return QUANTIZED[kind]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_every_tensor_has_the_bytes_of_the_gguf_package(converted: dict[str, Conversion], kind: str) -> None:
    done = converted[kind]
    assert done.mtp_path is not None and done.n_mtp_modules == SMALL.n_mtp
    for path, expected, mtp in zip(
        (done.path, done.mtp_path), expected_tensors(hf_weights(SMALL)), (False, True), strict=True
    ):
        found = {str(tensor.name): tensor for tensor in gguf.GGUFReader(path).tensors}
        assert sorted(found) == sorted(expected)
        for name, value in expected.items():
            block_format = expected_format(name, value, kind, mtp)
            tensor = found[name]
            assert tensor.tensor_type.name == block_format, name
            assert tuple(reversed(tensor.shape.tolist())) == value.shape, name
            wanted = gguf.quants.quantize(value, gguf.GGMLQuantizationType[block_format])
            assert tensor.data.tobytes() == wanted.tobytes(), name


def test_our_own_reader_sees_the_same(converted: dict[str, Conversion]) -> None:
    done = converted["q4_0"]
    reader = {str(tensor.name): tensor for tensor in gguf.GGUFReader(done.path).tensors}
    with open_gguf(done.path) as model:
        assert len(model.tensors) == done.n_tensors == len(reader) == 3 + 13 * SMALL.n_layers
        assert model.size_bytes == done.size_bytes == done.path.stat().st_size
        for name, tensor in model.tensors.items():
            assert model.view(name).tobytes() == reader[name].data.tobytes()
            assert tensor.offset % 32 == 0


def test_metadata_is_what_llama_cpp_reads(converted: dict[str, Conversion]) -> None:
    with open_gguf(converted["q4_0"].path) as model:
        found: dict[str, Any] = {k: v for k, v in model.metadata.items() if isinstance(v, (str, int, float, bool))}
        tokens = model.array("tokenizer.ggml.tokens", str)
        types = model.array("tokenizer.ggml.token_type", int)
        merges = model.array("tokenizer.ggml.merges", str)
    n_base = SMALL.n_vocab - 12 - 4
    assert found.pop("tokenizer.chat_template").startswith("{{ ']~!b[' }}")
    assert found.pop("m2lite.header_xxh64") > 0
    assert found == {
        "general.architecture": "minimax-m2",
        "general.alignment": 32,
        "general.type": "model",
        "general.name": "MiniMax-M2",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "general.sampling.temp": 1.0,
        "general.sampling.top_k": 40,
        "general.sampling.top_p": pytest.approx(0.95),
        "minimax-m2.block_count": 2,
        "minimax-m2.context_length": 196608,
        "minimax-m2.embedding_length": 64,
        "minimax-m2.feed_forward_length": 32,
        "minimax-m2.expert_feed_forward_length": 32,
        "minimax-m2.attention.head_count": 2,
        "minimax-m2.attention.head_count_kv": 1,
        "minimax-m2.attention.key_length": 32,
        "minimax-m2.attention.value_length": 32,
        "minimax-m2.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "minimax-m2.rope.dimension_count": 16,
        "minimax-m2.rope.freq_base": 5e6,
        "minimax-m2.expert_count": 4,
        "minimax-m2.expert_used_count": 2,
        "minimax-m2.expert_gating_func": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "minimax-m2",
        "tokenizer.ggml.bos_token_id": n_base + 7,
        "tokenizer.ggml.eos_token_id": n_base + 5,
        "tokenizer.ggml.unknown_token_id": n_base + 6,
        "tokenizer.ggml.padding_token_id": n_base,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert len(tokens) == len(types) == SMALL.n_vocab
    assert tokens[:2] == ["Ā", "ā"] and tokens[n_base + 4] == "]~b]" and tokens[n_base + 8] == "<think>"
    assert tokens[-1] == f"[PAD{SMALL.n_vocab - 1}]"
    assert types == [1] * n_base + [3] * 8 + [4] * 4 + [5] * 4
    assert merges[0] == "Ġ e" and len(merges) == n_base - 256


def test_the_sidecar_says_how_it_is_meant(converted: dict[str, Conversion]) -> None:
    for done in converted.values():
        assert done.mtp_path == sidecar_path(done.path) == done.path.with_name(f"mtp-{done.path.name}")
        with open_gguf(done.path) as model, open_gguf(done.mtp_path) as sidecar:
            assert sidecar.metadata["general.architecture"] == "minimax-m2"
            assert sidecar.metadata["minimax-m2.block_count"] == SMALL.n_layers + SMALL.n_mtp
            assert sidecar.metadata["minimax-m2.nextn_predict_layers"] == SMALL.n_mtp
            assert sidecar.metadata["minimax-m2.vocab_size"] == SMALL.n_vocab
            assert "minimax-m2.nextn_predict_layers" not in model.metadata
            private = {key: value for key, value in sidecar.metadata.items() if key.startswith("m2lite.mtp")}
            assert private == {
                "m2lite.mtp.concat": "embedding,hidden",
                "m2lite.mtp.hidden": "pre_norm",
                "m2lite.mtp.zero_at_0": True,
                "m2lite.mtp.shared_norm": False,
                "m2lite.mtp.trunk": trunk_identity(model),
            }
            same = [key for key in model.metadata if key.startswith("minimax-m2.") and not key.endswith("block_count")]
            assert all(sidecar.metadata[key] == model.metadata[key] for key in same)
            assert all(int(name.split(".")[1]) >= SMALL.n_layers for name in sidecar.tensors)


def test_a_trunk_has_one_identity_in_every_precision_and_a_file_its_own(
    converted: dict[str, Conversion], tmp_path: Path
) -> None:
    trunks, files = set(), set()
    for done in converted.values():
        with open_gguf(done.path) as model:
            trunks.add(trunk_identity(model))
            files.add(file_identity(model))
    assert len(trunks) == 1 and len(files) == len(converted)
    weights = hf_weights(SMALL)
    weights["model.layers.1.block_sparse_moe.e_score_correction_bias"][3] += 1e-6
    other = checkpoints.write(tmp_path / "hf", checkpoints.as_f32(weights))
    with open_gguf(convert(other, tmp_path / "other.gguf", "f32").path) as model:
        assert trunk_identity(model) not in trunks


def test_the_same_input_gives_the_same_bytes(source: Path, converted: dict[str, Conversion], tmp_path: Path) -> None:
    moved = checkpoints.write(tmp_path / "another place", checkpoints.small())
    os.utime(moved / "model.safetensors", (0, 0))
    assert digests(convert(moved, tmp_path / "x.gguf", "q4_0")) == digests(converted["q4_0"])


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("spelling", ["old", "new"])
def test_every_spelling_of_a_checkpoint_gives_the_same_file(
    converted: dict[str, Conversion], tmp_path: Path, spelling: str, n_shards: int
) -> None:
    weights, config = hf_weights(SMALL), hf_config(SMALL)
    if spelling == "new":
        weights, config = checkpoints.fuse_experts(weights, SMALL), checkpoints.new_config(SMALL)
    source = checkpoints.write(tmp_path / "hf", checkpoints.as_f32(weights), config, n_shards)
    assert digests(convert(source, tmp_path / "x.gguf", "q8_0")) == digests(converted["q8_0"])


@pytest.mark.parametrize("fused", [False, True])
def test_fp8_blocks_and_bf16_become_what_they_stand_for(tmp_path: Path, fused: bool) -> None:
    block = 24  # edges are ragged in rows of 64 and 32
    stored = checkpoints.as_fp8(hf_weights(SMALL), block)
    weights: dict[str, F32] = {}
    for name, (dtype, value) in stored.items():
        if dtype == "F8_E4M3":
            weights[name] = checkpoints.dequantize_fp8(value, stored[name + "_scale_inv"][1], block)
        elif not name.endswith("_scale_inv"):
            weights[name] = value if dtype == "F32" else (value.astype(np.uint32) << 16).view(np.float32)
    settings = {"quant_method": "fp8", "fmt": "float8_e4m3fn", "weight_block_size": [block, block]}
    if fused:
        plain = {name: value for name, value in weights.items() if ".mtp." not in name}
        stored = checkpoints.as_fp8(checkpoints.fuse_experts(plain, SMALL), block)
        # Each fused tensor is quantised anew, so only its own values count: take them back from the codes.
        weights = {name: value for name, value in plain.items() if ".experts." not in name}
        for name, (dtype, value) in stored.items():
            if dtype == "F8_E4M3":
                values = checkpoints.dequantize_fp8(value, stored[name + "_scale_inv"][1], block)
                prefix = name.partition("mlp.experts.")[0] + "block_sparse_moe.experts."
                for e in range(SMALL.n_experts):
                    if name.endswith("gate_up_proj"):
                        weights[f"{prefix}{e}.w1.weight"], weights[f"{prefix}{e}.w3.weight"] = np.split(values[e], 2)
                    elif name.endswith("down_proj"):
                        weights[f"{prefix}{e}.w2.weight"] = values[e]
                if "experts" not in name:
                    weights[name] = values
    config = {**hf_config(SMALL), "quantization_config": settings}
    done = convert(checkpoints.write(tmp_path / "hf", stored, config, n_shards=2), tmp_path / "x.gguf", "f32")
    found = {str(tensor.name): tensor.data for tensor in gguf.GGUFReader(done.path).tensors}
    if fused:
        weights.update({name: value for name, value in hf_weights(SMALL).items() if ".mtp." in name})
    trunk, _ = expected_tensors(weights)
    for name, value in trunk.items():
        assert (found[name].reshape(value.shape) == value).all(), name


@pytest.mark.parametrize("store", [checkpoints.as_f16, checkpoints.as_bf16])
def test_halves_are_read_exactly(tmp_path: Path, store: Any) -> None:
    stored = store(hf_weights(SMALL))
    done = convert(checkpoints.write(tmp_path / "hf", stored), tmp_path / "x.gguf", "f32")
    with open_gguf(done.path) as model:
        kind, value = stored["lm_head.weight"]
        wide = value.astype(np.float32) if kind == "F16" else (value.astype(np.uint32) << 16).view(np.float32)
        assert model.view("output.weight").tobytes() == wide.tobytes()


@pytest.mark.parametrize("layout", ["a", "b"])
def test_every_mtp_layout_gives_the_same_modules(converted: dict[str, Conversion], tmp_path: Path, layout: str) -> None:
    weights = checkpoints.rename_mtp(hf_weights(SMALL), SMALL, layout)
    if layout == "a":
        weights[f"model.layers.{SMALL.n_layers}.embed_tokens.weight"] = weights["model.embed_tokens.weight"]
        weights[f"model.layers.{SMALL.n_layers}.shared_head.head.weight"] = weights["lm_head.weight"]
    source = checkpoints.write(tmp_path / "hf", checkpoints.as_f32(weights))
    done = convert(source, tmp_path / "x.gguf", "q4_0")
    assert digest(done.path) == digest(converted["q4_0"].path)
    assert done.mtp_path is not None and converted["q4_0"].mtp_path is not None
    with open_gguf(done.mtp_path) as found, open_gguf(converted["q4_0"].mtp_path) as expected:
        # With a shared norm the modules have none of their own: the trunk's output_norm counts.
        shared = {name for name in expected.tensors if layout == "b" and "shared_head_norm" in name}
        assert [name for name in expected.tensors if name not in shared] == list(found.tensors)
        for name in found.tensors:
            assert found.view(name).tobytes() == expected.view(name).tobytes(), name
        assert found.metadata["m2lite.mtp.shared_norm"] is (layout == "b")
        assert found.metadata["m2lite.mtp.hidden"] == {"a": "post_norm", "b": "pre_norm"}[layout]


def test_config_overrules_how_modules_are_meant_and_mtp_can_be_left_out(tmp_path: Path) -> None:
    config = {**hf_config(SMALL), "m2lite_mtp": {"hidden": "post_norm", "zero_at_0": False}, "model_name": "Tiny"}
    source = checkpoints.write(tmp_path / "hf", checkpoints.small(), config)
    done = convert(source, tmp_path / "x.gguf", "q8_0")
    assert done.mtp_path is not None
    with open_gguf(done.mtp_path) as sidecar, open_gguf(done.path) as model:
        assert sidecar.metadata["m2lite.mtp.hidden"] == "post_norm"
        assert sidecar.metadata["m2lite.mtp.zero_at_0"] is False
        assert model.metadata["general.name"] == "Tiny"
    without = convert(source, tmp_path / "y.gguf", "q8_0", mtp=False, name="Other")
    assert without.mtp_path is None and sorted(p.name for p in tmp_path.glob("*y.gguf*")) == ["y.gguf"]
    with open_gguf(without.path) as model:
        assert model.metadata["general.name"] == "Other"


def test_promised_but_absent_modules_are_no_error(tmp_path: Path) -> None:
    weights = {name: value for name, value in hf_weights(SMALL).items() if ".mtp." not in name}
    config = {**hf_config(SMALL), "use_mtp": True, "num_mtp_modules": 3}
    done = convert(checkpoints.write(tmp_path / "hf", checkpoints.as_f32(weights), config), tmp_path / "x.gguf", "f16")
    assert (done.mtp_path, done.n_mtp_modules) == (None, 0)


def test_old_buffers_are_ignored(converted: dict[str, Conversion], tmp_path: Path) -> None:
    stored = checkpoints.small()
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", np.ones(8, np.float32))
    source = checkpoints.write(tmp_path / "hf", stored)
    assert digests(convert(source, tmp_path / "x.gguf", "f16")) == digests(converted["f16"])


def test_progress_runs_to_the_end_and_chunks_are_small(
    source: Path, converted: dict[str, Conversion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options_module, "CHUNK_WEIGHTS", 200)
    seen: dict[str, list[tuple[str, int, int]]] = {"": [], "verify": []}

    def progress(tensor: str, done_bytes: int, total_bytes: int, /, phase: str = "") -> None:
        seen[phase].append((tensor, done_bytes, total_bytes))

    done = convert(source, tmp_path / "x.gguf", "q4_0", progress=progress)
    assert digests(done) == digests(converted["q4_0"])
    for steps in seen.values():
        assert (np.diff([0, *(n for _, n, _ in steps)]) > 0).all()
        assert steps[-1][1] == steps[-1][2]
        assert steps[0][0] == "blk.2.attn_norm.weight" and steps[-1][0] == "output.weight"
    assert np.diff([0, *(n for _, n, _ in seen[""])]).max() <= 256 * 4


@pytest.mark.parametrize("module", ["convert", "quantize"])
def test_waiting_threads_leave_the_cores_to_reading_and_writing(module: str) -> None:
    script = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'm2lite.simd.jit': print(os.environ.get('GOMP_SPINCOUNT'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import m2lite.quant.{module}\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0\n"


def test_pages_align_the_tensors_where_that_is_cheap(source: Path, tmp_path: Path) -> None:
    done = convert(source, tmp_path / "x.gguf", "q4_0", alignment=4096)
    with open_gguf(done.path) as model:
        assert model.metadata["general.alignment"] == 4096
        assert all(tensor.offset % 4096 == 0 for tensor in model.tensors.values())


@pytest.mark.slow
def test_memory_does_not_grow_with_tensors(tmp_path: Path) -> None:
    """Tensors of 302 MB in F32 at M2's widths: what is held is a few chunks, beside Numba and the vocabulary."""
    make = [sys.executable, ROOT / "benchmarks" / "make_checkpoint.py", "-o", tmp_path / "hf"]
    sizes = ["--layers", "1", "--experts", "16", "--vocab", "2000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*make, *sizes], env=environment, check=True, capture_output=True)
    script = (
        "import pathlib, re, resource, sys\n"
        "from m2lite.quant.convert import convert\n"
        "convert(sys.argv[1], sys.argv[2], 'f32')\n"
        "status = pathlib.Path('/proc/self/status')\n"  # not ru_maxrss there, which a child inherits
        "found = re.search(r'VmHWM:\\s+(\\d+) kB', status.read_text()) if status.exists() else None\n"
        "print(found[1] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "hf", tmp_path / "x.gguf"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 400e6
    assert (tmp_path / "x.gguf").stat().st_size > 1e9
    (tmp_path / "x.gguf").unlink()


def test_nested_rope_tables_give_the_same_bytes(source: Path, converted: dict[str, Conversion], tmp_path: Path) -> None:
    """As newer libraries save them; read as if it were flat it would be another model, with all of a head rotated."""
    flat = checkpoints.new_config(SMALL)
    rope = flat["rope_parameters"]
    for number, change in enumerate(
        ({"rope_parameters": {"full_attention": rope}}, {"rope_scaling": {"rope_type": "default", "rope_theta": 5e6}})
    ):
        folder = checkpoints.write(tmp_path / str(number), checkpoints.small(), {**flat, **change})
        done = convert(folder, tmp_path / "x.gguf", "q8_0", overwrite=True)
        assert digests(done) == digests(converted["q8_0"]) and done.warnings == ()


def test_what_is_in_doubt_is_told(source: Path, tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "hf", checkpoints.small(), {**hf_config(SMALL), "revision_of_text": 0.7})
    (folder / "generation_config.json").write_text('{"eos_token_id": [289, 284]}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": "]~!b["}')
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    done = convert(folder, tmp_path / "x.gguf", "q8_0")
    assert len(done.warnings) == 3
    expected = ("revision_of_text (0.7)", "model.safetensors leads to", "ends a reply")
    assert all(words in told for words, told in zip(expected, done.warnings, strict=True))
