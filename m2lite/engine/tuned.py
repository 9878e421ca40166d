"""What `m2lite tune` found for this machine: a small file in the cache directory, for each machine one.

It changes no token, and losing it costs speed. A file that is wrong or another machine's is not used, with a word; of
one that is whole only the values are believed that the table (simd/tuning.py) has.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from m2lite import __version__, machine
from m2lite.engine.ratios import Ratio
from m2lite.errors import M2liteError
from m2lite.simd import emit, jit, tuning
from m2lite.storage.durable import atomic_write
from m2lite.system.json_text import JsonError, parse_object
from m2lite.system.paths import machine_cache_dir, make_private

_VERSION = 1  # of what the file means
_MOST_BYTES, _MOST_ITEMS = 1 << 16, 1024
_SAME_SPEED = 1.5  # memory that is so many times as fast or as slow is another


class Change(NamedTuple):
    """A value that was kept, and the ratios of speeds that it was kept for, by the work they were measured with."""

    name: str
    value: int
    ratios: Mapping[str, Ratio]


class Tuning(NamedTuple):
    """What is known of a machine. `gains`: of all changes together, against the defaults."""

    changes: Sequence[Change] = ()
    gains: Mapping[str, Ratio] = MappingProxyType({})
    read_bytes_per_s: float = 0.0  # of its memory
    date: str = ""
    warning: str = ""  # why a file is not used

    @property
    def values(self) -> dict[str, int]:
        return {change.name: change.value for change in self.changes}

    def is_of(self, read_bytes_per_s: float) -> bool:
        """Whether memory of this speed is the one that it was measured with: rented machines share a name."""
        return self.read_bytes_per_s / _SAME_SPEED < read_bytes_per_s < self.read_bytes_per_s * _SAME_SPEED


def this_machine() -> dict[str, Any]:
    """What the best values depend on, but for the speed of memory, which takes too long to measure at every start."""
    return {
        "processor": machine.processor_identity(),
        "features": hashlib.sha256(" ".join(sorted(emit.FEATURES)).encode()).hexdigest()[:16],
        "cores": machine.n_usable_cores(),
        "quota": machine.quota(),
        "system": f"{platform.system()} {platform.machine()}",
        "product": machine.product_name(),
        "version": f"{__version__} {jit.SOURCES}",
    }


def tuning_path(of: Mapping[str, Any]) -> Path:
    """Where a machine's file is; it need not exist."""
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
    return machine_cache_dir() / "tuning" / f"{digest[:32]}.json"


def load_tuning(path: Path | None = None) -> Tuning:
    """Of this machine; nothing where there is none, or one that cannot be used, which `warning` then says."""
    here = this_machine()
    path = tuning_path(here) if path is None else path
    try:
        if not os.path.lexists(path):
            return Tuning()
        if not make_private(path.parent):
            raise JsonError("its directory is not yours alone to write")
        if not path.is_file():  # opening a pipe would wait for its other end
            raise JsonError("it is no file")
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        return _checked(parse_object(data, most_bytes=_MOST_BYTES, most_items=_MOST_ITEMS), here)
    except (OSError, JsonError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        return Tuning(warning=f"{path} is not used: {why}. Run m2lite tune, or remove it")


def make_place(path: Path) -> None:
    """The directory of the file. M2liteError where that is not possible."""
    try:
        if not make_private(path.parent):
            raise M2liteError(f"{path.parent} is not yours alone to write.", "Remove it, or set M2LITE_CACHE_DIR.")
    except OSError as error:
        raise M2liteError(f"{path.parent} cannot be made: {error.strerror}.", "Set M2LITE_CACHE_DIR.") from None


def save_tuning(path: Path, found: Tuning) -> None:
    """Keep it for this machine. M2liteError where that is not possible."""
    content = {"format": _VERSION, "machine": this_machine()} | found._asdict()
    content |= {"changes": [change._asdict() for change in found.changes], "gains": dict(found.gains)}
    content.pop("warning")
    make_place(path)
    atomic_write(path, json.dumps(content, indent=1).encode())


def _checked(content: Mapping[str, Any], here: Mapping[str, Any]) -> Tuning:
    if content.get("format") != _VERSION:
        raise JsonError("it is of another version of m2lite")
    if content.get("machine") != here:
        raise JsonError("it is another machine's, or another version's")
    changes, gains = content.get("changes"), content.get("gains")
    speed, date = content.get("read_bytes_per_s"), content.get("date")
    if not isinstance(changes, list) or not isinstance(speed, int | float) or not isinstance(date, str):
        raise JsonError("it is damaged")
    found = Tuning([_change(each) for each in changes], _ratios(gains), float(speed), date[:40])
    if len(found.values) != len(changes):
        raise JsonError("it gives a value twice")
    return found


def _change(each: Any) -> Change:
    if not isinstance(each, dict) or not isinstance(name := each.get("name"), str):
        raise JsonError("it is damaged")
    row, value = tuning.PARAMETERS.get(name), each.get("value")
    if row is None:
        raise JsonError(f"there is no parameter {name[:40]!r}")
    if isinstance(value, bool) or value not in row.values:
        raise JsonError(f"{name} cannot be {str(value)[:40]!r}")
    return Change(name, int(value), _ratios(each.get("ratios")))


def _ratios(table: Any) -> dict[str, Ratio]:
    found = dict[str, Ratio]()
    for name, values in table.items() if isinstance(table, dict) else ((None, None),):
        if name not in tuning.WORKS or not isinstance(values, list) or len(values) != 3:
            raise JsonError("it is damaged")
        low, median, high = (v if isinstance(v, int | float) and 0 < v < 1000 else 0.0 for v in values)
        found[name] = float(low), float(median), float(high)
    return found
