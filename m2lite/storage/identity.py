"""What a model file is, as short hashes: this very file, or this trunk whatever its precision."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt

from m2lite.formats.table import unpack_rows
from m2lite.storage.gguf_reader import GGUFArray, GGUFFile

SAMPLE_BYTES = 4096

# Never quantised, in our files and in llama.cpp's: these are the same numbers in every precision of one model.
_LAYER = (
    "attn_norm.weight", "attn_q_norm.weight", "attn_k_norm.weight", "ffn_norm.weight", "ffn_gate_inp.weight",
    "exp_probs_b.bias",
)  # fmt: skip
_SIZES = ("embedding_length", "block_count", "attention.head_count", "attention.head_count_kv", "expert_count")


def hash_trunk(sizes: Iterable[int], n_layers: int, read_row: Callable[[str], npt.NDArray[np.float32]]) -> str:
    """Identity of a trunk from its sizes, norms, selection biases and the first row of every router.

    `read_row(name)` gives the first row (all of a vector) in float32. An F32, Q8_0 and Q4_0 file of one checkpoint
    share this hash, so one sidecar serves them all; another model, or another stage of its training, does not.
    """
    digest = hashlib.sha256(b"m2lite trunk 1")
    digest.update(repr(tuple(int(size) for size in sizes)).encode())
    for name in [*(f"blk.{i}.{tail}" for i in range(n_layers) for tail in _LAYER), "output_norm.weight"]:
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(read_row(name), "<f4").tobytes())
    return digest.hexdigest()


def trunk_sizes(architecture: str, metadata: Mapping[str, object]) -> tuple[int, ...]:
    """The sizes that go into the identity; a key that is missing or no whole number counts as 0."""
    found = (metadata.get(f"{architecture}.{key}") for key in _SIZES)
    values = (value.one() if isinstance(value, GGUFArray) else value for value in found)
    return tuple(value if isinstance(value, int) else 0 for value in values)


def trunk_identity(gguf: GGUFFile) -> str:
    """`hash_trunk` of an open model: reads a few MB at M2's size. KeyError if it is not a whole MiniMax-M2 trunk."""
    architecture = str(gguf.metadata.get("general.architecture", ""))
    sizes = trunk_sizes(architecture, gguf.metadata)

    def read_row(name: str) -> npt.NDArray[np.float32]:
        tensor = gguf.tensors[name]
        width = tensor.shape[-1]
        return unpack_rows(tensor.format, gguf.view(name)[: tensor.format.row_bytes(width)], (width,))

    return hash_trunk(sizes, sizes[_SIZES.index("block_count")], read_row)


def file_identity(gguf: GGUFFile) -> str:
    """Identity of this very file: its tensor table and both ends of every tensor. Cheap; no proof of every byte."""
    digest = hashlib.sha256(b"m2lite file 1")
    for name, tensor in sorted(gguf.tensors.items()):
        digest.update(f"{name} {tensor.format.name} {tensor.shape}\n".encode())
        view = gguf.view(name)
        digest.update(view[:SAMPLE_BYTES].tobytes())
        digest.update(view[-SAMPLE_BYTES:].tobytes())
    return digest.hexdigest()
