"""What m2lite finds on this machine. Reports, changes nothing, compiles nothing."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from m2lite import __version__, machine
from m2lite.errors import M2liteError
from m2lite.settings import OPTIONS, Settings
from m2lite.system.byte_units import format_bytes

_FEATURES = ("avx2", "avxvnni", "avx512f", "avx512bw", "avx512vnni", "amx-int8", "neon", "dotprod", "i8mm")


def report(settings: Settings) -> Iterator[tuple[str, str]]:
    from llvmlite import binding

    from m2lite.engine.locate import locate_model
    from m2lite.kernels import amx
    from m2lite.simd import emit, jit

    yield "m2lite", f"{__version__}, Python {platform.python_version()}"
    yield "packages", ", ".join(f"{name} {_version(name)}" for name in ("numpy", "numba", "llvmlite", "tokenizers"))
    yield "processor", machine.processor_name()
    features = binding.get_host_cpu_features()
    yield "features", ", ".join(name for name in _FEATURES if features.get(name)) or "none that the kernels use"
    yield "integer products", f"{emit.FORM}; {amx.said(settings['amx'])}"
    yield "cores", f"{machine.n_usable_cores()} usable"
    yield "threading layer", jit.LAYER
    yield "memory", f"{format_bytes(machine.free_memory_bytes())} free"
    yield "kernel cache", str(jit.CACHE_DIR)
    if jit.CACHE_DIR.exists():
        yield "disk there", f"{format_bytes(shutil.disk_usage(jit.CACHE_DIR).free)} free"
    for warning in jit.warnings():
        yield "warning", warning
    try:
        yield "model", str(locate_model(settings.model))
    except M2liteError as error:
        yield "model", f"none: {error}"
    for name, option in OPTIONS.items():
        value = settings[name]
        if value is not None:
            value = format_bytes(value) if option.metavar == "SIZE" else option.text(value)
        yield f"  {name}", f"{'automatic' if value is None else value} ({settings.origins[name]})"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
