"""GGUF to GGUF: the same bytes as convert gives, metadata kept, tensors copied, requantizing refused."""

from __future__ import annotations

import hashlib
import re
import shutil
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest

from m2lite.errors import BadModelError, UsageError
from m2lite.quant.convert import Conversion, convert
from m2lite.quant.imatrix import Importance, write_imatrix
from m2lite.quant.quantize import quantize
from m2lite.quant.recipes import parse_overrides
from m2lite.quant.verify import verify
from m2lite.storage.gguf_reader import GGUFFile, open_gguf
from tests.quant.checkpoints import SMALL, digest, digests


def bodies(path: Path | None) -> dict[str, tuple[str, bytes]]:
    assert path is not None
    with open_gguf(path) as file:
        return {name: (info.format.name, file.view(name).tobytes()) for name, info in file.tensors.items()}


@pytest.mark.parametrize("kind", ["f32", "q4_0", "bf16", pytest.param("q8_0", marks=pytest.mark.slow)])
def test_f32_to_any_type_is_what_convert_writes(converted: dict[str, Conversion], tmp_path: Path, kind: str) -> None:
    done = quantize(converted["f32"].path, tmp_path / "x.gguf", kind)
    assert done.n_mtp_modules == SMALL.n_mtp and done.n_tensors == converted[kind].n_tensors
    assert digests(done) == digests(converted[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["q4_k_m", "iq4_xs", "m2-int4", "mxfp4"])
def test_mixes_too(source: Path, converted: dict[str, Conversion], tmp_path: Path, kind: str) -> None:
    direct = convert(source, tmp_path / "direct.gguf", kind)
    assert digests(quantize(converted["f32"].path, tmp_path / "x.gguf", kind)) == digests(direct)


def test_a_split_is_read_and_written(converted: dict[str, Conversion], tmp_path: Path) -> None:
    whole = bodies(converted["q4_0"].path)
    split = quantize(converted["f32"].path, tmp_path / "s.gguf", "f32", split_max_bytes=200_000)
    assert len(split.paths) > 3 and split.path.name.startswith("s-00001-of-") and split.mtp_path is not None
    assert all(path.stat().st_size <= 200_000 for path in split.paths if path != split.mtp_path)
    assert bodies(split.path) == bodies(converted["f32"].path)
    assert [str(tensor.name) for tensor in gguf.GGUFReader(split.path).tensors] == list(whole)[: len(first_part(split))]
    one = quantize(split.path, tmp_path / "one.gguf", "q4_0")
    assert bodies(one.path) == whole and bodies(one.mtp_path) == bodies(converted["q4_0"].mtp_path)
    with open_gguf(split.path) as file, open_gguf(converted["f32"].path) as plain:
        assert dict_of(file).items() >= dict_of(plain).items()
    with pytest.raises(
        UsageError, match=r"'token_embd\.weight' alone makes a part of .* \([\d,]+ bytes\), more than the 1,000 B"
    ):
        quantize(converted["f32"].path, tmp_path / "t.gguf", "f32", split_max_bytes=1000)


def first_part(split: Conversion) -> list[str]:
    with open_gguf(split.path) as file:
        return [name for name, info in file.tensors.items() if info.part == 0]


def dict_of(file: GGUFFile) -> dict[str, bytes]:
    return {key: file.raw_value(key) for key in file.metadata if not key.startswith(("m2lite.", "split."))}


def test_a_sidecar_alone_keeps_what_it_says_of_itself(converted: dict[str, Conversion], tmp_path: Path) -> None:
    source = converted["f32"].mtp_path
    assert source is not None
    done = quantize(source, tmp_path / "mtp-y.gguf", "q4_0", name="Other")
    assert done.mtp_path is None and done.n_mtp_modules == SMALL.n_mtp
    assert bodies(done.path) == bodies(converted["q4_0"].path.with_name("mtp-m-q4_0.gguf"))
    with open_gguf(done.path) as new, open_gguf(source) as old:
        assert list(new.metadata) == list(old.metadata)
        changed = {key for key, value in dict_of(new).items() if value != dict_of(old)[key]}
        assert changed == {"general.name", "general.file_type"}
        assert new.metadata["m2lite.mtp.trunk"] == old.metadata["m2lite.mtp.trunk"]


def test_quantized_tensors_are_copied_but_not_quantized_again(converted: dict[str, Conversion], tmp_path: Path) -> None:
    source = converted["q8_0"].path
    before = digest(source)
    with pytest.raises(UsageError, match=r"are quantized already, the first is '.*' in Q8_0, which would become Q4_0"):
        quantize(source, tmp_path / "x.gguf", "q4_0")
    assert not list(tmp_path.iterdir())
    assert digests(quantize(source, tmp_path / "same.gguf", "q8_0")) == digests(converted["q8_0"])
    done = quantize(source, tmp_path / "x.gguf", "f32", allow_requantize=True, mtp=False)
    with open_gguf(done.path) as new, open_gguf(source) as old:
        for name, info in old.tensors.items():
            wide = gguf.quants.dequantize(old.view(name), gguf.GGMLQuantizationType(info.format.ggml_type))
            assert np.array_equal(new.view(name).view("<f4"), wide.reshape(-1)), name
    assert digest(source) == before


def test_overrides_and_a_target_size_shape_the_file(converted: dict[str, Conversion], tmp_path: Path) -> None:
    overrides = parse_overrides([r"blk\.1\.ffn_down_exps=q5_1", "attn_v=f16"])
    done = quantize(converted["f32"].path, tmp_path / "x.gguf", "q4_0", mtp=False, overrides=overrides)
    kinds = {name: kind for name, (kind, _) in bodies(done.path).items()}
    assert kinds["blk.1.ffn_down_exps.weight"] == "Q5_1" and kinds["blk.0.ffn_down_exps.weight"] == "Q4_0"
    assert kinds["blk.0.attn_v.weight"] == "F16"
    with pytest.raises(UsageError, match="No tensor matches"):
        quantize(converted["f32"].path, tmp_path / "y.gguf", "q4_0", overrides=[(re.compile("nothing"), "Q8_0")])
    for size in (100_000, 130_000):
        done = quantize(converted["f32"].path, tmp_path / f"{size}.gguf", "m2-int4", mtp=False, target_bytes=size)
        assert size * 0.9 < done.path.stat().st_size <= size


def test_importance_changes_the_bytes_and_is_noted(converted: dict[str, Conversion], tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    with open_gguf(converted["f32"].path) as model:
        shapes = {name: info.shape for name, info in model.tensors.items() if len(info.shape) > 1}
    entries = {
        name: (np.exp(rng.standard_normal((int(np.prod(s[:-2])), s[-1]), np.float32)), np.ones(int(np.prod(s[:-2]))))
        for name, s in shapes.items()
    }
    matrix = tmp_path / "some where" / "imatrix.gguf"
    matrix.parent.mkdir()
    write_imatrix(matrix, Importance(entries, ("/home/me/text.txt",), 7, 512))
    done = quantize(converted["f32"].path, tmp_path / "x.gguf", "q4_0", imatrix=matrix)
    with open_gguf(done.path) as model:
        assert model.metadata["quantize.imatrix.file"] == "imatrix.gguf"
        assert model.metadata["quantize.imatrix.dataset"] == "text.txt"
        assert model.metadata["quantize.imatrix.entries_count"] == len(entries)
        assert model.metadata["quantize.imatrix.chunks_count"] == 7
    found, plain = bodies(done.path), bodies(converted["q4_0"].path)
    assert found["blk.0.ffn_up_exps.weight"] != plain["blk.0.ffn_up_exps.weight"]
    # Each expert has its own row: exchanged rows give another tensor.
    name = "blk.1.ffn_gate_exps.weight"
    swapped = entries | {name: (entries[name][0][::-1].copy(), entries[name][1])}
    write_imatrix(tmp_path / "swapped.gguf", Importance(swapped))
    other = bodies(quantize(converted["f32"].path, tmp_path / "y.gguf", "q4_0", imatrix=tmp_path / "swapped.gguf").path)
    assert {n for n in other if other[n] != found[n]} == {name}
    assert verify(done.path, converted["f32"].path, 99, imatrix=matrix).ok
    without = verify(done.path, converted["f32"].path, 99)
    assert without.ok and "made with an importance matrix" in without.notes[0]
    assert not verify(done.path, converted["f32"].path, 99, imatrix=tmp_path / "swapped.gguf").ok


def test_half_an_importance_matrix_is_refused_unless_it_is_asked_for(
    converted: dict[str, Conversion], source: Path, tmp_path: Path
) -> None:
    with open_gguf(converted["f32"].path) as model:
        shapes = {n: i.shape for n, i in model.tensors.items() if n.startswith("blk.") and len(i.shape) > 1}
    rng, half, whole = np.random.default_rng(4), tmp_path / "half.gguf", tmp_path / "whole.gguf"
    entries = {
        name: (np.exp(rng.standard_normal((int(np.prod(s[:-2])), s[-1]), np.float32)), np.ones(int(np.prod(s[:-2]))))
        for name, s in shapes.items()
    }
    write_imatrix(whole, Importance(entries))  # neither embedding nor head, as those that make them have it
    write_imatrix(half, Importance({name: entry for name, entry in entries.items() if "blk.0." in name}))
    assert quantize(converted["f32"].path, tmp_path / "a.gguf", "q4_0", imatrix=whole).warnings == ()
    for job in (partial(quantize, converted["f32"].path), partial(convert, source)):
        with pytest.raises(UsageError, match=r"half.gguf covers 7 of 14 tensors .* missing are blk\.1\.attn_q\.weight"):
            job(tmp_path / "b.gguf", "q4_0", imatrix=half)
        done = job(tmp_path / "b.gguf", "q4_0", imatrix=half, allow_partial_imatrix=True, overwrite=True)
        (told,) = done.warnings
        assert "covers 7 of 14 tensors" in told and "and 1 more" in told
        found, plain = bodies(done.path), bodies(converted["q4_0"].path)
        assert {n for n in found if found[n] != plain[n]} == {n for n in entries if "blk.0." in n and "inp" not in n}
    assert (
        quantize(converted["f32"].path, tmp_path / "c.gguf", "q8_0", imatrix=half).warnings == ()
    )  # has no use for it
    write_imatrix(
        tmp_path / "other.gguf", Importance(entries | {"blk.7.attn_q.weight": entries["blk.0.attn_q.weight"]})
    )
    (told,) = quantize(converted["f32"].path, tmp_path / "d.gguf", "q4_0", imatrix=tmp_path / "other.gguf").warnings
    assert "does not have: blk.7.attn_q.weight. Is it this model's?" in told


def test_what_cannot_be_quantized_is_refused(converted: dict[str, Conversion], tmp_path: Path) -> None:
    source = converted["f32"].path
    out = tmp_path / "x.gguf"
    for error, arguments, words in (
        (UsageError, (source, out, "q9"), "'q9' is not an output type"),
        (UsageError, (source, tmp_path / "x.bin", "q8_0"), "does not end in .gguf"),
        (BadModelError, (tmp_path / "none.gguf", out, "q8_0"), "cannot be opened"),
    ):
        with pytest.raises(error, match=words):
            quantize(*arguments)
    with pytest.raises(UsageError, match="is a file that this command reads"):
        quantize(source, source, "q8_0", overwrite=True)
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.add_tensor("blk.0.ffn_gate.weight", np.zeros((4, 32), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    with pytest.raises(BadModelError, match=r"'blk\.0\.ffn_gate\.weight' has no place in an M2"):
        quantize(tmp_path / "llama.gguf", out, "q8_0")
    assert not list(tmp_path.glob("x.*"))


def test_a_damaged_weight_is_refused_by_name(converted: dict[str, Conversion], tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    shutil.copy(converted["f32"].path, bad)
    with open_gguf(bad) as model:
        place = model.tensors["blk.1.ffn_down_exps.weight"].offset + 4 * (2 * 64 * 32 + 5 * 32)
    with bad.open("r+b") as file:
        file.seek(place)
        file.write(np.array([np.nan], "<f4").tobytes())
    with pytest.raises(BadModelError, match=r"'blk\.1\.ffn_down_exps\.weight' holds NaN .* rows 0 to 63 of matrix 2"):
        quantize(bad, tmp_path / "x.gguf", "q8_0")
    assert not (tmp_path / "x.gguf").exists()


def test_an_input_that_changes_on_the_way_is_no_model(converted: dict[str, Conversion], tmp_path: Path) -> None:
    source = tmp_path / "in.gguf"
    shutil.copy(converted["f32"].path, source)

    def touch(tensor: str, done: int, total: int, /, phase: str = "") -> None:
        source.touch()

    with pytest.raises(BadModelError, match="changed on disk"):
        quantize(source, tmp_path / "x.gguf", "q8_0", progress=touch)
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]
    assert hashlib.sha256(source.read_bytes()).hexdigest() == digest(converted["f32"].path)
