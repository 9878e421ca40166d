"""Multi-token-prediction modules: the same layer on another input, from a sidecar file. Knows no acceptance, no loop.

    g_0[t] = the trunk's hidden state at position t
    g_k[t] = layer_k( eh_proj_k @ [rms_norm(embed(x_t), enorm), rms_norm(g_{k-1}[t-1], hnorm)] )
    head(norm_k(g_k[t])) predicts x_{t+1}, from tokens up to t and trunk states up to t-k

At position 0 the embedding (if `zero_at_0`) and the state of position -1 are zero. Embedding and head are the trunk's;
each module has its own KV, behind the trunk's layers in the same pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from m2lite.errors import BadModelError, M2liteError
from m2lite.kernels import jit
from m2lite.model.cache import KVPool, Rows
from m2lite.model.config import ARCHITECTURE, parse_config
from m2lite.model.forward import Buffers, Place, head, multiply, run_layer
from m2lite.model.weights import Layer, Matrix, TensorNames, Vector, Weights, bind_layer, load_kernels
from m2lite.storage.gguf_reader import GGUFFile
from m2lite.storage.identity import trunk_identity

MAX_MODULES = 16


@dataclass(frozen=True)
class Module:
    """One prediction module."""

    enorm: Vector
    hnorm: Vector
    eh_proj: Matrix
    layer: Layer
    norm: Vector  # before the shared head


@dataclass(frozen=True)
class Mtp:
    """The modules of one trunk, in the order in which they are chained; holds the sidecar file open."""

    gguf: GGUFFile
    trunk: Weights
    modules: tuple[Module, ...]
    is_post_norm: bool  # g_0 is taken after the trunk's final norm
    zero_at_0: bool


def bind_mtp(sidecar: GGUFFile, trunk: Weights) -> Mtp:
    """Bind the modules in `sidecar`; BadModelError if they are damaged or belong to another trunk."""
    metadata, config = sidecar.metadata, trunk.config
    n_modules = metadata.get(f"{ARCHITECTURE}.nextn_predict_layers")
    if not isinstance(n_modules, int) or not 1 <= n_modules <= MAX_MODULES:
        raise BadModelError(
            f"{ARCHITECTURE}.nextn_predict_layers is {n_modules!r}, expected 1 to {MAX_MODULES}.",
            "This is no MTP sidecar.",
        )
    found = parse_config(metadata, n_extra_layers=n_modules, n_vocab=config.n_vocab)
    identity = trunk_identity(trunk.gguf)
    if found != config or metadata.get("m2lite.mtp.trunk") != identity:
        raise BadModelError(
            f"The MTP modules belong to trunk {metadata.get('m2lite.mtp.trunk')!r}, the model is {identity!r}.",
            "Convert both from the same checkpoint.",
        )
    _check_choice(sidecar, "m2lite.mtp.concat", "embedding,hidden")
    hidden = _check_choice(sidecar, "m2lite.mtp.hidden", "pre_norm", "post_norm")
    names = TensorNames(sidecar, config, load_kernels(), generic=False)
    shared_norm = bool(metadata.get("m2lite.mtp.shared_norm", False))
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
    return Mtp(sidecar, trunk, tuple(modules), hidden == "post_norm", bool(metadata.get("m2lite.mtp.zero_at_0", True)))


def _check_choice(sidecar: GGUFFile, key: str, *allowed: str) -> str:
    value = sidecar.metadata.get(key)
    if value not in allowed:
        raise BadModelError(f"{key} is {value!r}, expected {' or '.join(allowed)}.", "Convert the modules again.")
    return str(value)


def trunk_state(mtp: Mtp, buffers: Buffers, n: int) -> npt.NDArray[np.float32]:
    """g_0 [n, n_embd] of the rows that `forward` has just computed: a copy."""
    x = buffers.array("x")[:n].copy()
    if mtp.is_post_norm:
        c = mtp.trunk.config
        address = int(x.ctypes.data)
        buffers.kernels.rms_norm(address, address, mtp.trunk.output_norm.address, n, c.n_embd, np.float32(c.rms_eps))
    return x


def run_module(
    mtp: Mtp, k: int, pool: KVPool, buffers: Buffers, rows: Rows, previous: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """g_{k+1} [T, n_embd] (a copy) and logits [T, n_vocab] (a view until the next call) of module k, counted from 0.

    previous: float32 [T, n_embd], g_k of the position before each row's (zeros for position 0). `rows` come from
    `pool.rows_at`; the module's K and V are written at their positions.
    """
    weights, module, b = mtp.trunk, mtp.modules[k], buffers
    c, n = weights.config, rows.n
    assert n <= b.n_rows and previous.shape == (n, c.n_embd) and jit.n_threads() <= b.n_threads
    embd, place = weights.token_embd, Place(pool, rows, b.kernels)
    b.kernels.embed_rows(
        weights.unpack_embd, embd.address, embd.row_bytes, embd.n_blocks, place.tokens, n, b.h, 4 * c.n_embd
    )
    if mtp.zero_at_0:
        b.array("h")[:n][rows.positions == 0] = 0
    joined = np.empty((n, 2, c.n_embd), np.float32)
    halves = np.ascontiguousarray(previous, np.float32)
    eps, normed = np.float32(c.rms_eps), np.empty((n, c.n_embd), np.float32)
    for half, source, norm in ((0, b.h, module.enorm), (1, int(halves.ctypes.data), module.hnorm)):
        b.kernels.rms_norm(int(normed.ctypes.data), source, norm.address, n, c.n_embd, eps)
        joined[:, half] = normed
    multiply(b, b.x, module.eh_proj, int(joined.ctypes.data), n)
    if not run_layer(c, module.layer, b, place, n, (c.n_layers + k) * pool.layer_bytes):
        raise M2liteError(f"NaN or infinity in prediction module {k}.", "The sidecar's weights may be damaged.")
    state = b.array("x")[:n].copy()
    return state, head(weights, b, b.x, module.norm, n)
