"""Hugging Face names -> GGUF names, as data, and the binding of one to the other. HF names live here only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from m2lite.errors import BadModelError
from m2lite.quant.checkpoint import SCALE_SUFFIX, Checkpoint, matrices
from m2lite.quant.config import SourceConfig
from m2lite.quant.foreign import check_tensors


class Spelling(NamedTuple):
    """One way a checkpoint may hold a tensor. `{e}` in the name: one tensor per expert. parts > 1: rows fused."""

    name: str
    part: int = 0
    parts: int = 1


class Entry(NamedTuple):
    """A GGUF tensor: its shape (row-major, words of SourceConfig.dims), what it is for, and where it comes from."""

    gguf: str
    shape: tuple[str, ...]
    role: str
    spellings: tuple[Spelling, ...]


def _entry(gguf: str, shape: str, role: str, *names: str | Spelling) -> Entry:
    return Entry(gguf, tuple(shape.split()), role, tuple(Spelling(n) if isinstance(n, str) else n for n in names))


def _moe(tail: str) -> tuple[str, str]:
    """Original and transformers-5 spelling of a name within the expert block."""
    return f"block_sparse_moe.{tail}", f"mlp.{tail}"


def _fused(tail: str, part: int = 0, parts: int = 1) -> tuple[Spelling, ...]:
    return tuple(Spelling(name, part, parts) for name in _moe(tail))


TRUNK = (
    _entry("token_embd.weight", "vocab embd", "embedding", "model.embed_tokens.weight"),
    _entry("output_norm.weight", "embd", "norm", "model.norm.weight"),
    _entry("output.weight", "vocab embd", "head", "lm_head.weight"),
)
LAYER = (
    _entry("attn_norm.weight", "embd", "norm", "input_layernorm.weight"),
    _entry("attn_q.weight", "q embd", "attention", "self_attn.q_proj.weight"),
    _entry("attn_k.weight", "kv embd", "attention", "self_attn.k_proj.weight"),
    _entry("attn_v.weight", "kv embd", "attention", "self_attn.v_proj.weight"),
    _entry("attn_output.weight", "embd q", "attention", "self_attn.o_proj.weight"),
    _entry("attn_q_norm.weight", "q", "norm", "self_attn.q_norm.weight"),
    _entry("attn_k_norm.weight", "kv", "norm", "self_attn.k_norm.weight"),
    _entry("ffn_norm.weight", "embd", "norm", "post_attention_layernorm.weight"),
    _entry("ffn_gate_inp.weight", "experts embd", "router", *_moe("gate.weight")),
    _entry(
        "exp_probs_b.bias", "experts", "bias", *_moe("e_score_correction_bias"), *_moe("gate.e_score_correction_bias"),
    ),
    _entry(
        "ffn_gate_exps.weight", "experts ff embd", "experts",
        *_moe("experts.{e}.w1.weight"), *_moe("experts.{e}.gate_proj.weight"), *_fused("experts.gate_up_proj", 0, 2),
    ),
    _entry(
        "ffn_up_exps.weight", "experts ff embd", "experts",
        *_moe("experts.{e}.w3.weight"), *_moe("experts.{e}.up_proj.weight"), *_fused("experts.gate_up_proj", 1, 2),
    ),
    _entry(
        "ffn_down_exps.weight", "experts embd ff", "experts",
        *_moe("experts.{e}.w2.weight"), *_moe("experts.{e}.down_proj.weight"), *_fused("experts.down_proj"),
    ),
)  # fmt: skip


class MtpLayout(NamedTuple):
    """One of the ways in which checkpoints hold prediction modules. `{i}` is the module, `{l}` is layers + module.

    `layer` lists prefixes under which the module's ordinary layer may lie. `swap`: eh_proj reads [hidden, embedding],
    so its column halves are swapped into our order. `hidden` and `zero_at_0` are the layout's usual reading; m2lite_mtp
    in config.json overrules them.
    """

    prefix: str
    enorm: str
    hnorm: str
    eh_proj: str
    norm: str | None  # None: the trunk's final norm is shared
    layer: tuple[str, ...]
    copies: tuple[tuple[str, str], ...]  # tensors that may only repeat one of the trunk's
    swap: bool
    hidden: str
    zero_at_0: bool


MTP_LAYOUTS = (
    MtpLayout(
        "model.mtp.layers.{i}.", "enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight",
        ("transformer_layer.",), (), False, "pre_norm", True,
    ),
    MtpLayout(
        "model.layers.{l}.", "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", ("",),
        (("embed_tokens.weight", "model.embed_tokens.weight"), ("shared_head.head.weight", "lm_head.weight")),
        False, "post_norm", True,
    ),
    MtpLayout(
        "model.mtp_layers.{i}.", "e_norm.weight", "h_norm.weight", "linear_projection.weight", None,
        ("", "transformer_layer.", "layer.", "mtp_block."), (), True, "pre_norm", True,
    ),
)  # fmt: skip

# What a prediction module has beside its layer, and the role of each.
MTP_TENSORS = {"eh_proj": "mtp_projection", "enorm": "norm", "hnorm": "norm", "shared_head_norm": "norm"}

# Buffers that some savers write and nobody reads.
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")


class RowRange(NamedTuple):
    """Rows of one source matrix; the pieces of a tensor, in order, are its rows."""

    source: str
    matrix: int
    first_row: int
    n_rows: int


@dataclass(frozen=True)
class Binding:
    """A GGUF tensor bound to its source. No pieces: made by `fill`, as for a bias that the model does not use."""

    name: str
    shape: tuple[int, ...]
    role: str
    pieces: tuple[RowRange, ...]
    swap: bool = False  # exchange the two halves of every row
    mtp: bool = False
    fill: str = "zeros"  # or ones, or halves: half the identity, twice side by side


@dataclass(frozen=True)
class MtpBindings:
    """The prediction modules of a checkpoint: their tensors, under blk.{n_layers + i}, and how they are meant."""

    n_modules: int
    bindings: tuple[Binding, ...]
    hidden: str
    zero_at_0: bool
    shared_norm: bool


class Bindings(NamedTuple):
    trunk: tuple[Binding, ...]
    mtp: MtpBindings | None


def bind_tensors(checkpoint: Checkpoint, config: SourceConfig) -> Bindings:
    """Every GGUF tensor with its source, shapes checked; every tensor of the checkpoint is accounted for."""
    trunk = [_bind(checkpoint, config, entry, "", "") for entry in (TRUNK[0],)]
    for layer in range(config.n_layers):
        trunk += _bind_layer(checkpoint, config, layer, f"model.layers.{layer}.")
    trunk += [_bind(checkpoint, config, entry, "", "") for entry in TRUNK[1:]]
    mtp, copies = _bind_mtp(checkpoint, config)
    _check_leftovers(checkpoint, [*trunk, *(mtp.bindings if mtp else ())], copies)
    return Bindings(tuple(trunk), mtp)


def _bind_layer(checkpoint: Checkpoint, config: SourceConfig, block: int, source_prefix: str) -> list[Binding]:
    return [_bind(checkpoint, config, entry, f"blk.{block}.", source_prefix) for entry in LAYER]


def _bind(checkpoint: Checkpoint, config: SourceConfig, entry: Entry, prefix: str, source_prefix: str) -> Binding:
    shape = tuple(config.dims()[word] for word in entry.shape)
    for spelling in entry.spellings:
        name = source_prefix + spelling.name
        if name.replace("{e}", "0") in checkpoint.tensors:
            pieces = tuple(_pieces(checkpoint, name, spelling, shape))
            return Binding(prefix + entry.gguf, shape, entry.role, pieces)
    if entry.role == "bias" and not config.routing_bias:
        return Binding(prefix + entry.gguf, shape, entry.role, ())
    wanted = source_prefix + entry.spellings[0].name.replace("{e}", "0")
    raise _missing(checkpoint, wanted, f" ({prefix}{entry.gguf})")


def _missing(checkpoint: Checkpoint, wanted: str, more: str = "") -> BadModelError:
    """What lacks one of M2's tensors although all its files are there: another kind of checkpoint, or part of one."""
    check_tensors(checkpoint.tensors, [tensor.dtype for tensor in checkpoint.tensors.values()])
    first = next(iter(checkpoint.tensors), None)
    found = f"{len(checkpoint.tensors)} others are there, the first is {first!r}" if first else "there are no others"
    todo = "config.json is of another checkpoint, or the model was saved without this part: use the one it came from."
    if first is not None and not any(name.startswith("model.") for name in checkpoint.tensors):
        todo = "The names are not those of a whole MiniMax-M2 as Hugging Face has it: save it from there."
    return BadModelError(f"Tensor {wanted!r} is missing{more}, and no file is: {found}.", todo)


def _pieces(checkpoint: Checkpoint, name: str, spelling: Spelling, shape: tuple[int, ...]) -> Iterator[RowRange]:
    n_matrices, n_rows, _ = matrices(shape)
    separate = "{e}" in name
    for index in range(n_matrices):
        source = name.replace("{e}", str(index))
        expected = (
            shape[1:] if separate else (*shape[:-2], spelling.parts * shape[-2], shape[-1]) if len(shape) > 1 else shape
        )
        if index == 0 or separate:
            _check_shape(checkpoint, source, expected)
        yield RowRange(source, 0 if separate else index, spelling.part * n_rows, n_rows)


def _check_shape(checkpoint: Checkpoint, source: str, expected: tuple[int, ...]) -> None:
    if source not in checkpoint.tensors:
        raise _missing(checkpoint, source)
    found = checkpoint.tensors[source].shape
    if found != expected:
        check_tensors(checkpoint.tensors, [checkpoint.tensors[source].dtype])
        raise BadModelError(
            f"Tensor {source!r} has shape {list(found)} where config.json gives {list(expected)}.",
            "Use the config.json of this checkpoint.",
        )


def _bind_mtp(checkpoint: Checkpoint, config: SourceConfig) -> tuple[MtpBindings | None, list[str]]:
    """Prediction modules are found by their tensors: config.json promises them where there are none."""
    for layout in MTP_LAYOUTS:
        prefixes: list[str] = []
        while (prefix := _module_prefix(layout, config, len(prefixes))) + layout.eh_proj in checkpoint.tensors:
            prefixes.append(prefix)
        if prefixes:
            break
    else:
        return None, []
    bindings: list[Binding] = []
    copies: list[str] = []
    for index, prefix in enumerate(prefixes):
        bindings += _bind_module(checkpoint, config, layout, config.n_layers + index, prefix)
        for name, original in layout.copies:
            if prefix + name in checkpoint.tensors:
                _check_copy(checkpoint, prefix + name, original)
                copies.append(prefix + name)
    hidden = config.mtp_hidden or layout.hidden
    zero_at_0 = layout.zero_at_0 if config.mtp_zero_at_0 is None else config.mtp_zero_at_0
    return MtpBindings(len(prefixes), tuple(bindings), hidden, zero_at_0, layout.norm is None), copies


def copied_modules(config: SourceConfig, trunk: Sequence[Binding], n_modules: int) -> MtpBindings:
    """Modules to begin training with: each the trunk's last layer, on the mean of embedding and hidden state.

    So the paper began. As they are they foresee little: models/m2-tiny/README.md has figures.
    """
    last, found = f"blk.{config.n_layers - 1}.", list[Binding]()
    for block in range(config.n_layers, config.n_layers + n_modules):
        prefix = f"blk.{block}."
        layer = [b for b in trunk if b.name.startswith(last)]
        found += [replace(b, name=prefix + b.name.removeprefix(last), mtp=True) for b in layer]
        for name, fill in (("eh_proj", "halves"), ("enorm", "ones"), ("hnorm", "ones")):
            shape = (config.n_embd, 2 * config.n_embd) if fill == "halves" else (config.n_embd,)
            full_name = f"{prefix}nextn.{name}.weight"
            found.append(Binding(full_name, shape, MTP_TENSORS[name], (), mtp=True, fill=fill))
    return MtpBindings(n_modules, tuple(found), config.mtp_hidden or "pre_norm", True, shared_norm=True)


def _module_prefix(layout: MtpLayout, config: SourceConfig, index: int) -> str:
    return layout.prefix.format(i=index, l=config.n_layers + index)


def _bind_module(
    checkpoint: Checkpoint, config: SourceConfig, layout: MtpLayout, block: int, prefix: str
) -> Iterator[Binding]:
    marker = LAYER[0].spellings[0].name
    inner = next((p for p in layout.layer if prefix + p + marker in checkpoint.tensors), layout.layer[0])
    for binding in _bind_layer(checkpoint, config, block, prefix + inner):
        yield replace(binding, mtp=True)
    for gguf, source, shape in (
        ("eh_proj", layout.eh_proj, "embd 2embd"),
        ("enorm", layout.enorm, "embd"),
        ("hnorm", layout.hnorm, "embd"),
        ("shared_head_norm", layout.norm, "embd"),
    ):
        if source is None:
            continue
        entry = _entry(f"nextn.{gguf}.weight", shape, MTP_TENSORS[gguf], prefix + source)
        binding = _bind(checkpoint, config, entry, f"blk.{block}.", "")
        yield replace(binding, mtp=True, swap=layout.swap and gguf == "eh_proj")


def _check_copy(checkpoint: Checkpoint, name: str, original: str) -> None:
    """A module may repeat the trunk's embedding or head; one of its own has no place in the sidecar."""
    _check_shape(checkpoint, name, checkpoint.tensors[original].shape)
    n_rows = checkpoint.tensors[name].shape[0]
    for first in range(0, n_rows, 4096):
        count = min(4096, n_rows - first)
        if (checkpoint.read(name, 0, first, count) != checkpoint.read(original, 0, first, count)).any():
            raise BadModelError(
                f"Tensor {name!r} differs from {original!r}.", "Modules with their own head are not supported."
            )


def _check_leftovers(checkpoint: Checkpoint, bindings: list[Binding], copies: list[str]) -> None:
    used = {piece.source for binding in bindings for piece in binding.pieces} | set(copies)
    used |= {name + SCALE_SUFFIX for name in used if checkpoint.tensors[name].dtype == "F8_E4M3"}
    left = sorted(name for name in checkpoint.tensors if name not in used and not IGNORED.fullmatch(name))
    if left:
        check_tensors(left, [checkpoint.tensors[name].dtype for name in left])
        raise BadModelError(
            f"{len(left)} tensors of the checkpoint have no place in an M2, the first is {left[0]!r}.",
            "This is another architecture, or config.json is of another checkpoint.",
        )


ROLES: Mapping[str, str] = {
    "embedding": "token embedding",
    "head": "output head",
    "attention": "attention matrices",
    "experts": "stacked experts",
    "mtp_projection": "eh_proj of a prediction module",
    "norm": "norms",
    "router": "router",
    "bias": "selection bias",
}
EXACT_ROLES = ("norm", "router", "bias")  # tiny, and what rounding them does is out of proportion: F32 in every file

_OF_TRUNK = {entry.gguf: entry.role for entry in TRUNK}
_OF_LAYER = {entry.gguf: entry.role for entry in LAYER} | {
    "attn_qkv.weight": "attention",  # q, k and v in one, as some published files have them
    **{f"nextn.{gguf}.weight": role for gguf, role in MTP_TENSORS.items()},
}
_BLOCK = re.compile(r"blk\.(?:0|[1-9][0-9]{0,3})\.(.+)")


def role_of(gguf_name: str) -> str:
    """What a tensor of a finished GGUF is for; BadModelError for one that no M2 has."""
    block = _BLOCK.fullmatch(gguf_name)
    role = _OF_LAYER.get(block[1]) if block else _OF_TRUNK.get(gguf_name)
    if role is None:
        raise BadModelError(f"Tensor {gguf_name!r} has no place in an M2.", "Only MiniMax-M2 files can be quantized.")
    return role
