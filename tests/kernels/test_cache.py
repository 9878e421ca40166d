"""The kernel cache on disk: whatever lies there, and wherever it cannot lie, the code that runs is right."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import pytest

from m2lite.simd import cache, jit
from m2lite.simd.cache import KernelCache, choose_directory
from tests.conftest import ROOT, Run


def twice(x: Any) -> Any:
    return x + x


def compiled(directory: Path) -> Any:
    function = numba.njit(twice)
    function._cache = KernelCache(twice, directory)
    return function


def hits(function: Any) -> int:
    return sum(function.stats.cache_hits.values())


ENV = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("first", [int, float])
def test_a_signature_has_a_file_of_its_own(tmp_path: Path, first: type) -> None:
    """Two processes may compile at once: neither takes the other's code for its own."""
    one, other = compiled(tmp_path), compiled(tmp_path)
    second = float if first is int else int
    assert (one(first(1)), other(second(2))) == (2, 4)
    names = {path.name for path in tmp_path.glob("*.kernel")}
    assert len(names) == 2 and all(name.startswith("twice-") and name.endswith(".kernel") for name in names)
    third = compiled(tmp_path)
    assert (third(1), third(0.5), hits(third)) == (2, 1.0, 2)


def test_files_that_are_damaged_are_compiled_again(tmp_path: Path) -> None:
    assert compiled(tmp_path)(1) == 2
    (path,) = tmp_path.glob("*.kernel")
    whole = path.read_bytes()
    damaged = [b"", whole[:10], whole[:32], whole[:-1], whole + b"x", bytes(len(whole))]
    damaged += [
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (0, 40, len(whole) // 2, -1 % len(whole))
    ]
    for content in damaged:
        path.write_bytes(content)
        function = compiled(tmp_path)
        assert (function(1), hits(function)) == (2, 0)
        again = compiled(tmp_path)  # and was mended
        assert (again(1), hits(again)) == (2, 1)
    path.unlink()
    path.mkdir()
    assert compiled(tmp_path)(1) == 2


LOADED = """
import sys
from pathlib import Path
import numba
from m2lite.simd.cache import KernelCache

def halved(x):
    if x % 2:
        raise ValueError("odd", x)
    return x // 2

kept = numba.njit(halved)
kept._cache = KernelCache(halved, Path(sys.argv[1]))
caller = numba.njit(lambda x: kept(kept(x)))
print(kept(4), caller(12), end=" ")
for function, number in ((kept, 3), (caller, 6)):
    try:
        function(number)
    except ValueError as error:
        print(error, end=" ")
(compiled,) = caller.overloads.values()
print([f.name for f in compiled.library._final_module.functions if f.is_declaration and "halved" in f.name], end=" ")
print(sum(kept.stats.cache_hits.values()))
"""


def test_what_was_loaded_goes_into_what_is_compiled(tmp_path: Path) -> None:
    """Another process's kernel is a part of its callers' code, with the error that it raises."""
    for n_hits in (0, 1):
        done = subprocess.run([sys.executable, "-c", LOADED, tmp_path], env=ENV, capture_output=True, check=False)
        assert done.stdout.decode() == f"2 3 ('odd', 3) ('odd', 3) [] {n_hits}\n", done.stderr.decode()


def test_another_processor_has_code_of_its_own(tmp_path: Path) -> None:
    """One home directory may be that of several machines."""

    class Codegen:
        def __init__(self, *magic: str) -> None:
            self.magic_tuple = lambda: magic

    kept = KernelCache(twice, tmp_path)
    machines = [("haswell", "+avx2"), ("haswell", "-avx2"), ("zen4", "+avx2")]
    assert len({kept._path("(int64,)", Codegen("x86_64", *machine)) for machine in machines}) == 3


def test_what_cannot_be_kept_still_runs(tmp_path: Path) -> None:
    function = compiled(tmp_path / "gone")
    assert (function(1), function(0.5)) == (2, 1.0) and not (tmp_path / "gone").exists()


def forbid(path: Path) -> None:
    path.chmod(0o777)


def give_away(path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a directory away")
    os.chown(path, 65534, -1)


def lock(path: Path) -> None:
    """Nobody can write there; root could, but for a file system that is mounted so."""
    path.chmod(0o500)
    if os.getuid() == 0:
        _run("mount", "--bind", path, path)
        _LOCKED.append(path)
        _run("mount", "-o", "remount,bind,ro", path)


def _run(*command: str | Path) -> None:
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("root may write anywhere, and nothing can be mounted here")


_LOCKED: list[Path] = []


@pytest.fixture(autouse=True)
def unlocked() -> Iterator[None]:
    yield
    while _LOCKED:
        subprocess.run(["umount", _LOCKED.pop()], check=True)


def put_a_file_there(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("no directory")


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("spoil", [forbid, give_away, put_a_file_there, link])
@pytest.mark.parametrize("which", ["kernels", "kernels/v1"])
def test_a_directory_of_others_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, which: str
) -> None:
    """Nothing is read there, nothing is written anywhere, and that is said."""
    monkeypatch.setenv("M2LITE_CACHE_DIR", str(tmp_path / "user"))
    assert choose_directory("v1") == (tmp_path / "user" / "kernels" / "v1", "")
    assert stat.S_IMODE((tmp_path / "user" / "kernels" / "v1").stat().st_mode) == 0o700
    spoil(tmp_path / "user" / which)
    before = sorted(tmp_path.rglob("*"))
    found, warning = choose_directory("v1")
    assert compiled(found)(1) == 2 and not found.exists() and sorted(tmp_path.rglob("*")) == before
    assert str(tmp_path / "user" / "kernels") in warning and "cannot be kept" in warning


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_directories_are_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int) -> None:
    """Those above it too, whatever the umask; and one that others could only read is closed to them."""
    monkeypatch.setenv("M2LITE_CACHE_DIR", str(tmp_path / "a" / "b"))
    before = os.umask(umask)
    try:
        assert choose_directory("v1") == (tmp_path / "a" / "b" / "kernels" / "v1", "")
    finally:
        os.umask(before)
    made = [tmp_path / part for part in ("a", "a/b", "a/b/kernels", "a/b/kernels/v1")]
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o700] * 4
    made[2].chmod(0o755)
    assert choose_directory("v1")[1] == "" and stat.S_IMODE(made[2].stat().st_mode) == 0o700


def test_one_that_is_read_only_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2LITE_CACHE_DIR", str(tmp_path))
    assert compiled(choose_directory("v1")[0])(1) == 2
    lock(tmp_path / "kernels" / "v1")
    path, warning = choose_directory("v1")
    function = compiled(path)
    assert (function(1), function(0.5), hits(function)) == (2, 1.0, 1)
    assert "read-only" in warning and len(list(path.glob("*.kernel"))) == 1


def test_a_place_where_nothing_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2LITE_CACHE_DIR", "/proc/none")
    path, warning = choose_directory("v1")
    assert compiled(path)(1) == 2 and not path.exists() and "/proc/none/kernels" in warning


def test_a_full_disk_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "LOST", [])
    function = compiled(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        assert (function(1), function(0.5)) == (2, 1.0)
    assert len(cache.LOST) == 1 and "No space left" in cache.LOST[0]
    assert {path.name for path in tmp_path.iterdir()} == {".claims"}


def test_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what writers left that were killed long ago."""
    monkeypatch.setenv("M2LITE_CACHE_DIR", str(tmp_path))
    for n in range(12):
        path, _ = choose_directory(f"v{n}")
        for name in (".new-1", ".new-2"):
            (path / name).mkdir()
        (path / "x.kernel").write_text("")
        os.utime(path / ".new-1", (n, n))
        os.utime(path, (n, n))
    choose_directory("v11")
    assert {path.name for path in (tmp_path / "kernels").iterdir()} == {f"v{n}" for n in range(4, 12)}
    assert {path.name for path in (tmp_path / "kernels" / "v11").iterdir()} == {"x.kernel", ".new-2"}


OTHER = """
import sys
from pathlib import Path
from m2lite.simd.claims import Claims
assert Claims(Path(sys.argv[1])).take(sys.argv[2])
print("mine", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("is_saved", [True, False])
def test_what_another_process_compiles_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_saved: bool
) -> None:
    """Until it is there, or until that process has ended, however it did."""
    assert compiled(tmp_path)(1) == 2
    (path,) = tmp_path.glob("*.kernel")
    content, n_waited = path.read_bytes(), 0
    path.unlink()
    command = [sys.executable, "-c", OTHER, str(tmp_path), path.name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENV) as other:
        assert other.stdout is not None and other.stdout.readline() == b"mine\n"

        def wait(_: float) -> None:
            nonlocal n_waited
            n_waited += 1
            if n_waited == 3:
                if is_saved:
                    path.write_bytes(content)
                other.kill()
                other.wait()

        monkeypatch.setattr(cache.time, "sleep", wait)
        function = compiled(tmp_path)
        assert (function(1), n_waited, hits(function)) == (2, 3, is_saved)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_a_damaged_cache_is_mended_without_a_word_of_it(run_m2lite: Run, tmp_path: Path) -> None:
    """Of the command's own cache some files are cut, empty or changed: the same answer, and whole files at the end."""
    own = tmp_path / "kernels" / jit.CACHE_DIR.name
    own.parent.mkdir(mode=0o700)
    shutil.copytree(jit.CACHE_DIR, own)
    arguments = ("generate", "-p", "Hello", "-n", "8", "--temp", "0", "--no-template")
    expected = run_m2lite(*arguments)
    files = [path for name in ("rms_norm", "add_rows", "route") for path in own.glob(f"{name}-*.kernel")]
    assert len(files) == 3
    before = {path: path.read_bytes() for path in files}
    for n, path in enumerate(files):
        path.write_bytes((b"", before[path][: len(before[path]) // 2], before[path][:-1] + b"!")[n % 3])
    done = run_m2lite(*arguments, env={"M2LITE_CACHE_DIR": str(tmp_path)})
    assert (done.returncode, done.stdout) == (0, expected.stdout), done.stderr
    assert "Error" not in done.stderr and all(cache._content(path) for path in files)
