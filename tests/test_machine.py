"""Memory and cores, in a container too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from m2lite import machine

REAL_READ = Path.read_text


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up cgroup v2 tree in which this process is in /a/b."""
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)

    def read_text(path: Path) -> str:
        return "0::/a/b\n" if str(path) == "/proc/self/cgroup" else REAL_READ(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    (tmp_path / "a" / "b").mkdir(parents=True)
    return tmp_path


def limit(folder: Path, maximum: str, current: int, cached: int) -> None:
    (folder / "memory.max").write_text(maximum + "\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached // 2}\nactive_file {cached - cached // 2}\n")


def test_the_tightest_limit_counts(cgroup: Path) -> None:
    limit(cgroup / "a" / "b", "max", 10, 0)
    assert machine._cgroup_free_bytes() is None
    limit(cgroup / "a", "1000", 700, 500)  # cached file pages are free
    assert machine.free_memory_bytes() == 800
    limit(cgroup / "a" / "b", "100", 300, 10)
    assert machine.free_memory_bytes() == 0


def test_version_1(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(path: Path) -> str:
        if str(path) == "/proc/self/cgroup":
            return "5:cpuset:/\n4:cpu,memory:/a/b\n0::/\n"
        return REAL_READ(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    for name, limited in (("memory/a/b", 9223372036854771712), ("memory/a", 1000)):
        folder = cgroup / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{limited}\n")
        (folder / "memory.usage_in_bytes").write_text("700\n")
        (folder / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 300\ntotal_active_file 200\n")
    assert machine.free_memory_bytes() == 800


def test_own_memory() -> None:
    before = machine.anonymous_bytes()
    block = bytearray(64 << 20)
    assert machine.anonymous_bytes() >= before + (60 << 20)
    del block


def test_file_systems_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.network_file_system(tmp_path) is None
    device = tmp_path.stat().st_dev
    line = f"22 1 {os.major(device)}:{os.minor(device)} / / rw,relatime shared:1 - nfs4 server:/x rw\n"

    def read_text(path: Path) -> str:
        return line if str(path) == "/proc/self/mountinfo" else REAL_READ(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert machine.network_file_system(tmp_path) == "nfs4"


def test_without_a_container() -> None:
    assert 1 << 20 < machine.free_memory_bytes() < 1 << 50
    assert machine.n_usable_cores() >= 1
    assert machine.processor_name()


def test_share_of_time(cgroup: Path) -> None:
    (cgroup / "cpu.max").write_text("100000 100000\n")
    assert machine.n_usable_cores() == 1
