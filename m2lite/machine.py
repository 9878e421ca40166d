"""What this machine has: memory that is free, cores, processor. Knows nothing of models."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def free_memory_bytes() -> int:
    """Memory that can be taken without pushing others out: the system's figure, or a container's limit if lower."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limited = _cgroup_free_bytes()
    return free if limited is None else min(free, limited)


def _cgroup_free_bytes() -> int | None:
    """The tightest limit (cgroup v2) above this process; cached file pages count as free."""
    try:
        own = Path("/proc/self/cgroup").read_text().split("::", 1)[1].splitlines()[0].lstrip("/")
    except (OSError, IndexError):
        return None
    found: list[int] = []
    folder = _CGROUP / own
    while True:
        try:
            limit = (folder / "memory.max").read_text().strip()
            if limit != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / "memory.current").read_text())
                cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
                found.append(max(0, int(limit) - max(0, used - cached)))
        except (OSError, ValueError):
            pass
        if folder == _CGROUP or _CGROUP not in folder.parents:
            return min(found, default=None)
        folder = folder.parent


def n_usable_cores() -> int:
    """Cores that this process may run on: its affinity mask and, in a container, its share of time."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        if quota != "max":
            n = min(n, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return n


def processor_name() -> str:
    """As the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
