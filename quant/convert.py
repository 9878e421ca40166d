"""The job `convert`: a Hugging Face checkpoint as GGUF. Planned here, carried out by job.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Unpack

import numpy as np
import numpy.typing as npt

from m2lite.errors import UsageError
from m2lite.quant import options as options_module
from m2lite.quant.checkpoint import Checkpoint, MatrixRows, open_checkpoint
from m2lite.quant.config import SourceConfig, config_warnings, parse_config
from m2lite.quant.header import Key, Slot, boolean, float32, string, uint32
from m2lite.quant.imatrix import Importance
from m2lite.quant.job import FileJob, Output, Progress, journal_path
from m2lite.quant.names import Binding, MtpBindings, bind_tensors, copied_modules
from m2lite.quant.options import (
    Asked,
    Conversion,
    JobPlan,
    Options,
    carry_out,
    check_coverage,
    choose_all,
    describe,
    encode_slot,
    importance_keys,
    resolve_options,
)
from m2lite.quant.recipes import Recipe
from m2lite.quant.split import Planned, plan_files
from m2lite.quant.stream import Bytes, Chunk
from m2lite.quant.vocabulary import sampling_keys, vocabulary_keys
from m2lite.storage.hub import find_snapshot
from m2lite.storage.identity import hash_trunk, trunk_sizes
from m2lite.storage.sidecar import sidecar_path

__all__ = ["ARCHITECTURE", "BoundTensor", "Conversion", "architecture_keys", "convert", "general_keys", "plan_convert"]

ARCHITECTURE = "minimax-m2"
GATING_SIGMOID = 2
MTP_CONCAT = "embedding,hidden"


def convert(
    hf_dir: str | Path,
    out_path: str | Path,
    type_name: str,
    *,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
    **asked: Unpack[Asked],
) -> Conversion:
    """Convert a Hugging Face checkpoint to a GGUF; prediction modules go to mtp-<out name> beside it.

    The same checkpoint and options give the same bytes. The output's name appears last, and only when all is complete.
    A run that was interrupted is taken up where it stopped, or with `restart` begun anew. `mtp=False` leaves prediction
    modules out, `init_mtp` makes so many of the last layer where there are none, `verify=False` does not read back
    what was written.
    """
    plan = plan_convert(hf_dir, out_path, type_name, **asked)
    return carry_out(plan, overwrite=overwrite, restart=restart, verify=verify, threads=threads, progress=progress)


@contextmanager
def plan_convert(hf_dir: str | Path, out_path: str | Path, type_name: str, **asked: Unpack[Asked]) -> Iterator[JobPlan]:
    """What `convert` would do. Nothing is written; the checkpoint is open within the `with` block."""
    out = Path(out_path)
    options = resolve_options(out, type_name, asked, [Path(hf_dir), find_snapshot(hf_dir)])
    with open_checkpoint(hf_dir) as checkpoint:
        yield _plan(checkpoint, out, options)


def _plan(checkpoint: Checkpoint, out: Path, options: Options) -> JobPlan:
    config = parse_config(checkpoint.config)
    bindings = bind_tensors(checkpoint, config)
    modules = bindings.mtp if options.mtp else None
    if options.init_mtp:
        if bindings.mtp is not None:
            raise UsageError("The checkpoint has prediction modules.", "Leave --init-mtp out.")
        modules = copied_modules(config, bindings.trunk, options.init_mtp)
    bound = (*bindings.trunk, *(modules.bindings if modules else ()))
    warnings = [*config_warnings(checkpoint.config), *checkpoint.notes]
    keys = _main_keys(checkpoint, config, options, warnings)
    choices, alignment = choose_all(options, bound, ARCHITECTURE, keys)
    warnings += check_coverage(options, bound, choices)

    def place(found: tuple[Binding, ...]) -> list[Planned]:
        sources = (BoundTensor(checkpoint, binding, options.importance) for binding in found)
        return [Planned(b.name, b.shape, choices[b.name].block_format, s) for b, s in zip(found, sources, strict=True)]

    model = plan_files(out, ARCHITECTURE, keys, place(bindings.trunk), alignment, options.split_max_bytes)
    sidecar: tuple[Output, ...] = ()
    if modules is not None:
        identity = _identify(checkpoint, config, bindings.trunk)
        keys = [
            *general_keys(options.recipe, f"{options.name or 'MiniMax-M2'} MTP"),
            *importance_keys(options),
            *sidecar_keys(config, modules, identity),
        ]
        sidecar = plan_files(sidecar_path(out), ARCHITECTURE, keys, place(modules.bindings), options.alignment)
    job = FileJob((*sidecar, *model), checkpoint, journal_path(out), model[0].path, options.words("convert"))
    result = describe(model, sidecar, modules.n_modules if modules else 0, warnings)
    return JobPlan(job, options, bound, choices, result)


def _main_keys(checkpoint: Checkpoint, config: SourceConfig, options: Options, warnings: list[str]) -> list[Key]:
    return [
        *general_keys(options.recipe, options.name or _model_name(checkpoint)),
        *importance_keys(options),
        *sampling_keys(checkpoint.path, warnings),
        *architecture_keys(config, config.n_layers),
        *vocabulary_keys(checkpoint.path, config.n_vocab, checkpoint.config, warnings),
    ]


def sidecar_keys(config: SourceConfig, mtp: MtpBindings, identity: str) -> list[Key]:
    """What a sidecar says of its modules and of the trunk that they belong to."""
    return [
        *architecture_keys(config, config.n_layers + mtp.n_modules),
        uint32(f"{ARCHITECTURE}.vocab_size", config.n_vocab),
        uint32(f"{ARCHITECTURE}.nextn_predict_layers", mtp.n_modules),
        string("m2lite.mtp.concat", MTP_CONCAT),
        string("m2lite.mtp.hidden", mtp.hidden),
        boolean("m2lite.mtp.zero_at_0", mtp.zero_at_0),
        boolean("m2lite.mtp.shared_norm", mtp.shared_norm),
        string("m2lite.mtp.trunk", identity),
    ]


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


@dataclass(frozen=True)
class BoundTensor:
    """One tensor of the output, made of rows of the checkpoint."""

    checkpoint: Checkpoint
    binding: Binding
    importance: Importance | None

    def chunks(self, slot: Slot) -> Iterator[Chunk]:
        """Pieces are whole matrices, so no chunk reaches into two experts."""
        row_bytes = slot.block_format.row_bytes(slot.shape[-1])
        step = max(1, options_module.CHUNK_WEIGHTS // slot.shape[-1])
        offset = 0
        if not self.binding.pieces:
            yield Chunk(0, slot.n_bytes, lambda: None, lambda: None, lambda nothing: self._made(slot))
        for matrix, piece in enumerate(self.binding.pieces):
            for first in range(0, piece.n_rows, step):
                rows = (piece.source, piece.matrix, piece.first_row + first, min(step, piece.n_rows - first))
                n_bytes = rows[-1] * row_bytes
                yield Chunk(
                    offset,
                    n_bytes,
                    partial(self.checkpoint.announce, *rows),
                    partial(self.checkpoint.fetch, *rows),
                    partial(self._encode, slot, matrix),
                )
                offset += n_bytes
        assert offset == slot.n_bytes or not self.binding.pieces

    def _encode(self, slot: Slot, matrix: int, fetched: MatrixRows) -> Bytes:
        rows = self.checkpoint.decode(fetched)
        if self.binding.swap:
            rows = np.roll(rows, rows.shape[1] // 2, axis=1)
        return encode_slot(slot, rows, self.importance, matrix)

    def _made(self, slot: Slot) -> Bytes:
        """Of a tensor that has no source."""
        n_in = slot.shape[-1]
        rows: npt.NDArray[np.float32]
        if self.binding.fill == "halves":
            rows = np.tile(np.eye(n_in // 2, dtype=np.float32) * np.float32(0.5), 2)
        else:
            rows = np.full((1, n_in), float(self.binding.fill == "ones"), np.float32)
        return encode_slot(slot, rows, None, 0)
