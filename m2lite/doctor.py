"""What m2lite finds on this machine. Reports, changes nothing, compiles nothing."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from m2lite import __version__, machine
from m2lite.errors import M2liteError
from m2lite.settings import OPTIONS, Settings
from m2lite.system.byte_units import format_bytes, format_speed
from m2lite.system.paths import is_private, user_dir

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
    yield from _tuning(settings["tuning"])
    for path in (user_dir("cache") / name for name in ("kv", "heat", "drafts")):
        if path.exists() and not is_private(path):
            yield "warning", f"{path} is not yours alone to write: what lies there is not used"
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


def _tuning(is_wanted: bool) -> Iterator[tuple[str, str]]:
    """What is in force, and where it comes from."""
    from m2lite.engine.tuned import load_tuning, this_machine, tuning_path
    from m2lite.simd import tuning

    found, path = load_tuning(), tuning_path(this_machine())
    gains = ", ".join(f"{work} {median:.3f} x" for work, (_, median, _) in found.gains.items())
    if not is_wanted:
        yield "tuning", "switched off: the defaults"
    elif found.warning or not found.date:
        yield "tuning", "the defaults; `m2lite tune` looks for better ones"
    else:
        speed = format_speed(found.read_bytes_per_s)
        yield "tuning", f"{path} of {found.date}, with memory of {speed}{': ' if gains else ''}{gains}"
    if found.warning and is_wanted:
        yield "warning", found.warning
    values = found.values if is_wanted else {}
    for name, row in tuning.PARAMETERS.items():
        where = "tuned" if name in values else "default"
        yield f"  {name}", f"{values.get(name, row.default):,} ({where}): {row.about}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
