"""A Hugging Face directory: shards, index, FP8 block scales, config. Knows tensors by name, not by use."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from m2lite.errors import BadModelError, UsageError
from m2lite.quant.config import check_architecture
from m2lite.quant.decode import decode_rows
from m2lite.quant.foreign import CONVERTIBLE, FOREIGN_DTYPES, check_config, check_directory, check_tensors, unwrapped
from m2lite.quant.journal import SourceFile
from m2lite.quant.safetensors import SafetensorsFile, SourceTensor
from m2lite.quant.texts import load_json
from m2lite.storage.hub import find_snapshot

F32 = npt.NDArray[np.float32]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
BESIDE = ("*.json", "*.jinja", "tokenizer.model")
SCALE_SUFFIX = "_scale_inv"


def _e4m3_table() -> F32:
    """The 256 values of float8_e4m3fn: bias 7, no infinity, NaN at 0x7F and 0xFF, largest 448."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    value[127] = np.nan
    return np.concatenate([value, -value]).astype(np.float32)


E4M3 = _e4m3_table()
E8M0 = np.append(np.exp2(np.arange(255.0) - 127), np.nan).astype(np.float32)  # powers of two, for scales


DTYPES = ("F32", "F16", "BF16", "F8_E4M3")  # those of quant/decode.py; only the last needs a second tensor, its scales


# How block scales may be stored, and their values.
SCALE_DTYPES: Mapping[str, Callable[[npt.NDArray[np.uint8]], F32]] = {
    "F32": lambda raw: raw.view("<f4").astype(np.float32, copy=False),
    "F16": lambda raw: raw.view("<f2").astype(np.float32),
    "BF16": lambda raw: (raw.view("<u2").astype(np.uint32) << 16).view(np.float32),
    "F8_E8M0": lambda raw: E8M0[raw],
}


class MatrixRows(NamedTuple):
    """Rows of one matrix of a tensor, as they are in the file, and the block scales of that matrix."""

    name: str
    first_row: int
    n_rows: int
    raw: npt.NDArray[np.uint8]
    scale: F32 | None


class Checkpoint:
    """Open shards of one directory and the table of all their tensors."""

    def __init__(self, path: Path, config: dict[str, Any], shards: list[SafetensorsFile]) -> None:
        self.path = path
        self.config = config
        self._shards = shards
        self.notes: list[str] = []  # for the user
        self._home: dict[str, SafetensorsFile] = {}
        self._scales: dict[str, F32] = {}
        tensors: dict[str, SourceTensor] = {}
        for shard in shards:
            for name, tensor in shard.tensors.items():
                plain = unwrapped(name)
                if plain in self._home:
                    _refuse_twice(plain, name, self._home[plain], shard, tensors[plain].name)
                self._home[plain] = shard
                tensors[plain] = tensor
        self.tensors: Mapping[str, SourceTensor] = tensors
        self._note_wrappers()
        self._block = _fp8_block(config)

    def _note_wrappers(self) -> None:
        wrapped = [(plain, tensor.name) for plain, tensor in self.tensors.items() if plain != tensor.name]
        if wrapped:
            plain, name = wrapped[0]
            self.notes.append(
                f"tensors were saved from a wrapped model and are read by their plain names, {len(wrapped)} in all:"
                f" {name} as {plain}."
            )

    def read(self, name: str, matrix: int = 0, first_row: int = 0, n_rows: int | None = None) -> F32:
        """Rows of one matrix of a tensor seen as [matrices, rows, columns], in float32 with FP8 scales applied."""
        count = matrices(self.tensors[name].shape)[1] - first_row if n_rows is None else n_rows
        return self.decode(self.fetch(name, matrix, first_row, count))

    def fetch(self, name: str, matrix: int, first_row: int, n_rows: int) -> MatrixRows:
        """The part of `read` that waits for the disk; the page cache is not left full of it."""
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            words = f" ({FOREIGN_DTYPES[tensor.dtype]})" if tensor.dtype in FOREIGN_DTYPES else ""
            raise BadModelError(
                f"Tensor {name!r} has dtype {tensor.dtype}{words}; {', '.join(DTYPES)} can be converted.", CONVERTIBLE
            )
        shard, offset, n_bytes = self._range(name, matrix, first_row, n_rows)
        raw = shard.read(offset, n_bytes)
        shard.advise(offset, n_bytes, "DONTNEED")
        scale = self._scale(name)[matrix] if tensor.dtype == "F8_E4M3" else None
        return MatrixRows(name, first_row, n_rows, raw, scale)

    def announce(self, name: str, matrix: int, first_row: int, n_rows: int) -> None:
        """These rows will be fetched soon."""
        shard, offset, n_bytes = self._range(name, matrix, first_row, n_rows)
        shard.advise(offset, n_bytes, "WILLNEED")
        scale_name = name + SCALE_SUFFIX
        if first_row == 0 and scale_name in self.tensors:
            scale = self.tensors[scale_name]
            self._home[scale_name].advise(scale.offset, scale.n_bytes, "WILLNEED")

    def decode(self, rows: MatrixRows) -> F32:
        """float32[rows, columns]: W[r, c] = fp8[r, c] * scale[r // 128, c // 128], edges ragged.

        Despite the name "inv" the scale is multiplied. A kernel: only on the thread that calls kernels.
        """
        tensor = self.tensors[rows.name]
        width = matrices(tensor.shape)[2]
        values, is_finite = decode_rows(
            rows.raw, tensor.dtype, rows.n_rows, width, rows.scale, self._block, rows.first_row
        )
        if not is_finite:
            raise BadModelError(
                f"Tensor {rows.name!r} holds NaN or infinity within rows {rows.first_row} to "
                f"{rows.first_row + rows.n_rows - 1}.",
                "The checkpoint is damaged: download that shard again.",
            )
        return values

    def _range(self, name: str, matrix: int, first_row: int, n_rows: int) -> tuple[SafetensorsFile, int, int]:
        """Where these rows lie: shard, offset, bytes."""
        tensor = self.tensors[name]
        n_matrices, height, _ = matrices(tensor.shape)
        assert 0 <= matrix < n_matrices and 0 <= first_row <= first_row + n_rows <= height
        row_bytes = tensor.n_bytes // max(1, n_matrices * height)
        return self._home[name], tensor.offset + (matrix * height + first_row) * row_bytes, n_rows * row_bytes

    def _scale(self, name: str) -> F32:
        """The block scales of an FP8 tensor, [matrices, block rows, block columns], checked once."""
        if name not in self._scales:
            scale_name = name + SCALE_SUFFIX
            if scale_name not in self.tensors:
                check_tensors(self.tensors, ())
                raise BadModelError(
                    f"Tensor {name!r} is FP8 but {scale_name!r} is missing, and no file is.",
                    f"Its weights cannot be known without. {CONVERTIBLE}",
                )
            n_matrices, height, width = matrices(self.tensors[name].shape)
            expected = (n_matrices, -(-height // self._block[0]), -(-width // self._block[1]))
            if matrices(self.tensors[scale_name].shape) != expected:
                raise BadModelError(
                    f"{scale_name!r} has shape {list(self.tensors[scale_name].shape)} where blocks of"
                    f" {self._block[0]} x {self._block[1]} need {list(expected if n_matrices > 1 else expected[1:])}.",
                    "Check weight_block_size in config.json.",
                )
            self._scales.clear()  # tensors are read one after another: the last one's scales are enough
            self._scales[name] = np.stack([self._read_scale(scale_name, matrix) for matrix in range(n_matrices)])
        return self._scales[name]

    def _read_scale(self, name: str, matrix: int) -> F32:
        """A small matrix in plain NumPy: this is called beside the thread of the kernels."""
        tensor = self.tensors[name]
        _, height, width = matrices(tensor.shape)
        shard, offset, n_bytes = self._range(name, matrix, 0, height)
        if tensor.dtype not in SCALE_DTYPES:
            raise BadModelError(f"Tensor {name!r} has dtype {tensor.dtype}.", f"Known are {', '.join(SCALE_DTYPES)}.")
        scale = SCALE_DTYPES[tensor.dtype](shard.read(offset, n_bytes)).reshape(height, width)
        if not np.isfinite(scale).all():
            raise BadModelError(f"Tensor {name!r} holds NaN or infinity.", "Download that shard again.")
        return scale

    def check_unchanged(self) -> None:
        for shard in self._shards:
            shard.check_unchanged()

    def identify(self) -> list[SourceFile]:
        """The shards, for the journal of a job."""
        return [shard.identify() for shard in self._shards]

    def paths(self) -> list[Path]:
        """Shards first, then the other files of the directory that may be read."""
        beside = (path for pattern in BESIDE for path in sorted(self.path.glob(pattern)))
        return [*(shard.path for shard in self._shards), *beside]

    def close(self) -> None:
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A shape as [matrices, rows, columns]: a vector is one row, a stack of matrices stays one."""
    if len(shape) > 3:
        raise BadModelError(f"A tensor of shape {list(shape)} has {len(shape)} dimensions, at most 3 are known.")
    padded = (1, 1, 1, *shape)[-3:] if shape else (1, 1, 1)
    return padded[0], padded[1], padded[2]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a directory with config.json and model.safetensors, or shards and their index."""
    directory = find_snapshot(path)
    if not directory.is_dir():
        is_gguf = directory.suffix == ".gguf" and directory.exists()
        todo = "`m2lite quantize` takes a GGUF file." if is_gguf else "Give the directory of a Hugging Face checkpoint."
        raise UsageError(f"{directory} is not a directory.", todo)
    if not (directory / "config.json").exists():
        check_directory(directory)
    config = load_json(directory, "config.json")
    if config.get("model_type") is not None:
        check_architecture(config)  # first: what is said of its files would lead nowhere
    check_config(config)
    shards: list[SafetensorsFile] = []
    try:
        if (directory / INDEX_NAME).exists():
            _open_sharded(directory, shards)
        else:
            if not (directory / SINGLE_NAME).exists():
                check_directory(directory)
            _check_only(directory, {SINGLE_NAME})
            shards.append(SafetensorsFile(directory / SINGLE_NAME))
        checkpoint = Checkpoint(directory, config, shards)
        _note_links(checkpoint)
        return checkpoint
    except BaseException:
        for shard in shards:
            shard.close()
        raise


def _open_sharded(directory: Path, shards: list[SafetensorsFile]) -> None:
    weight_map = load_json(directory, INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()) or not weight_map:
        raise BadModelError(f"{INDEX_NAME} has no weight_map of names.", "Fetch that one file again.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not SHARD_NAME.fullmatch(name):
            raise BadModelError(f"{INDEX_NAME} names the shard {name!r}, not a plain file name.", "Do not use it.")
    _check_only(directory, set(names))
    for name in names:
        shards.append(SafetensorsFile(directory / name))
    for shard in shards:
        for tensor in shard.tensors:
            if tensor not in weight_map:
                raise BadModelError(f"{INDEX_NAME} does not list {tensor!r} of {shard.path.name}.", "Check both.")
    tables = {shard.path.name: shard.tensors for shard in shards}
    for tensor, name in weight_map.items():
        if tensor not in tables[name]:
            raise BadModelError(
                f"{name} does not hold {tensor!r}, as {INDEX_NAME} says.", "One of the two is of another checkpoint."
            )


def _check_only(directory: Path, expected: set[str]) -> None:
    """A safetensors file that no index lists may hold half of a model: say so instead of leaving it out."""
    extra = sorted(p.name for p in directory.glob("[!.]*.safetensors") if p.name not in expected)  # ._x: of macOS
    if extra:
        known = f"{INDEX_NAME} does not list it" if expected != {SINGLE_NAME} else f"there is no {INDEX_NAME}"
        raise BadModelError(f"{directory} holds {extra[0]}, but {known}.", "Add the index, or move the file away.")


def _note_links(checkpoint: Checkpoint) -> None:
    """A name that the index gives is a plain one in the directory that the user named; there it may be a link.

    What it leads to is told where that is elsewhere, as in a cache whose repositories share their files.
    """
    real = checkpoint.path.resolve()
    roots = (real, real.parent.parent / "blobs") if real.parent.name == "snapshots" else (real,)
    targets = [(path.name, path.resolve()) for path in checkpoint.paths() if path.is_symlink()]
    outside = [(name, target) for name, target in targets if not any(target.is_relative_to(root) for root in roots)]
    if outside:
        name, target = outside[0]
        checkpoint.notes.append(
            f"{checkpoint.path} holds links to files elsewhere, {len(outside)} in all: {name} leads to {target}."
        )


def _refuse_twice(plain: str, name: str, first: SafetensorsFile, second: SafetensorsFile, other: str) -> NoReturn:
    if name != other:
        raise BadModelError(f"Tensors {other!r} and {name!r} would both be {plain!r}.", "Save the model unwrapped.")
    raise BadModelError(
        f"Tensor {name!r} is in two shards, {first.path.name} and {second.path.name}.",
        "One of the two is of another checkpoint: move it away.",
    )


# What quantization_config may say of FP8 in blocks: key -> allowed values, None for any (they decide no weight).
FP8_KEYS: Mapping[str, tuple[object, ...] | None] = {
    "quant_method": ("fp8",),
    "fmt": (None, "float8_e4m3fn", "e4m3", "e4m3fn"),
    "weight_block_size": None,  # read
    "activation_scheme": None,
    "scale_fmt": None,  # the scales' own type says it
    "modules_to_not_convert": None,
    "ignored_layers": None,
    "dequantize": None,
    "kv_cache_scheme": (None,),
    "is_checkpoint_fp8_serialized": (None, True),
}


def _fp8_block(config: Mapping[str, Any]) -> tuple[int, int]:
    """The block size of FP8 scales; 128 x 128 where config.json is silent."""
    settings = config.get("quantization_config") or {}
    if not isinstance(settings, dict):
        _refuse("quantization_config", settings)
    if settings and settings.get("quant_method") != "fp8":
        _refuse("quantization_config.quant_method", settings.get("quant_method"))
    for key, value in settings.items():
        allowed = FP8_KEYS.get(key, ())
        if allowed is not None and value not in allowed:
            _refuse(f"quantization_config.{key}", value)
    block = settings.get("weight_block_size") or [128, 128]
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        _refuse("quantization_config.weight_block_size", block)
    return block[0], block[1]


def _refuse(key: str, value: object) -> NoReturn:
    raise BadModelError(
        f"config.json: {key} is {repr(value)[:200]}, which is not supported.",
        "Use an FP8, BF16, F16 or F32 checkpoint.",
    )
