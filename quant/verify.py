"""Is a GGUF what was written, and is it what its source gives? Reads files, encodes samples; writes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from m2lite.errors import BadModelError
from m2lite.quant.checkpoint import open_checkpoint
from m2lite.quant.config import config_warnings, parse_config
from m2lite.quant.convert import ARCHITECTURE, BoundTensor, architecture_keys
from m2lite.quant.header import Key, Slot, hash_header
from m2lite.quant.imatrix import Importance
from m2lite.quant.job import CHECK_BYTES, Progress, TensorSource
from m2lite.quant.names import bind_tensors
from m2lite.quant.options import load_importance
from m2lite.quant.pieces import MODEL_NAME
from m2lite.quant.quantize import StoredTensor
from m2lite.quant.stream import make
from m2lite.quant.vocabulary import JSON_NAME, vocabulary_keys
from m2lite.simd import jit
from m2lite.storage.gguf_header import KEY_HEADER_HASH, KEY_TENSOR_HASHES, GGUFArray, Header, TensorInfo
from m2lite.storage.gguf_reader import GGUFFile, open_gguf

KEY_IMATRIX = "quantize.imatrix.file"


class Sample(NamedTuple):
    """Some bytes of a tensor that were made again from the source."""

    tensor: str
    offset: int  # within the tensor
    n_bytes: int
    is_equal: bool


@dataclass(frozen=True)
class Report:
    """What was found. `problems` are sentences; a file without any is `ok`, as far as it was checked."""

    paths: tuple[Path, ...]
    size_bytes: int
    n_tensors: int
    n_hashed: int  # tensors whose hash the file holds; 0: another tool's file, only its structure was checked
    problems: tuple[str, ...]
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]  # what could not be checked, and why

    @property
    def ok(self) -> bool:
        return not self.problems


class Original(NamedTuple):
    """What a file is compared with."""

    tensors: Mapping[str, Reference]
    keys: Mapping[str, Any]
    name: str
    doubts: tuple[str, ...] = ()


class Reference(NamedTuple):
    """Where a tensor of the source comes from, and its shape there."""

    source: TensorSource
    shape: tuple[int, ...]


def verify(
    file: str | Path,
    against: str | Path | None = None,
    n_samples: int = 8,
    *,
    imatrix: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check a GGUF, whole or split: header, padding and every tensor against the hashes that convert left in it.

    `against` (the checkpoint's directory, or the GGUF it was made of) also makes parts of `n_samples` tensors again and
    compares bytes; a file made with an importance matrix needs that too. A file that cannot be read at all raises.
    """
    problems: list[str] = []
    notes: list[str] = []
    samples: list[Sample] = []
    importance = load_importance(imatrix)
    with open_gguf(file) as gguf:
        done, total = 0, sum(info.n_bytes for info in gguf.tensors.values())
        n_hashed = 0
        for part, header in enumerate(gguf.headers):
            hashes = _stored_hashes(gguf, part, header, problems)
            n_hashed += len(hashes)
            if hashes:
                _check_padding(gguf, part, header, problems)
            for info in header.tensors.values():
                for n_bytes in _check_tensor(gguf, info, hashes.get(info.name), problems):
                    done += n_bytes
                    if progress is not None:
                        progress(info.name, done, total, phase="verify")
        if n_hashed < len(gguf.tensors):
            n_without = len(gguf.tensors) - n_hashed
            notes.append(
                f"{n_without} tensors have no hash in the file (another tool wrote it): only their place was checked."
            )
        if against is not None:
            jit.start(threads)
            with ExitStack() as stack:
                source = _open_source(stack, Path(against), importance, gguf)
                samples = list(_compare(gguf, source.tensors, n_samples, importance, problems, notes))
                _compare_keys(gguf, source, problems, notes)
                notes += source.doubts
        paths, size_bytes, n_tensors = gguf.parts, gguf.size_bytes, len(gguf.tensors)
    return Report(paths, size_bytes, n_tensors, n_hashed, tuple(problems), tuple(samples), tuple(notes))


def _stored_hashes(gguf: GGUFFile, part: int, header: Header, problems: list[str]) -> dict[str, int]:
    """The hash of every tensor of one file, if the file has them and its header is as it was written."""
    name = gguf.parts[part].name
    found, own = header.metadata.get(KEY_TENSOR_HASHES), header.metadata.get(KEY_HEADER_HASH)
    if found is None and own is None:
        return {}
    if not isinstance(found, GGUFArray) or found.item_type.name != "UINT64" or len(found) != len(header.tensors):
        problems.append(f"{name}: key '{KEY_TENSOR_HASHES}' is no list of {len(header.tensors)} hashes.")
        return {}
    data = gguf.read(part, 0, header.n_bytes)
    hash_at = header.spans[KEY_HEADER_HASH][1] - 8 if KEY_HEADER_HASH in header.spans else 0
    if not hash_at or type(own) is not int or hash_header(data.data, hash_at) != own:
        problems.append(f"{name}: the header's {header.n_bytes} bytes are not those that were written.")
    return dict(zip(header.tensors, (int(value) for value in found.numpy()), strict=True))


def _check_padding(gguf: GGUFFile, part: int, header: Header, problems: list[str]) -> None:
    """Between tensors are zeros, and nothing is behind the last but its padding."""
    end, before = header.n_bytes, "the header"
    aligned = end
    for info in [*header.tensors.values(), None]:
        aligned = end + -end % header.alignment
        begin = info.offset if info else gguf.sizes[part]
        if begin != aligned or gguf.read(part, end, aligned - end).any():
            problems.append(f"{gguf.parts[part].name}: {begin - end} bytes behind {before} are not its zero padding.")
        if info:
            end, before = info.offset + info.n_bytes, f"tensor '{info.name}'"


def _check_tensor(gguf: GGUFFile, info: TensorInfo, expected: int | None, problems: list[str]) -> Iterator[int]:
    """Read all of a tensor that has a hash; yields the bytes that are done, as they are."""
    if expected is None:
        yield info.n_bytes
        return
    digest = xxhash.xxh64()
    end = info.offset + info.n_bytes
    for offset in range(info.offset, end, CHECK_BYTES):
        n_bytes = min(CHECK_BYTES, end - offset)
        gguf.advise(info.part, offset + n_bytes, CHECK_BYTES, "WILLNEED")
        digest.update(gguf.read(info.part, offset, n_bytes).data)
        gguf.advise(info.part, offset, n_bytes, "DONTNEED")
        yield n_bytes
    if digest.intdigest() != expected:
        problems.append(
            f"{gguf.parts[info.part].name}: tensor '{info.name}' ({info.n_bytes} bytes at {info.offset}) is not what "
            "was written."
        )


def _open_source(stack: ExitStack, against: Path, importance: Importance | None, made: GGUFFile) -> Original:
    """Every tensor and key that the source gives, by its name in GGUF."""
    if not against.is_dir():
        gguf = stack.enter_context(open_gguf(against))
        table = {n: Reference(StoredTensor(gguf, info, importance), info.shape) for n, info in gguf.tensors.items()}
        return Original(table, gguf.metadata, "the source")
    checkpoint = stack.enter_context(open_checkpoint(against))
    config = parse_config(checkpoint.config)
    bindings = bind_tensors(checkpoint, config)
    bound = (*bindings.trunk, *(bindings.mtp.bindings if bindings.mtp else ()))
    table = {b.name: Reference(BoundTensor(checkpoint, b, importance), b.shape) for b in bound}
    n_modules = made.metadata.get(f"{ARCHITECTURE}.nextn_predict_layers", 0)
    keys = architecture_keys(config, config.n_layers + (n_modules if isinstance(n_modules, int) else 0))
    if "m2lite.mtp.trunk" not in made.metadata and any((checkpoint.path / n).exists() for n in (JSON_NAME, MODEL_NAME)):
        keys += vocabulary_keys(checkpoint.path, config.n_vocab, checkpoint.config)
    doubts = (*config_warnings(checkpoint.config), *checkpoint.notes)
    return Original(table, {key.name: _as_stored(key) for key in keys}, "config.json", doubts)


def _as_stored(key: Key) -> Any:
    return float(np.float32(key.value)) if key.kind == "FLOAT32" else key.value


def _plain(value: Any) -> Any:
    """As a key's value is compared: arrays are lists, their strings bytes."""
    if isinstance(value, GGUFArray):
        return value.items(bytes) if value.item_type.kind is str else value.numpy().tolist()
    return [item.encode() if isinstance(item, str) else item for item in value] if isinstance(value, list) else value


def _compare_keys(gguf: GGUFFile, source: Original, problems: list[str], notes: list[str]) -> None:
    """What decides the arithmetic must be the source's; a tokenizer may have been mended, so that is only told."""
    made, wanted = _deciding(gguf.metadata), _deciding(source.keys)
    for key in sorted(made.keys() | wanted.keys()):
        is_in_both = key in made and key in wanted
        is_off = made.get(key, 0) in (0, 1, "none") and wanted.get(key, 0) in (0, 1, "none")
        if made.get(key) != wanted.get(key) and (is_in_both or (".rope." in key and not is_off)):
            found = f"is {str(made[key])[:80]}" if key in made else "is missing"
            expected = f"gives {str(wanted[key])[:80]}" if key in wanted else "has none"
            problems.append(f"Key '{key}' {found} in the file, where {source.name} {expected}.")
    for key, value in source.keys.items():
        if not key.startswith("tokenizer.") or (key not in gguf.metadata and not key.endswith("_token_id")):
            continue
        found = _plain(gguf.metadata.get(key))
        if found != _plain(value):
            words = ["another list" if isinstance(v, list | GGUFArray) else str(v)[:80] for v in (found, value)]
            notes.append(f"Key '{key}' is {words[0]} in the file, {words[1]} in the source.")


def _one(value: Any) -> Any:
    one = value.one() if isinstance(value, GGUFArray) else None
    return value if one is None else one


def _deciding(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Values under the architecture; what llama.cpp writes once for every layer is one if all are equal."""
    prefix = f"{ARCHITECTURE}."
    found = {key: _plain(_one(value)) for key, value in keys.items() if key.startswith(prefix)}
    if f"{prefix}attention.key_length" in found:  # without a rotary width all of the head is rotated
        found.setdefault(f"{prefix}rope.dimension_count", found[f"{prefix}attention.key_length"])
    return found


def _compare(
    gguf: GGUFFile,
    table: Mapping[str, Reference],
    n_samples: int,
    importance: Importance | None,
    problems: list[str],
    notes: list[str],
) -> Iterator[Sample]:
    weighted = KEY_IMATRIX in gguf.metadata and importance is None
    # Any order will do, but the same each time; what was encoded says more than what is F32.
    names = sorted(gguf.tensors, key=lambda name: (gguf.tensors[name].format.name == "F32", _order(name)))
    reasons: dict[str, int] = {}
    n_left = n_samples
    for name in names:
        info = gguf.tensors[name]
        if name not in table or table[name].shape != info.shape:
            found = f"has {list(table[name].shape)} there" if name in table else "is not there"
            problems.append(f"Tensor '{name}' of shape {list(info.shape)} is not of this source: it {found}.")
            continue
        if not info.format.is_writable:
            reasons[f"{info.format.name} cannot be written here"] = 1
        elif weighted and info.format.search:
            reasons["the file was made with an importance matrix, which was not given (--imatrix)"] = 1
        elif n_left > 0:
            n_left -= 1
            yield from _compare_tensor(gguf, info, table[name].source, problems)
    notes += [f"Some tensors were not compared: {reason}." for reason in reasons]


def _compare_tensor(gguf: GGUFFile, info: TensorInfo, source: TensorSource, problems: list[str]) -> Iterator[Sample]:
    """The first, the last and one other chunk of a tensor, made again."""
    chunks = list(source.chunks(Slot(info.name, info.shape, info.format, info.offset, info.n_bytes)))
    for number in sorted({0, len(chunks) - 1, _order(info.name) % len(chunks)}):
        chunk = chunks[number]
        stored = gguf.read(info.part, info.offset + chunk.offset, chunk.n_bytes)
        made = make(chunk)
        is_equal = bool(np.array_equal(made, stored))
        if not is_equal:
            n_other = int((made != stored).sum())
            problems.append(
                f"Tensor '{info.name}': {n_other} of {chunk.n_bytes} bytes from byte {chunk.offset} on differ from "
                "what its source gives."
            )
        yield Sample(info.name, chunk.offset, chunk.n_bytes, is_equal)


def _order(name: str) -> int:
    return xxhash.xxh64_intdigest(name.encode())


def check(report: Report) -> None:
    """Raises what a report found wrong."""
    if report.problems:
        more = f" ({len(report.problems) - 1} more problems)" if len(report.problems) > 1 else ""
        raise BadModelError(report.problems[0] + more, "Download or convert it again.")
