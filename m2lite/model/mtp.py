"""Multi-token-prediction modules: the same layer on another input, from a sidecar file. Knows no acceptance, no loop.

    g_0[t] = the trunk's hidden state at position t
    g_k[t] = layer_k( eh_proj_k @ [rms_norm(embed(x_t), enorm), rms_norm(g_{k-1}[t-1], hnorm)] )
    head(norm_k(g_k[t])) predicts x_{t+1}, from tokens up to t and trunk states up to t-k

At position 0 the embedding (if `zero_at_0`) and the state of position -1 are zero. Embedding and head are the trunk's;
each module has its own KV, behind the trunk's layers in the same pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from m2lite.errors import BadModelError, M2liteError
from m2lite.kernels import layer as records
from m2lite.model.buffers import Buffers
from m2lite.model.cache import KVPool, Rows
from m2lite.model.config import ARCHITECTURE, parse_config
from m2lite.model.forward import embed, head
from m2lite.model.layers import ForwardPass, layer
from m2lite.model.observer import Observer
from m2lite.model.weights import Layer, Matrix, TensorNames, Vector, Weights, bind_layer, load_kernels
from m2lite.simd import jit
from m2lite.storage.gguf_reader import GGUFFile

MAX_MODULES = 16


@dataclass(frozen=True)
class Module:
    """One prediction module."""

    enorm: Vector
    hnorm: Vector
    eh_proj: Matrix
    layer: Layer
    norm: Vector  # before the shared head

    @cached_property
    def record(self) -> npt.NDArray[np.void]:
        """records.MODULE [1]: what leads to the layer, as kernels read it."""
        record = np.zeros(1, records.MODULE)
        record[0] = (self.enorm.address, self.hnorm.address, self.eh_proj.record[0])
        return record


@dataclass(frozen=True)
class Mtp:
    """The modules of one trunk, in the order in which they are chained; holds the sidecar file open."""

    gguf: GGUFFile
    trunk: Weights
    modules: tuple[Module, ...]
    is_post_norm: bool  # g_0 is taken after the trunk's final norm
    zero_at_0: bool


def bind_mtp(sidecar: GGUFFile, trunk: Weights) -> Mtp:
    """Bind the modules in `sidecar`, whose trunk was checked; BadModelError if they are damaged."""
    metadata, config = sidecar.metadata, trunk.config
    n_modules = metadata.get(f"{ARCHITECTURE}.nextn_predict_layers")
    if type(n_modules) is not int or not 1 <= n_modules <= MAX_MODULES:
        raise BadModelError(
            f"{ARCHITECTURE}.nextn_predict_layers is {n_modules!r}, expected 1 to {MAX_MODULES}.",
            "This is no MTP sidecar.",
        )
    found = parse_config(metadata, n_extra_layers=n_modules, n_vocab=config.n_vocab)
    if found != config:
        raise BadModelError("The MTP modules have other dimensions than the model.", "Convert both again.")
    _check_choice(sidecar, "m2lite.mtp.concat", "embedding,hidden")
    hidden = _check_choice(sidecar, "m2lite.mtp.hidden", "pre_norm", "post_norm")
    names = TensorNames(sidecar, config, load_kernels())
    shared_norm = _check_flag(sidecar, "m2lite.mtp.shared_norm", default=False)
    zero_at_0 = _check_flag(sidecar, "m2lite.mtp.zero_at_0", default=True)
    modules = []
    for i in range(config.n_layers, config.n_layers + n_modules):
        prefix = f"blk.{i}.nextn."
        modules.append(
            Module(
                enorm=names.vector(f"{prefix}enorm.weight", "embd"),
                hnorm=names.vector(f"{prefix}hnorm.weight", "embd"),
                eh_proj=names.matrix(f"{prefix}eh_proj.weight", "embd", "2 embd"),
                layer=bind_layer(names, f"blk.{i}."),
                norm=trunk.output_norm if shared_norm else names.vector(f"{prefix}shared_head_norm.weight", "embd"),
            )
        )
    names.check_nothing_left()
    return Mtp(sidecar, trunk, tuple(modules), hidden == "post_norm", zero_at_0)


def _check_flag(sidecar: GGUFFile, key: str, default: bool) -> bool:
    value = sidecar.metadata.get(key, default)
    if not isinstance(value, bool):
        raise BadModelError(f"{key} is {value!r}, expected true or false.", "Convert the modules again.")
    return value


def _check_choice(sidecar: GGUFFile, key: str, *allowed: str) -> str:
    value = sidecar.metadata.get(key)
    if not isinstance(value, str) or value not in allowed:
        raise BadModelError(f"{key} is {value!r}, expected {' or '.join(allowed)}.", "Convert the modules again.")
    return str(value)


class ModuleScratch:
    """What the modules need beside the trunk's Buffers, for as many rows."""

    def __init__(self, buffers: Buffers) -> None:
        self._joined = np.empty((buffers.n_rows, 2, buffers.config.n_embd), np.float32)
        self.joined = int(self._joined.ctypes.data)


def trunk_states(mtp: Mtp, buffers: Buffers, n: int) -> int:
    """Address of g_0 [n, n_embd] of the first n rows that `forward` has just computed: valid until the next call."""
    if not mtp.is_post_norm:
        return buffers.x
    c = mtp.trunk.config
    buffers.kernels.rms_norm(buffers.h, buffers.x, mtp.trunk.output_norm.address, n, c.n_embd, np.float32(c.rms_eps))
    return buffers.h


def run_module(
    mtp: Mtp, k: int, pool: KVPool, buffers: Buffers, scratch: ModuleScratch, rows: Rows, previous: int,
    observers: Sequence[Observer] = (),
) -> int:  # fmt: skip
    """Address of g_{k+1} [T, n_embd] of module k, counted from 0: valid until the next call.

    previous: address of float32 [T, n_embd], g_k of the position before each row's (zeros for position 0). `rows` come
    from `pool.rows_at`; the module's K and V are written at their positions.
    """
    module, b, n = mtp.modules[k], buffers, rows.n
    call = ForwardPass(pool, rows, b, observers)
    embed(call, mtp.trunk, n, b.h)
    if mtp.zero_at_0:
        for row in rows.at_0:
            b.array("h")[row] = 0
    b.kernels.steps.join(jit.team(), module.record, b.record, scratch.joined, previous, n)
    if not layer(call, module.layer, mtp.trunk.config.n_layers + k, n):
        raise M2liteError(f"NaN or infinity in prediction module {k}.", "The sidecar's weights may be damaged.")
    return b.x


def module_logits(mtp: Mtp, k: int, buffers: Buffers, first: int, n: int) -> npt.NDArray[np.float32]:
    """float32 [n, n_vocab] = what module k, which has just run, says of its rows from `first` on; a view, too."""
    b = buffers
    return head(mtp.trunk, b, b.x + 4 * first * b.config.n_embd, mtp.modules[k].norm, n)
