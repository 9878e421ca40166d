"""What this machine has: memory that is free, cores, processor. Knows nothing of models."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_FAR_AWAY = ("nfs", "cifs", "smb", "9p", "fuse", "ceph", "glusterfs", "afs")
_NO_LIMIT = 1 << 60  # version 1 writes the largest page count for none


def free_memory_bytes() -> int:
    """Memory that can be taken without pushing others out: the system's figure, or a container's limit if lower."""
    import psutil

    try:
        free = int(psutil.virtual_memory().available)
    except (OSError, psutil.Error):  # no /proc: without what files hold and could give back
        free = max(0, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limited = _cgroup_free_bytes()
    return free if limited is None else min(free, limited)


def _cgroup_free_bytes() -> int | None:
    """The tightest limit above this process (cgroup v2 or v1); cached file pages count as free."""
    found: list[int] = []
    for root, own, limit, current, scope in _cgroups():
        folder = root / own
        while True:
            free = _free_below(folder / limit, folder / current, folder / "memory.stat", scope)
            if free is not None:
                found.append(free)
            if folder == root or root not in folder.parents:
                break
            folder = folder.parent
    return min(found, default=None)


def _cgroups() -> Iterator[tuple[Path, str, str, str, str]]:
    """(root, our group, file of the limit, file of what is used, prefix of memory.stat's totals) of each hierarchy."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            yield _CGROUP, own.lstrip("/"), "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            yield _CGROUP / "memory", own.lstrip("/"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"


def _free_below(limit_file: Path, used_file: Path, stat_file: Path, scope: str) -> int | None:
    """What one group's limit leaves, or None where it has none."""
    try:
        limit = limit_file.read_text().strip()
        if limit == "max" or int(limit) >= _NO_LIMIT:
            return None
        stat = dict(line.split() for line in stat_file.read_text().splitlines())
        cached = sum(int(stat.get(f"{scope}{name}", 0)) for name in ("inactive_file", "active_file"))
        return max(0, int(limit) - max(0, int(used_file.read_text()) - cached))
    except (OSError, ValueError):
        return None


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind; without /proc its most so far, which counts files too."""
    import psutil

    try:
        memory = psutil.Process().memory_info()
        return int(memory.rss - getattr(memory, "shared", 0))  # macOS does not tell apart what files stand behind
    except (OSError, psutil.Error):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def major_faults() -> int:
    """Of this process so far: pages that were touched and had to come from a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def network_file_system(path: Path) -> str | None:
    """The kind of file system that `path` lies on, if it is one of another machine's or of another program's."""
    try:
        device = path.stat().st_dev
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        mount, _, kind = line.partition(" - ")
        if mount.split()[2:3] == [number] and kind.startswith(_FAR_AWAY):
            return kind.split()[0]
    return None


def n_usable_cores() -> int:
    """Cores that this process may run on: its affinity mask and, in a container, its share of time."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(ValueError):
        share, period = quota().split()
        if share != "max":
            n = min(n, max(1, int(share) // int(period)))
    return n


def quota() -> str:
    """What a container allows of processor time, as the system writes it; "" where it says nothing."""
    try:
        return (_CGROUP / "cpu.max").read_text().strip()
    except (OSError, ValueError):
        return ""


def product_name() -> str:
    """What the machine is sold, or rented, as; "" where the system does not say."""
    try:
        return Path("/sys/class/dmi/id/product_name").read_text().strip()
    except (OSError, ValueError):
        return ""


def processor_identity() -> str:
    """Maker, family, model and stepping; else its name."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            lines = file.read(4096).split("\n\n")[0].splitlines()  # of many cores, all of it takes milliseconds
    except OSError:
        return processor_name()
    names = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
    table = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return " ".join(table[name] for name in names if name in table) or processor_name()


def processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
