"""Writing fails, or the process dies, at every call in turn: the old or the new content is there, never a mixture."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from m2lite.errors import M2liteError, ResourceError, UsageError
from m2lite.storage import durable
from m2lite.storage.durable import atomic_write
from m2lite.storage.line_log import LineLog
from m2lite.storage.part_file import PART_MARK, PartFile, part_path

OLD, NEW = b"old" * 50, b"new!" * 100


class Dead(BaseException):
    """The process ended here: nothing that follows reaches the disk."""


class Faults(durable.FileOps):
    """File operations of which number `n` fails with `error`; without one, it and all after it do. Writes are short."""

    def __init__(self, n: int, error: int | None) -> None:
        self.n, self.error, self.dies = n, error, error is None
        self.n_calls = 0

    def __getattribute__(self, name: str) -> object:
        operation = super().__getattribute__(name)
        if name not in vars(durable.FileOps) or name.startswith("_"):
            return operation

        def call(*arguments: object, **options: object) -> object:
            self.n_calls += 1
            fails = self.n_calls >= self.n if self.dies else self.n_calls == self.n
            if fails and name == "close":
                operation(*arguments)  # as the system does, also when a process ends
            if fails and self.error is None:
                raise Dead
            if fails:
                raise OSError(self.error, os.strerror(self.error))
            if name in ("write", "pwrite"):
                arguments = (arguments[0], arguments[1][:150], *arguments[2:])
            return operation(*arguments, **options)

        return call


def until_it_succeeds(
    monkeypatch: pytest.MonkeyPatch, job: Callable[[], None], check: Callable[[bool, bool], None], n_at_least: int
) -> None:
    """Run `job` with a fault at call 1, 2, ... until there are no more calls; `check(succeeded, died)` after each."""
    for error in (errno.ENOSPC, errno.EIO, None):
        for n in range(1, 100):
            faults = Faults(n, error)
            monkeypatch.setattr(durable, "fsops", faults)
            try:
                job()
                succeeded = True
            except Dead:
                succeeded = False
                assert error is None
            except M2liteError as caught:
                succeeded = False
                assert isinstance(caught, ResourceError) == (error == errno.ENOSPC)
                assert os.strerror(error or 0) in str(caught)
            check(succeeded, error is None)
            if faults.n_calls < n:
                assert succeeded and n > n_at_least
                break
        else:
            raise AssertionError("never succeeded")


def test_atomic_write_at_every_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"

    def job() -> None:
        path.write_bytes(OLD)
        atomic_write(path, NEW)

    def check(succeeded: bool, died: bool) -> None:
        assert path.read_bytes() in ((NEW,) if succeeded else (OLD, NEW))
        if died:
            for left in tmp_path.glob(".file.*.tmp"):
                left.unlink()
        assert list(tmp_path.iterdir()) == [path]

    until_it_succeeds(monkeypatch, job, check, n_at_least=9)


def test_part_file_at_every_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, part = tmp_path / "big", tmp_path / "big.part"
    body = bytes(range(1, 251)) * 4

    def job() -> None:
        path.unlink(missing_ok=True)
        if part.exists() and part.read_bytes() == body:
            part.unlink()  # complete, and without its mark: whose it is nobody knows
        with PartFile(path, len(body)) as file:
            file.write(500, body[500:])
            file.sync()
            file.write(4, body[4:500])
            file.complete(body[:4])
            file.publish()

    def check(succeeded: bool, died: bool) -> None:
        if path.exists():
            assert path.read_bytes() == body and not part.exists()
        else:
            assert not succeeded
        if died and part.exists() and part.read_bytes()[:4] == body[:4]:
            assert part.read_bytes() == body  # the magic only ever stands before a whole body

    until_it_succeeds(monkeypatch, job, check, n_at_least=14)


def test_atomic_write_details(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250)
    atomic_write(path, memoryview(NEW))
    assert path.read_bytes() == NEW and path.stat().st_mode & 0o777 == 0o600
    atomic_write(path, b"")
    assert path.read_bytes() == b""
    with pytest.raises(M2liteError, match="none/file: cannot be written: No such file or directory"):
        atomic_write(tmp_path / "none" / "file", b"")


def test_part_file_reserves_or_refuses(tmp_path: Path) -> None:
    with PartFile(tmp_path / "a", 1 << 20) as file:
        assert file.part_path.stat().st_size == 1 << 20
        file.write((1 << 20) - 1, b"x")
        for offset, data in [((1 << 20) - 1, b"xy"), (-1, b"x"), (1 << 20, b"x")]:
            with pytest.raises(ValueError, match="past the 1048576 bytes"):
                file.write(offset, data)
    assert (tmp_path / "a.part").exists() and not (tmp_path / "a").exists()
    with pytest.raises(ResourceError, match=r"b: no room: 1,024 PiB are needed, [\d.]+ \w+ are free"):
        PartFile(tmp_path / "b", 1 << 60)
    assert not (tmp_path / "b.part").exists()
    file = PartFile(tmp_path / "c", 0)
    file.complete()
    file.publish()
    file.close()
    assert (tmp_path / "c").read_bytes() == b""
    with pytest.raises(ValueError, match="closed"):
        file.sync()


def test_part_file_never_replaces(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(OLD)
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("a", "dangling"):
        with pytest.raises(UsageError, match=f"{name}: exists already"):
            PartFile(tmp_path / name, 10)
    (tmp_path / "b.part").symlink_to("a")
    with pytest.raises(M2liteError, match="cannot be written: Too many levels of symbolic links"):
        PartFile(tmp_path / "b", 10)
    assert (tmp_path / "a").read_bytes() == OLD


def test_part_file_replaces_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"

    def job() -> None:
        path.write_bytes(OLD)
        part_path(path).unlink(missing_ok=True)
        file = PartFile(path, len(NEW), replaces=True)
        try:
            file.write(4, NEW[4:])
            file.complete(NEW[:4])
            file.publish()
        except BaseException:
            file.discard()
            raise

    def check(succeeded: bool, died: bool) -> None:
        assert path.read_bytes() in ((NEW,) if succeeded else (OLD, NEW))
        assert died or list(tmp_path.iterdir()) == [path]

    until_it_succeeds(monkeypatch, job, check, n_at_least=8)


def test_part_file_starts_anew_and_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "a"
    (tmp_path / "a.part").write_bytes(PART_MARK + b"stale" * 100)
    with PartFile(path, 8) as file:
        with pytest.raises(UsageError, match=rf"a\.part: in use by pid {os.getpid()}\. Wait"):
            PartFile(path, 8)
        assert file.part_path.read_bytes() == PART_MARK + bytes(4)
        file.discard()
        file.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("foreign", [b"GGUF\x03\0\0\0", bytes(100), b"x"])
def test_a_part_of_somebody_else_is_kept(tmp_path: Path, foreign: bytes) -> None:
    part = tmp_path / "a.part"
    part.write_bytes(foreign)
    with pytest.raises(UsageError, match=r"a\.part is there already and no unfinished output of m2lite\. Move it away"):
        PartFile(tmp_path / "a", 8)
    assert part.read_bytes() == foreign
    PartFile(tmp_path / "a", 8, is_ours=True).discard()  # a journal names it
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.part")
    with pytest.raises(UsageError, match=r"a\.part is no regular file"):
        PartFile(tmp_path / "a", 8)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EFBIG, "a file may have 4.00 KiB, the limit on file sizes of this shell"),
        (errno.EDQUOT, "this user's quota on that disk is used up"),
        (errno.ENOSPC, "are free"),
    ],
)
def test_each_limit_is_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (4096, 4096))
    monkeypatch.setattr(durable, "fsops", Faults(2, code))
    with pytest.raises(ResourceError, match="no room: 9 B are needed") as error:
        atomic_write(tmp_path / "a", b"123456789")
    assert words in str(error.value) and ("ulimit -f" in str(error.value)) == (code == errno.EFBIG)


def test_a_limit_on_file_sizes_in_earnest(tmp_path: Path) -> None:
    """As `ulimit -f` sets it; Python ignores its signal, so that the write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        for write in (lambda: atomic_write(tmp_path / "a", bytes(9000)), lambda: PartFile(tmp_path / "b", 9000)):
            with pytest.raises(ResourceError, match=r"a file may have 8\.00 KiB, the limit on file sizes"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_part_file_that_is_finished_between_open_and_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    first = PartFile(path, 4)
    lock = fcntl.flock

    def finish_first(fd: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        first.complete(b"done")
        first.publish()
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    PartFile(path, 4).discard()
    assert path.read_bytes() == b"done"


def test_line_log_at_every_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    batches = [["one"], ["two", "x" * 200], ["four"]]
    lines = [line.encode() for batch in batches for line in batch]

    def job() -> None:
        path.unlink(missing_ok=True)
        log = LineLog(path)
        try:
            for batch in batches:
                log.append(batch)
        finally:
            log.close()

    def check(succeeded: bool, died: bool) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(durable, "fsops", durable.FileOps())
            log = LineLog(path)  # whole lines, and what is appended stands on a line of its own
            assert log.lines == lines[: len(log.lines)] and (len(log.lines) == 4 or not succeeded)
            log.append(["next"])
            log.close()
            assert path.read_bytes().splitlines() == [*log.lines[:-1], b"next"]

    until_it_succeeds(monkeypatch, job, check, n_at_least=8)


def test_line_log_details(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nto")
    log = LineLog(path)
    assert log.lines == [b"one", b"two"] and path.read_bytes().endswith(b"to")
    with pytest.raises(UsageError, match=rf"log: in use by pid {os.getpid()}\. Wait until it is done"):
        LineLog(path)
    log.append(["three"])
    assert path.read_bytes() == b"one\ntwo\nthree\n"
    log.cut(0)
    assert path.read_bytes() == b"" and log.lines == []
    log.append(["größe"])
    log.remove()
    log.close()
    assert not path.exists()
    with pytest.raises(ValueError, match="closed"):
        log.append(["x"])
    with pytest.raises(M2liteError, match="cannot be written: No such file or directory"):
        LineLog(tmp_path / "none" / "log")


def test_a_part_is_resumed_only_when_told_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with PartFile(path, 8) as file:
        file.write(4, b"half")
        file.sync()
        file.release(4, 4)
        assert not file.resumed
    with PartFile(path, 8, resume=True) as file:
        found = bytearray(8)
        file.read(0, memoryview(found))
        assert file.resumed and found == PART_MARK + b"half"
        with pytest.raises(M2liteError, match="the file has become shorter"):
            file.read(4, memoryview(bytearray(8)))
    with PartFile(path, 9, resume=True) as file:
        assert not file.resumed and file.part_path.read_bytes() == PART_MARK + bytes(5)
        file.complete(b"done")
        assert file.part_path.read_bytes()[:4] == b"done" and not path.exists()
        file.publish()
    assert list(tmp_path.iterdir()) == [path]


def test_space_is_reserved_where_the_system_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PartFile(tmp_path / "a", 1 << 20) as file:
        assert file.part_path.stat().st_blocks * 512 >= 1 << 20
    codes = [errno.EINTR, errno.EOPNOTSUPP]
    monkeypatch.setattr(durable, "_fallocate", lambda fd, n_bytes: codes.pop(0))
    with PartFile(tmp_path / "b", 100) as file:
        assert file.part_path.stat().st_size == 100 and not codes
    codes = [errno.ENOSPC]
    with pytest.raises(ResourceError, match="no room: 100 B are needed"):
        PartFile(tmp_path / "c", 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.part", "b.part"]
