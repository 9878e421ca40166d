"""Jobs on disk: killed, failed, resumed, changed, damaged at every file operation; the bytes are always the same."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from m2lite.errors import M2liteError, ResourceError, UsageError
from m2lite.quant import job as job_module
from m2lite.quant.job import FileJob, run_job
from m2lite.quant.journal import SourceChanged, SourceFile
from m2lite.quant.verify import verify
from m2lite.storage.gguf_reader import open_gguf
from m2lite.storage.part_file import PartFile
from m2lite.system.byte_units import format_bytes
from tests.faults.disk import Dead, faults
from tests.quant.memory_job import MemorySource, made, memory_job

Files = dict[str, bytes]


def files_in(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """What the job gives when nothing happens."""
    folder = tmp_path_factory.mktemp("whole")
    run_job(memory_job(folder))
    return files_in(folder)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of two or three tensors of the job."""
    monkeypatch.setattr(job_module, "BATCH_BYTES", 700)


def test_a_job_gives_its_files_and_nothing_else(whole: Files) -> None:
    parts = [name for name in whole if name.startswith("x-")]
    assert len(parts) > 1 and parts == [f"x-0000{n}-of-0000{len(parts)}.gguf" for n in range(1, len(parts) + 1)]
    assert list(whole) == ["mtp-x.gguf", *parts]


def test_a_kill_at_every_call_resumes_to_the_same_bytes(
    whole: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faults(monkeypatch) as counter:
        folder = tmp_path / "count"
        folder.mkdir()
        run_job(memory_job(folder))
    last = next(name for name in whole if "-00001-" in name)
    n_resumed = 0
    for number in range(1, counter.n_calls + 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        with faults(monkeypatch, number), pytest.raises(Dead):
            run_job(memory_job(folder))
        found = files_in(folder)
        assert all(data == whole[name] for name, data in found.items() if name.endswith(".gguf")), number
        if last in found:  # the model's name appears after all others
            assert set(whole) <= set(found)
        for name, data in found.items():
            if name.endswith(".part") and data[:4] == b"GGUF":
                assert data == whole[name.removesuffix(".part")]
        if found == whole:  # killed when nothing was left to do
            continue
        with faults(monkeypatch):
            n_resumed += run_job(memory_job(folder)) > 0
        assert files_in(folder) == whole, number
    assert n_resumed > counter.n_calls // 3


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, *(pytest.param(code, marks=pytest.mark.slow) for code in (errno.EDQUOT, errno.EIO))]
)
def test_a_failure_at_every_call_is_said_and_resumes_to_the_same_bytes(
    whole: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    number = 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        with faults(monkeypatch, number, code) as counter:
            try:
                run_job(memory_job(folder))
            except M2liteError as error:
                assert isinstance(error, ResourceError) == (code != errno.EIO)
                assert os.strerror(code) in str(error)
                left = files_in(folder)
                n_entries = left.get("x.gguf.journal", b"").count(b"\n") - 1
                assert ("run the same command again to go on" in str(error)) == (n_entries > 0), number
                if n_entries <= 0:
                    # The call that failed may have been the one to close what was removed before.
                    assert not left, number
            else:
                break
        for name, data in files_in(folder).items():
            assert not name.endswith(".gguf") or data == whole[name]
        with faults(monkeypatch):
            run_job(memory_job(folder))
        assert files_in(folder) == whole, number
    assert number >= counter.n_calls


def kill_at_byte(folder: Path, n_bytes: int, error: type[BaseException] = Dead) -> None:
    """Run a job until so many bytes are done."""

    def progress(name: str, done: int, total: int, /, phase: str = "") -> None:
        if done >= n_bytes and not phase:
            raise error

    with pytest.raises(error) as caught:
        run_job(memory_job(folder), progress=progress)
    if error is KeyboardInterrupt:
        assert any("run the same command again to go on" in note for note in caught.value.__notes__)


def test_only_what_is_missing_is_made_again(whole: Files, tmp_path: Path) -> None:
    kill_at_byte(tmp_path, 700)
    job = memory_job(tmp_path)
    done_bytes = []
    found = run_job(job, progress=lambda name, done, total, /, phase="": done_bytes.append(done))
    assert found >= 240 and "m" not in made(job) and made(job)["d"] == 1
    assert done_bytes[0] > found
    assert files_in(tmp_path) | {"whole": b""} == whole | {"whole": b""}


def test_ctrl_c_keeps_every_tensor_that_was_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "BATCH_BYTES", 1 << 30)
    kill_at_byte(tmp_path, 1000, KeyboardInterrupt)
    job = memory_job(tmp_path)
    assert run_job(job) >= 240 + 320
    assert not {"m", "a"} & set(made(job))


def test_restart_begins_anew_and_leaves_no_old_part(whole: Files, tmp_path: Path) -> None:
    kill_at_byte(tmp_path, 700)
    unsplit = memory_job(tmp_path, parts=False)
    with pytest.raises(UsageError, match=r"the plan of its output was another\. Run that command .* --restart"):
        run_job(unsplit)
    assert len(list(tmp_path.glob("*.part"))) > 2
    assert run_job(unsplit, restart=True) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mtp-x.gguf", "x.gguf"]


def test_another_job_or_a_changed_input_is_refused_in_words(tmp_path: Path) -> None:
    kill_at_byte(tmp_path, 700)
    before = files_in(tmp_path)

    def words(job: FileJob) -> str:
        with pytest.raises(UsageError) as caught:
            run_job(job)
        assert files_in(tmp_path) == before
        return str(caught.value)

    assert "seed was 0 then and is 5 now" in words(memory_job(tmp_path, seed=5))
    changed = [SourceFile("in.safetensors", 100, 2, "ab")]
    assert "the input in.safetensors has changed since" in words(memory_job(tmp_path, MemorySource(changed)))
    more = [SourceFile("in.safetensors", 100, 1, "ab"), SourceFile("b.safetensors", 1, 1, "")]
    assert "the input b.safetensors was not among its inputs" in words(memory_job(tmp_path, MemorySource(more)))
    assert "it had more inputs" in words(memory_job(tmp_path, MemorySource([])))
    journal = tmp_path / "x.gguf.journal"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([lines[0].replace("m2lite 0", "m2lite 9"), *lines[1:]]) + "\n")
    before = files_in(tmp_path)
    assert "it was begun by m2lite 9" in words(memory_job(tmp_path))
    journal.write_text("\n".join(['{"files": [torn', *lines[1:]]) + "\n")
    before = files_in(tmp_path)
    assert "its first line is damaged" in words(memory_job(tmp_path))


def test_an_input_that_changes_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    source = MemorySource()

    def progress(name: str, done: int, total: int, /, phase: str = "") -> None:
        source.has_changed = done > 700

    with pytest.raises(SourceChanged, match="changed while it was read"):
        run_job(memory_job(tmp_path, source), progress=progress)
    assert not files_in(tmp_path)


def test_a_torn_or_lying_journal_costs_only_the_tensors_it_speaks_of(whole: Files, tmp_path: Path) -> None:
    journal = tmp_path / "x.gguf.journal"
    for damage in (
        lambda lines: [*lines[:-1], lines[-1][: len(lines[-1]) // 2]],  # torn off
        lambda lines: [*lines, b'{"tensor": "d.weight", "off": 1'],
        lambda lines: [*lines[:1], b"[]\n", b'{"tensor": 1}\n', *lines[2:]],
        lambda lines: [*lines[:-1], lines[-1].replace(b'"xxh64": "', b'"xxh64": "f')],  # found when read back
    ):
        kill_at_byte(tmp_path, 1300)
        lines = journal.read_bytes().splitlines(keepends=True)
        assert len(lines) > 3
        journal.write_bytes(b"".join(damage(lines)))
        job = memory_job(tmp_path)
        run_job(job)
        assert files_in(tmp_path) == whole
        assert sum(made(job).values()) < 5
        for path in tmp_path.glob("*.gguf"):
            path.unlink()


def test_a_part_that_is_gone_is_made_anew(whole: Files, tmp_path: Path) -> None:
    kill_at_byte(tmp_path, 1300)
    (tmp_path / "mtp-x.gguf.part").unlink()
    os.truncate(next(tmp_path.glob("x-00001-*.part")), 100)
    run_job(memory_job(tmp_path))
    assert files_in(tmp_path) == whole


def test_what_the_disk_lost_is_written_once_more_and_then_refused(
    whole: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PartFile.read
    n_bad = 1

    def read(part: PartFile, offset: int, into: memoryview) -> None:
        nonlocal n_bad
        real(part, offset, into)
        if n_bad and "mtp" not in part.path.name:
            n_bad -= 1
            into[3] ^= 1

    monkeypatch.setattr(PartFile, "read", read)
    job = memory_job(tmp_path)
    run_job(job)
    assert files_in(tmp_path) == whole and sorted(made(job).values()) == [1, 1, 1, 1, 2]
    for path in tmp_path.glob("*.gguf"):
        path.unlink()
    n_bad = 100
    with pytest.raises(M2liteError, match=r"the disk twice returned other bytes than were written for 'a\.weight'"):
        run_job(memory_job(tmp_path))
    assert not list(tmp_path.glob("*.gguf"))
    assert run_job(memory_job(tmp_path), verify=False) > 0  # who does not look does not see


def test_two_jobs_on_one_output(tmp_path: Path) -> None:
    def progress(name: str, done: int, total: int, /, phase: str = "") -> None:
        with pytest.raises(UsageError, match=rf"x\.gguf\.journal: in use by pid {os.getpid()}\. Wait until it is done"):
            run_job(memory_job(tmp_path))

    run_job(memory_job(tmp_path), progress=progress)
    assert verify(next(tmp_path.glob("x-00001-*"))).ok


def test_existing_files_stay_unless_told(whole: Files, tmp_path: Path) -> None:
    last = next(name for name in whole if "-00001-" in name)
    (tmp_path / last).write_text("precious")
    with pytest.raises(UsageError, match=f"{last} exists already"):
        run_job(memory_job(tmp_path))
    assert files_in(tmp_path) == {last: b"precious"}
    run_job(memory_job(tmp_path), overwrite=True)
    assert files_in(tmp_path) == whole
    with pytest.raises(UsageError, match="exists already"):
        run_job(memory_job(tmp_path))
    assert files_in(tmp_path) == whole
    (tmp_path / last).unlink()
    (tmp_path / last).symlink_to("nowhere")
    with pytest.raises(UsageError, match="is a link to a file that is not there"):
        run_job(memory_job(tmp_path), overwrite=True)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("mtp-x.gguf.part", b"GGUF of another program, half loaded"),
        ("mtp-x.gguf.part", bytes(99)),
        ("x.gguf.journal", b"no journal\n"),
        ("x.gguf.journal", b'{"torn": '),
    ],
)
def test_parts_and_journals_of_somebody_else_stay(tmp_path: Path, name: str, data: bytes, restart: bool) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=rf"{name} is there already and no .* of m2lite\. Move it away"):
        run_job(memory_job(tmp_path), overwrite=True, restart=restart)
    assert files_in(tmp_path) == {name: data}


def test_overwriting_a_link_leaves_what_it_points_to(whole: Files, tmp_path: Path) -> None:
    """The name is replaced."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "target").write_text("precious")
    (tmp_path / "mtp-x.gguf").symlink_to("old/target")
    run_job(memory_job(tmp_path), overwrite=True)
    assert files_in(tmp_path) == whole and not (tmp_path / "mtp-x.gguf").is_symlink()
    assert (tmp_path / "old" / "target").read_text() == "precious"


@pytest.mark.parametrize("link", [os.link, os.symlink])
@pytest.mark.parametrize("name", ["mtp-x.gguf", "mtp-x.gguf.part", "x.gguf.journal"])
def test_no_output_is_an_input(tmp_path: Path, link: object, name: str) -> None:
    original = tmp_path / "in.safetensors"
    original.write_bytes(b"weights")
    assert callable(link)
    link(original, tmp_path / name)
    with pytest.raises(UsageError, match="is a file that this command reads"):
        run_job(memory_job(tmp_path, MemorySource(inputs=[original])), overwrite=True)
    assert original.read_bytes() == b"weights" and len(files_in(tmp_path)) == 2


def test_a_full_disk_is_said_before_work_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "free_bytes", lambda _: 1000)
    job = memory_job(tmp_path)
    with pytest.raises(ResourceError, match=rf"The output takes {format_bytes(job.total_bytes)}, .* has 1,000 B free"):
        run_job(job)
    assert not files_in(tmp_path) and not made(job)


def test_the_journal_is_as_it_is_described(tmp_path: Path) -> None:
    kill_at_byte(tmp_path, 1300)
    head, *lines = [json.loads(line) for line in (tmp_path / "x.gguf.journal").read_text().splitlines()]
    assert set(head) == {"v", "tool", "plan_sha", "src", "total_bytes", "opts", "files"}
    assert head["src"] == [{"name": "in.safetensors", "size": 100, "mtime_ns": 1, "sha_of_header": "ab"}]
    assert head["total_bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.part"))
    assert [line["tensor"] for line in lines][:2] == ["m.weight", "a.weight"]
    assert all(set(line) == {"tensor", "off", "nbytes", "xxh64"} for line in lines)
    assert str(tmp_path) not in (tmp_path / "x.gguf.journal").read_text()


def test_split_parts_are_within_their_size_and_open_as_one(whole: Files, tmp_path: Path) -> None:
    run_job(memory_job(tmp_path, parts=False))
    (tmp_path / "mtp-x.gguf").unlink()
    assert all(len(data) <= 1300 for name, data in whole.items() if name.startswith("x-"))
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    first = next(tmp_path.glob("x-00001-*"))
    with open_gguf(first) as split, open_gguf(tmp_path / "x.gguf") as one:
        assert split.metadata["split.count"] == len(split.parts) == len(whole) - 1
        assert split.metadata["split.tensors.count"] == len(one.tensors)
        assert list(split.tensors) == list(one.tensors)
        for name in one.tensors:
            assert split.view(name).tobytes() == one.view(name).tobytes()
    assert verify(first).ok and verify(first).n_hashed == 4
