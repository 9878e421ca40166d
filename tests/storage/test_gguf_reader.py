"""Good files: what the reader says equals what the gguf package wrote and reads."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import m2lite
from m2lite.errors import BadModelError, ResourceError
from m2lite.formats.table import FORMATS, unpack_rows
from m2lite.storage.gguf_reader import GGUFArray, open_gguf
from tests.children import PATIENCE_S
from tests.packing import PACKERS, pack_rows

if TYPE_CHECKING:
    from tests.storage.conftest import RawGGUF

Save = Callable[..., Path]


def write_with_gguf(path: Path, keys: dict[str, object], tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    writer = gguf.GGUFWriter(path, "minimax-m2")
    for key, value in keys.items():
        add: Callable[..., None] = {
            bool: writer.add_bool,
            int: writer.add_int64,
            float: writer.add_float64,
            str: writer.add_string,
            list: writer.add_array,
        }[type(value)]
        add(key, value)
    for name, (format_name, weights) in tensors.items():
        fmt = FORMATS[format_name]
        writer.add_tensor(name, pack_rows(fmt, weights), raw_dtype=gguf.GGMLQuantizationType(fmt.ggml_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {
        f"{name}.{i}": (name, rng.standard_normal(shape).astype(np.float32))
        for name in PACKERS
        for i, shape in enumerate([(64,), (3, 32), (2, 3, 96), (2, 1, 3, 32)])
    }
    keys: dict[str, object] = {
        "text": "größe",
        "empty": "",
        "yes": True,
        "big": -(2**63),
        "pi": 3.14159,
        "tokens": ["a", "", "日本", "x" * 300],
        "whole": [1, -2, 3],
        "reals": [0.5, -1.25],
        "flags": [True, False, True],
    }
    path = tmp_path / "model.gguf"
    write_with_gguf(path, keys, tensors)
    oracle = gguf.GGUFReader(path)
    with open_gguf(path) as ours:
        assert set(ours.metadata) == set(oracle.fields) - {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
        for key, value in ours.metadata.items():
            expected = oracle.fields[key].contents()
            if isinstance(value, GGUFArray):
                assert value.items(value.item_type.kind) == expected  # type: ignore[type-var]
                assert len(value) == len(expected)
            else:
                assert value == expected and type(value) is type(expected)
        assert list(ours.tensors) == [tensor.name for tensor in oracle.tensors]
        for tensor in oracle.tensors:
            info = ours.tensors[tensor.name]
            assert info.format.ggml_type == tensor.tensor_type
            assert info.shape == tuple(int(dim) for dim in tensor.shape[::-1])
            assert (info.offset, info.n_bytes, info.part) == (tensor.data_offset, tensor.n_bytes, 0)
            view = ours.view(tensor.name)
            np.testing.assert_array_equal(view, tensor.data.reshape(-1).view(np.uint8))
            assert ours.address(tensor.name) == view.ctypes.data
            weights = tensors[tensor.name][1]
            expected_bytes = pack_rows(info.format, weights)
            np.testing.assert_array_equal(
                unpack_rows(info.format, view, info.shape), unpack_rows(info.format, expected_bytes, weights.shape)
            )
        assert ours.size_bytes == path.stat().st_size
        assert ours.parts == (path,) and ours.path == path


names = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=12)
values = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),  # the gguf package drops empty ones
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names, values, max_size=8), st.lists(st.integers(1, 40), max_size=5))
def test_any_written_file_is_read(tmp_path: Path, keys: dict[str, object], sizes: list[int]) -> None:
    path = tmp_path / "any.gguf"
    tensors = {f"t{i}": ("F32", np.arange(n, dtype=np.float32)) for i, n in enumerate(sizes)}
    write_with_gguf(path, keys, tensors)
    with open_gguf(path) as ours:
        for key, value in keys.items():
            if isinstance(value, list):
                assert ours.array(key, type(value[0])) == value
            else:
                assert ours.metadata[key] == value
        for name, (_, weights) in tensors.items():
            np.testing.assert_array_equal(ours.view(name).view(np.float32), weights)


def test_version_2_and_no_tensors(small: RawGGUF, raw: RawGGUF, save: Save) -> None:
    small.version = 2
    with open_gguf(save(small.build())) as ours:
        assert list(ours.tensors) == ["w", "n"]
    with open_gguf(save(raw.text("general.architecture", "x").header(), "vocabulary.gguf")) as ours:
        assert not ours.tensors


@pytest.mark.parametrize("alignment", [8, 32, 4096, 65536])
def test_alignments(raw: RawGGUF, save: Save, alignment: int) -> None:
    raw.alignment = alignment
    raw.number("general.alignment", alignment).tensor("a", (2,)).tensor("b", (1,), offset=alignment)
    raw.data = struct.pack("<2f", 1, 2) + bytes(alignment - 8) + struct.pack("<f", 3)
    with open_gguf(save(raw.build())) as ours:
        assert ours.view("a").view(np.float32).tolist() == [1, 2]
        assert ours.view("b").view(np.float32).tolist() == [3]
        assert ours.address("b") % 8 == 0


def test_gaps_between_tensors_and_bytes_after_them_are_fine(raw: RawGGUF, save: Save) -> None:
    raw.tensor("a", (1,)).tensor("b", (1,), offset=96)
    raw.data = struct.pack("<f", 1) + bytes(92) + struct.pack("<f", 2) + b"more"
    with open_gguf(save(raw.build())) as ours:
        assert ours.view("b").view(np.float32).tolist() == [2]


def test_arrays_check_their_type(raw: RawGGUF, save: Save) -> None:
    raw.strings("text", [b"ok", b"\xff\xfe"]).key("types", raw.ARRAY, raw.array(raw.U8, b"\x01\x02", 2)).number(
        "one", 1
    )
    raw.key("flags", raw.ARRAY, raw.array(raw.BOOL, b"\x01\x07", 2)).key(
        "whole", raw.ARRAY, raw.array(raw.I32, bytes(8), 2)
    )
    with open_gguf(save(raw.build())) as ours:
        assert ours.array("text", bytes) == [b"ok", b"\xff\xfe"]
        assert ours.array("types", int) == [1, 2]
        assert ours.array("whole", int, "INT32") == [0, 0]
        for key, kind, type_name, message in [
            ("text", str, None, r"key 'text': string 1 of 2 is not UTF-8 .*\\xff\\xfe"),
            ("text", int, None, "key 'text' is an array of STRING, expected int"),
            ("types", float, None, "key 'types' is an array of UINT8, expected float"),
            ("types", int, "INT32", "key 'types' is an array of UINT8, expected INT32"),
            ("whole", str, None, "key 'whole' is an array of INT32, expected str"),
            ("flags", bool, None, "key 'flags': item 1 is a BOOL of 7, expected 0 or 1"),
            ("one", int, None, "key 'one' is a single int, expected an array of int"),
            ("none", str, None, "key 'none' is missing, expected an array of str"),
        ]:
            with pytest.raises(BadModelError, match=message):
                ours.array(key, kind, type_name)
        with pytest.raises(TypeError):
            ours.metadata["text"].numpy()  # type: ignore[union-attr]


def test_nothing_can_be_changed(small: RawGGUF, save: Save) -> None:
    with open_gguf(save(small.build())) as ours:
        view = ours.view("w")
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.flags.writeable = True
        with pytest.raises(TypeError):
            ours.metadata["x"] = 1  # type: ignore[index]
        with pytest.raises(AttributeError):
            ours.tensors["w"].offset = 0  # type: ignore[misc]


def n_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_views_outlive_close(small: RawGGUF, save: Save) -> None:
    path = save(small.build())
    ours = open_gguf(path)
    view = ours.view("w")
    ours.close()
    ours.close()
    assert view.tolist() == list(range(36))
    assert is_mapped(path)
    for use in (ours.view, ours.address):
        with pytest.raises(ValueError, match="closed"):
            use("w")
    with pytest.raises(ValueError, match="closed"):
        ours.check_unchanged()
    del view, ours, use
    gc.collect()
    assert not is_mapped(path)


def test_nothing_leaks(small: RawGGUF, save: Save) -> None:
    good, bad = save(small.build()), save(small.build()[:-1], "bad.gguf")
    before = n_descriptors()
    for _ in range(5):
        with open_gguf(good):
            pass
        open_gguf(good)  # forgotten
        with pytest.raises(BadModelError):
            open_gguf(bad)
    gc.collect()
    assert n_descriptors() == before
    assert not is_mapped(good) and not is_mapped(bad)


def test_changes_on_disk_are_noticed(small: RawGGUF, save: Save) -> None:
    path = save(small.build())
    with open_gguf(path) as ours:
        ours.check_unchanged()
        other = save(small.build() + b"more", "other.gguf")
        other.replace(path)  # the open file is whole still
        ours.check_unchanged()
        assert ours.view("w")[1] == 1
    with open_gguf(path) as ours:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(BadModelError, match=r"model file changed on disk \(\d+ bytes when opened, \d+ now\)"):
            ours.check_unchanged()
    with open_gguf(path) as ours:
        os.utime(path, ns=(1, 1))
        with pytest.raises(BadModelError, match="changed on disk"):
            ours.check_unchanged()


def test_ranges_are_read_and_values_kept_as_they_are(
    small: RawGGUF, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(small.build())
    data = path.read_bytes()
    with open_gguf(path) as gguf_file:
        header = gguf_file.headers[0]
        assert gguf_file.read(0, 3, 20).tobytes() == data[3:23] and gguf_file.read(0, 5, 0).size == 0
        gguf_file.advise(0, 0, 100, "WILLNEED")
        for key in gguf_file.metadata:
            name = struct.pack("<Q", len(key)) + key.encode()
            place = data.index(name) + len(name)
            assert data[place:].startswith(gguf_file.raw_value(key))
        assert header.n_bytes <= min(info.offset for info in header.tensors.values())
        with pytest.raises(BadModelError, match=f"ends at byte {len(data)}, 1 bytes early"):
            gguf_file.read(0, len(data) - 4, 5)

        def broken(*_: object) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(BadModelError, match="cannot be read at byte 7: Input/output error"):
            gguf_file.read(0, 7, 5)


def test_locks(small: RawGGUF, save: Save) -> None:
    path = save(small.build())
    with open_gguf(path), open_gguf(path), path.open("rb") as writer:
        with pytest.raises(BlockingIOError):
            fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with path.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BadModelError, match="another process is writing this file"):
            open_gguf(path)


def test_symbolic_links_are_fine(small: RawGGUF, save: Save, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(save(small.build()))
    with open_gguf(str(link)) as ours:
        assert ours.path == link


def test_no_room_to_map(small: RawGGUF, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    before = n_descriptors()
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(ResourceError, match=r"its \d+ bytes cannot be mapped: .*Cannot allocate memory"):
        open_gguf(save(small.build()))
    assert n_descriptors() == before


M2_SIZED = """
import sys
import numpy
from m2lite.storage.gguf_reader import open_gguf
def peak():  # not ru_maxrss, which a child inherits
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before, calls = peak(), []
def count(frame, event, argument):
    calls[-1] += event in ("call", "c_call")
calls.append(0)
sys.setprofile(count)
ours = open_gguf(sys.argv[1])
sys.setprofile(None)
n_tensors, after_open = len(ours.tensors), peak()
calls.append(0)
sys.setprofile(count)
tokens = ours.array("tokenizer.ggml.tokens", str)
merges = ours.array("tokenizer.ggml.merges", str)
scores = ours.array("tokenizer.ggml.scores", float)
types = ours.array("tokenizer.ggml.token_type", int)
sys.setprofile(None)
assert len(tokens) == len(scores) == len(types) == 200_064 and len(merges) == 199_744 and n_tensors == 809
print(calls[0], after_open - before, calls[1], peak() - before)
"""


def m2_sized(raw: RawGGUF) -> bytes:
    """The header that M2 has; of its 130 GB only the length is there."""
    rng = np.random.default_rng(0)
    words = [rng.integers(97, 123, n, np.uint8).tobytes() for n in rng.integers(1, 14, 200_064)]
    pairs = [words[i] + b" " + words[-i] for i in range(199_744)]
    raw.text("general.architecture", "minimax-m2").text("tokenizer.chat_template", "x" * 9000)
    raw.strings("tokenizer.ggml.tokens", words).strings("tokenizer.ggml.merges", pairs)
    raw.key("tokenizer.ggml.scores", raw.ARRAY, raw.array(raw.F32, bytes(4 * 200_064), 200_064))
    raw.key("tokenizer.ggml.token_type", raw.ARRAY, raw.array(raw.I32, bytes(4 * 200_064), 200_064))
    layer = {
        **dict.fromkeys(["attn_norm.weight", "ffn_norm.weight"], ((3072,), "F32")),
        "attn_q.weight": ((3072, 6144), "Q4_0"),
        "attn_k.weight": ((3072, 1024), "Q4_0"),
        "attn_v.weight": ((3072, 1024), "Q4_0"),
        "attn_output.weight": ((6144, 3072), "Q4_0"),
        "attn_q_norm.weight": ((6144,), "F32"),
        "attn_k_norm.weight": ((1024,), "F32"),
        "ffn_gate_inp.weight": ((3072, 256), "F32"),
        "exp_probs_b.bias": ((256,), "F32"),
        "ffn_gate_exps.weight": ((3072, 1536, 256), "Q4_0"),
        "ffn_up_exps.weight": ((3072, 1536, 256), "Q4_0"),
        "ffn_down_exps.weight": ((1536, 3072, 256), "Q4_0"),
    }
    table = {"token_embd.weight": ((3072, 200_064), "Q8_0"), "output.weight": ((3072, 200_064), "Q8_0")}
    table |= {f"blk.{i}.{name}": row for i in range(62) for name, row in layer.items()}
    table["output_norm.weight"] = ((3072,), "F32")
    offset = 0
    for name, (dims, format_name) in table.items():
        fmt = FORMATS[format_name]
        raw.tensor(name, dims, fmt.ggml_type, offset)
        offset += int(np.prod(dims, dtype=np.int64)) // fmt.n_weights * fmt.n_bytes
        assert offset % 32 == 0
    header = raw.build()
    raw.data = struct.pack("<Q", len(header) + offset)  # the whole size, for the caller
    return header


def test_m2_sized_header_costs_a_call_a_word_and_little_memory(raw: RawGGUF, save: Save) -> None:
    path = save(m2_sized(raw))
    os.truncate(path, int.from_bytes(raw.data, "little"))
    assert path.stat().st_size > 120e9
    command = [sys.executable, "-c", M2_SIZED, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(m2lite.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S, env=environment)
    open_calls, open_bytes, decode_calls, peak_bytes = map(int, done.stdout.split())
    print(f"open {open_calls} calls {open_bytes / 1e6:.1f} MB; decode {decode_calls}, peak {peak_bytes / 1e6:.1f} MB")
    n_words = 200_064 + 199_744  # opening steps over each, reading decodes each
    assert open_calls < 1.5 * n_words and open_bytes < 100e6
    assert decode_calls < 4 * n_words and peak_bytes < 250e6
