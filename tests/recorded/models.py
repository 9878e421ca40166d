"""The models of the record: m2-tiny, and random ones that are written anew in four formats. Knows no program."""

from __future__ import annotations

from pathlib import Path

import gguf
import xxhash

from tests import tinymodel

FORMATS = ("Q4_0", "Q4_K", "Q6_K", "Q8_0")
NAMES = ("m2-tiny", *FORMATS)
BUNDLED = Path(__file__).resolve().parents[2] / "models" / "m2-tiny" / "m2-tiny.gguf"
MODULES = BUNDLED.with_name(f"mtp-{BUNDLED.name}")


def write_models(folder: Path) -> dict[str, Path]:
    """Paths by name; the random models are written to `folder`."""
    return {"m2-tiny": BUNDLED} | {
        name: tinymodel.write_model(
            folder / f"{name}.gguf", seed=3, shape=tinymodel.WIDE, formats={"dense": name, "experts": name}, embedded=20
        )
        for name in FORMATS
    }


def hash_weights(path: Path) -> str:
    """xxh3-128 of all tensors: whether a model is the one that was recorded, whoever wrote its file."""
    digest = xxhash.xxh3_128()
    for tensor in sorted(gguf.GGUFReader(path).tensors, key=lambda tensor: str(tensor.name)):
        digest.update(f"{tensor.name} {tensor.tensor_type.name}".encode())
        digest.update(tensor.data.tobytes())
    return digest.hexdigest()
