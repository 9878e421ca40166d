"""Tensor names of a MiniMax-M2 bound to addresses, every shape and type checked once. Reads small vectors only.

A matrix is described, not loaded: where it lies in the mapping, how its rows are packed, which tile kernel reads it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from m2lite.errors import BadModelError
from m2lite.formats.table import unpack_rows
from m2lite.kernels import layer as records
from m2lite.kernels.dot import BLOCK, STEP_BYTES, activation_kind
from m2lite.model.config import Config
from m2lite.storage.gguf_reader import GGUFFile, TensorInfo


def record_of(owner: Any, kind: np.dtype[Any]) -> npt.NDArray[np.void]:
    """[1]: what kernels read of a matrix, a layer or a module; of vectors the addresses."""
    record = np.zeros(1, kind)
    for name in kind.names or ():
        value = getattr(owner, name)
        record[name] = getattr(value, "record", getattr(value, "address", value))
    return record


@dataclass(frozen=True)
class Matrix:
    """w [n_experts,] n_out, n_in in the mapping; `kind` is the activation panel that `tile` wants."""

    address: int
    n_out: int
    n_in: int
    row_bytes: int
    tile: int
    kind: str
    format: str

    @property
    def n_blocks(self) -> int:
        return self.n_in // BLOCK

    @property
    def slice_bytes(self) -> int:
        """Bytes of one expert of a stack (of the whole matrix where there is no stack)."""
        return self.n_out * self.row_bytes

    @property
    def is_int8(self) -> bool:
        """Whether the activations are int8; else they are float32."""
        return self.kind == "int8"

    @property
    def panel_row_bytes(self) -> int:
        """Bytes of one row of the activation panel that this matrix reads."""
        return self.n_blocks * STEP_BYTES[self.kind]

    @cached_property
    def record(self) -> npt.NDArray[np.void]:
        return record_of(self, records.MATRIX)


@dataclass(frozen=True)
class Vector:
    """float32 [n], our own copy: a norm's weight or the router's bias."""

    values: npt.NDArray[np.float32]
    address: int


@dataclass(frozen=True)
class Layer:
    """One layer, in GGUF's names."""

    attn_norm: Vector
    attn_q: Matrix
    attn_k: Matrix
    attn_v: Matrix
    attn_q_norm: Vector
    attn_k_norm: Vector
    attn_output: Matrix
    ffn_norm: Vector
    ffn_gate_inp: Matrix
    exp_probs_b: Vector
    ffn_gate_exps: Matrix
    ffn_up_exps: Matrix
    ffn_down_exps: Matrix

    @cached_property
    def record(self) -> npt.NDArray[np.void]:
        return record_of(self, records.LAYER)


@dataclass(frozen=True)
class Weights:
    """All of a model, read-only; holds the file open."""

    gguf: GGUFFile
    config: Config
    token_embd: Matrix
    unpack_embd: int
    layers: tuple[Layer, ...]
    output_norm: Vector
    output: Matrix
    dense_bytes: int  # read for every token: attention, router, head
    expert_bytes: int  # one expert of one layer, its three slices (mean over the layers)


def use_tiles(weights: Weights) -> None:
    """The tile kernels of the parameters in force (simd/tuning.py), from the next call on."""
    from m2lite.kernels.dot import tile_address

    def choose(record: npt.NDArray[np.void], matrix: Matrix) -> None:
        record["tile"] = tile_address(matrix.format, matrix.kind)

    choose(weights.output.record, weights.output)
    for layer in weights.layers:
        for field in fields(layer):
            value = getattr(layer, field.name)
            if isinstance(value, Matrix):
                choose(layer.record[field.name], value)
                choose(value.record, value)


def load_kernels() -> ModuleType:
    """The compiled kernels, or with M2LITE_KERNELS=reference their slow NumPy twins."""
    if os.environ.get("M2LITE_KERNELS") == "reference":
        from m2lite.kernels import reference

        return reference
    from m2lite.kernels import fast

    return fast


def bind_weights(
    gguf: GGUFFile,
    config: Config,
    kernels: ModuleType | None = None,
    address: Callable[[str], int] | None = None,
) -> Weights:
    """Bind every tensor of `gguf`. Raises BadModelError for a tensor that is missing, foreign or of another shape.

    `address` says where a matrix is or will be, if not in the mapping. `kernels` is kernels.fast or kernels.reference,
    by default what `load_kernels` says.
    """
    kernels = kernels or load_kernels()
    names = TensorNames(gguf, config, kernels, address)
    token_embd = names.matrix("token_embd.weight", "vocab", "embd")
    output = names.matrix("output.weight", "vocab", "embd")
    output_norm = names.vector("output_norm.weight", "embd")
    layers = tuple(bind_layer(names, f"blk.{i}.") for i in range(config.n_layers))
    names.check_nothing_left()
    dense = [output] + [m for la in layers for m in (la.attn_q, la.attn_k, la.attn_v, la.attn_output, la.ffn_gate_inp)]
    experts = [m.slice_bytes for la in layers for m in (la.ffn_gate_exps, la.ffn_up_exps, la.ffn_down_exps)]
    return Weights(
        gguf=gguf,
        config=config,
        token_embd=token_embd,
        unpack_embd=kernels.unpack_address(token_embd.format),
        layers=layers,
        output_norm=output_norm,
        output=output,
        dense_bytes=sum(m.n_out * m.row_bytes for m in dense),
        expert_bytes=sum(experts) // config.n_layers,
    )


def bind_layer(names: TensorNames, prefix: str) -> Layer:
    """The 13 tensors of a layer, or 11 with a fused attn_qkv."""

    def matrix(name: str, *shape: str) -> Matrix:
        return names.matrix(f"{prefix}{name}.weight", *shape)

    def vector(name: str, *shape: str) -> Vector:
        return names.vector(f"{prefix}{name}", *shape)

    if names.has(f"{prefix}attn_qkv.weight"):
        q, k, v = names.fused_qkv(f"{prefix}attn_qkv.weight")
    else:
        q, k, v = matrix("attn_q", "q", "embd"), matrix("attn_k", "kv", "embd"), matrix("attn_v", "kv", "embd")
    return Layer(
        attn_norm=vector("attn_norm.weight", "embd"),
        attn_q=q,
        attn_k=k,
        attn_v=v,
        attn_q_norm=vector("attn_q_norm.weight", "q"),
        attn_k_norm=vector("attn_k_norm.weight", "kv"),
        attn_output=matrix("attn_output", "embd", "q"),
        ffn_norm=vector("ffn_norm.weight", "embd"),
        ffn_gate_inp=matrix("ffn_gate_inp", "experts", "embd"),
        exp_probs_b=vector("exp_probs_b.bias", "experts"),
        ffn_gate_exps=matrix("ffn_gate_exps", "experts", "ff", "embd"),
        ffn_up_exps=matrix("ffn_up_exps", "experts", "ff", "embd"),
        ffn_down_exps=matrix("ffn_down_exps", "experts", "embd", "ff"),
    )


class TensorNames:
    """The tensor table with a tick behind every name that was bound."""

    def __init__(
        self,
        gguf: GGUFFile,
        config: Config,
        kernels: ModuleType,
        address: Callable[[str], int] | None = None,
    ) -> None:
        self.gguf, self.kernels = gguf, kernels
        self.address = address or gguf.address
        self.left = set(gguf.tensors)
        self.sizes: Mapping[str, int] = {
            "vocab": config.n_vocab,
            "embd": config.n_embd,
            "2 embd": 2 * config.n_embd,
            "q": config.n_q,
            "kv": config.n_kv,
            "qkv": config.n_q + 2 * config.n_kv,
            "experts": config.n_experts,
            "ff": config.n_ff,
        }

    def has(self, name: str) -> bool:
        return name in self.gguf.tensors

    def take(self, name: str, shape: tuple[str, ...]) -> TensorInfo:
        expected = tuple(self.sizes[s] for s in shape)
        info = self.gguf.tensors.get(name)
        if info is None:
            raise BadModelError(f"Tensor {name} is missing, expected {list(expected)}.", "Convert the model again.")
        if info.shape != expected:
            raise BadModelError(
                f"Tensor {name} has shape {list(info.shape)}, the metadata asks for {list(expected)}.",
                "The file is damaged or not an M2.",
            )
        self.left.discard(name)
        return info

    def matrix(self, name: str, *shape: str) -> Matrix:
        info = self.take(name, shape)
        return self._matrix(info, self.address(name), info.shape[-2])

    def _matrix(self, info: TensorInfo, address: int, n_out: int) -> Matrix:
        fmt, n_in = info.format, info.shape[-1]
        if n_in % BLOCK or n_in % fmt.n_weights:
            raise BadModelError(
                f"Tensor {info.name} has rows of {n_in} weights, expected a multiple of {max(BLOCK, fmt.n_weights)}.",
                "Convert the model again.",
            )
        kind = activation_kind(fmt.name)
        return Matrix(
            address=address,
            n_out=n_out,
            n_in=n_in,
            row_bytes=fmt.row_bytes(n_in),
            tile=self.kernels.tile_address(fmt.name, kind),
            kind=kind,
            format=fmt.name,
        )

    def fused_qkv(self, name: str) -> tuple[Matrix, Matrix, Matrix]:
        """q, k and v as rows of one matrix, in this order."""
        info = self.take(name, ("qkv", "embd"))
        row_bytes, address = info.format.row_bytes(info.shape[-1]), self.address(name)
        n_q, n_kv = self.sizes["q"], self.sizes["kv"]
        q, k, v = (
            self._matrix(info, address + first * row_bytes, n)
            for first, n in ((0, n_q), (n_q, n_kv), (n_q + n_kv, n_kv))
        )
        return q, k, v

    def vector(self, name: str, *shape: str) -> Vector:
        info = self.take(name, shape)
        values = np.ascontiguousarray(unpack_rows(info.format, self.gguf.view(name), info.shape), np.float32)
        padded = np.zeros((len(values) + 15) // 16 * 16, np.float32)  # kernels read whole vectors of 16
        padded[: len(values)] = values
        padded.flags.writeable = False
        return Vector(padded, int(padded.ctypes.data))

    def check_nothing_left(self) -> None:
        if self.left:
            name = min(self.left)
            raise BadModelError(
                f"Tensor {name} does not belong to a MiniMax-M2 ({len(self.left)} such tensors).", "This is not an M2."
            )
