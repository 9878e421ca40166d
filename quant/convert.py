"""The job `convert`: plan, write tensor after tensor, publish. One pass over the checkpoint, a few MB of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from m2lite.errors import M2liteError, ResourceError, UsageError
from m2lite.quant.checkpoint import Checkpoint, open_checkpoint
from m2lite.quant.config import SourceConfig, parse_config
from m2lite.quant.encode import encode_rows
from m2lite.quant.header import Header, Key, boolean, build_header, float32, string, uint32
from m2lite.quant.names import Binding, Mtp, bind_tensors
from m2lite.quant.recipes import Recipe, choose_format, find_recipe
from m2lite.quant.vocabulary import sampling_keys, vocabulary_keys
from m2lite.storage import durable
from m2lite.storage.durable import free_bytes
from m2lite.storage.identity import hash_trunk, trunk_sizes

ARCHITECTURE = "minimax-m2"
CHUNK_WEIGHTS = 1 << 18  # weights at a time: 1 MB of float32, so that the encoders work within the cache
GATING_SIGMOID = 2
MAGIC = b"GGUF"
MTP_CONCAT = "embedding,hidden"


class Progress(Protocol):
    """Called after every chunk: the tensor being written, bytes written so far and in all (both files together)."""

    def __call__(self, tensor: str, done_bytes: int, total_bytes: int, /) -> None: ...


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    path: Path
    size_bytes: int
    n_tensors: int
    mtp_path: Path | None
    mtp_size_bytes: int
    n_mtp_modules: int


@dataclass(frozen=True)
class _Plan:
    """One output file: its header with every offset, and the source of every tensor."""

    path: Path
    header: Header
    bindings: tuple[Binding, ...]


def convert(
    hf_dir: str | Path,
    out_path: str | Path,
    type_name: str,
    *,
    mtp: bool = True,
    overwrite: bool = False,
    name: str | None = None,
    alignment: int | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a Hugging Face checkpoint to a GGUF; prediction modules go to mtp-<out name> beside it.

    The same checkpoint, type, name and alignment give the same bytes. `out_path` appears last, and only complete.
    `mtp=False` leaves prediction modules out.
    """
    recipe = find_recipe(type_name)
    out = Path(out_path)
    _check_output(out)
    with open_checkpoint(hf_dir) as checkpoint:
        config = parse_config(checkpoint.config)
        bindings = bind_tensors(checkpoint, config)
        modules = bindings.mtp if mtp else None
        main = _plan_main(out, checkpoint, config, recipe, bindings.trunk, name, alignment)
        plans = [main]
        if modules is not None:
            identity = _identify(checkpoint, config, bindings.trunk)
            # The sidecar goes first: when the model's name appears, everything is there.
            plans.insert(0, _plan_sidecar(sidecar_path(out), config, recipe, modules, identity, name, alignment))
        _check_targets(checkpoint, [plan.path for plan in plans], overwrite)
        _check_disk(plans)
        _write_all(checkpoint, plans, progress)
    sidecar = plans[0] if modules is not None else None
    return Conversion(
        out,
        main.header.size_bytes,
        len(main.bindings),
        sidecar.path if sidecar else None,
        sidecar.header.size_bytes if sidecar else 0,
        modules.n_modules if modules else 0,
    )


def sidecar_path(model: Path) -> Path:
    """Where the prediction modules of a model file lie."""
    return model.with_name(f"mtp-{model.name}")


def _plan_main(
    path: Path,
    checkpoint: Checkpoint,
    config: SourceConfig,
    recipe: Recipe,
    bindings: tuple[Binding, ...],
    name: str | None,
    alignment: int | None,
) -> _Plan:
    keys = [
        *general_keys(recipe, name or _model_name(checkpoint)),
        *sampling_keys(checkpoint.path),
        *architecture_keys(config, config.n_layers),
        *vocabulary_keys(checkpoint.path, config.n_vocab),
    ]
    return _Plan(path, _build_header(recipe, keys, bindings, alignment), bindings)


def _plan_sidecar(
    path: Path, config: SourceConfig, recipe: Recipe, mtp: Mtp, identity: str, name: str | None, alignment: int | None
) -> _Plan:
    keys = [
        *general_keys(recipe, f"{name or 'MiniMax-M2'} MTP"),
        *architecture_keys(config, config.n_layers + mtp.n_modules),
        uint32(f"{ARCHITECTURE}.vocab_size", config.n_vocab),
        uint32(f"{ARCHITECTURE}.nextn_predict_layers", mtp.n_modules),
        string("m2lite.mtp.concat", MTP_CONCAT),
        string("m2lite.mtp.hidden", mtp.hidden),
        boolean("m2lite.mtp.zero_at_0", mtp.zero_at_0),
        boolean("m2lite.mtp.shared_norm", mtp.shared_norm),
        string("m2lite.mtp.trunk", identity),
    ]
    return _Plan(path, _build_header(recipe, keys, mtp.bindings, alignment), mtp.bindings)


def _build_header(recipe: Recipe, keys: list[Key], bindings: tuple[Binding, ...], alignment: int | None) -> Header:
    tensors = [(binding.name, binding.shape, choose_format(recipe, binding)) for binding in bindings]
    return build_header(ARCHITECTURE, keys, tensors, alignment)


def _model_name(checkpoint: Checkpoint) -> str:
    """A name that the checkpoint gives itself; never a directory's, which would change the bytes."""
    found = checkpoint.config.get("model_name")
    return found if isinstance(found, str) and found else "MiniMax-M2"


def general_keys(recipe: Recipe, name: str) -> list[Key]:
    return [
        string("general.type", "model"),
        string("general.name", name),
        uint32("general.file_type", recipe.file_type),
        uint32("general.quantization_version", 2),
    ]


def architecture_keys(config: SourceConfig, n_blocks: int) -> list[Key]:
    counts = {
        "block_count": n_blocks,
        "context_length": config.n_ctx_train,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_ff,
        "expert_feed_forward_length": config.n_ff,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.rotary_dim,
        "expert_count": config.n_experts,
        "expert_used_count": config.n_experts_used,
        "expert_gating_func": GATING_SIGMOID,
    }
    return [
        *(uint32(f"{ARCHITECTURE}.{key}", value) for key, value in counts.items()),
        float32(f"{ARCHITECTURE}.rope.freq_base", config.rope_theta),
        float32(f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon", config.rms_eps),
    ]


def _identify(checkpoint: Checkpoint, config: SourceConfig, bindings: tuple[Binding, ...]) -> str:
    """The trunk's identity from the source; the finished file gives the same (storage/identity.py)."""
    metadata = {key.name: key.value for key in architecture_keys(config, config.n_layers)}
    table = {binding.name: binding for binding in bindings}

    def read_row(name: str) -> npt.NDArray[np.float32]:
        binding = table[name]
        if not binding.pieces:
            return np.zeros(binding.shape[-1], np.float32)
        piece = binding.pieces[0]
        row: npt.NDArray[np.float32] = checkpoint.read(piece.source, piece.matrix, piece.first_row, 1)[0]
        return row

    return hash_trunk(trunk_sizes(ARCHITECTURE, metadata), config.n_layers, read_row)


def _check_output(out: Path) -> None:
    if out.suffix != ".gguf":
        raise UsageError(f"The output {out.name!r} does not end in .gguf.", "Name it so: programs go by that.")
    if out.is_dir() or not out.parent.is_dir():
        what = "is a directory" if out.is_dir() else f"has no directory {out.parent} to lie in"
        raise UsageError(f"The output {out} {what}.", "Give the path of a file.")


def _check_targets(checkpoint: Checkpoint, targets: Sequence[Path], overwrite: bool) -> None:
    """No output is an input under another name (link, hard link), and none is overwritten without being asked."""
    sources = [path for path in [*checkpoint.paths(), *checkpoint.path.glob("*.json")] if path.exists()]
    for target in targets:
        if not target.exists():
            continue
        if any(target.samefile(source) for source in sources):
            raise UsageError(f"The output {target} is a file of the checkpoint itself.", "Choose another name.")
        if target.is_dir() or not overwrite:
            raise UsageError(f"The output {target} exists already.", "Choose another name, or allow to overwrite it.")


def _check_disk(plans: Sequence[_Plan]) -> None:
    needed = sum(plan.header.size_bytes for plan in plans)
    directory = plans[0].path.parent
    free = free_bytes(directory)
    if free < needed:
        raise ResourceError(
            f"The output takes {needed:,} bytes, {directory} has {free:,} free.", "Make room, or choose another disk."
        )


def _write_all(checkpoint: Checkpoint, plans: Sequence[_Plan], progress: Progress | None) -> None:
    """Bodies by offset, headers without magic, and only when all of that is written the magic and the names."""
    total = sum(slot.n_bytes for plan in plans for slot in plan.header.slots)
    done = 0

    def report(tensor: str, n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress is not None:
            progress(tensor, done, total)

    parts: list[durable.PartFile] = []
    try:
        for plan in plans:
            parts.append(durable.PartFile(plan.path, plan.header.size_bytes, replaces=plan.path.exists()))
        for plan, part in zip(plans, parts, strict=True):
            _write_bodies(checkpoint, plan, part, report)
            part.write(len(MAGIC), plan.header.data[len(MAGIC) :])
        checkpoint.check_unchanged()
        for part in parts:
            part.finish(MAGIC)
    except BaseException:
        for part in parts:
            with contextlib.suppress(M2liteError):  # the first error is the one to tell
                part.discard()
        raise


def _write_bodies(
    checkpoint: Checkpoint, plan: _Plan, part: durable.PartFile, report: Callable[[str, int], None]
) -> None:
    for slot, binding in zip(plan.header.slots, plan.bindings, strict=True):
        offset = slot.offset
        for rows in _read_rows(checkpoint, binding):
            data = encode_rows(slot.block_format, rows, slot.name)
            part.write(offset, data.reshape(-1).data)
            offset += data.nbytes
            report(slot.name, data.nbytes)
        assert offset == slot.offset + slot.n_bytes


def _read_rows(checkpoint: Checkpoint, binding: Binding) -> Iterator[npt.NDArray[np.float32]]:
    """The rows of a tensor in order, some at a time."""
    width = binding.shape[-1]
    if not binding.pieces:
        yield np.zeros((1, width), np.float32)
    step = max(1, CHUNK_WEIGHTS // width)
    for piece in binding.pieces:
        for first in range(0, piece.n_rows, step):
            count = min(step, piece.n_rows - first)
            rows = checkpoint.read(piece.source, piece.matrix, piece.first_row + first, count)
            yield np.roll(rows, width // 2, axis=1) if binding.swap else rows
