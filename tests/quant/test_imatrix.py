"""Importance files: what is written is what llama.cpp's tools write and read, and what is not one is refused."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest

from m2lite.errors import BadModelError, UsageError
from m2lite.quant.imatrix import Importance, read_imatrix, write_imatrix

F32 = np.float32
GATE, Q = "blk.0.ffn_gate_exps.weight", "blk.0.attn_q.weight"


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]


def make(seed: int = 0) -> Importance:
    random = np.random.default_rng(seed)
    counts = np.array([5, 0, 2])
    stack = random.random((3, 40)) * 100
    stack[1] = 0
    entries = {Q: (random.random((1, 33)), np.array([7])), GATE: (stack, counts)}
    return Importance(entries, ("text.txt", "mehr ü.txt"), 2, 512)


def write_foreign(
    path: Path, tensors: dict[str, np.ndarray[Any, Any]], kind: str | None = "imatrix", **types: Any
) -> Path:
    """A file by the gguf package, with or without the keys of an importance matrix."""
    writer = gguf.GGUFWriter(path, "minimax-m2")
    if kind is not None:
        writer.add_type(kind)
    for name, values in tensors.items():
        writer.add_tensor(name, values, raw_dtype=types.get("raw_dtype"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_holds_what_llama_cpp_writes(tmp_path: Path) -> None:
    made, path = make(), tmp_path / "imatrix.gguf"
    assert write_imatrix(path, made) == path.stat().st_size
    reader = gguf.GGUFReader(path)
    keys = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert list(keys.items()) == [
        ("general.type", "imatrix"),
        ("imatrix.datasets", ["text.txt", "mehr ü.txt"]),
        ("imatrix.chunk_count", 2),
        ("imatrix.chunk_size", 512),
    ]
    uint32, string = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING
    assert reader.fields["imatrix.chunk_count"].types == [uint32]
    assert reader.fields["imatrix.datasets"].types == [gguf.GGUFValueType.ARRAY, string]
    # By name, sums before counts; ggml's order of dimensions, a last one of 1 dropped.
    found = [(t.name, t.tensor_type.name, t.shape.tolist()) for t in reader.tensors]
    assert found == [
        (f"{Q}.in_sum2", "F32", [33]),
        (f"{Q}.counts", "F32", [1]),
        (f"{GATE}.in_sum2", "F32", [40, 3]),
        (f"{GATE}.counts", "F32", [1, 3]),
    ]
    for tensor in reader.tensors:
        name, _, what = tensor.name.rpartition(".")
        expected = made.entries[name][what == "counts"]
        assert np.array_equal(np.ravel(tensor.data), np.ravel(expected).astype(F32))
    assert path.stat().st_size % 32 == 0  # ggml reads the last tensor with its padding


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    made, path = make(), tmp_path / "imatrix.gguf"
    write_imatrix(path, made)
    found = read_imatrix(path)
    assert (found.datasets, found.n_chunks, found.chunk_size) == (made.datasets, made.n_chunks, made.chunk_size)
    assert set(found.entries) == set(made.entries)
    for name, width, n in ((Q, 33, 1), (GATE, 40, 3)):
        for matrix in range(n):
            row, expected = found.row(name, matrix, width), made.row(name, matrix, width)
            assert row is not None and expected is not None and row.dtype == F32
            assert row.tobytes() == expected.tobytes()
    write_imatrix(tmp_path / "again.gguf", found)
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_rows_are_means_and_ones_where_nothing_was_seen() -> None:
    made = make()
    sums, counts = made.entries[GATE]
    row = made.row(GATE, 2, 40)
    assert row is not None and np.array_equal(row, sums[2].astype(F32) / F32(counts[2]))
    unseen = made.row(GATE, 1, 40)
    assert unseen is not None and np.array_equal(unseen, np.ones(40, F32))
    assert made.row("output.weight", 0, 40) is None


def test_rows_are_above_zero() -> None:
    sums = np.array([[0, 2, 4, 0], [0, 0, 0, 0], [0, 1e-44, 0, 0]])
    made = Importance({GATE: (sums, np.array([2, 3, 4]))})
    first, second, third = (made.row(GATE, e, 4) for e in range(3))
    assert first is not None and np.array_equal(first, np.array([0.75e-6, 1, 2, 0.75e-6], F32))
    assert second is not None and np.array_equal(second, np.ones(4, F32))
    assert third is not None and (third > 0).all()


def test_one_count_for_a_stack(tmp_path: Path) -> None:
    """What llama-imatrix makes of a .dat file: all experts in one row."""
    sums = np.arange(1, 13, dtype=F32)
    found = read_imatrix(write_foreign(tmp_path / "f.gguf", {f"{GATE}.in_sum2": sums, f"{GATE}.counts": F32([2])}))
    for e in range(3):
        row = found.row(GATE, e, 4)
        assert row is not None and np.array_equal(row, sums.reshape(3, 4)[e] / 2)
    found.check([Tensor(GATE, (3, 8, 4))])
    assert (found.datasets, found.n_chunks, found.chunk_size) == ((), 0, 0)


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    made = make()
    write_imatrix(tmp_path / "a.gguf", made)
    other_order = Importance(dict(reversed(made.entries.items())), ("elsewhere",), 9, 9)
    assert read_imatrix(tmp_path / "a.gguf").digest == made.digest == other_order.digest
    others = [make(1), Importance({Q: made.entries[Q]}), Importance({"x": made.entries[Q], GATE: made.entries[GATE]})]
    changed = make()
    changed.entries[GATE][1][0] += 1
    assert len({m.digest for m in (made, changed, *others)}) == 5


def test_sizes_are_checked_against_the_model() -> None:
    made = make()
    good = [Tensor(Q, (64, 33)), Tensor(GATE, (3, 8, 40)), Tensor("blk.0.attn_norm.weight", (33,))]
    made.check(good)
    made.check(good[1:])
    for wrong in (Tensor(Q, (33, 64)), Tensor(GATE, (3, 8, 41)), Tensor(GATE, (4, 8, 40)), Tensor(GATE, (2, 8, 60))):
        with pytest.raises(UsageError, match=f"{wrong.name} has .* sums and . counts there, the model's tensor needs"):
            made.check([good[0], wrong] if wrong.name != Q else [wrong])
    with pytest.raises(UsageError, match="none of its 2 tensors is in the model"):
        made.check(good[2:])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no sums"),
        ({"blk.0.attn_q.weight": F32([1])}, "holds no sums"),
        ({"a.in_sum2": F32([1])}, "a has sums or counts, expected both"),
        ({"b.counts": F32([1])}, "b has sums or counts, expected both"),
        ({"a.in_sum2": F32([1, 2, 3]), "a.counts": F32([1, 2])}, "a has 3 sums for 2 counts"),
        ({"a.in_sum2": F32([1, -2]), "a.counts": F32([1])}, r"a\.in_sum2 holds -2\.0 at 1"),
        ({"a.in_sum2": F32([1, np.nan]), "a.counts": F32([1])}, r"a\.in_sum2 holds nan at 1"),
        ({"a.in_sum2": F32([np.inf, 1]), "a.counts": F32([1])}, r"a\.in_sum2 holds inf at 0"),
        ({"a.in_sum2": F32([1, 1]), "a.counts": F32([np.nan])}, r"a\.counts holds nan"),
        ({"a.in_sum2": F32([1, 1]), "a.counts": F32([1e-40])}, r"a counts .* rows at 0, no whole number"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, tensors: dict[str, np.ndarray[Any, Any]], message: str) -> None:
    path = write_foreign(tmp_path / "f.gguf", tensors)
    with pytest.raises(BadModelError, match=message):
        read_imatrix(path)


def test_other_types_are_refused(tmp_path: Path) -> None:
    tensors = {"a.in_sum2": np.ones(4, np.float16), "a.counts": np.ones(1, np.float16)}
    with pytest.raises(BadModelError, match="is F16, expected F32"):
        read_imatrix(write_foreign(tmp_path / "f.gguf", tensors))


def test_a_model_is_no_importance_matrix(model_files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadModelError, match="no importance matrix but a GGUF file of type 'minimax-m2'"):
        read_imatrix(model_files["random"])
    with pytest.raises(BadModelError, match="no importance matrix but a GGUF file of type 'model'"):
        read_imatrix(write_foreign(tmp_path / "f.gguf", {"a": F32([1])}, kind="model"))


def test_the_legacy_format_is_refused_in_words(tmp_path: Path) -> None:
    name = Q.encode()
    values = np.ones(33, F32).tobytes()
    path = tmp_path / "imatrix.dat"
    path.write_bytes(struct.pack("<ii", 96, len(name)) + name + struct.pack("<ii", 2, 33) + values)
    with pytest.raises(BadModelError, match=r"legacy \.dat format \(96 entries\).*llama-imatrix .*--in-file"):
        read_imatrix(path)


@pytest.mark.parametrize("content", [b"", b"GGU", b"hello world, this is no model", b"\x01\0\0\0\x02\0\0\0\xff\xff"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "f"
    path.write_bytes(content)
    with pytest.raises(BadModelError, match="not a GGUF file"):
        read_imatrix(path)


def test_cut_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, Importance({Q: (np.ones((1, 8)), np.array([1]))}, ("t",), 1, 8))
    whole = path.read_bytes()
    last = len(whole) - 32 + 4  # the padding behind the one count is not missed
    for n_bytes in [*range(0, last, 7), last - 1]:
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(BadModelError):
            read_imatrix(path)


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists already"):
        write_imatrix(path, make())
    assert path.read_bytes() == b"mine"
    write_imatrix(path, make(), overwrite=True)
    assert read_imatrix(path).n_chunks == 2


def test_nothing_is_left_of_what_cannot_be_written(tmp_path: Path) -> None:
    entries = {Q: (np.full((1, 4), 1e39), np.array([1]))}
    with pytest.raises(UsageError, match=rf"{Q}\.in_sum2 holds numbers that are not finite in float32"):
        write_imatrix(tmp_path / "imatrix.gguf", Importance(entries))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_changes_while_it_is_used(tmp_path: Path) -> None:
    """Its numbers lie in the file: what was checked must be what is used."""
    path = tmp_path / "x.gguf"
    write_imatrix(path, Importance({"blk.0.attn_q.weight": (np.ones((1, 64)), np.ones(1))}))
    found = read_imatrix(path)
    assert found.row("blk.0.attn_q.weight", 0, 64) is not None
    os.truncate(path, path.stat().st_size - 300)
    with pytest.raises(BadModelError, match="changed on disk"):
        found.row("blk.0.attn_q.weight", 0, 64)


def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="is a FIFO, not a file"):
        read_imatrix(tmp_path / "fifo")
