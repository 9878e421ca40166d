"""Writes a few layers of true MiniMax-M2 widths as a GGUF with random weights, for speed measurements only.

python benchmarks/make_slice.py -o slice.gguf [--layers 4] [--experts 256] [--vocab 200064] [--type q4_0|q4_k_m|...]
    [--modules 3]: prediction modules of random weights, too, in mtp-slice.gguf

The defaults take 9.6 GB and load here and in llama.cpp (llama-bench). A type gives every tensor the format that
`convert` and llama-quantize give it. Weights are random blocks with scales that keep activations finite; the same
arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m2lite.errors import M2liteError
from m2lite.formats.fp4 import E2M1_DOUBLED
from m2lite.formats.iquants import IQ4_VALUES
from m2lite.quant.config import SourceConfig
from m2lite.quant.convert import ARCHITECTURE, architecture_keys, general_keys, sidecar_keys
from m2lite.quant.header import MAGIC, Key, Slot, array, boolean, build_header, string, uint32
from m2lite.quant.names import LAYER, MTP_TENSORS, TRUNK, Entry, MtpBindings
from m2lite.quant.recipes import choose_formats, find_recipe, parse_overrides
from m2lite.storage.gguf_reader import open_gguf
from m2lite.storage.identity import trunk_identity
from m2lite.storage.part_file import PartFile
from m2lite.storage.sidecar import sidecar_path

Bytes = npt.NDArray[np.uint8]

CHUNK_BYTES = 32 << 20
SKEW = 0.02  # standard deviation of the router's bias
N_ADDED = 64  # ids at the end of M2's vocabulary that are not byte pairs: 200000 and on
CONTROL, USER_DEFINED = 3, 4
ADDED = {
    0: "]!p~[", 1: "<fim_prefix>", 2: "<fim_middle>", 3: "<fim_suffix>", 19: "]~b]", 20: "[e~[", 21: "]!d~[",
    34: "]~!b[", 50: "<think>", 51: "</think>", 52: "<minimax:tool_call>", 53: "</minimax:tool_call>",
}  # fmt: skip
SPECIAL = {"bos": 34, "eos": 20, "unknown": 21, "padding": 0}

# Standard deviation of the weights by role, times 1 / sqrt(inputs): what keeps a random network's activations near 1.
GAIN = {"attention": 1.0, "experts": 1.0, "head": 2.6, "router": 1.0, "mtp_projection": 1.0}
# Attention averages tokens, so what they share passes it and what tells them apart does not: at full gain, tokens of
# deep layers choose the same experts. At this one they share as many as chance has it; those of real text share more.
ATTENTION_OUT = 0.25
# Files of these types have been measured since before the recipes were: 8 bits for embedding and head, as with
# llama-quantize's --token-embedding-type q8_0 --output-tensor-type q8_0.
OVERRIDES = {"q4_0": ("^token_embd=q8_0", "^output=q8_0")}
TYPES = ("q4_0", "q8_0", "q4_k_m", "q5_k_m", "q6_k", "iq4_nl", "mxfp4")


class Tensor(NamedTuple):
    """What quant/recipes.py asks of a tensor."""

    name: str
    shape: tuple[int, ...]
    role: str
    mtp: bool = False


@dataclass(frozen=True)
class Chunk:
    """Bytes [offset, offset + n_bytes) of the file, within one tensor."""

    slot: Slot
    role: str
    offset: int
    n_bytes: int


def slice_config(n_layers: int, n_experts: int, n_vocab: int) -> SourceConfig:
    """M2's widths."""
    return SourceConfig(
        n_layers=n_layers,
        n_embd=3072,
        n_heads=48,
        n_kv_heads=8,
        head_dim=128,
        rotary_dim=64,
        n_ff=1536,
        n_experts=n_experts,
        n_experts_used=min(8, n_experts),
        n_vocab=n_vocab,
        n_ctx_train=196608,
        rope_theta=5e6,
        rms_eps=1e-6,
        routing_bias=True,
        mtp_hidden=None,
        mtp_zero_at_0=None,
    )


def vocabulary_keys(n_vocab: int) -> list[Key]:
    """A valid byte-level BPE of that size: all bytes, then all pairs of bytes, then pairs and a byte."""
    n_base = n_vocab - N_ADDED
    if not 256 < n_base <= 256 + (1 << 16) + (1 << 24):
        raise SystemExit(f"--vocab must be at least {256 + N_ADDED + 1}")
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    letters = [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
    tokens = list(letters)
    merges = []
    for n_left in (256, 256 + (1 << 16)):
        first = 0 if n_left == 256 else 256
        for left in tokens[first:n_left]:
            room = n_base - len(tokens)
            merges += [f"{left} {letter}" for letter in letters[:room]]
            tokens += [left + letter for letter in letters[:room]]
    added = [ADDED.get(i, f"]!{i}~[") for i in range(N_ADDED)]
    types = [1] * n_base + [USER_DEFINED if 50 <= i <= 53 else CONTROL for i in range(N_ADDED)]
    return [
        string("tokenizer.ggml.model", "gpt2"),
        string("tokenizer.ggml.pre", "minimax-m2"),
        array("tokenizer.ggml.tokens", tokens + added),
        array("tokenizer.ggml.token_type", types),
        array("tokenizer.ggml.merges", merges),
        *(uint32(f"tokenizer.ggml.{role}_token_id", n_base + i) for role, i in SPECIAL.items()),
        boolean("tokenizer.ggml.add_bos_token", False),
    ]


def slice_entries(n_layers: int) -> Iterator[tuple[str, Entry]]:
    yield TRUNK[0].gguf, TRUNK[0]
    for layer in range(n_layers):
        for entry in LAYER:
            yield f"blk.{layer}.{entry.gguf}", entry
    for entry in TRUNK[1:]:
        yield entry.gguf, entry


def set_halves(
    blocks: Bytes, rng: np.random.Generator, size: float, *places: tuple[int, float], signed: bool = False
) -> None:
    """Float16 fields of every block: `size` within a quarter, times a factor, for each (byte, factor).

    `signed` is for formats whose integers have a mean other than zero: without it every output of a matrix shares an
    offset, layers amplify it, and all tokens choose the same experts.
    """
    sizes = np.linspace(0.75, 1.25, 1024, dtype=np.float32) * np.float32(size)
    if signed:
        sizes[1::2] *= -1
    picks = rng.integers(0, len(sizes), len(blocks), np.uint16)
    for at, factor in places:
        blocks[:, at : at + 2] = (sizes * np.float32(factor)).astype("<f2").view(np.uint8).reshape(-1, 2)[picks]


def draw_q4_0(blocks: Bytes, rng: np.random.Generator, std: float) -> None:
    set_halves(blocks, rng, std / 4.6, (0, 1), signed=True)


def draw_q8_0(blocks: Bytes, rng: np.random.Generator, std: float) -> None:
    signed = blocks.view(np.int8)
    np.maximum(signed, -127, out=signed)  # -128 never comes out of an encoder
    set_halves(blocks, rng, std / 73.6, (0, 1))


def set_scales_and_mins(blocks: Bytes) -> None:
    """Q4_K's and Q5_K's 12 bytes from 4 on: scales of 32 to 63, and every minimum as large as its scale."""
    packed = blocks[:, 4:16]
    packed[:, :4] |= np.uint8(0xA0)
    packed[:, 4:8] = packed[:, :4]
    packed[:, 8:] = (packed[:, 8:] & np.uint8(15)) * np.uint8(17)


def draw_q4_k(blocks: Bytes, rng: np.random.Generator, std: float) -> None:
    set_scales_and_mins(blocks)
    set_halves(blocks, rng, std / (RMS_OF_SCALE * 4.61), (0, 1), (2, 7.5))


def draw_q5_k(blocks: Bytes, rng: np.random.Generator, std: float) -> None:
    set_scales_and_mins(blocks)
    set_halves(blocks, rng, std / (RMS_OF_SCALE * 9.23), (0, 1), (2, 15.5))


def draw_q6_k(blocks: Bytes, rng: np.random.Generator, std: float) -> None:
    scales = blocks[:, 192:208]  # of either sign, 64 to 128: the bit below the sign is the sign's opposite
    scales[:] = (scales & np.uint8(0xBF)) | ((~scales >> np.uint8(1)) & np.uint8(0x40))
    set_halves(blocks, rng, std / (97.7 * 18.48), (208, 1))


def draw_iq4_nl(blocks: Bytes, rng: np.random.Generator, std: float) -> None:
    set_halves(blocks, rng, std / rms(IQ4_VALUES), (0, 1), signed=True)


def draw_mxfp4(blocks: Bytes, rng: np.random.Generator, std: float) -> None:
    """Powers of two next to the wanted scale on either side, mixed so that the mean square is right."""
    scale = std / rms(E2M1_DOUBLED)
    below = math.floor(math.log2(scale))
    share = ((scale / 2.0**below) ** 2 - 1) / 3
    blocks[:, 0] = below + 128 + (rng.random(len(blocks), np.float32) < share)


def rms(values: npt.ArrayLike) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


RMS_OF_SCALE = rms(np.arange(32, 64))
# Each sets what is not free in blocks of random bytes; the constants are the root mean squares of what is.
DRAW: dict[str, Callable[[Bytes, np.random.Generator, float], None]] = {
    "Q4_0": draw_q4_0, "Q8_0": draw_q8_0, "Q4_K": draw_q4_k, "Q5_K": draw_q5_k, "Q6_K": draw_q6_k,
    "IQ4_NL": draw_iq4_nl, "MXFP4": draw_mxfp4,
}  # fmt: skip


def fill(chunk: Chunk, skew: float = SKEW) -> Bytes:
    """The chunk's bytes; a function of the tensor's name, the place and the skew alone."""
    slot, role = chunk.slot, chunk.role
    rng = np.random.Generator(np.random.SFC64([*slot.name.encode(), chunk.offset - slot.offset]))
    block = slot.block_format
    if block.name == "F32":
        mean, std = {"norm": (1.0, 0.1), "bias": (0.0, skew)}.get(role, (0.0, slot.shape[-1] ** -0.5))
        values = rng.standard_normal(chunk.n_bytes // 4, np.float32) * np.float32(std) + np.float32(mean)
        return values.view(np.uint8)
    data = rng.integers(0, 1 << 64, (chunk.n_bytes + 7) // 8, np.uint64).view(np.uint8)[: chunk.n_bytes]
    std = 1.0 if role == "embedding" else GAIN[role] * slot.shape[-1] ** -0.5
    if ".attn_output." in slot.name:
        std *= ATTENTION_OUT
    DRAW[block.name](data.reshape(-1, block.n_bytes), rng, std)
    return data


def write_slice(out: Path, config: SourceConfig, type_name: str, skew: float = SKEW, n_modules: int = 0) -> int:
    """Writes the file and returns its size; skew is the standard deviation of the router's bias.

    n_modules prediction modules go to a file of their own beside it.
    """
    dims = config.dims()
    plan = [Tensor(n, tuple(dims[w] for w in e.shape), e.role) for n, e in slice_entries(config.n_layers)]
    keys = [*architecture_keys(config, config.n_layers), *vocabulary_keys(config.n_vocab)]
    name = f"MiniMax-M2 slice, {config.n_layers} layers, random"
    size_bytes = _write(out, type_name, name, plan, keys, skew)
    if n_modules:
        with open_gguf(out) as trunk:
            mtp = MtpBindings(n_modules, (), "pre_norm", True, shared_norm=False)
            keys = sidecar_keys(config, mtp, trunk_identity(trunk))
        _write(sidecar_path(out), type_name, f"{name}, MTP", module_plan(config, n_modules), keys, skew)
    return size_bytes


def module_plan(config: SourceConfig, n_modules: int) -> list[Tensor]:
    dims, n_embd = config.dims(), config.n_embd
    plan = []
    for block in range(config.n_layers, config.n_layers + n_modules):
        prefix = f"blk.{block}."
        plan += [Tensor(prefix + e.gguf, tuple(dims[w] for w in e.shape), e.role, mtp=True) for e in LAYER]
        for name, role in MTP_TENSORS.items():
            shape = (n_embd, 2 * n_embd) if role == "mtp_projection" else (n_embd,)
            plan.append(Tensor(f"{prefix}nextn.{name}.weight", shape, role, mtp=True))
    return plan


def _write(out: Path, type_name: str, name: str, plan: list[Tensor], keys: list[Key], skew: float) -> int:
    recipe = find_recipe(type_name)
    overrides = [] if plan[0].mtp else OVERRIDES.get(type_name, ())
    formats = choose_formats(recipe, plan, parse_overrides(overrides))
    tensors = [(t.name, t.shape, formats[t.name].block_format) for t in plan]
    header = build_header(ARCHITECTURE, [*general_keys(recipe, name), *keys], tensors)
    chunks = []
    for slot, tensor in zip(header.slots, plan, strict=True):
        step = CHUNK_BYTES // slot.block_format.n_bytes * slot.block_format.n_bytes
        for first in range(0, slot.n_bytes, step):
            chunks.append(Chunk(slot, tensor.role, slot.offset + first, min(step, slot.n_bytes - first)))
    part = PartFile(out, header.size_bytes)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda chunk: part.write(chunk.offset, fill(chunk, skew).data), chunks))
        part.write(len(MAGIC), header.data[len(MAGIC) :])
        part.complete(MAGIC)
        part.publish()
    except BaseException:
        part.discard()
        raise
    return header.size_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=200_064)
    parser.add_argument("--skew", type=float, default=SKEW, help="of the router's bias: more makes favourites")
    parser.add_argument("--type", choices=TYPES, default="q4_0")
    parser.add_argument("--modules", type=int, default=0, help="prediction modules, in mtp-OUTPUT beside it")
    args = parser.parse_args()
    if args.layers < 1 or not 1 <= args.experts <= 1024:
        parser.error("--layers must be at least 1, --experts from 1 to 1024")
    start = time.perf_counter()
    try:
        config = slice_config(args.layers, args.experts, args.vocab)
        n_bytes = write_slice(args.output, config, args.type, args.skew, args.modules)
    except M2liteError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    seconds = time.perf_counter() - start
    print(f"{args.output}: {n_bytes:,} bytes in {seconds:.1f} s, {n_bytes / seconds / 1e6:.0f} MB/s on disk")


if __name__ == "__main__":
    main()
